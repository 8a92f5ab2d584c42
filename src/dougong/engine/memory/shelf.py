"""Tensors that lie in files, and look like any others.

Here        Shelf; Slot; Copy, of some of them in memory; `weights_in`, in which a model is built whose weights never
            were in memory together.
Elsewhere   which tensors lie there, and when which are needed (offload.py); files that outlive a run
            (engine/checkpoint.py).
Promise     each unit is one safetensors file, mapped: what reads or writes a tensor reads or writes the file, of which
            the system keeps as much in memory as there is room for. All room on the disk is taken before the first
            number is written. Nothing of it is needed after a kill: a run goes on from its checkpoint.

The system reads a page when it is first touched, and writes one when it needs the room: a few kilobytes at a time,
while the work waits. What is needed next is therefore copied into memory beside the work, megabytes at a time and past
the system's own store (O_DIRECT), and copied back when it is done with (Rajbhandari et al. 2021, ZeRO-Infinity,
arXiv:2104.07857). Where that cannot be, a unit is asked for while the one before it works (posix_fadvise), and written
out when it is done (fdatasync).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text

ALIGNED: Final = 4096
"""Bytes: where what is read past the system's store has to begin and end."""

PIECE: Final = 4 * 2**20
"""Bytes that are read or written at once."""

MOST_STORING: Final = 16 * 2**20
"""Bytes in memory that wait to be written; beyond it, who hands in more waits."""

_NAMES: Final = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Slot(NamedTuple):
    """Of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Copy:
    """Of tensors that lie next to each other, in memory of its own."""

    def __init__(self, file: _File, kind: str, names: Sequence[str]) -> None:
        first = file.places[kind, names[0]][0]
        last, slot = file.places[kind, names[-1]]
        self.file, self.place, self.length = file, first, last + _aligned(slot.nbytes) - first
        # Pages of its own: they begin where a page does, and are given back with it.
        self.memory = mmap.mmap(-1, self.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a hint: the system may know no such pages
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        content = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.tensors = {name: _seen(content, begin - first, slot) for name, begin, slot in file.among(kind, names)}
        self._coming: list[Future[None]] = []

    def wait(self) -> Mapping[str, Tensor]:
        """The tensors, once they are there."""
        while self._coming:
            self._coming.pop().result()
        return self.tensors

    def begin(self, beside: ThreadPoolExecutor, move: Callable[[int, memoryview, int], None]) -> list[Future[None]]:
        """Read or write all of it, a piece at a time."""
        whole = memoryview(self.memory)
        self._coming = [
            beside.submit(move, self.file.direct, whole[begin : begin + PIECE], self.place + begin)
            for begin in range(0, self.length, PIECE)
        ]
        return self._coming


class Shelf:
    """Mapped tensors by unit, kind and name. A unit's tensors of a kind lie next to each other."""

    def __init__(self, folder: Path, units: Mapping[str, Mapping[str, Mapping[str, Slot]]]) -> None:
        """Takes the room, in `folder`, which is emptied first. All numbers are 0.

        Raises:
            ConfigError: the folder cannot be written, or has no room.
        """
        self.folder = folder
        total = sum(slot.nbytes for kinds in units.values() for slots in kinds.values() for slot in slots.values())
        self._beside = ThreadPoolExecutor(max_workers=3, thread_name_prefix="shelf")
        self._writing: dict[str, Future[None]] = {}
        self._storing: deque[Copy] = deque()
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            if free < total:
                raise OSError(errno.ENOSPC, f"{bytes_as_text(free)} are free")
            self._files = {name: _File(folder / f"{name}.safetensors", kinds) for name, kinds in units.items()}
        except OSError as error:
            self._beside.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(
                f"memory.offload takes {bytes_as_text(total)} in {folder}, which cannot be had there "
                f"({error.strerror or error}). Name a folder with more room in memory.offload.folder."
            ) from None
        self.nbytes = total

    def tensor(self, unit: str, kind: str, name: str) -> Tensor:
        """That lies there."""
        return self._files[unit].tensors[kind, name]

    def copy_of(self, unit: str, kind: str, names: Sequence[str]) -> Copy:
        """Of tensors that lie next to each other, which begins to arrive at once."""
        copy = Copy(self._files[unit], kind, names)
        copy.begin(self._beside, _read)
        return copy

    def room_for(self, unit: str, kind: str, names: Sequence[str]) -> Copy:
        """The same without numbers, to be filled and stored."""
        return Copy(self._files[unit], kind, names)

    def store(self, copy: Copy) -> None:
        """Begin to write it where it lies. Until it is `stored`, what lies there is not to be touched."""
        while self._storing and sum(each.length for each in self._storing) + copy.length > MOST_STORING:
            self._storing.popleft().wait()
        copy.begin(self._beside, _write)
        self._storing.append(copy)

    def stored(self) -> None:
        """Wait until all that was to be stored lies there.

        Raises:
            OSError: it cannot be written.
        """
        while self._storing:
            self._storing.popleft().wait()

    def write(self, unit: str, kind: str, name: str, tensor: Tensor) -> None:
        """Put numbers there. Unlike copying into the tensor, it does not read what was there before."""
        file = self._files[unit]
        raw = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        _write(file.descriptor, raw, file.places[kind, name][0])

    def soon(self, unit: str, kinds: Collection[str]) -> None:
        """They are needed next: begin to read what is not in memory."""
        file = self._files[unit]
        for kind in kinds:
            if kind in file.spans:
                first, last = file.spans[kind]
                self._beside.submit(_read_ahead, file.descriptor, first, last - first)

    def behind(self, unit: str) -> None:
        """It has been changed, and will not be for a while: begin to write it out."""
        before = self._writing.pop(unit, None)
        if before is not None:
            before.result()
        self._writing[unit] = self._beside.submit(os.fdatasync, self._files[unit].descriptor)

    def settle(self) -> None:
        """Wait until all that is being written is on the disk.

        Raises:
            OSError: it cannot be.
        """
        self.stored()
        while self._writing:
            self._writing.popitem()[1].result()

    def close(self) -> None:
        """Give the room back. Tensors that somebody still has stay readable."""
        self._beside.shutdown(cancel_futures=True)
        self._writing.clear()
        self._storing.clear()
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _File:
    """One unit's: a header as safetensors has it, and the tensors."""

    def __init__(self, path: Path, kinds: Mapping[str, Mapping[str, Slot]]) -> None:
        header: dict[str, object] = {}
        places: dict[tuple[str, str], tuple[int, Slot]] = {}
        spans = {}
        end = 0
        for kind, slots in kinds.items():
            first = end
            for name, slot in slots.items():
                places[kind, name] = end, slot
                header[f"{kind}/{name}"] = _entry(_NAMES[slot.dtype], slot.shape, end, slot.nbytes)
                over = _aligned(slot.nbytes) - slot.nbytes
                if over:  # the format knows no holes
                    header[f"nothing/{len(places)}"] = _entry("U8", (over,), end + slot.nbytes, over)
                end += slot.nbytes + over
            spans[kind] = first, end
        text = json.dumps(header).encode()
        text += b" " * (_aligned(8 + len(text)) - 8 - len(text))
        begin = 8 + len(text)
        self.spans = {kind: (begin + first, begin + last) for kind, (first, last) in spans.items()}
        self.places = {key: (begin + place, slot) for key, (place, slot) in places.items()}
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self.descriptor, 0, begin + end)
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)
        self.direct = _past_the_store(path, self.descriptor)
        content = torch.frombuffer(mmap.mmap(self.descriptor, begin + end), dtype=torch.uint8)
        self.tensors = {key: _seen(content, place, slot) for key, (place, slot) in self.places.items()}

    def among(self, kind: str, names: Sequence[str]) -> Iterator[tuple[str, int, Slot]]:
        """Where each lies."""
        for name in names:
            yield name, *self.places[kind, name]

    def close(self) -> None:
        self.tensors.clear()
        if self.direct != self.descriptor:
            os.close(self.direct)
        os.close(self.descriptor)


