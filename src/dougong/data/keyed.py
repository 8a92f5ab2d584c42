"""Records that share a value of a column, told by a number.

Here        KeyedLoader, `keys_by_row`.
Elsewhere   the batches themselves (data/loader.py); pairs of views, which have such numbers too (data/pairs.py); what
            is made of them (objectives/contrastive.py).
Promise     batches and positions are those of the loader that it was given; a value that nobody knows is like no other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import numpy as np

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
    place: dict[Hashable, int] = {}
    found: dict[int, int] = {}
    for row, cell in zip(rows, cells_of(table.column(column)), strict=True):
        key = unit_key(cell)
        found[row] = place.setdefault(("alone", row) if key is None else key, len(place))
    return found


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
