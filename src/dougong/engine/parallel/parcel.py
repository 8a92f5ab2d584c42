"""A model's state, or its output, from one rank to another.

Here        `pack`, `unpack`, `fresh` (a nested value as tensors and an outline of it); Post, which sends and receives.
Elsewhere   what is sent when (pipeline.py).
Promise     what arrives is what was sent, bit for bit, of any shapes, which the receiver need not know. Nothing is
            unpickled: an outline is JSON, and only the types that the model names are made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNED: Final = 16
"""Bytes, to which each tensor is placed: the widest type may begin there."""


class Parcel(NamedTuple):
    """A nested value, taken apart."""

    outline: Any
    """As JSON can hold it."""

    tensors: list[Tensor]


def pack(value: Any) -> Parcel:
    """Tensors, numbers, text and None, in named tuples, tuples, lists and dicts with text as keys."""
    tensors: list[Tensor] = []
    return Parcel(_outline(value, tensors), tensors)


# Not a function within pack: one that calls itself holds what it closes over, all these tensors, until the garbage
# collector comes by.
def _outline(inner: Any, tensors: list[Tensor]) -> Any:
    """Of a value, whose tensors are added to the list."""
    if isinstance(inner, Tensor):
        tensors.append(inner)
        return {"tensor": len(tensors) - 1}
    if inner is None or isinstance(inner, bool | int | float | str):
        return {"is": inner}
    if isinstance(inner, dict):
        assert all(isinstance(key, str) for key in inner), "a state's dicts have text as keys"
        return {"dict": [[key, _outline(each, tensors)] for key, each in inner.items()]}
    if isinstance(inner, tuple) and hasattr(inner, "_fields"):
        return {"named": type(inner).__name__, "of": [_outline(each, tensors) for each in inner]}
    if isinstance(inner, tuple | list):
        return {"tuple" if isinstance(inner, tuple) else "list": [_outline(each, tensors) for each in inner]}
    raise TypeError(f"a state cannot hold a {type(inner).__name__} where stages of a pipeline pass it on")


def unpack(parcel: Parcel, types: Sequence[type]) -> Any:
    """The value again; `types` are the named tuples that may be in it."""
    return _value(parcel.outline, parcel.tensors, {each.__name__: each for each in types})


def _value(outline: Mapping[str, Any], tensors: Sequence[Tensor], known: Mapping[str, type]) -> Any:
    if "tensor" in outline:
        return tensors[outline["tensor"]]
    if "is" in outline:
        return outline["is"]
    if "dict" in outline:
        return {key: _value(each, tensors, known) for key, each in outline["dict"]}
    if "named" in outline:
        if outline["named"] not in known:
            raise TypeError(f"{outline['named']} is none of the model's state_types: {', '.join(known)}")
        return known[outline["named"]](*(_value(each, tensors, known) for each in outline["of"]))
    if "tuple" in outline:
        return tuple(_value(each, tensors, known) for each in outline["tuple"])
    return [_value(each, tensors, known) for each in outline["list"]]


def fresh(parcel: Parcel) -> Parcel:
    """The same tensors, of which no way leads back; each needs a gradient if it did."""
    return parcel._replace(tensors=[t.detach().requires_grad_(t.requires_grad) for t in parcel.tensors])


class Post:
    """Parcels between the ranks of a group. What one rank sends another arrives in that order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, parcel: Parcel, to: int) -> None:
        """Begin to send; `settle` waits for it."""
        for buffer in self._written(parcel):
            work = dist.isend(buffer, group=self._group, group_dst=to)
            assert work is not None
            self._under_way.append((work, buffer))
        # What has gone need not be held any longer.
        self._under_way = [(work, buffer) for work, buffer in self._under_way if not work.is_completed()]

    def receive(self, source: int) -> Parcel:
        """Wait for the next parcel from there. A tensor that needed a gradient needs one here."""
        sizes = torch.empty(2, dtype=torch.int64, device=self._device)
        dist.recv(sizes, group=self._group, group_src=source)
        head_bytes, all_bytes = sizes.tolist()
        content = torch.empty(all_bytes, dtype=torch.uint8, device=self._device)
        dist.recv(content, group=self._group, group_src=source)
        return self._read(content, head_bytes)

    def spread(self, parcel: Parcel | None, source: int) -> Parcel:
        """One rank's parcel, to all of the group."""
        buffers = self._written(parcel) if parcel is not None else None
        sizes = buffers[0] if buffers else torch.empty(2, dtype=torch.int64, device=self._device)
        dist.broadcast(sizes, group=self._group, group_src=source)
        head_bytes, all_bytes = sizes.tolist()
        content = buffers[1] if buffers else torch.empty(all_bytes, dtype=torch.uint8, device=self._device)
        dist.broadcast(content, group=self._group, group_src=source)
        return parcel if parcel is not None else self._read(content, head_bytes)

    def settle(self) -> None:
        """Wait until all that was sent has gone."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def _written(self, parcel: Parcel) -> tuple[Tensor, Tensor]:
        """Sizes, then an outline and the tensors in one buffer."""
        told = [[str(t.dtype).removeprefix("torch."), list(t.shape), t.requires_grad] for t in parcel.tensors]
        head = json.dumps([parcel.outline, told]).encode()
        pieces = [torch.frombuffer(bytearray(head), dtype=torch.uint8).to(self._device)]
        pieces += [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in parcel.tensors]
        places = places_of([piece.numel() for piece in pieces])
        content = torch.empty(places[-1], dtype=torch.uint8, device=self._device)
        for piece, place in zip(pieces, places, strict=False):
            content[place : place + piece.numel()] = piece
        return torch.tensor([len(head), places[-1]], device=self._device), content

    def _read(self, content: Tensor, head_bytes: int) -> Parcel:
        outline, told = json.loads(content[:head_bytes].cpu().numpy().tobytes())
        kinds = [(getattr(torch, name), shape, needs) for name, shape, needs in told]
        sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape, _ in kinds]
        places = places_of([head_bytes, *sizes])
        tensors = [
            content[place : place + size].view(dtype).view(shape).requires_grad_(needs)
            for (dtype, shape, needs), size, place in zip(kinds, sizes, places[1:], strict=False)
        ]
        return Parcel(outline, tensors)


def places_of(sizes: list[int]) -> list[int]:
    """Where each of these begins, and where the last ends."""
    places = [0]
    for size in sizes:
        places.append(-(-(places[-1] + size) // ALIGNED) * ALIGNED)
    return places