def _aligned(size: int) -> int:
    return size + -size % ALIGNED


def _entry(dtype: str, shape: Sequence[int], place: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}


def _seen(content: Tensor, place: int, slot: Slot) -> Tensor:
    return content[place : place + slot.nbytes].view(slot.dtype).view(slot.shape)


def _past_the_store(path: Path, descriptor: int) -> int:
    """Of the same file, to read and write without the system's keeping what passes; else the one there is."""
    try:
        direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):  # memory file systems, and other systems than Linux
        return descriptor
    try:
        os.preadv(direct, [mmap.mmap(-1, ALIGNED)], 0)
    except OSError:  # a disk of larger sectors
        os.close(direct)
        return descriptor
    return direct


def _read(descriptor: int, into: memoryview, place: int) -> None:
    while len(into):
        read = os.preadv(descriptor, [into], place)
        if not read:
            raise OSError(errno.EIO, f"a file of memory.offload ends at {place}, where more was put")
        into, place = into[read:], place + read


def _write(descriptor: int, raw: memoryview, place: int) -> None:
    while len(raw):
        written = os.pwritev(descriptor, [raw], place)
        raw, place = raw[written:], place + written


def _read_ahead(descriptor: int, place: int, length: int) -> None:
    os.posix_fadvise(descriptor, place, length, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def weights_in(folder: Path) -> Iterator[None]:
    """Weights that are made inside lie in files of this folder, which are gone with them.

    Every module that is built gives up each weight as it is made, so that most at one time is one of them. The numbers
    are those that the model would have had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known: set[int] = set()

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.untyped_storage().data_ptr() in known or not parameter.numel():
            return None  # as it is
        lying = nn.Parameter(_mapped_like(parameter.detach(), folder), requires_grad=parameter.requires_grad)
        known.add(lying.untyped_storage().data_ptr())
        return lying

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        handle.remove()


def _mapped_like(tensor: Tensor, folder: Path) -> Tensor:
    descriptor, path = tempfile.mkstemp(dir=folder)
    try:
        os.unlink(path)  # the room is given back with the tensor
        os.posix_fallocate(descriptor, 0, tensor.nbytes)
        content = torch.frombuffer(mmap.mmap(descriptor, tensor.nbytes), dtype=tensor.dtype)
    except OSError as error:
        raise ConfigError(
            f"memory.offload needs {bytes_as_text(tensor.nbytes)} more in {folder} ({error.strerror}). Name a folder "
            "with more room in memory.offload.folder."
        ) from None
    finally:
        os.close(descriptor)
    found = content.view(tensor.shape)
    found.copy_(tensor)
    return found
