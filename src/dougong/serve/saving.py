"""A network of any kind and what feeds it, written as a bundle.

Here        `save_bundle`; the names of the files that every bundle has.
Elsewhere   manifest and sums (core/bundle.py); reading a bundle back, by its kind (model.py, aligner.py, generator.py).
Promise     an older bundle at that place is replaced at once and whole, or stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import nn

from dougong.core.bundle import Manifest, write_bundle
from dougong.core.files import write_atomic
from dougong.data.preparation import Preparation
from dougong.engine.weights import distinct_weights, write_weights

WEIGHTS: Final = "model.safetensors"
CARD: Final = "README.md"


def save_bundle(
    folder: str | Path,
    manifest: Manifest,
    preparation: Preparation,
    network: nn.Module,
    card: str,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write weights, preparation and card, and `more` texts by file name.

    Raises:
        BundleError: the folder holds something else.
    """
    folder = Path(folder)
    with write_bundle(folder, manifest) as building:
        preparation.save(building)
        write_weights(building / WEIGHTS, distinct_weights(network))
        for name, text in {CARD: card, **(more or {})}.items():
            write_atomic(building / name, text)
    return folder
