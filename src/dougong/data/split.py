"""Parts of a table that share nothing.

Here        split_table; `unit_numbers`, `largest_group`, of what must be on one side; sample_table, some of the
            records; part_of, for a split that is made elsewhere.
Elsewhere   splits that come with the data (data/sources/).
Promise     records of one unit (a speaker, a patient, or those that share a medium) are on one side; the same seed
            splits the same table alike; records keep their numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dougong.core.errors import ConfigError, DataError
from dougong.core.seeds import derive_seed
from dougong.data.modality.medium import unit_key
from dougong.data.table import Table, cells_of


class Inseparable(DataError):
    """Nothing can be held out of this table. Whoever asked says what else would do."""


class _Part(Table):
    """The rows of a table that are on one side."""

    def __init__(self, whole: Table, masks: list[npt.NDArray[np.bool_]]) -> None:
        kept = [chunk for chunk, mask in enumerate(masks) if mask.any()]
        super().__init__(whole.path, whole.folder, whole.schema, [int(masks[chunk].sum()) for chunk in kept])
        self._whole, self._kept = whole, kept
        self._masks = [masks[chunk] for chunk in kept]

    def numbers_of(self, chunk: int) -> npt.NDArray[np.int64]:
        return self._whole.numbers_of(self._kept[chunk])[self._masks[chunk]]

    def bytes_of(self, chunk: int) -> int:
        return self._whole.bytes_of(self._kept[chunk])

    def first(self, chunk: int, num_rows: int, columns: list[str]) -> pa.Table:
        # As many rows of the whole as hold so many of this side.
        mask = self._masks[chunk]
        whole_rows = int(np.searchsorted(np.cumsum(mask), num_rows)) + 1
        part = self._whole.first(self._kept[chunk], whole_rows, columns)
        return part.filter(pa.array(mask[: part.num_rows]))

    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        return self._whole.read(self._kept[chunk], columns).filter(pa.array(self._masks[chunk]))


def split_table(
    table: Table,
    share: float,
    *,
    unit: str | None,
    seed: int,
    together: Sequence[npt.NDArray[np.int64]] = (),
) -> tuple[Table, Table]:
    """A part for training and one of about `share` of the units, at least one of each; `unit` is a column, None is each
    record by itself, as is one whose unit is not known. `together` has numbers of records (R,) each: those with equal
    ones, but -1, are on one side, and so is who shares a unit with them.

    Raises:
        ConfigError: `unit` is no column.
        Inseparable: there is no second unit.
    """
    if unit is not None and unit not in table.schema.names:
        raise ConfigError(f"unit {unit!r} is no column. Use one of {', '.join(table.schema.names)}.")
    aside: dict[Hashable, bool] = {}
    masks: list[npt.NDArray[np.bool_]] = []
    for chunk in range(table.num_chunks):
        random = np.random.default_rng(derive_seed(seed, "split", chunk))
        alone = random.random(len(table.rows_of(chunk))) < share
        if unit is None:
            masks.append(alone)
            continue
        keys = [unit_key(cell) for cell in cells_of(table.read(chunk, [unit]).column(unit))]
        for key in keys:
            if key is not None and key not in aside:
                aside[key] = (
                    derive_seed(seed, "split", key.hex() if isinstance(key, bytes) else str(key)) < share * 2**63
                )
        own = zip(keys, alone, strict=True)
        masks.append(np.array([by_itself if key is None else aside[key] for key, by_itself in own], np.bool_))
    aside_R = np.concatenate([np.zeros(0, np.bool_), *masks])
    if together or _one_sided(aside_R):
        numbers = [*together, *([unit_numbers(table, unit)] if unit is not None else [])]
        first_R = _first_of_each([np.full(len(aside_R), -1), *numbers])
        aside_R = _both_sides(aside_R[first_R], first_R, share)
    if _one_sided(aside_R):
        by, there = "" if unit is None else f" by {unit!r}", table.num_rows
        why = f"all of its {there} records hang together" if there > 1 else f"its records are {there}"
        raise Inseparable(f"{table.path.name} cannot be split{by}: {why}.")
    masks = np.split(aside_R, np.cumsum([len(mask) for mask in masks])[:-1])
    return _Part(table, [~mask for mask in masks]), _Part(table, masks)


def _one_sided(aside_R: npt.NDArray[np.bool_]) -> bool:
    return not 0 < aside_R.sum() < len(aside_R)


def _both_sides(aside_R: npt.NDArray[np.bool_], first_R: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """The same, but where chance left a side empty, with the group on it that comes nearest to its share."""
    if not _one_sided(aside_R):
        return aside_R
    group_G, size_G = np.unique(first_R, return_counts=True)
    if len(group_G) < 2:
        return aside_R
    wanted = (1 - share if aside_R[0] else share) * len(first_R)
    alone_R: npt.NDArray[np.bool_] = first_R == group_G[np.abs(size_G - wanted).argmin()]
    return aside_R ^ alone_R


def unit_numbers(table: Table, unit: str) -> npt.NDArray[np.int64]:
    """Of each record a number (R,), equal for those of one unit; -1 where it is not known."""
    numbers: dict[Hashable, int] = {}
    found = [
        -1 if key is None else numbers.setdefault(key, len(numbers))
        for chunk in range(table.num_chunks)
        for key in map(unit_key, cells_of(table.read(chunk, [unit]).column(unit)))
    ]
    return np.array(found, np.int64)


def largest_group(together: Sequence[npt.NDArray[np.int64]]) -> int:
    """Records of the largest group that such numbers (R,) keep on one side, also by way of others."""
    if not together or not len(together[0]):
        return 0
    return int(np.bincount(_first_of_each(together)).max())


def _first_of_each(numbers: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """For each record the first one that it belongs together with, by any of the numbers, also by way of others.

    Each group's least root is hung above its records' roots, and paths are made short, in turns (Shiloach and Vishkin
    1982): a chain as long as the table takes a few dozen turns, not as many as it has links.
    """
    first_R = np.arange(len(numbers[0]))
    while True:
        before_R = first_R
        for number_R in numbers:
            there = number_R >= 0
            root_N = first_R[there]
            least = np.full(number_R.max(initial=-1) + 1, len(first_R), np.int64)
            np.minimum.at(least, number_R[there], root_N)
            first_R = first_R.copy()
            np.minimum.at(first_R, root_N, least[number_R[there]])
            while (first_R[first_R] != first_R).any():
                first_R = first_R[first_R]
        if (first_R == before_R).all():
            return first_R


def sample_table(table: Table, most: int, *, seed: int) -> Table:
    """At most so many records, drawn from all over the table; all of a smaller table."""
    if table.num_rows <= most:
        return table
    random = np.random.default_rng(derive_seed(seed, "sample"))
    return part_of(table, random.choice(table.num_rows, most, replace=False))


def part_of(table: Table, rows: npt.NDArray[np.int64]) -> Table:
    """Some of a table's rows, by their place in it, in the table's order; for a split that is made elsewhere.

    Raises:
        DataError: there is no row.
    """
    if not len(rows):
        raise DataError(f"a part of {table.path.name} has no rows. Hold out fewer.")
    kept_R = np.zeros(table.num_rows, np.bool_)
    kept_R[rows] = True
    return _Part(table, [kept_R[table.rows_of(chunk)] for chunk in range(table.num_chunks)])
