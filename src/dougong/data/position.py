"""Where a run stands in its data, and what a loader promises to whoever trains from it.

Here        Position, the Loader protocol, `one_epoch`.
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
    """Gives batches without end, one epoch after the other, from any position on."""

    @property
    def batches_per_epoch(self) -> int: ...

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """The batches from `start` on, each with the position behind it."""
        ...


def one_epoch(loader: Loader) -> Iterator[BatchArrays]:
    """The batches of epoch 0; the loader's own iterator is closed at its end."""
    batches = loader.batches(Position())
    try:
        for position, arrays in batches:
            yield arrays
            if position.epoch > 0:
                return
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
