"""A file that holds for a while what memory need not.

Here        Spill; PIECE_BYTES, by which its file grows.
Elsewhere   what is put there (saved.py).
Promise     what is taken is what was put, bit for bit. The disk's blocks are there before anything is written to them,
            so that a full disk is an error of one line and no fault in the middle of a copy. Freed space is used again,
            in the tightest room that fits; the file has no name once it is open, so that nothing is left of it however
            the process ends.

Copies are made by one thread, in the order in which they were asked for: so a place that was freed and given again is
written only after what was asked of it before.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dougong.core.errors import RunError
from dougong.core.sizes import bytes_as_text

PIECE_BYTES: Final = 64 * 2**20
AHEAD_BYTES: Final = 64 * 2**20
"""So much may wait to be written; it is still in memory meanwhile."""


class _Room(NamedTuple):
    piece: int
    begin: int
    size: int


class Spill:
    """Space in a file, given out and taken back."""

    def __init__(
        self, folder: Path | None = None, *, piece_bytes: int = PIECE_BYTES, ahead_bytes: int = AHEAD_BYTES
    ) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._piece_bytes, self._ahead_bytes = piece_bytes, ahead_bytes
        number, name = tempfile.mkstemp(prefix="saved-", dir=self._folder)
        os.unlink(name)
        self._file = number
        weakref.finalize(self, os.close, number)
        self._pieces: list[np.ndarray] = []
        self._free: list[_Room] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spill")
        self._ahead: deque[tuple[Future[None], int]] = deque()
        # What is let go may be so at any moment and in any thread; it is sorted in when room is asked for.
        self._let_go: deque[_Room] = deque()

    @property
    def used_bytes(self) -> int:
        """That are given out now."""
        self._sort_in()
        return self.file_bytes - sum(room.size for room in self._free)

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._file).st_size

    def put(self, flat: Tensor) -> Spilled:
        """Begin to write these bytes.

        Raises:
            RunError: the disk is full.
        """
        room = self._take_room(max(1, flat.numel()))
        written = self._thread.submit(_write, self._at(room, flat.numel()), flat)
        self._ahead.append((written, flat.numel()))
        while self._ahead and (self._ahead[0][0].done() or sum(size for _, size in self._ahead) > self._ahead_bytes):
            self._ahead.popleft()[0].result()
        return Spilled(self, room, flat.numel(), written)

    def read(self, room: _Room, size: int) -> Future[Tensor]:
        return self._thread.submit(_read, self._at(room, size))

    def give_back(self, room: _Room) -> None:
        self._let_go.append(room)

    def _sort_in(self) -> None:
        while self._let_go:
            self._free.append(self._let_go.popleft())
        self._free.sort()
        merged: list[_Room] = []
        for each in self._free:
            last = merged[-1] if merged else None
            if last is not None and last.piece == each.piece and last.begin + last.size == each.begin:
                merged[-1] = last._replace(size=last.size + each.size)
            else:
                merged.append(each)
        self._free = merged

    def _at(self, room: _Room, size: int) -> np.ndarray:
        return self._pieces[room.piece][room.begin : room.begin + size]

    def _take_room(self, size: int) -> _Room:
        size = -(-size // 64) * 64
        self._sort_in()
        fitting = [place for place, room in enumerate(self._free) if room.size >= size]
        if not fitting:
            self._grow(max(size, self._piece_bytes))
            fitting = [len(self._free) - 1]
        # The tightest one: large rooms stay for what is large.
        place = min(fitting, key=lambda each: self._free[each].size)
        room = self._free.pop(place)
        if room.size > size:
            self._free.insert(place, room._replace(begin=room.begin + size, size=room.size - size))
        return room._replace(size=size)

    def _grow(self, size: int) -> None:
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        begin = self.file_bytes
        try:
            os.posix_fallocate(self._file, begin, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            os.ftruncate(self._file, begin)
            raise RunError(
                f"memory.saved=disk: {self._folder} has no room for {bytes_as_text(size)} beside the "
                f"{bytes_as_text(begin)} that a step has saved there so far. Use a smaller data.loader.batch_size with "
                "a larger train.accumulation, memory.recompute: blocks, or a folder on a larger disk."
            ) from None
        mapped = mmap.mmap(self._file, size, offset=begin)
        self._pieces.append(np.frombuffer(mapped, dtype=np.uint8))
        self._free.append(_Room(len(self._pieces) - 1, 0, size))


class Spilled:
    """Bytes in the file, until nobody refers to this."""

    def __init__(self, spill: Spill, room: _Room, size: int, written: Future[None]) -> None:
        self._spill, self._room, self._size, self._written = spill, room, size, written
        self._back: Future[Tensor] | None = None

    def fetch(self) -> None:
        if self._back is None:
            self._back = self._spill.read(self._room, self._size)

    def take(self) -> Tensor:
        self.fetch()
        assert self._back is not None
        self._written.result()  # an error in writing is told here at the latest
        found, self._back = self._back.result(), None
        return found

    def __del__(self) -> None:
        self._spill.give_back(self._room)


def _write(at: np.ndarray, flat: Tensor) -> None:
    torch.from_numpy(at).copy_(flat)


def _read(at: np.ndarray) -> Tensor:
    return torch.from_numpy(at).clone()
