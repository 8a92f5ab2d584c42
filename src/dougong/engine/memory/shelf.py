"""Tensors that lie in files, and look like any others.

Here        Shelf; Slot; `weights_in`, in which a model is built whose weights never were in memory together.
Elsewhere   which tensors lie there, and when which are needed (offload.py); files that outlive a run
            (engine/checkpoint.py).
Promise     each unit is one safetensors file, mapped: what reads or writes a tensor reads or writes the file, of which
            the system keeps as much in memory as there is room for. All room on the disk is taken before the first
            number is written. Nothing of it is needed after a kill: a run goes on from its checkpoint.

The system would read a page when it is first touched, and write one when it needs the room. Here a unit is asked for
while the one before it works (posix_fadvise), and written out when it is done (fdatasync, on threads beside the work).
After Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), who read into and write out of buffers of their own.
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
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text

ALIGNED: Final = 64
"""Bytes: what the widest instructions load at once."""

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


class Shelf:
    """Mapped tensors by unit, kind and name. A unit's tensors of a kind lie next to each other."""

    def __init__(self, folder: Path, units: Mapping[str, Mapping[str, Mapping[str, Slot]]]) -> None:
        """Takes the room, in `folder`, which is emptied first. All numbers are 0.

        Raises:
            ConfigError: the folder cannot be written, or has no room.
        """
        self.folder = folder
        total = sum(slot.nbytes for kinds in units.values() for slots in kinds.values() for slot in slots.values())
        self._beside = ThreadPoolExecutor(max_workers=2, thread_name_prefix="shelf")
        self._writing: dict[str, Future[None]] = {}
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

    def write(self, unit: str, kind: str, name: str, tensor: Tensor) -> None:
        """Put numbers there. Unlike copying into the tensor, it does not read what was there before."""
        file = self._files[unit]
        raw = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        place = file.places[kind, name]
        while len(raw):
            written = os.pwrite(file.descriptor, raw, place)
            raw, place = raw[written:], place + written

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
        """Wait until all that is being written out is on the disk.

        Raises:
            OSError: it cannot be.
        """
        while self._writing:
            self._writing.popitem()[1].result()

    def close(self) -> None:
        """Give the room back. Tensors that somebody still has stay readable."""
        self._beside.shutdown(cancel_futures=True)
        self._writing.clear()
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
                header[f"{kind}/{name}"] = {
                    "dtype": _NAMES[slot.dtype],
                    "shape": list(slot.shape),
                    "data_offsets": [end, end + slot.nbytes],
                }
                end += slot.nbytes
            spans[kind] = first, end
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        begin = 8 + len(text)
        self.spans = {kind: (begin + first, begin + last) for kind, (first, last) in spans.items()}
        self.places = {key: begin + place for key, (place, _) in places.items()}
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self.descriptor, 0, begin + end)
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)
        content = torch.frombuffer(mmap.mmap(self.descriptor, begin + end), dtype=torch.uint8)
        self.tensors = {
            key: content[begin + place : begin + place + slot.nbytes].view(slot.dtype).view(slot.shape)
            for key, (place, slot) in places.items()
        }

    def close(self) -> None:
        self.tensors.clear()
        os.close(self.descriptor)


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
