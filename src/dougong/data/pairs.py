"""Records as pairs: each of a record's sides seen by some of the columns that show it.

Here        PairLoader.
Elsewhere   records as they are (data/loader.py); putting a batch together (data/collate.py); which records have a
            value in common (data/keyed.py).
Promise     a batch follows from the seed, the epoch and its number alone; several processes share out its records, each
            seen as one process sees it; what a record's sides show is paired with all that its other sides show, so
            that nothing of one record is held against another part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dougong.core.errors import ConfigError, DataError
from dougong.core.seeds import derive_seed
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request
from dougong.data.keyed import numbered
from dougong.data.position import WHOLE, Position, Share
from dougong.data.preparation import Preparation
from dougong.data.table import Table, cells_of


class PairLoader:
    """The batches of a table whose sides have several columns each, such as two pictures and a name in 28 languages.

    Holds the columns in memory, encoded as they are in the table.
    """

    def __init__(
        self,
        table: Table,
        preparation: Preparation,
        sides: Mapping[str, Sequence[str]],
        *,
        batch_size: int,
        views: int = 1,
        key: str | None = None,
        seed: int = 0,
        train: bool = False,
        share: Share = WHOLE,
        note: Callable[[str], None] | None = None,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        """Args:
            preparation: a modality for each side, by its name; each reads cells of any of the side's columns.
            sides: the columns that show each side.
            batch_size: records of one batch, at most: an epoch's are shared out evenly, since a last batch of a few
                records would ask next to nothing. It has up to `views` ** sides pairs of each.
            views: columns drawn of each side of a record; those beyond what it has are left out.
            key: a column; records that share its value share a number in the batch's target (`numbered`). None: no
                target.
            share: the part of each batch that comes here: some of its records, with all of their pairs. Batches and
                positions count as without a share, and a part may be empty.
            note: is told each modality that is decoded.

        Raises:
            ConfigError: a side has no modality, or a column does not exist.
            DataError: the table has no records.
        """
        columns = [column for side in sides.values() for column in side]
        missing = [name for name in (*columns, *([key] if key else ())) if name not in table.schema.names]
        if missing:
            raise ConfigError(f"{table.path.name} has no column {missing[0]!r}. Use some of {_some(table)}.")
        strange = [side for side in sides if side not in preparation.modalities]
        if strange:
            raise ConfigError(f"side {strange[0]!r} has no modality that reads it. Give it columns of one kind.")
        if table.num_rows == 0:
            raise DataError(f"{table.path.name} holds no records.")
        self._sides = {side: tuple(found) for side, found in sides.items()}
        self._cells: dict[str, list[Any]] = {column: cells_of(table.column(column)) for column in columns}
        self._rows = np.concatenate([table.numbers_of(chunk) for chunk in range(table.num_chunks)])
        self._keys = None if key is None else numbered(cells_of(table.column(key)))
        self._batch_size, self._views, self._seed, self._train = batch_size, views, seed, train
        self._share, self._note = share, note
        self._modality_column = {side: preparation.modalities[side].columns[0] for side in sides}
        self._collator = Collator(preparation, table.folder, seed=seed, augment=train, cache_bytes=cache_bytes)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """Batches without end from `start` on, each with the position after it."""
        epoch, first = start
        while True:
            order = self._order(epoch)
            for number in range(first, self.batches_per_epoch):
                last = number + 1 == self.batches_per_epoch
                yield Position(epoch + 1, 0) if last else Position(epoch, number + 1), self._batch(order, epoch, number)
            epoch, first = epoch + 1, 0

    def one_pass(self) -> Iterator[BatchArrays]:
        """Every record once, by the views of the first epoch; `row_B` names a record once for each of its pairs."""
        order = self._order(0)
        for number in range(self.batches_per_epoch):
            yield self._batch(order, 0, number)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._train:
            return np.arange(len(self._rows))
        return np.random.default_rng(derive_seed(self._seed, "order", epoch)).permutation(len(self._rows))

    def _batch(self, order: npt.NDArray[np.int64], epoch: int, number: int) -> BatchArrays:
        random = np.random.default_rng(derive_seed(self._seed, "pairs", epoch, number))
        records = np.array_split(order, self.batches_per_epoch)[number].tolist()
        own = range(len(records))[self._share.of(len(records))]
        places: list[int] = []
        cells: dict[str, list[Any]] = {column: [] for column in self._modality_column.values()}
        for index, place in enumerate(records):
            # Drawn for the whole batch, so that a record is seen alike, whoever has it.
            seen = [self._draw(side, place, random) for side in self._sides]
            if index not in own:
                continue
            for pair in itertools.product(*seen):
                places.append(place)
                for side, cell in zip(self._sides, pair, strict=True):
                    cells[self._modality_column[side]].append(cell)
        chosen = np.array(places, np.int64)
        # What a request says of its place in the batch is for what is drawn by record there, which here is nothing.
        request = Request(self._rows[chosen], cells, (epoch, number), self._share)
        batch = self._collator(request, self._note)
        if self._keys is None:
            return batch
        key_of = dict(zip(self._rows[chosen].tolist(), self._keys[chosen].tolist(), strict=True))
        return batch._replace(target=np.array([key_of[row] for row in batch.row_B.tolist()], np.int64))

    def _draw(self, side: str, place: int, random: np.random.Generator) -> list[Any]:
        """Cells of some of the side's columns; the first ones where nothing is drawn at random."""
        columns = self._sides[side]
        given = [self._cells[column][place] for column in columns]
        given = [cell for cell in given if cell is not None and cell != ""] or [None]
        if not self._train or len(given) <= self._views:
            return given[: self._views]
        return [given[index] for index in sorted(random.choice(len(given), self._views, replace=False))]


def _some(table: Table) -> str:
    return ", ".join(table.schema.names[:40])
