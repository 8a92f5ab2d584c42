"""What a model looked at, for a person to see beside its answer.

Here        attention.
Elsewhere   the network's intermediates (model/sandwich.py explain); drawing them (page.html).
Promise     weights are the model's own, of the same forward pass as the answer, and add up to 1 over what is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dougong.data.modality.audio import AudioModality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality

if TYPE_CHECKING:
    from dougong.bundle.model import Model


def attention(model: Model, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each modality that the record has, how much each of its tokens counted in its vector: `weights` (T,), with
    the picture's `grid` of rows and columns, the text's `tokens`, or the sound's `seconds`."""
    arrays, explained = model.explain([record])
    found: dict[str, dict[str, Any]] = {}
    if not len(arrays.row_B):
        return found
    for name, modality in model.preparation.modalities.items():
        if name not in explained.pooled or not arrays.media[name].present_B.any():
            continue
        weight_T = explained.pooled[name][0].float()
        mask = explained.state.masks.get(name)
        real_T = weight_T if mask is None or mask.shape[-1] != weight_T.shape[0] else weight_T[mask[0]]
        total = float(real_T.sum()) or 1.0
        entry: dict[str, Any] = {"weights": [round(float(weight) / total, 6) for weight in real_T.tolist()]}
        if name in explained.grids:
            entry["grid"] = list(explained.grids[name])
        elif isinstance(modality, TextModality):
            tokens = modality.tokenizer.encode(str(record[modality.config.column])).tokens
            entry["tokens"] = tokens[: len(entry["weights"])]
        elif isinstance(modality, AudioModality):
            mask_T = arrays.media[name].values["mask_UT"][0]
            entry["seconds"] = float(mask_T.sum() / modality.config.sample_rate)
        elif isinstance(modality, TableModality):
            entry["tokens"] = list(modality.columns)
        found[name] = entry
    return found
