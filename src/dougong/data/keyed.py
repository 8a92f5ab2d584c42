"""Records that share a value of a column, told by a number.

Here        KeyedLoader, `keys_by_row`; `numbered`, of a column's cells.
Elsewhere   the batches themselves (data/loader.py); pairs of views, which have such numbers too (data/pairs.py); what
            is made of them (objectives/contrastive.py).
Promise     batches and positions are those of the loader that it was given; a value that nobody knows is like no other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dougong.core.errors import ConfigError
from dougong.data.batch import BatchArrays
from dougong.data.modality.medium import unit_key
from dougong.data.position import Loader, Position
from dougong.data.table import Table, cells_of


def keys_by_row(table: Table, column: str) -> dict[int, int]:
    """A number for each row of the table, equal where the column's value is.

    Raises:
        ConfigError: there is no such column.
    """
    if column not in table.schema.names:
        known = ", ".join(table.schema.names[:40])
        raise ConfigError(f"{table.path.name} has no column {column!r} that tells records apart. Use one of {known}.")
    rows = [int(row) for chunk in range(table.num_chunks) for row in table.numbers_of(chunk)]
    return dict(zip(rows, numbered(cells_of(table.column(column))).tolist(), strict=True))


def numbered(keys: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Equal for equal keys; a key that nobody knows is like no other."""
    place: dict[Hashable, int] = {}
    known = [("alone", row) if (key := unit_key(cell)) is None else key for row, cell in enumerate(keys)]
    return np.array([place.setdefault(key, len(place)) for key in known], np.int64)


class KeyedLoader:
    """The batches of another loader, with each record's key in place of its target."""

    def __init__(self, loader: Loader, keys: Mapping[int, int]) -> None:
        """`keys` are by the row's number in its table, for every row that the loader gives."""
        self._loader, self._keys = loader, keys

    @property
    def batches_per_epoch(self) -> int:
        return self._loader.batches_per_epoch

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """As the loader's."""
        for after, batch in self._loader.batches(start):
            yield after, self._keyed(batch)

    def one_pass(self) -> Iterator[BatchArrays]:
        """As the loader's."""
        for batch in self._loader.one_pass():
            yield self._keyed(batch)

    def _keyed(self, batch: BatchArrays) -> BatchArrays:
        return batch._replace(target=np.array([self._keys[row] for row in batch.row_B.tolist()], np.int64))
