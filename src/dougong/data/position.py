"""Where a run stands in its data.

Here        Position, and BatchSource: what a trainer asks of a loader.
Elsewhere   the loader of tables (data/loader.py); keeping the position (engine/checkpoint.py).
Promise     batches from a position on are the same however it was reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from dougong.data.batch import BatchArrays


class Position(NamedTuple):
    """The next batch, counted from 0."""

    epoch: int
    batch: int


class BatchSource(Protocol):
    """Gives batches from any position on."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """Batches without end, each with the position after it."""
        ...
