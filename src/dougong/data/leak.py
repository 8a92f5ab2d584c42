"""What stands on two sides of a split.

Here        find_leaks, check_leaks, Leak; `copies`, which records of one table hold the same medium.
Elsewhere   splitting by unit (data/split.py); media that are nearly the same (data/duplicates.py).
Promise     a unit or a medium on two sides is found whatever its file is called and wherever it lies; it is refused
            unless allowed. Texts, numbers and categories may repeat: they are what records have in common.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.core.errors import DataError
from dougong.core.files import inside
from dougong.data.columns import MEDIA, ColumnRole
from dougong.data.modality.array import list_content
from dougong.data.modality.medium import BadValue, media_bytes, unit_key
from dougong.data.table import Table, cells_of

FEWEST_NUMBERS: Final = 16
"""A list of fewer numbers may well be that of another record."""

EXAMPLE_LETTERS: Final = 40
COMMON_SHARE: Final = 0.1
COMMON_TIMES: Final = 10
"""A content of so many of a column's media, and so many times as many as the median one has, is a blank or a sign."""


class Leak(NamedTuple):
    """What one column has on two sides."""

    column: str
    kind: str
    """unit, or the medium's: image, audio, signal, volume."""

    left: str
    right: str
    """The parts."""

    num_shared: int
    """Units or media on both sides."""

    num_left: int
    num_right: int
    """Records that have one of them."""

    example: str
    """A unit, or a row of each part."""

    def line(self) -> str:
        what = f"values of the unit {self.column!r}" if self.kind == "unit" else f"{self.kind} media of {self.column!r}"
        return (
            f"{self.num_shared} {what} are in {self.left} and in {self.right} "
            f"({self.num_left} and {self.num_right} records; {self.example})"
        )


class _Found(NamedTuple):
    """Records by what they have."""

    num_records: dict[Hashable, int]
    first_row: dict[Hashable, int]


def find_leaks(
    parts: Mapping[str, Table], roles: Mapping[str, ColumnRole], unit: str | None = None
) -> tuple[Leak, ...]:
    """Units and media that are in two parts, by exact content. Every record is looked at; files of a size that no
    other side has are not read."""
    leaks: list[Leak] = []
    if unit is not None:
        found = {part: _units(table, unit) for part, table in parts.items() if unit in table.schema.names}
        leaks += _shared(unit, "unit", found)
    for name, role in roles.items():
        if role.role in MEDIA and name != unit:
            having = {part: table for part, table in parts.items() if name in table.schema.names}
            leaks += _shared(name, role.role, _media(having, name))
    return tuple(leaks)


def check_leaks(leaks: Iterable[Leak]) -> None:
    """Refuse a split that shares something.

    Raises:
        DataError: it does.
    """
    leaks = list(leaks)
    if leaks:
        more = f" (and {len(leaks) - 1} more)" if len(leaks) > 1 else ""
        raise DataError(
            f"the split leaks: {leaks[0].line()}{more}, so figures would be of what was learnt by heart. "
            "Remove those records from one side, or set data.allow_leak: true to go on."
        )


def _shared(column: str, kind: str, found: Mapping[str, _Found]) -> Iterator[Leak]:
    for left, right in itertools.combinations(found, 2):
        one, other = found[left], found[right]
        both = sorted(one.num_records.keys() & other.num_records.keys(), key=lambda key: one.first_row[key])
        if both:
            rows = f"such as row {one.first_row[both[0]]} of {left} and row {other.first_row[both[0]]} of {right}"
            yield Leak(
                column=column,
                kind=kind,
                left=left,
                right=right,
                num_shared=len(both),
                num_left=sum(one.num_records[key] for key in both),
                num_right=sum(other.num_records[key] for key in both),
                example=f"such as {str(both[0])[:EXAMPLE_LETTERS]!r}"
                if kind == "unit" and isinstance(both[0], str)
                else rows,
            )


