"""Records put together from several tables, by key, by time, or by time within a key.

Here        JoinConfig, join_table, JoinReport, write_joined.
Elsewhere   finding pairs that do not belong together (data/alignment.py).
Promise     nothing is dropped silently: what is unmatched, unused or ambiguous is counted or refused. A path in a cell
            leads to a file in the folder of the table that the cell came from, or to nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from dougong.core.config import Config
from dougong.core.errors import DataError
from dougong.core.files import inside, whole_file, write_json
from dougong.data.modality.medium import LARGEST_FILE_BYTES, BadValue, media_bytes
from dougong.data.table import MEDIA_ENDINGS, Table, cells_of, open_table

HELD_BYTES: Final = 2**30
"""Of another table's chunks, kept at hand while it is joined."""

EMBEDDED_BYTES: Final = 64 * 2**20
"""Of media that are held at once while a joined table is written."""

MEDIA: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OFFSET_PAIRS: Final = 2_000_000
"""Differences of times looked at to estimate an offset."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class JoinConfig(Config):
    """One more table, and how its rows find their records."""

    table: str
    """Parquet, CSV, JSONL or a folder, as any table."""

    key: str | None = None
    """A column of equal values on both sides."""

    base_key: str | None = None
    """What the key is called in the table that is joined to. None: the same."""

    time: str | None = None
    """A column of numbers or timestamps: the nearest row is taken. Beside a key: the nearest of the same key."""

    base_time: str | None = None
    """What the time is called in the table that is joined to. None: the same."""

    tolerance: float | None = None
    """Farther apart is no match. In seconds for timestamps, else in the unit of the column."""

    offset: float | Literal["estimate"] = 0.0
    """Added to the other table's times, whose clock may be wrong by a constant. "estimate": where most times meet."""

    largest_offset: float | None = Field(default=None)
    """How far an estimate may go. None: a hundred tolerances."""

    columns: tuple[str, ...] | None = None
    """Of the other table. None: all but the key."""

    prefix: str = ""
    """Put before the names of the other table's columns."""

    unmatched: Literal["keep", "drop"] = "keep"
    """A record without a partner: kept with nothing in these columns, or dropped and counted."""

    duplicates: Literal["refuse", "first"] = "refuse"
    """A key that stands twice in the other table: refused, or its first row taken and the rest counted. With a time,
    the first of equally near rows is taken, and what repeats a key and time is counted."""

    @field_validator("tolerance", "largest_offset")
    @classmethod
    def _not_below_zero(cls, value: float | None) -> float | None:
        if value is not None and not value >= 0:
            raise ValueError(f"{value} must be at least 0: it is how far apart two times may be.")
        return value

    @model_validator(mode="after")
    def _by_something(self) -> JoinConfig:
        if self.key is None and self.time is None:
            raise ValueError("neither key nor time is given: rows find their records by one of them, or both.")
        if self.time is not None and self.tolerance is None:
            raise ValueError(f"time {self.time!r} needs a tolerance: without one the nearest row may be years away.")
        if self.time is None and (self.tolerance is not None or self.offset != 0.0 or self.base_time is not None):
            raise ValueError("tolerance, offset and base_time say how times meet, but no time is given.")
        if self.base_key is not None and self.key is None:
            raise ValueError(f"base_key {self.base_key!r} stands without a key.")
        return self


