"""Which records come when, and batches of them, decoded ahead by worker processes.

Here        LoaderConfig, Loader.
Elsewhere   putting one batch together (data/collate.py); where a run stands (data/position.py).
Promise     the order follows from the seed, the epoch and the row counts alone: a run goes on from any position
            without decoding what came before, to the same batches, with any number of workers. Several processes share
            out each batch of that same order, and decode only their own part. Memory is bounded by one window of
            rows, whatever the table's size.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import field_validator, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError, DataError
from dougong.core.seeds import derive_seed
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request, View
from dougong.data.corruption import CorruptConfig, Corruption
from dougong.data.modality.audio import AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.medium import media_key
from dougong.data.position import WHOLE, Position, Share
from dougong.data.preparation import Preparation
from dougong.data.table import Table, cells_of

Indices = npt.NDArray[np.int64]
AHEAD: Final = 2
"""Batches in the making per worker."""

BLOCK_BYTES: Final = 32 * 2**20
ROWS_AT_ONCE: Final = 1000


class LoaderConfig(Config):
    """How records become batches."""

    batch_size: int = 64
    """Records of one batch."""

    group_by: str | None = None
    """A media column: records that share its medium come together. "auto" finds one; None does not group."""

    records_per_medium: int | None = None
    """Of the records that share a medium, at most so many come together; the others come another time."""

    window_rows: int = 100_000
    """Rows are shuffled within windows of about so many, since a larger table is never held whole."""

    window_bytes: int = 512 * 2**20
    """The same, in memory. One row group is the least."""

    workers: int | None = None
    """Processes that decode. None: none for what is cheap to decode or on 2 cores, else up to 4."""

    cache_bytes: int = 512 * 2**20
    """Decoded media kept, in each worker."""

    @field_validator("batch_size", "window_rows", "window_bytes", "records_per_medium")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{value} must be at least 1.")
        return value

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, workers: int | None) -> int | None:
        if workers is not None and workers < 0:
            raise ValueError(f"{workers} must be 0 (decode in this process) or more.")
        return workers

    @model_validator(mode="after")
    def _something_to_limit(self) -> LoaderConfig:
        if self.records_per_medium is not None and self.group_by is None:
            raise ValueError("records_per_medium limits groups, and group_by makes none. Name a media column there.")
        return self


class _Window(NamedTuple):
    """Neighbours in the order of an epoch, held together."""

    chunks: tuple[int, ...]
    num_rows: int


class Loader:
    """The batches of a table."""

    def __init__(
        self,
        table: Table,
        preparation: Preparation,
        config: LoaderConfig,
        *,
        seed: int = 0,
        train: bool = False,
        views: tuple[View, ...] = (),
        one_view_a_batch: bool = False,
        withhold: float = 0.0,
        corrupt: CorruptConfig | None = None,
        corruptions: Sequence[Corruption] = (),
        quality: bool = False,
        withheld_beside: bool = False,
        spared: Sequence[str] = (),
        share: Share = WHOLE,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """`train` shuffles and augments; `share` is the part of each batch that comes here; `note` is told what is
        decoded in this process; the other settings are data/collate.py's. Batches and positions count as without a
        share, and a part may be empty.

        Raises:
            ConfigError: `group_by`, a view or a corruption names what is not there.
            DataError: the table has no records, or lacks a column of the preparation.
        """
        self._table, self._config, self._seed, self._train = table, config, seed, train
        self._share, self._note = share, note
        for view in views:
            strange = [name for name in (*view.keep, *view.beside) if name not in preparation.modalities]
            if strange:
                known = ", ".join(preparation.modalities)
                raise ConfigError(f"a view names {strange[0]!r}, which is no modality. Use some of {known}.")
        missing = [name for name in preparation.columns if name not in table.schema.names]
        if missing:
            raise DataError(f"{table.path.name} lacks the column {missing[0]!r}. Leave its cells empty where unknown.")
        if table.num_rows == 0:
            raise DataError(f"{table.path.name} holds no records.")
        target = preparation.target.name
        self._columns = [*preparation.columns, *([target] if target in table.schema.names else [])]
        self._group_by = self._find_group(preparation) if train else None
        self._collator = Collator(
            preparation,
            table.folder,
            seed=seed,
            augment=train,
            views=views,
            one_view_a_batch=one_view_a_batch,
            withhold=withhold,
            corrupt=corrupt,
            corruptions=corruptions,
            quality=quality,
            withheld_beside=withheld_beside,
            spared=spared,
            cache_bytes=config.cache_bytes,
        )
        self.workers = _choose_workers(config, preparation)
        self._held: tuple[tuple[int, ...], list[pa.Table], list[Indices] | None] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """How many batches one pass has; windows, and so their last batches, may differ a little between epochs."""
        return sum(self._num_batches(window) for window in self._windows(0))

    @property
    def num_rows(self) -> int:
        return self._table.num_rows

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        """Batches without end from `start` on, each with the position after it."""
        yield from self._decoded(self._requests(start, endless=True))

    def one_pass(self) -> Iterator[BatchArrays]:
        """Every record once."""
        for _, batch in self._decoded(self._requests(Position(0, 0), endless=False)):
            yield batch

    # Order ---------------------------------------------------------------------------------------------------

    def _windows(self, epoch: int) -> list[_Window]:
        chunks = np.arange(self._table.num_chunks)
        if self._train:
            np.random.default_rng(derive_seed(self._seed, "chunks", epoch)).shuffle(chunks)
        windows: list[_Window] = []
        held: list[int] = []
        rows = size = 0
        for chunk in map(int, chunks):
            more_rows, more_bytes = len(self._table.rows_of(chunk)), self._table.bytes_of(chunk)
            if held and (rows + more_rows > self._config.window_rows or size + more_bytes > self._config.window_bytes):
                windows.append(_Window(tuple(sorted(held)), rows))
                held, rows, size = [], 0, 0
            held.append(chunk)
            rows, size = rows + more_rows, size + more_bytes
        # Sorted: rows are shuffled later anyway, and a table of one window is then read once.
        return [*windows, _Window(tuple(sorted(held)), rows)]

    def _num_batches(self, window: _Window) -> int:
        return -(-window.num_rows // self._config.batch_size)

    def _requests(self, start: Position, *, endless: bool) -> Iterator[tuple[Position, Request]]:
        epoch, first = start
        while True:
            windows, passed = self._windows(epoch), 0
            total = sum(self._num_batches(window) for window in windows)
            for place, window in enumerate(windows):
                count = self._num_batches(window)
                if passed + count > first:
                    yield from self._window_requests(epoch, place, window, passed, first, total)
                passed += count
            if not endless:
                return
            epoch, first = epoch + 1, 0

    def _window_requests(
        self, epoch: int, place: int, window: _Window, passed: int, first: int, total: int
    ) -> Iterator[tuple[Position, Request]]:
        blocks, groups = self._hold(window)
        rows = np.concatenate([self._table.numbers_of(chunk) for chunk in window.chunks])
        order = self._order(epoch, place, window, groups)
        for inner in range(max(0, first - passed), self._num_batches(window)):
            chosen = order[inner * self._config.batch_size :][: self._config.batch_size]
            number, size = passed + inner, len(chosen)
            chosen = chosen[self._share.of(size)]
            cells = _take(blocks, chosen, self._columns)
            after = Position(epoch, number + 1) if number + 1 < total else Position(epoch + 1, 0)
            yield after, Request(rows[chosen], cells, (epoch, number), self._share, size)

    def _order(self, epoch: int, place: int, window: _Window, groups: list[Indices] | None) -> Indices:
        if not self._train:
            return np.arange(window.num_rows)
        random = np.random.default_rng(derive_seed(self._seed, "order", epoch, place))
        if groups is None:
            return random.permutation(window.num_rows)
        parts: list[Indices] = []
        for group in groups:
            mixed = random.permutation(group)
            most = self._config.records_per_medium or len(mixed)
            parts.extend(mixed[start : start + most] for start in range(0, len(mixed), most))
        return np.concatenate([parts[index] for index in random.permutation(len(parts))])

    def _hold(self, window: _Window) -> tuple[list[pa.Table], list[Indices] | None]:
        """The window's rows, and which of them share a medium; kept while it is the same window."""
        if self._held is None or self._held[0] != window.chunks:
            self._held = None  # let the old rows go before the new ones come
            # What groups need not be read by the model: a model of fewer modalities gets the same batches.
            columns = list(dict.fromkeys([*self._columns, *([self._group_by] if self._group_by else [])]))
            blocks = list(_blocks(self._table.read(chunk, columns) for chunk in window.chunks))
            groups = None if self._group_by is None else _groups(block.column(self._group_by) for block in blocks)
            self._held = (window.chunks, blocks, groups)
        return self._held[1], self._held[2]

    def _find_group(self, preparation: Preparation) -> str | None:
        wanted = self._config.group_by
        media = [
            column
            for modality in preparation.modalities.values()
            if isinstance(modality, ImageModality | AudioModality)
            for column in modality.columns
        ]
        if wanted is None:
            return None
        if wanted != "auto":
            if wanted not in self._table.schema.names:
                known = ", ".join(self._table.schema.names)
                raise ConfigError(f"group_by {wanted!r} is no column of the table. Use one of {known}.")
            return wanted
        sample = self._table.first(0, 2000, media) if media else None
        for column in media:
            assert sample is not None
            cells = cells_of(sample.column(column))
            if len({media_key(cell) for cell in cells}) < 0.5 * len(cells):
                return column
        return None

    # Decoding ------------------------------------------------------------------------------------------------

    def _decoded(self, requests: Iterator[tuple[Position, Request]]) -> Iterator[tuple[Position, BatchArrays]]:
        if self.workers == 0:
            for after, request in requests:
                yield after, self._collator(request, self._note)
            return
        # Spawned: a fork would copy the threads' locks of the tensor library.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, _start_worker, (self._collator,))
        waiting: deque[tuple[Position, Future[BatchArrays]]] = deque()
        try:
            for after, request in requests:
                waiting.append((after, pool.submit(_collate, request)))
                if len(waiting) > AHEAD * self.workers:
                    after, done = waiting.popleft()
                    yield after, done.result()
            while waiting:
                after, done = waiting.popleft()
                yield after, done.result()
        except BrokenProcessPool:
            raise DataError(
                f"a decoding process ended: {self.workers} of them may need more memory than there is. "
                "Use fewer workers, a smaller cache_bytes, or workers: 0."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _blocks(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer pieces, each without gaps: a batch's rows are gathered piece by piece."""
    held: list[pa.Table] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += chunk.nbytes
        if size >= BLOCK_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, size = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _take(blocks: list[pa.Table], chosen: Indices, columns: list[str]) -> dict[str, list[Any]]:
    """The chosen rows' cells, in the order in which they are chosen."""
    starts = np.cumsum([0, *(block.num_rows for block in blocks)])
    block_B = np.searchsorted(starts, chosen, side="right") - 1
    cells: dict[str, list[Any]] = {name: [None] * len(chosen) for name in columns}
    for number in np.unique(block_B):
        places = np.flatnonzero(block_B == number)
        taken = blocks[number].take(pa.array(chosen[places] - starts[number]))
        for name in columns:
            for place, cell in zip(places.tolist(), cells_of(taken.column(name)), strict=True):
                cells[name][place] = cell
    return cells


def _groups(columns: Iterable[pa.ChunkedArray]) -> list[Indices]:
    """Places of rows with the same medium; a row without one stands alone."""
    places: dict[Hashable, list[int]] = {}
    index = 0
    for column in columns:
        for start in range(0, len(column), ROWS_AT_ONCE):  # as Python's own objects all of them would fill the memory
            for cell in cells_of(column.slice(start, ROWS_AT_ONCE)):
                key = media_key(cell)
                places.setdefault(index if key is None else key, []).append(index)
                index += 1
    return [np.array(group, np.int64) for group in places.values()]


def _choose_workers(config: LoaderConfig, preparation: Preparation) -> int:
    if config.workers is not None:
        return config.workers
    costly = any(isinstance(m, ImageModality | AudioModality) for m in preparation.modalities.values())
    return min(4, max(0, (os.cpu_count() or 1) - 2)) if costly else 0


_worker_collator: Collator | None = None


def _start_worker(collator: Collator) -> None:
    global _worker_collator
    # Ctrl-C reaches the whole process group; the parent decides what to do with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_collator = collator


def _collate(request: Request) -> BatchArrays:
    assert _worker_collator is not None
    return _worker_collator(request)
