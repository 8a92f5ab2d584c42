"""Where a run stands in its data, and what a loader promises to whoever trains from it.

Here        Position, Share, the Loader protocol.
Elsewhere   loaders (data/); saving a position with a checkpoint (engine/checkpoint.py).
Promise     a loader keeps no state that matters: the same position always gives the same batches, so a position
            is all that a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from dougong.data.batch import BatchArrays


class Position(NamedTuple):
    """A place between two batches."""

    epoch: int = 0
    batch: int = 0
    """How many batches of this epoch lie behind. After an epoch's last batch stands `(epoch + 1, 0)`."""


class Share(NamedTuple):
    """The part of every batch that one of several processes takes: neighbours, so that what was put together stays so.

    The parts differ by one record at most; where a batch has fewer records than there are processes, some get none.
    """

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> slice:
        """Which of a batch's `count` records."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)


WHOLE: Final = Share()


class Loader(Protocol):
    """Gives the batches of a table, for training and for judging; where it was made for a share of them, its part of
    each, which may be empty."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """Batches without end from `start` on, one epoch after the other, each with the position behind it."""
        ...

    def one_pass(self) -> Iterator[BatchArrays]:
        """Every record once."""
        ...