class JoinReport(NamedTuple):
    """How one table found its records."""

    table: str
    num_base: int
    """Records joined to."""

    num_matched: int
    num_unmatched: int
    """No partner, those without a key or time among them."""

    num_without_key: int
    """Records whose key or time is missing."""

    num_rows: int
    """Of the other table."""

    num_unused: int
    """Its rows that no record took."""

    num_shared: int
    """Its rows that several records took."""

    num_duplicate_keys: int
    """Its rows beyond the first of their key, of their time, or of both."""

    offset: float
    """That was added to its times."""

    skew_median: float | None
    """Other time minus record's time, of the matches, after the offset; None where joined by key alone."""

    skew_p95: float | None
    """Of the absolute skew."""

    was_sorted: bool
    """Whether its times rose; the match does not depend on it."""

    def line(self) -> str:
        """For people."""
        text = f"{self.table}: {self.num_matched} of {self.num_base} records matched"
        details = [
            (self.num_unmatched, "unmatched"),
            (self.num_without_key, "of them without key or time"),
            (self.num_unused, f"of its {self.num_rows} rows unused"),
            (self.num_shared, "of its rows taken by several records"),
            (self.num_duplicate_keys, "rows repeat a key or a time"),
        ]
        text += "".join(f", {count} {what}" for count, what in details if count)
        if self.skew_median is not None:
            text += f"; skew median {self.skew_median:+.4g}, 95 % within {self.skew_p95:.4g}"
        if self.offset:
            text += f", offset {self.offset:+.4g} added"
        return text + ("" if self.was_sorted else "; its times were not in order")


class JoinedTable(Table):
    """The records of one table, with columns of others beside them. Chunks are those of the first table."""

    def __init__(
        self, base: Table, others: Sequence[_Other], keep: npt.NDArray[np.bool_], media: Sequence[str] = ()
    ) -> None:
        self._base, self._others = base, others
        folders = [base.folder, *(other.table.folder for other in others)]
        together = len({folder.resolve() for folder in folders}) == 1
        root = base.folder if together else Path(os.path.commonpath([folder.resolve() for folder in folders]))
        self._paths = {} if together else _path_columns(base, base.schema.names, named=media)
        for other in () if together else others:
            own = [name.removeprefix(other.prefix) for name in media if name.startswith(other.prefix)]
            other.paths = _path_columns(other.table, other.columns, named=own)
        fields = [pa.field(f.name, MEDIA) if f.name in self._paths else f for f in base.schema]
        for other in others:
            for name in other.columns:
                kind = MEDIA if name in other.paths else other.table.schema.field(name).type
                fields.append(pa.field(other.prefix + name, kind))
        self._keep = [keep[base.first_rows[chunk] : base.first_rows[chunk + 1]] for chunk in range(base.num_chunks)]
        self._kept = [chunk for chunk, mask in enumerate(self._keep) if mask.any()]
        super().__init__(base.path, root, pa.schema(fields), [int(self._keep[chunk].sum()) for chunk in self._kept])

    def numbers_of(self, chunk: int) -> Ints:
        inner = self._kept[chunk]
        return self._base.numbers_of(inner)[self._keep[inner]]

    def bytes_of(self, chunk: int) -> int:
        rows = self.first(chunk, 64, self.schema.names)
        return int(rows.nbytes / max(1, rows.num_rows) * len(self.rows_of(chunk)))

    def first(self, chunk: int, num_rows: int, columns: list[str]) -> pa.Table:
        inner = self._kept[chunk]
        return self._rows(inner, np.flatnonzero(self._keep[inner])[:num_rows], columns)

    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        inner = self._kept[chunk]
        return self._rows(inner, np.flatnonzero(self._keep[inner]), columns)

    def _rows(self, inner: int, places: Ints, columns: list[str]) -> pa.Table:
        found: dict[str, pa.ChunkedArray] = {}
        own = [name for name in columns if name in self._base.schema.names]
        if own:
            upto = int(places[-1]) + 1
            whole = len(self._base.rows_of(inner)) == upto
            part = self._base.read(inner, own) if whole else self._base.first(inner, upto, own)
            part = part.take(pa.array(places))
            found.update({name: self._readable(part.column(name), name, self._paths, self._base) for name in own})
        for other in self._others:
            wanted = {other.prefix + name: name for name in other.columns if other.prefix + name in columns}
            if wanted:
                match = other.match[self._base.first_rows[inner] + places]
                part = other.take(match, list(wanted.values()))
                for outer, name in wanted.items():
                    found[outer] = self._readable(part.column(name), name, other.paths, other.table)
        return pa.table(
            {name: found[name] for name in columns}, schema=pa.schema([self.schema.field(n) for n in columns])
        )

    def _readable(self, column: pa.ChunkedArray, name: str, paths: dict[str, bool], table: Table) -> pa.ChunkedArray:
        """Path cells, spelt from the folder that all the tables share. One that leaves its own table's folder becomes
        an empty file, which every modality refuses: spelt anew, it could lead somewhere."""
        if name not in paths:
            return column
        root, moved = self.folder.resolve(), []
        for cell in cells_of(column):
            cell = {"bytes": None, "path": cell} if isinstance(cell, str) else cell
            if not isinstance(cell, dict) or cell.get("bytes") is not None or cell.get("path") is None:
                moved.append(cell if isinstance(cell, dict) else None)
                continue
            path = _inside(table.folder, cell["path"])
            if path is None:
                moved.append({"bytes": b"", "path": cell["path"]})
            else:
                moved.append({"bytes": None, "path": path.relative_to(root).as_posix()})
        return pa.chunked_array([pa.array(moved, MEDIA)])


