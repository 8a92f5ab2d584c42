"""A model that gives each medium a vector, as its user has it.

Here        Aligner (vectors, save), load_aligner, KIND.
Elsewhere   the bundle's files and sums (core/bundle.py); training one (recipes/align.py); a model that decides
            (bundle/model.py).
Promise     what is saved and loaded gives the same vectors; a cell that cannot be read gets a vector of zeros, which is
            like nothing, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dougong.bundle.saving import load_network, save_bundle
from dougong.core.bundle import Manifest, read_bundle
from dougong.core.config import parse
from dougong.core.errors import BundleError, ConfigError
from dougong.data.collate import Collator, Request
from dougong.data.preparation import Preparation
from dougong.data.table import Table, cells_of
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import evaluating
from dougong.model.dual import Dual, DualConfig

KIND: Final = "align"
BATCH_SIZE: Final = 128


class Vectors(NamedTuple):
    """Shapes: N records, D channels."""

    x_ND: npt.NDArray[np.float32]
    """Of length 1; zeros where a record has nothing that can be read."""

    num_bad: int
    """Cells that could not be read."""


class Aligner:
    """A network with the preparation that feeds it."""

    def __init__(self, network: Dual, preparation: Preparation, manifest: Manifest) -> None:
        self.network = network
        self.preparation = preparation
        self.manifest = manifest

    def columns(self, side: str) -> list[str]:
        """Of a table like that which it was trained on, those that hold this side."""
        known: dict[str, list[str]] = self.manifest.provenance.get("columns", {})
        return known.get(side, [side])

    def vectors(self, table: Table, side: str, columns: Sequence[str]) -> Vectors:
        """Of each record the mean of the vectors of those columns, all read as `side`.

        Raises:
            ConfigError: there is no such side or column.
        """
        missing = [column for column in columns if column not in table.schema.names]
        if missing:
            raise ConfigError(f"{table.path.name} has no column {missing[0]!r} to read as {side}. Name one of its own.")
        return vectors_of_cells(
            self.network, self.preparation, side, [cells_of(table.column(column)) for column in columns], table.folder
        )

    def save(self, folder: str | Path) -> Path:
        """Write a bundle; an older bundle at that place is replaced at once and whole.

        Raises:
            BundleError: the folder holds something else.
        """
        return save_bundle(folder, self.manifest, self.preparation, self.network, _card(self.manifest))


def vectors_of_cells(
    network: Dual, preparation: Preparation, side: str, views: Sequence[Sequence[Any]], folder: Path
) -> Vectors:
    """The same of cells: `views` holds, for each column, one cell of each record; None where there is nothing.

    Raises:
        ConfigError: there is no such side.
    """
    if side not in preparation.modalities:
        raise ConfigError(f"{side!r} is no side of this model. Use one of {', '.join(preparation.modalities)}.")
    columns = {name: modality.columns[0] for name, modality in preparation.modalities.items()}
    collator = Collator(preparation, folder, seed=0, cache_bytes=64 * 2**20)
    device = next(network.parameters()).device
    num_records = len(views[0])
    sum_ND: npt.NDArray[np.float32] | None = None
    num_bad = 0
    with torch.inference_mode(), evaluating(network):
        for cells in views:
            for start in range(0, num_records, BATCH_SIZE):
                part = list(cells[start : start + BATCH_SIZE])
                request = Request(
                    np.arange(start, start + len(part)),
                    {column: part if name == side else [None] * len(part) for name, column in columns.items()},
                    (0, start),
                )
                arrays = collator(request)
                num_bad += len(arrays.bad)
                batch = to_tensors(arrays, device)
                found = network(batch).vectors.get(side)
                if found is None:
                    continue
                media = batch.media[side]
                here_B = media.present_B.cpu().numpy()
                vector_BD = found[media.index_B].float().cpu().numpy()[here_B]
                if sum_ND is None:
                    sum_ND = np.zeros((num_records, vector_BD.shape[1]), np.float32)
                sum_ND[arrays.row_B[here_B]] += vector_BD
    if sum_ND is None:
        sum_ND = np.zeros((num_records, network.config.width), np.float32)  # nobody has anything: as wide as others
    length_N1 = np.linalg.norm(sum_ND, axis=1, keepdims=True)
    return Vectors(sum_ND / np.maximum(length_N1, 1e-12), num_bad)


def load_aligner(folder: str | Path) -> Aligner:
    """A model from its bundle; the sum of every file is checked first, and nothing is unpickled.

    Raises:
        BundleError: it is not a whole, unaltered bundle of such a model.
    """
    folder = Path(folder)
    manifest = read_bundle(folder)
    if manifest.kind != KIND:
        raise BundleError(f"{folder} is a bundle of another kind of model: load it with dougong.load.")

    def build() -> Dual:
        return parse(DualConfig, manifest.model, where="the bundle's model").build(manifest.signature)

    preparation, network = load_network(folder, manifest, build)
    return Aligner(network.eval(), preparation, manifest)


def _card(manifest: Manifest) -> str:
    figures = next(iter(manifest.metrics.values()), {})
    lines = [
        f"# {manifest.name}",
        "",
        f"Gives a vector to each of {', '.join(manifest.signature.inputs)}: what says the same lies close together.",
        "",
        "Load it with `dougong.bundle.aligner.load_aligner(FOLDER)`.",
        "",
        "## Measured",
        "",
        *(f"- {name.replace('_', ' ')}: {value:.4f}" for name, value in figures.items()),
        "",
        "## Where it comes from",
        "",
        *(f"- {key}: {value}" for key, value in manifest.provenance.items()),
    ]
    return "\n".join(lines) + "\n"