def copies(table: Table, column: str) -> npt.NDArray[np.int64]:
    """Of each record a number (R,), equal for the same content of a column of media; -1: none, or one that is far
    commoner than the others: a blank or a sign is what records have in common."""
    place = {row: index for index, row in enumerate(row for chunk in _rows(table) for row in chunk)}
    unread = _collected(_keys(table, column))
    held = Counter(_size(key) for key in unread.num_records)
    content = _contents(unread, table.folder, {size for size, number in held.items() if number > 1})
    number: dict[Hashable, int] = {}
    number_R = np.full(table.num_rows, -1, np.int64)
    for row, key in _keys(table, column):
        if key is not None:
            number_R[place[row]] = number.setdefault(content[key], len(number))
    count_N = np.bincount(number_R[number_R >= 0], minlength=1)
    bound = max(COMMON_SHARE * count_N.sum(), COMMON_TIMES * float(np.median(count_N)))
    number_R[(number_R >= 0) & (count_N[number_R] > bound)] = -1
    return number_R


def _contents(found: _Found, folder: Path, sizes: set[int]) -> dict[Hashable, Hashable]:
    """What stands for each medium's content; files of other sizes are told apart by their size alone."""
    content: dict[Hashable, Hashable] = {}
    for key in found.num_records:
        content[key] = key
        if isinstance(key, _Path) and key.size in sizes:
            with contextlib.suppress(BadValue):
                content[key] = _inline(media_bytes(key.name, folder))
    return content


def _units(table: Table, unit: str) -> _Found:
    return _collected((row, unit_key(cell)) for row, cell in _cells(table, unit))


class _Path(NamedTuple):
    """A medium in a file that was not read yet."""

    name: str
    size: int


def _media(parts: Mapping[str, Table], name: str) -> dict[str, _Found]:
    """By content. A file is read only where another part has a medium of its size."""
    unread = {part: _collected(_keys(table, name)) for part, table in parts.items()}
    sizes = {part: {_size(key) for key in found.num_records} for part, found in unread.items()}
    return {
        part: _read(found, parts[part].folder, set().union(*(own for other, own in sizes.items() if other != part)))
        for part, found in unread.items()
    }


def _keys(table: Table, name: str) -> Iterator[tuple[int, Hashable]]:
    """Inline media as their length and digest, others as their path."""
    known: dict[str, _Path | None] = {}
    for row, cell in _cells(table, name):
        if isinstance(cell, list):
            yield row, (_inline(list_content(cell)) if _num_numbers(cell) >= FEWEST_NUMBERS else None)
            continue
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, bytes):
            yield row, (_inline(cell) if cell else None)
        elif isinstance(cell, str):
            if cell not in known:
                known[cell] = _path(cell, table.folder)
            yield row, known[cell]


def _path(name: str, folder: Path) -> _Path | None:
    try:
        path = inside(folder, name)
        return _Path(name, path.stat().st_size) if path is not None and path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None  # its record is set aside, with the reason, wherever it is used


def _size(key: Hashable) -> int:
    return key.size if isinstance(key, _Path) else key[0]  # type: ignore[index]


def _read(found: _Found, folder: Path, sizes: set[int]) -> _Found:
    read = _Found({}, {})
    for key, count in found.num_records.items():
        first = found.first_row[key]
        if isinstance(key, _Path):
            if key.size not in sizes:
                continue
            try:
                key = _inline(media_bytes(key.name, folder))
            except BadValue:
                continue
        read.num_records[key] = read.num_records.get(key, 0) + count
        read.first_row[key] = min(first, read.first_row.get(key, first))
    return read


def _inline(content: bytes) -> tuple[int, bytes]:
    return len(content), hashlib.blake2b(content, digest_size=16).digest()


def _rows(table: Table) -> Iterator[list[int]]:
    for chunk in range(table.num_chunks):
        yield table.numbers_of(chunk).tolist()


def _cells(table: Table, name: str) -> Iterator[tuple[int, Any]]:
    for chunk in range(table.num_chunks):
        rows = table.numbers_of(chunk).tolist()
        yield from zip(rows, cells_of(table.read(chunk, [name]).column(name)), strict=True)


def _collected(keys: Iterable[tuple[int, Hashable]]) -> _Found:
    found = _Found({}, {})
    for row, key in keys:
        if key is not None:
            found.num_records[key] = found.num_records.get(key, 0) + 1
            found.first_row.setdefault(key, row)
    return found


def _num_numbers(cell: Any) -> int:
    return sum(map(_num_numbers, cell)) if isinstance(cell, list) else 1