class _Other:
    """A table that is joined, and which of its rows each record takes (-1: none)."""

    def __init__(self, table: Table, columns: list[str], prefix: str, match: Ints) -> None:
        self.table, self.columns, self.prefix, self.match = table, columns, prefix, match
        self.paths: dict[str, bool] = {}
        self._held: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def take(self, rows: Ints, columns: list[str]) -> pa.Table:
        """These rows in this order, with nothing where a row is -1."""
        there = rows >= 0
        distinct, place = np.unique(rows[there], return_inverse=True)
        chunk_of = np.searchsorted(self.table.first_rows, distinct, side="right") - 1
        pieces = [self.table.schema.empty_table().select(columns)]
        for chunk in np.unique(chunk_of):
            inner = distinct[chunk_of == chunk] - self.table.first_rows[chunk]
            pieces.append(self._chunk(int(chunk), columns).take(pa.array(inner)))
        index = np.zeros(len(rows), np.int64)
        index[there] = place
        return pa.concat_tables(pieces).take(pa.array(index, mask=~there))

    def _chunk(self, chunk: int, columns: list[str]) -> pa.Table:
        key = (chunk, tuple(columns))
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = self.table.read(chunk, columns)
            while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        return self._held[key]


def join_table(
    base: Table, joins: Sequence[JoinConfig], media: Sequence[str] = ()
) -> tuple[Table, tuple[JoinReport, ...]]:
    """`base` with the columns of other tables, and how each found its records.

    Keys and times are read whole, media a chunk at a time when they are asked for. `media` names columns, as they are
    called after joining, that hold paths of files though they do not look like it.

    Raises:
        DataError: a column is missing, is of another kind than its counterpart, stands on both sides, or a key is
            ambiguous; or no record at all is matched.
    """
    others: list[_Other] = []
    reports: list[JoinReport] = []
    keep = np.ones(base.num_rows, np.bool_)
    names = list(base.schema.names)
    for join in joins:
        table = open_table(join.table)
        columns = _columns(table, join, names)
        match, report = _match(base, table, join)
        if report.num_matched == 0:
            by = " and ".join(repr(name) for name in (join.key, join.time) if name is not None)
            raise DataError(
                f"{table.path.name} matches none of the {base.num_rows} records of {base.path.name} by {by}. "
                "Compare a few values of both, or set a larger tolerance or an offset."
            )
        if join.unmatched == "drop":
            keep &= match >= 0
        names += [join.prefix + name for name in columns]
        others.append(_Other(table, columns, join.prefix, match))
        reports.append(report)
    if not keep.any():
        raise DataError(f"no record of {base.path.name} has a partner in every table. Set unmatched: keep.")
    return JoinedTable(base, others, keep, media), tuple(reports)


