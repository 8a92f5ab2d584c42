"""Where a run stands in its data, and what a loader promises to whoever trains from it.

Here        Position, the Loader protocol.
Elsewhere   loaders (data/); saving a position with a checkpoint (engine/checkpoint.py).
Promise     a loader keeps no state that matters: the same position always gives the same batches, so a position
            is all that a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from dougong.data.batch import BatchArrays


class Position(NamedTuple):
    """A place between two batches."""

    epoch: int = 0
    batch: int = 0
    """How many batches of this epoch lie behind. After an epoch's last batch stands `(epoch + 1, 0)`."""


class Loader(Protocol):
    """Gives the batches of a table, for training and for judging."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """Batches without end from `start` on, one epoch after the other, each with the position behind it."""
        ...

    def one_pass(self) -> Iterator[BatchArrays]:
        """Every record once."""
        ...
