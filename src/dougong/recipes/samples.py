"""Some records with what the model made of them, for the report to show.

Here        write_samples: samples.json and samples/ in a run's folder.
Elsewhere   showing them (watch/report.py); the attention they carry (model/sandwich.py).
Promise     the records are chosen by their number alone, half of them wrong answers where there are as many, so that
            neither a good nor a bad impression is picked.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
from PIL import Image

from dougong.bundle.model import Model, Prediction
from dougong.core.files import write_atomic, write_json
from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.modality.array import SignalModality
from dougong.data.modality.audio import KEPT_SCALE, AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality
from dougong.data.table import Table
from dougong.engine.evaluate import Evaluation

PER_CONDITION: Final = 8
MOST: Final = 24
MOST_POINTS: Final = 400
"""Of a signal's course."""


def write_samples(
    run: Path, model: Model, table: Table, views: Mapping[str, View], evaluations: Mapping[str, Evaluation]
) -> None:
    """Choose, explain and write them."""
    samples: list[dict[str, Any]] = []
    shown = list(views)[: max(1, MOST // PER_CONDITION)]
    for condition in shown:
        rows = _choose(evaluations[condition])
        cells = table.records(rows, [*model.preparation.columns, model.preparation.target.name])
        withheld = [name for name in model.preparation.modalities if name not in views[condition].keep]
        for row, record in zip(rows, cells, strict=True):
            sample = _sample(run, model, record, row, withheld, table.folder, len(samples))
            samples.append({"condition": condition, **sample})
    write_json(run / "samples.json", samples)


def _choose(found: Evaluation) -> list[int]:
    if found.target_B is None or found.prediction_B.ndim > 1 or found.probability_BC is None:
        return sorted(found.row_B[:PER_CONDITION].tolist())
    right_B = found.prediction_B == found.target_B
    wrong = found.row_B[~right_B][: PER_CONDITION // 2].tolist()
    right = found.row_B[right_B]
    step = max(1, len(right) // PER_CONDITION)
    return sorted([*wrong, *right[::step][: PER_CONDITION - len(wrong)].tolist()])


def _sample(
    run: Path, model: Model, record: dict[str, Any], row: int, withheld: list[str], folder: Path, number: int
) -> dict[str, Any]:
    visible = {
        column: record[column]
        for name, modality in model.preparation.modalities.items()
        if name not in withheld
        for column in modality.columns
    }
    arrays, explained = model.explain([visible], folder=folder)
    (prediction,) = model.predict([visible], folder=folder)
    inputs = {name: _input(run, model, record, name, arrays, number) for name in model.preparation.modalities}
    for name in prediction.completed:
        inputs[name]["completed"] = True
    return {
        "row": row,
        "inputs": inputs,
        "target": _text(record[model.preparation.target.name]),
        "prediction": _text(prediction.answer),
        "probabilities": _most_likely(prediction),
        "gate": prediction.gate,
        "attention": _attention(model, arrays, explained, record),
    }


def _input(
    run: Path, model: Model, record: dict[str, Any], name: str, arrays: BatchArrays, number: int
) -> dict[str, Any]:
    modality = model.preparation.modalities[name]
    kind = modality.signature().kind
    media = arrays.media[name]
    if not media.present_B.any():
        return {"kind": kind, "absent": True}
    if isinstance(modality, TextModality):
        return {"kind": kind, "absent": False, "text": str(record[modality.config.column])}
    if isinstance(modality, TableModality):
        return {"kind": kind, "absent": False, "values": {column: _text(record[column]) for column in modality.columns}}
    if isinstance(modality, ImageModality):
        pixels_HWC = media.values["pixels_UCHW"][0].transpose(1, 2, 0)
        pixels_HWC = pixels_HWC * np.array(modality.config.scale) + np.array(modality.config.mean)
        content = io.BytesIO()
        Image.fromarray((pixels_HWC * 255).round().clip(0, 255).astype(np.uint8)).save(content, format="PNG")
        file = f"samples/{number}-image.png"
        write_atomic(run / file, content.getvalue())
        return {"kind": kind, "absent": False, "file": file}
    if isinstance(modality, SignalModality):
        samples_CT = media.values["samples_UCT"][0][:, media.values["mask_UT"][0]]
        points_T = samples_CT.mean(axis=0)  # channels together: a picture of the course, not the numbers themselves
        step = -(-len(points_T) // MOST_POINTS)
        return {"kind": kind, "absent": False, "points": [round(float(point), 3) for point in points_T[::step]]}
    assert isinstance(modality, AudioModality)
    samples = media.values["samples_UT"][0][media.values["mask_UT"][0]]
    content = io.BytesIO()
    loudest = max(float(np.abs(samples).max()), 1.0 / KEPT_SCALE)
    soundfile.write(content, samples / loudest * 0.9, modality.config.sample_rate, format="WAV", subtype="PCM_16")
    file = f"samples/{number}-{len(inputs_before(name, model))}-sound.wav"
    write_atomic(run / file, content.getvalue())
    return {"kind": kind, "absent": False, "file": file}


def inputs_before(name: str, model: Model) -> list[str]:
    """The modalities that come before one; their number makes a file name of it."""
    names = list(model.preparation.modalities)
    return names[: names.index(name)]


def _attention(model: Model, arrays: BatchArrays, explained: Any, record: dict[str, Any]) -> dict[str, Any]:
    """For each modality, how much the others looked at its tokens in the last block, heads and queries averaged."""
    found: dict[str, Any] = {}
    for name in model.preparation.modalities:
        if name not in explained.state.tokens or not arrays.media[name].present_B.any():
            continue
        looks = _looks_at(name, explained)
        if looks is None:
            continue
        asking, weights = looks
        made_up = not arrays.media[asking].present_B.any()
        entry: dict[str, Any] = {
            "from": f"{asking} (completed)" if made_up else asking,
            "weights": [round(float(weight), 6) for weight in weights],
        }
        modality = model.preparation.modalities[name]
        media = arrays.media[name]
        if name in explained.grids:
            entry["grid"] = list(explained.grids[name])
        elif isinstance(modality, TextModality):
            tokens = modality.tokenizer.encode(str(record[modality.config.column])).tokens
            entry["tokens"] = tokens[: len(entry["weights"])]
        elif isinstance(modality, AudioModality):
            entry["seconds"] = float(media.values["mask_UT"][0].sum() / modality.config.sample_rate)
        elif isinstance(modality, TableModality):
            entry["tokens"] = list(modality.columns)
        found[name] = entry
    return found


def _looks_at(name: str, explained: Any) -> tuple[str, Any] | None:
    """Who looked most at this modality's real tokens, and where."""
    if not explained.looked:
        return None
    best: tuple[float, str, Any] | None = None
    for asking, looked in explained.looked[-1].items():
        if asking == name:
            continue
        start = 0
        for other, count in looked.keys:
            if other == name:
                mask_T = explained.state.masks[asking][0]
                weights_S = looked.weight_BHTS[0, :, mask_T, start : start + count].mean(dim=(0, 1))
                real_S = weights_S[explained.state.masks[name][0]]
                if best is None or float(real_S.sum()) > best[0]:
                    best = (float(real_S.sum()), asking, real_S.tolist())
            start += count
    return None if best is None else (best[1], best[2])


def _most_likely(prediction: Prediction) -> dict[str, float]:
    return dict(sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:5])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