def write_joined(
    base: str | Path,
    joins: Sequence[JoinConfig],
    out: str | Path,
    announce: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Join, and write one Parquet file that holds its media, with its report beside it (`OUT.join.json`).

    Returns the report, and its `lines` for people.

    Raises:
        DataError: as join_table; or `out` does not end in .parquet, or exists.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise DataError(f"{out.name} would not be known as a table: name a file that ends in .parquet.")
    if out.exists():
        raise DataError(f"{out} exists already. Name another file, or remove it.")
    first = open_table(base)
    table, reports = join_table(first, joins)
    media = _path_columns(table, table.schema.names)
    schema = pa.schema([pa.field(f.name, MEDIA) if f.name in media else f for f in table.schema])
    unreadable: dict[str, dict[str, Any]] = {}
    with whole_file(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for chunk in range(table.num_chunks):
            rows = table.read(chunk, table.schema.names)
            for start, stop in itertools.pairwise(_cuts(rows, list(media), table.folder)):
                part = rows.slice(start, stop - start)
                for name in media:
                    held = _embed(part.column(name), table.folder, name, unreadable)
                    part = part.set_column(part.schema.get_field_index(name), schema.field(name), held)
                writer.write_table(part.cast(schema), row_group_size=max(1, part.num_rows))
            if announce is not None:
                announce("joining records", table.first_rows[chunk + 1], table.num_rows)
    report = {
        "out": str(out),
        "rows": table.num_rows,
        "dropped": first.num_rows - table.num_rows,
        "tables": [found._asdict() for found in reports],
        "unreadable": unreadable,
    }
    write_json(out.with_name(out.name + ".join.json"), report)
    return {**report, "lines": [found.line() for found in reports]}


def _cuts(rows: pa.Table, media: Sequence[str], folder: Path) -> list[int]:
    """Where to cut, so that no part's media have many more bytes than EMBEDDED_BYTES."""
    bytes_R = np.zeros(rows.num_rows, np.int64)
    for name in media:
        for row, cell in enumerate(cells_of(rows.column(name))):
            cell = cell if isinstance(cell, dict) else {"path": cell}
            if cell.get("bytes") is not None:
                bytes_R[row] += len(cell["bytes"])
            elif isinstance(cell.get("path"), str):
                path = _inside(folder, cell["path"])
                with contextlib.suppress(OSError, ValueError):
                    bytes_R[row] += min(path.stat().st_size, LARGEST_FILE_BYTES) if path is not None else 0
    cuts, held = [0], 0
    for row, size in enumerate(bytes_R.tolist()):
        if held and held + size > EMBEDDED_BYTES:
            cuts.append(row)
            held = 0
        held += size
    return [*cuts, rows.num_rows]


def _embed(column: pa.ChunkedArray, folder: Path, name: str, unreadable: dict[str, dict[str, Any]]) -> pa.ChunkedArray:
    """Files in the place of their paths. What cannot be read stays a bad cell, and is counted."""
    held: list[dict[str, Any] | None] = []
    for cell in cells_of(column):
        cell = {"bytes": None, "path": cell} if isinstance(cell, str) else cell
        if not isinstance(cell, dict) or (cell.get("bytes") is None and cell.get("path") is None):
            held.append(None)
            continue
        try:
            content = media_bytes(cell, folder)
        except BadValue as bad:
            content = b""
            outside = cell.get("bytes") == b""
            reason = (
                f"path {cell.get('path')!r} leads out of its table's folder, or is an empty file"
                if outside
                else str(bad)
            )
            found = unreadable.setdefault(name, {"count": 0, "first": reason})
            found["count"] += 1
        path = cell.get("path")
        held.append({"bytes": content, "path": PurePosixPath(path).name if isinstance(path, str) else None})
    return pa.chunked_array([pa.array(held, MEDIA)])


def _columns(table: Table, join: JoinConfig, taken: Sequence[str]) -> list[str]:
    for name in (*(join.columns or ()), *(n for n in (join.key, join.time) if n is not None)):
        if name not in table.schema.names:
            raise DataError(f"{table.path.name} has no column {name!r}. It has {', '.join(table.schema.names)}.")
    same_key = (join.key,) if join.base_key in (None, join.key) else ()
    columns = [name for name in join.columns or table.schema.names if name not in same_key]
    if join.columns is None and join.time is not None and not join.prefix and join.time in taken:
        columns.remove(join.time)  # the record's own time stands for both
    twice = [name for name in columns if join.prefix + name in taken]
    if twice:
        raise DataError(
            f"column {join.prefix + twice[0]!r} of {table.path.name} is there already. "
            f"Set a prefix (such as {table.path.stem}_; --prefix does so), or name the columns that you want."
        )
    return columns


def _match(base: Table, table: Table, join: JoinConfig) -> tuple[Ints, JoinReport]:
    base_rows, rows = base.num_rows, table.num_rows
    base_group, group = np.zeros(base_rows, np.int64), np.zeros(rows, np.int64)
    if join.key is not None:
        base_group, group = _groups(base, join.base_key or join.key, table, join.key)
    skews: Floats | None = None
    num_repeats, offset, was_sorted = 0, 0.0, True
    if join.time is None:
        match, num_repeats = _match_keys(base_group, group, table, join)
        missing = base_group < 0
    else:
        base_time, time = _times(base, join.base_time or join.time, table, join.time)
        missing = (base_group < 0) | np.isnan(base_time)
        seen = time[~np.isnan(time)]
        was_sorted = bool((np.diff(seen) >= 0).all())
        assert join.tolerance is not None
        if join.offset == "estimate":
            offset = estimate_offset(base_time, time, join.tolerance, join.largest_offset)
        else:
            offset = join.offset
        match, skews = nearest(base_time, time + offset, base_group, group, join.tolerance)
        keyed = np.stack([group, time], axis=1)[(group >= 0) & ~np.isnan(time)]
        num_repeats = len(keyed) - len(np.unique(keyed, axis=0))
    used, counts = np.unique(match[match >= 0], return_counts=True)
    return match, JoinReport(
        table=table.path.name,
        num_base=base_rows,
        num_matched=int((match >= 0).sum()),
        num_unmatched=int((match < 0).sum()),
        num_without_key=int(missing.sum()),
        num_rows=rows,
        num_unused=rows - len(used),
        num_shared=int((counts > 1).sum()),
        num_duplicate_keys=num_repeats,
        offset=float(offset),
        skew_median=None if skews is None or not len(skews) else float(np.median(skews)),
        skew_p95=None if skews is None or not len(skews) else float(np.quantile(np.abs(skews), 0.95)),
        was_sorted=was_sorted,
    )


def _groups(base: Table, base_key: str, table: Table, key: str) -> tuple[Ints, Ints]:
    """Equal keys as equal numbers; -1 for none."""
    left, right = _plain(base, base_key), _plain(table, key)
    for column, name, where in ((left, base_key, base), (right, key, table)):
        kind = column.type
        if pa.types.is_nested(kind) or pa.types.is_floating(kind):
            raise DataError(
                f"key {name!r} of {where.path.name} holds {kind}: a key is a whole number, a word or a date."
            )
    if _family(left.type) != _family(right.type):
        raise DataError(
            f"key {base_key!r} of {base.path.name} holds {left.type} and {key!r} of {table.path.name} {right.type}: "
            "no value of one equals one of the other. Write both alike."
        )
    both = _alike(left, right, base_key, base)
    codes = both.combine_chunks() if isinstance(both, pa.ChunkedArray) else both
    if isinstance(codes, pa.ChunkedArray):
        codes = pa.concat_arrays(codes.chunks)
    numbers = pc.dictionary_encode(codes).indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers[: base.num_rows], numbers[base.num_rows :]


def _alike(left: pa.ChunkedArray, right: pa.ChunkedArray, name: str, base: Table) -> pa.ChunkedArray:
    """One after the other, as one type that holds the values of both."""
    family = _family(left.type)
    kinds: tuple[pa.DataType, ...] = (left.type,)
    if family == "whole number":
        kinds = (pa.int64(), pa.uint64())
    elif family == "word":
        kinds = (pa.large_binary(),)  # also of what is no UTF-8
    for kind in kinds:
        with contextlib.suppress(pa.ArrowInvalid):
            return pa.chunked_array([*left.cast(kind).chunks, *right.cast(kind).chunks], kind)
    raise DataError(
        f"key {name!r} of {base.path.name} holds whole numbers below 0 on one side and above 2**63 on the other: "
        "no value of one equals one of the other. Write both alike."
    )


def _family(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "whole number"
    words = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return "word" if any(is_kind(kind) for is_kind in words) else str(kind)


def _plain(table: Table, name: str) -> pa.ChunkedArray:
    if name not in table.schema.names:
        raise DataError(f"{table.path.name} has no column {name!r}. It has {', '.join(table.schema.names)}.")
    column = table.column(name)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _match_keys(base_group: Ints, group: Ints, table: Table, join: JoinConfig) -> tuple[Ints, int]:
    keyed = np.flatnonzero(group >= 0)
    distinct, first, counts = np.unique(group[keyed], return_index=True, return_counts=True)
    num_repeats = int((counts - 1).sum())
    if num_repeats and join.duplicates == "refuse":
        assert join.key is not None
        row = int(keyed[first[counts > 1][0]])
        example = cells_of(table.column(join.key).slice(row, 1))[0]
        raise DataError(
            f"key {join.key!r} of {table.path.name} is ambiguous: {int((counts > 1).sum())} values stand more than "
            f"once ({str(example)[:40]!r} is one). Set duplicates: first, or join by a time as well."
        )
    if not len(distinct):
        return np.full(len(base_group), -1, np.int64), num_repeats
    place = np.searchsorted(distinct, base_group).clip(0, len(distinct) - 1)
    found = (distinct[place] == base_group) & (base_group >= 0)
    return np.where(found, keyed[first[place]], -1), num_repeats


def _times(base: Table, base_time: str, table: Table, time: str) -> tuple[Floats, Floats]:
    """Both as numbers, NaN for none. Timestamps become seconds after the earliest of them."""
    left, right = _plain(base, base_time), _plain(table, time)
    for column, name, where in ((left, base_time, base), (right, time, table)):
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_moment(kind)):
            raise DataError(
                f"time {name!r} of {where.path.name} holds {kind}, neither numbers nor timestamps: "
                "write seconds, or dates such as 2024-05-01 12:00:00.250."
            )
    stamped = [_is_moment(column.type) for column in (left, right)]
    zoned = [pa.types.is_timestamp(column.type) and column.type.tz is not None for column in (left, right)]
    if stamped[0] != stamped[1] or zoned[0] != zoned[1]:
        raise DataError(
            f"time {base_time!r} of {base.path.name} holds {left.type} and {time!r} of {table.path.name} {right.type}: "
            "their clocks cannot be compared. Write both as numbers, or both as timestamps with or without a zone."
        )
    if not stamped[0]:
        return _floats(left), _floats(right)
    # Seconds, which any moment has, and what is left of them: a float of nanoseconds since 1970 is off by hundreds.
    parts = [_seconds(column) for column in (left, right)]
    first = min((int(whole[known].min()) for whole, _, known in parts if known.any()), default=0)
    found = []
    for whole, rest, known in parts:
        found.append(np.where(known, (whole - first).astype(np.float64) + rest, np.nan))
    return found[0], found[1]


def _seconds(column: pa.ChunkedArray) -> tuple[Ints, Floats, npt.NDArray[np.bool_]]:
    """Whole seconds since 1970, the part of a second beyond, and whether there is a moment at all."""
    kind = column.type
    if pa.types.is_date(kind):
        column, kind = column.cast(pa.timestamp("ms")), pa.timestamp("ms")
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
    known = np.asarray(column.is_valid().to_numpy(), np.bool_)
    count = np.asarray(column.cast(pa.int64()).fill_null(0).to_numpy(), np.int64)
    whole, rest = np.divmod(count, ticks)
    return whole, rest / ticks, known


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _floats(column: pa.ChunkedArray) -> Floats:
    numbers = np.asarray(column.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy(), np.float64).copy()
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def nearest(base_time: Floats, time: Floats, base_group: Ints, group: Ints, tolerance: float) -> tuple[Ints, Floats]:
    """For each base time the nearest other row of the same group within the tolerance, or -1; and the skews of those.

    Of two equally near ones the earlier is taken, of equal times the first row. NaN times and groups below 0 match
    nothing.
    """
    usable = np.flatnonzero(~np.isnan(time) & (group >= 0))
    usable = usable[np.lexsort((usable, time[usable], group[usable]))]
    times, groups = time[usable], group[usable]
    match = np.full(len(base_time), -1, np.int64)
    asked = np.flatnonzero(~np.isnan(base_time) & (base_group >= 0))
    asked = asked[np.argsort(base_group[asked], kind="stable")]
    bounds = np.flatnonzero(np.diff(base_group[asked], prepend=-1, append=-1))
    for start, stop in itertools.pairwise(bounds):
        rows = asked[start:stop]
        low, high = (
            np.searchsorted(groups, base_group[rows[0]], "left"),
            np.searchsorted(groups, base_group[rows[0]], "right"),
        )
        if low == high:
            continue
        after = low + np.searchsorted(times[low:high], base_time[rows], "left")
        before = np.maximum(after - 1, low)
        before = low + np.searchsorted(times[low:high], times[before], "left")  # the first of its time
        after = np.minimum(after, high - 1)
        earlier = np.abs(times[before] - base_time[rows]) <= np.abs(times[after] - base_time[rows])
        best = np.where(earlier, before, after)
        near = np.abs(times[best] - base_time[rows]) <= tolerance
        match[rows[near]] = usable[best[near]]
    matched = np.flatnonzero(match >= 0)
    return match, time[match[matched]] - base_time[matched]


def estimate_offset(base_time: Floats, time: Floats, tolerance: float, largest: float | None = None) -> float:
    """What added to `time` makes the most of its times meet a base time.

    The mode of all differences within `largest` in steps of half a tolerance, then the median of those near it. Times
    at a steady beat fit at every multiple of it; the smallest such offset is taken.
    """
    largest = 100 * tolerance if largest is None else largest
    bases, times = np.sort(base_time[~np.isnan(base_time)]), np.sort(time[~np.isnan(time)])
    if not len(bases) or not len(times) or tolerance <= 0:
        return 0.0
    low, high = np.searchsorted(times, bases - largest), np.searchsorted(times, bases + largest, "right")
    # An even choice of the records where there are too many pairs.
    step = max(1, -(-int((high - low).sum()) // OFFSET_PAIRS))
    differences = np.concatenate(
        [b - times[lo:hi] for b, lo, hi in zip(bases[::step], low[::step], high[::step], strict=True)]
    )
    if not len(differences):
        return 0.0
    width = tolerance / 2
    bins, counts = np.unique(np.round(differences / width).astype(np.int64), return_counts=True)
    around = np.array([counts[(bins >= b - 1) & (bins <= b + 1)].sum() for b in bins]) if len(bins) < 5000 else counts
    best = around >= 0.98 * around.max()
    centre = width * bins[best][np.argmin(np.abs(bins[best]))]
    near = differences[np.abs(differences - centre) <= tolerance]
    return float(np.median(near))


def _path_columns(table: Table, columns: Sequence[str], named: Sequence[str] = ()) -> dict[str, bool]:
    """Columns whose cells may name files: structs of bytes and path, words that end like media, and those named so."""
    endings = tuple(ending for kind in MEDIA_ENDINGS.values() for ending in kind)
    found: dict[str, bool] = {}
    for name in columns:
        kind = table.schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind) and "path" in {field.name for field in kind}:
            found[name] = True
        elif _family(kind) == "word":
            words = [cell for cell in cells_of(table.head(1000, [name]).column(name)) if isinstance(cell, str)]
            alike = sum(word.lower().endswith(endings) for word in words) >= 0.9 * len(words)
            if name in named or (words and alike):
                found[name] = True
    return found


def _inside(folder: Path, name: str) -> Path | None:
    try:
        return inside(folder, name)
    except (OSError, RuntimeError, ValueError):
        return None  # too long a name, links in a circle
