"""Opens what records live in, and reads it in chunks.

Here        open_table: Parquet (a file, or a folder of shards), CSV, JSONL, a folder of class folders.
Elsewhere   what the columns mean (data/columns.py); what a cell becomes (data/modality/).
Promise     Parquet is read a row group at a time, so a table may be larger than memory; the others are held whole
            and refused above a size that says so.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from dougong.core.errors import DataError

LARGEST_TEXT_TABLE_BYTES: Final = 2 * 2**30
ROWS_PER_CHUNK: Final = 5000
LOOKED_INTO: Final = 8
"""Chunks that stand for a whole table."""

MEDIA_ENDINGS: Final = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".opus"),
    "array": (".npy",),
}


class Table(ABC):
    """Rows numbered from 0, in chunks of neighbouring rows."""

    def __init__(self, path: Path, folder: Path, schema: pa.Schema, chunk_rows: list[int]) -> None:
        self.path = path
        self.folder = folder
        """Paths in cells are relative to it, and may not leave it."""
        self.schema = schema
        self.first_rows = [0]
        for count in chunk_rows:
            self.first_rows.append(self.first_rows[-1] + count)

    @property
    def num_rows(self) -> int:
        return self.first_rows[-1]

    @property
    def num_chunks(self) -> int:
        return len(self.first_rows) - 1

    def rows_of(self, chunk: int) -> range:
        return range(self.first_rows[chunk], self.first_rows[chunk + 1])

    def numbers_of(self, chunk: int) -> npt.NDArray[np.int64]:
        """The rows' numbers in what was opened first."""
        return np.asarray(self.rows_of(chunk), np.int64)

    @abstractmethod
    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        """These columns of one chunk."""

    def bytes_of(self, chunk: int) -> int:
        """About what one chunk takes in memory."""
        return int(self.read(chunk, self.schema.names).nbytes)

    def first(self, chunk: int, num_rows: int, columns: list[str]) -> pa.Table:
        """The same of a chunk's first rows alone."""
        return self.read(chunk, columns).slice(0, num_rows)

    def head(self, num_rows: int, columns: list[str] | None = None) -> pa.Table:
        """Rows from all over the table, at most about `num_rows`, in order; for looking at, not for training."""
        chosen = self._spread(LOOKED_INTO)
        share = -(-num_rows // len(chosen))
        return pa.concat_tables([self.first(chunk, share, columns or self.schema.names) for chunk in chosen])

    def records(self, rows: Sequence[int], columns: list[str]) -> list[dict[str, Any]]:
        """The records of these numbers, in this order; for looking at a few."""
        found: dict[int, dict[str, Any]] = {}
        wanted = set(rows)
        for chunk in range(self.num_chunks):
            numbers = self.numbers_of(chunk).tolist()
            places = [place for place, number in enumerate(numbers) if number in wanted]
            if places:
                held = self.read(chunk, columns).take(pa.array(places, pa.int64()))
                cells = {column: cells_of(held.column(column)) for column in columns}
                for index, place in enumerate(places):
                    found[numbers[place]] = {column: cells[column][index] for column in columns}
        return [found[row] for row in rows]

    def _spread(self, wanted: int) -> list[int]:
        """Some chunks, from all over the table."""
        last = self.num_chunks - 1
        return sorted({round(place * last / max(1, wanted - 1)) for place in range(wanted)})

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column; for targets and groups, which are small."""
        return pa.chunked_array(
            [piece for chunk in range(self.num_chunks) for piece in self.read(chunk, [name]).column(name).chunks],
            type=self.schema.field(name).type,
        )


class _InMemory(Table):
    """CSV, JSONL, and rows that a caller holds."""

    def __init__(self, path: Path, folder: Path, table: pa.Table) -> None:
        counts = [min(ROWS_PER_CHUNK, table.num_rows - start) for start in range(0, table.num_rows, ROWS_PER_CHUNK)]
        super().__init__(path, folder, table.schema, counts)
        self._table = table

    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        rows = self.rows_of(chunk)
        return self._table.select(columns).slice(rows.start, len(rows))


class _Parquet(Table):
    """One file, or the shards of a folder in the order of their names. A chunk is a row group."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        try:
            self._files = []
            for file in files:
                self._files.append(pq.ParquetFile(file))
        except (pa.ArrowException, OSError) as error:
            broken = files[len(self._files)]
            raise DataError(f"{broken} is not a whole Parquet file ({_first_line(error)}). Write it again.") from None
        schemas = [file.schema_arrow for file in self._files]
        for file, schema in zip(files, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise DataError(
                    f"{file.name} has other columns than {files[0].name}: shards of one table are alike. "
                    "Write them with one schema, or move the odd one out."
                )
        groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.metadata.num_row_groups)]
        groups = [(f, g) for f, g in groups if self._files[f].metadata.row_group(g).num_rows]
        counts = [self._files[f].metadata.row_group(g).num_rows for f, g in groups]
        super().__init__(path, path if path.is_dir() else path.parent, schemas[0], counts)
        self._names = [file.name for file in files]
        self._groups = groups

    def bytes_of(self, chunk: int) -> int:
        return int(self._encoded_bytes(chunk) * self._growth)

    @functools.cached_property
    def _growth(self) -> float:
        """How much larger rows are in memory than in the file, where a value that repeats stands once."""
        looked_at = [(chunk, self.read(chunk, self.schema.names).nbytes) for chunk in self._spread(LOOKED_INTO)]
        return max(1.0, *(float(held) / max(1, self._encoded_bytes(chunk)) for chunk, held in looked_at))

    def _encoded_bytes(self, chunk: int) -> int:
        file, group = self._groups[chunk]
        return int(self._files[file].metadata.row_group(group).total_byte_size)

    def read(self, chunk: int, columns: list[str]) -> pa.Table:
        file, group = self._groups[chunk]
        with self._damage_said(chunk):
            return self._files[file].read_row_group(group, columns=columns, use_threads=False)

    def first(self, chunk: int, num_rows: int, columns: list[str]) -> pa.Table:
        # A row group may be the whole file: no more of it is read than what is wanted.
        file, group = self._groups[chunk]
        with self._damage_said(chunk):
            pieces = self._files[file].iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False)
            return pa.Table.from_batches([next(pieces)]).select(columns)

    @contextlib.contextmanager
    def _damage_said(self, chunk: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            file, group = self._groups[chunk]
            raise DataError(
                f"{self._names[file]}: row group {group} is damaged ({_first_line(error)}). Write it again."
            ) from None


def open_table(path: str | Path) -> Table:
    """Open a table by its kind.

    Raises:
        DataError: there is nothing, it is empty, or it is no kind of table that is known here.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a Parquet, CSV or JSONL file, or a folder of class folders.")
    if path.is_dir():
        table: Table = _Parquet(path) if any(path.glob("*.parquet")) else _open_class_folders(path)
    else:
        opener = {".parquet": _Parquet, ".csv": _open_csv, ".jsonl": _open_jsonl, ".ndjson": _open_jsonl}
        if path.suffix.lower() not in opener:
            raise DataError(
                f"{path.name} ends in {path.suffix!r}, which is no kind of table known here. "
                "Use .parquet, .csv, .jsonl, or a folder of class folders."
            )
        table = opener[path.suffix.lower()](path)
    if table.num_rows == 0:
        raise DataError(f"{path} holds no records.")
    twice = sorted({name for name in table.schema.names if table.schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{path.name} has two columns {twice[0]!r}: give each its own name.")
    return table


def table_of_rows(rows: pa.Table, folder: Path) -> Table:
    """Rows that are in memory already, with media paths relative to `folder`."""
    return _InMemory(folder, folder, rows)


def _check_fits(path: Path) -> None:
    if path.stat().st_size > LARGEST_TEXT_TABLE_BYTES:
        raise DataError(
            f"{path.name} has {path.stat().st_size / 2**30:.1f} GiB and would be held in memory whole. "
            "Write it as Parquet, which streams."
        )


def _whole(path: Path) -> int:
    """Read in one block: then every value, not only the first ones, says what kind a column is of, and a row may be
    as long as it likes."""
    return max(2**20, min(path.stat().st_size + 1, 2**31 - 1))


def _open_csv(path: Path) -> Table:
    _check_fits(path)
    try:
        # A byte that is not UTF-8 is its own record's trouble, not a column's.
        options = pyarrow.csv.ConvertOptions(check_utf8=False)
        rows = pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(block_size=_whole(path)), convert_options=options)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name} is not a CSV table with one header line: {_first_line(error)}") from None
    return _InMemory(path, path.parent, _without_empty_words(rows))


def _without_empty_words(rows: pa.Table) -> pa.Table:
    """In columns of words an empty cell is a missing one, and "NA" or "null" are words as they would be in Parquet; in
    columns of numbers those are missing numbers, which reading has seen to."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_string(field.type):
            column = rows.column(place)
            empty = pc.equal(pc.binary_length(column), 0)
            rows = rows.set_column(place, field, pc.if_else(empty, pa.scalar(None, field.type), column))
    return rows


def _open_jsonl(path: Path) -> Table:
    _check_fits(path)
    try:
        rows = pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=_whole(path)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path.name} is not one JSON object a line with the same kinds of values: {_first_line(error)}"
        ) from None
    return _InMemory(path, path.parent, rows)


def _open_class_folders(path: Path) -> Table:
    """A class a folder, a record a file. The column takes its name from what most files are."""
    kinds = {ending: kind for kind, endings in MEDIA_ENDINGS.items() for ending in endings}
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in MEDIA_ENDINGS}
    for folder in sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith(".")):
        for file in sorted(folder.rglob("*")):
            kind = kinds.get(file.suffix.lower())
            if kind is not None:
                found[kind].append((file.relative_to(path).as_posix(), folder.name))
    kind, rows = max(found.items(), key=lambda item: len(item[1]))
    if not rows:
        raise DataError(
            f"{path} has no class folders with images, sounds or .npy arrays in them, and no Parquet files."
        )
    table = pa.table({kind: [name for name, _ in rows], "label": [label for _, label in rows]})
    return _InMemory(path, path, table)


def cells_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """The values in Python. A string that is not UTF-8 stays bytes, for its own record to be set aside."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        buffer = scalar.as_buffer() if hasattr(scalar, "as_buffer") else None
        return b"" if buffer is None else buffer.to_pybytes()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
