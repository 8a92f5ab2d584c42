"""Adds up quality over a table: what is usual, what is worst, and which records those are.

Here        QualityTally, FigureSummary; TextTroubles, `find_text_troubles`.
Elsewhere   the figures of one medium (data/quality.py); reading every record (data/check.py); showing the worst
            (watch/sheet.py).
Promise     every record that has the modality counts once; of media that are alike in every figure one is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.data.batch import BatchArrays
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.data.quality import WORSE, text_troubles
from dougong.data.table import Table, cells_of

SHARE: Final = 0.05
LISTED: Final = 12


class FigureSummary(NamedTuple):
    """One figure of one modality over a table."""

    name: str
    median: float
    worst: float
    """The bound of the worst 5 %."""

    side: Literal["low", "high"]
    """Where that lies. Of a figure that may be bad on either side, the one that is farther from the median."""

    rows: tuple[tuple[int, float], ...]
    """The worst records' numbers, with their figures, the worst first; only such as are worse than the median."""


class TextTroubles(NamedTuple):
    """One kind of trouble with a text column's letters."""

    name: str
    """As data/quality.py's `text_troubles` names it."""

    num_records: int
    rows: tuple[int, ...]
    """The first of them."""


class QualityTally:
    """Takes batches that carry quality, and sums them up."""

    def __init__(self) -> None:
        self._figures: dict[str, list[npt.NDArray[np.float32]]] = {}
        self._rows: dict[str, list[npt.NDArray[np.int64]]] = {}

    def add(self, batch: BatchArrays) -> None:
        for name, media in batch.media.items():
            assert media.quality_UQ is not None
            self._figures.setdefault(name, []).append(media.quality_UQ[media.index_B[media.present_B]])
            self._rows.setdefault(name, []).append(batch.row_B[media.present_B])

    def summary(self, preparation: Preparation) -> dict[str, tuple[FigureSummary, ...]]:
        """By modality; one that no record has is left out."""
        found = {}
        for name, modality in preparation.modalities.items():
            figures_NQ = np.concatenate(self._figures.get(name, [np.zeros((0, len(modality.quality_names)))]))
            if len(figures_NQ):
                rows_N = np.concatenate(self._rows[name])
                _, first = np.unique(figures_NQ, axis=0, return_index=True)
                found[name] = tuple(
                    _summarise(figure, figures_NQ[:, place].astype(np.float64), rows_N, np.sort(first))
                    for place, figure in enumerate(modality.quality_names)
                )
        return found


def _summarise(
    name: str, figure_N: npt.NDArray[np.float64], rows_N: npt.NDArray[np.int64], distinct: npt.NDArray[np.int64]
) -> FigureSummary:
    low, median, high = (float(bound) for bound in np.quantile(figure_N, (SHARE, 0.5, 1 - SHARE)))
    side = WORSE[name]
    badness_N = {"low": -figure_N, "high": figure_N, "either": np.abs(figure_N - median)}[side]
    if side == "either":
        side = "low" if median - low > high - median else "high"
    # What is as it usually is is not among the worst, however few are worse.
    usual = {"low": -median, "high": median, "either": 0.0}[WORSE[name]]
    distinct = distinct[badness_N[distinct] > usual]
    worst = distinct[np.argsort(-badness_N[distinct], kind="stable")][:LISTED]
    return FigureSummary(
        name,
        median,
        low if side == "low" else high,
        side,
        tuple((int(rows_N[place]), float(figure_N[place])) for place in worst),
    )


def find_text_troubles(table: Table, preparation: Preparation) -> dict[str, tuple[TextTroubles, ...]]:
    """What the letters of text columns show and their tokens hide; by modality, those that have any."""
    found = {}
    for name, modality in preparation.modalities.items():
        if isinstance(modality, TextModality):
            rows: dict[str, list[int]] = {}
            for row, text in _texts(table, modality.config.column):
                for trouble in text_troubles(text):
                    rows.setdefault(trouble, []).append(row)
            if rows:
                found[name] = tuple(
                    TextTroubles(trouble, len(own), tuple(own[:LISTED])) for trouble, own in sorted(rows.items())
                )
    return found


def _texts(table: Table, column: str) -> Iterator[tuple[int, str]]:
    for chunk in range(table.num_chunks):
        cells = cells_of(table.read(chunk, [column]).column(column))
        for row, cell in zip(table.numbers_of(chunk).tolist(), cells, strict=True):
            if isinstance(cell, str):
                yield row, cell
