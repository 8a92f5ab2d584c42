"""The records that compressing learns from, chooses by, and is judged on at the end.

Here        Records, `split_records`; `without_target`, records whose answers are not looked at.
Elsewhere   what is held out of a table (data/holdout.py).
Promise     the three share no unit: records with one medium in common are on one side. The last are looked at once.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pyarrow as pa

from dougong.core.errors import ConfigError, DataError
from dougong.core.seeds import derive_seed
from dougong.data.columns import ColumnRole
from dougong.data.holdout import belonging, hold_out
from dougong.data.leak import find_leaks
from dougong.data.preparation import Preparation
from dougong.data.split import Inseparable
from dougong.data.table import Table


class Records(NamedTuple):
    """A table in three parts."""

    learn: Table
    choose: Table
    judge: Table
    unit: str | None
    """The column whose values are on one side each."""

    labelled: bool
    notes: tuple[str, ...]

    def identity(self, target: str) -> list[str]:
        """What tells these records from others, as far as their numbers and answers do."""
        return [_identity(each, target) for each in (self.learn, self.choose, self.judge)]


def split_records(
    table: Table, preparation: Preparation, *, share: float, unit: str | None, judge: Table | None, seed: int
) -> Records:
    """About `share` of the units to choose by, and as many to judge on where `judge` is not given.

    Raises:
        ConfigError: `unit` is no column.
        DataError: the table lacks a column that the model reads, or has too few units for so many parts.
    """
    for each in (table, judge):
        missing = [name for name in preparation.columns if each is not None and name not in each.schema.names]
        if missing and each is not None:
            raise DataError(
                f"{each.path.name} lacks the column {missing[0]!r} that the model reads. Leave its cells empty where "
                "they are not known."
            )
    if unit is not None and unit not in table.schema.names:
        raise ConfigError(f"--unit {unit!r} is no column. Use one of {', '.join(table.schema.names)}.")
    media = list(preparation.media)
    belongs = belonging(table, media, unit)
    notes = [] if judge is None else _shared_with(judge, table, preparation, unit)
    try:
        if judge is None:
            held = hold_out(table, share, belongs, seed=derive_seed(seed, "judge"))
            table, judge = held.rest, held.aside
            notes += [f"{judge.num_rows} records were held out to judge on at the end, {held.by}", *held.notes]
            belongs = belonging(table, held.media, unit)._replace(unit=belongs.unit)
        held = hold_out(table, share, belongs, seed=derive_seed(seed, "choose"))
    except Inseparable as error:
        raise DataError(f"{error} Give more records, or a table to judge on by --judge.") from None
    learn, choose = held.rest, held.aside
    notes += [note for note in held.notes if note not in notes]
    notes.append(f"{choose.num_rows} records choose among candidates, {held.by}; {learn.num_rows} are learnt from")
    name = preparation.target.name
    known = [_num_known(each, name) for each in (learn, choose, judge)]
    labelled = min(known) > 0
    if labelled and (lacking := learn.num_rows + choose.num_rows + judge.num_rows - sum(known)):
        notes.append(f"{name!r} is not known of {lacking} records: these are left out")
    if not labelled:
        notes.append(f"{name!r} is not known of these records: they are judged by agreement with the teacher")
        learn, choose, judge = (without_target(each, name) for each in (learn, choose, judge))
    return Records(learn, choose, judge, belongs.unit, labelled, tuple(notes))


def _shared_with(judge: Table, table: Table, preparation: Preparation, unit: str | None) -> list[str]:
    """What is judged though it was learnt from, where the tables were given apart."""
    roles = {name: ColumnRole(kind, "as the model reads it") for name, kind in preparation.media.items()}
    leaks = find_leaks({"what is learnt from": table, "what judges": judge}, roles, unit)
    return [f"{leak.line()}: figures are too good by as much as was learnt by heart" for leak in leaks]


def _identity(table: Table, target: str) -> str:
    found = hashlib.blake2b(digest_size=16)
    for chunk in range(table.num_chunks):
        found.update(table.numbers_of(chunk).tobytes())
        if target in table.schema.names:
            found.update(repr(table.read(chunk, [target]).column(target).to_pylist()).encode())
    return f"{table.num_rows} records, {found.hexdigest()}"


def _num_known(table: Table, name: str) -> int:
    if name not in table.schema.names:
        return 0
    columns = (table.read(chunk, [name]).column(name) for chunk in range(table.num_chunks))
    return sum(len(column) - column.null_count for column in columns)


class _Unlabelled(Table):
    """A table without one column."""

    def __init__(self, whole: Table, column: str) -> None:
        schema = whole.schema.remove(whole.schema.get_field_index(column))
        super().__init__(whole.path, whole.folder, schema, [len(whole.rows_of(c)) for c in range(whole.num_chunks)])
        self._whole = whole

    def numbers_of(self, chunk: int):  # type: ignore[no-untyped-def]  # as the table's
        return self._whole.numbers_of(chunk)

    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        return self._whole.read(chunk, columns)

    def bytes_of(self, chunk: int) -> int:
        return self._whole.bytes_of(chunk)

    def first(self, chunk: int, num_rows: int, columns: list[str]) -> pa.Table:
        return self._whole.first(chunk, num_rows, columns)


def without_target(table: Table, column: str) -> Table:
    """The same records, whose answers nobody can look at."""
    return _Unlabelled(table, column) if column in table.schema.names else table
