"""What autograd saves for the backward, put elsewhere or rounded until then.

Here        `apply_saved`, `check_saved`; Saved and SavedAs, its settings; SavedBytes, what has been put where.
Elsewhere   the file (spill.py); saving less in the first place (recompute.py, segments.py).
Promise     put elsewhere, losses and gradients are bit-equal to those of a model that keeps everything where it is.
            Rounded, integers and truths, weights, small tensors, and what embedding, head and loss save stay exact; the
            forward is bit-equal, and gradients are within what docs/numerics.md states. Memory that several operations
            save is put away once. What was put away is let go with the graph, also where no backward comes. A tensor
            that is changed in place after it was saved, which autograd refuses otherwise, is not noticed.

After Rhu et al. 2016 (arXiv:1602.08124, vDNN): what a block saved leaves while the next ones work, and comes back
while the block after it works in the backward. Storing what is saved in fewer bits, after Chen et al. 2021
(arXiv:2104.14129, ActNN), here by plain rounding to 16 bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dougong.core.errors import ConfigError
from dougong.engine.memory.spill import Spill
from dougong.nn.block_stack import BlockStack

Saved = Literal["kept", "host", "disk"]
"""Where what autograd saves is until the backward. kept: where it is. host: in the host's memory, from a device's.
disk: in a file of the run's folder."""

SavedAs = Literal["same", "bf16"]
"""In which format 32-bit numbers are saved."""

SMALL_BYTES: Final = 16 * 1024
"""Less than this is left as it is: it costs more to move than it frees."""


class Elsewhere(Protocol):
    """Where bytes can be put. Both ways may take their time; `take` waits for them."""

    def put(self, flat: Tensor) -> Placed: ...


class Placed(Protocol):
    """Bytes that were put somewhere; their place is free again when nobody refers to this."""

    def fetch(self) -> None:
        """Begin to bring them back."""

    def take(self) -> Tensor:
        """The bytes."""


def check_saved(saved: Saved, saved_as: SavedAs, device_type: str, *, shard: int = 1) -> None:
    """
    Raises:
        ConfigError: it cannot take effect on such a device, or where weights are spread over `shard` ranks.
    """
    if saved == "host" and device_type == "cpu":
        raise ConfigError(
            "memory.saved=host moves activations from a device to the host's memory, and this model is there already. "
            "Use memory.saved: disk, or kept."
        )
    if shard > 1 and (saved != "kept" or saved_as != "same"):
        given = f"saved={saved}" if saved != "kept" else f"saved_as={saved_as}"
        raise ConfigError(
            f"memory.{given} knows weights from activations by where they lie, and with plan shard={shard} weights "
            "come and go in between. Use plan shard: 1, or memory.recompute: blocks in its place."
        )


def apply_saved(
    model: BlockStack[Any, Any],
    saved: Saved,
    saved_as: SavedAs = "same",
    *,
    folder: Path | None = None,
    small_bytes: int = SMALL_BYTES,
) -> SavedBytes:
    """Have all blocks' saved tensors put away, in place. A file is made in `folder`, for `disk` alone.

    Raises:
        ConfigError: it cannot take effect on the model's device.
    """
    device_type = next(model.parameters()).device.type
    check_saved(saved, saved_as, device_type)
    counted = SavedBytes()
    elsewhere: Elsewhere | None = None
    if saved == "disk":
        elsewhere = Spill(folder)
    elif saved == "host":
        elsewhere = HostMemory()
    away = _Away(model, elsewhere, saved_as, small_bytes, counted)
    for place, block in enumerate(model.blocks):
        block.forward = away.around(block.forward, is_first=place == 0)
    return counted


class SavedBytes:
    """What has been done so far."""

    def __init__(self) -> None:
        self.moved = 0
        """Bytes put elsewhere, each piece of memory once."""

        self.rounded = 0
        """Bytes of 32-bit numbers that were stored in 16."""


class _Group:
    """What one block saved in one forward; and what the one before it did."""

    def __init__(self, before: _Group | None) -> None:
        self.before = before
        self.places: list[weakref.ref[_Place]] = []
        self.is_fetched = False

    def fetch(self) -> None:
        if not self.is_fetched:
            self.is_fetched = True
            for reference in self.places:
                place = reference()
                if place is not None:
                    place.placed.fetch()


class _Place:
    """One piece of memory, put away."""

    def __init__(self, placed: Placed, group: _Group) -> None:
        self.placed, self.group = placed, group
        self._back: weakref.ref[Any] | None = None

    def take(self) -> torch.UntypedStorage:
        """Its bytes, the same piece of memory for all that ask while anyone has it."""
        found: torch.UntypedStorage | None = None if self._back is None else self._back()
        if found is None:
            self.group.fetch()
            if self.group.before is not None:
                self.group.before.fetch()
            found = self.placed.take().untyped_storage()
            self._back = weakref.ref(found)
        return found


class _Packed:
    """A tensor whose memory is elsewhere, or in another format, or both."""

    def __init__(self, x: Tensor, dtype: torch.dtype, place: _Place | None) -> None:
        self.dtype, self.place = dtype, place
        self.kept = x if place is None else None
        self.stored_as, self.shape, self.stride, self.offset = x.dtype, x.shape, x.stride(), x.storage_offset()

    def unpack(self) -> Tensor:
        x = self.kept
        if x is None:
            assert self.place is not None
            storage = self.place.take()
            x = torch.empty(0, dtype=self.stored_as, device=storage.device)
            x.set_(storage, self.offset, self.shape, self.stride)
        return x if x.dtype == self.dtype else x.to(self.dtype)


class _Away:
    """What is done to each tensor that autograd saves inside a block."""

    def __init__(
        self,
        model: nn.Module,
        elsewhere: Elsewhere | None,
        saved_as: SavedAs,
        small_bytes: int,
        counted: SavedBytes,
    ) -> None:
        self._model, self._elsewhere, self._counted = model, elsewhere, counted
        self._rounds, self._small = saved_as == "bf16", small_bytes
        self._group = _Group(None)
        self._places: dict[tuple[int, int], tuple[weakref.ref[Any], weakref.ref[_Place]]] = {}
        self._rounded: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
        self._lives: set[int] = set()

    def around(self, forward: Callable[..., Any], *, is_first: bool) -> Callable[..., Any]:
        def put_away(*given: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*given)
            self._group = _Group(None if is_first else self._group)
            # Asked for anew each time: what else is done to the model may replace its weights.
            own = [*self._model.parameters(), *self._model.buffers()]
            self._lives = {x.untyped_storage()._cdata for x in own if not _is_spread(x)}
            with saved_tensors_hooks(self._pack, _unpack):
                return forward(*given)

        return put_away

    def _pack(self, x: Tensor) -> Any:
        if _is_spread(x) or x.layout != torch.strided or x.nbytes < self._small:
            return x
        if x.untyped_storage()._cdata in self._lives:
            return x
        dtype = x.dtype
        if self._rounds and dtype == torch.float32:
            x = self._rounded_once(x)
        if self._elsewhere is None:
            return x if x.dtype == dtype else _Packed(x, dtype, None)
        return _Packed(x, dtype, self._placed_once(x.detach()))

    def _rounded_once(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        key = (id(storage), x._version, x.shape, x.stride(), x.storage_offset())
        known = self._rounded.get(key)
        if known is not None and known[0]() is storage and (found := known[1]()) is not None:
            again: Tensor = found
            return again
        with torch.no_grad():
            rounded = x.detach().to(torch.bfloat16)
        self._counted.rounded += x.nbytes
        self._rounded[key] = weakref.ref(storage, lambda _: self._rounded.pop(key, None)), weakref.ref(rounded)
        return rounded

    def _placed_once(self, x: Tensor) -> _Place:
        assert self._elsewhere is not None
        storage = x.untyped_storage()
        # The version, too: what was changed in place since is saved as another.
        key = (id(storage), x._version)
        known = self._places.get(key)
        if known is not None and known[0]() is storage and (found := known[1]()) is not None:
            return found
        flat = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        place = _Place(self._elsewhere.put(flat), self._group)
        self._counted.moved += storage.nbytes()
        self._group.places.append(weakref.ref(place))
        self._places[key] = weakref.ref(storage, lambda _: self._places.pop(key, None)), weakref.ref(place)
        return place


def _is_spread(x: Any) -> bool:
    """Whether it is a part of what several ranks have."""
    return is_traceable_wrapper_subclass(x)


def _unpack(packed: Any) -> Tensor:
    found: Tensor = packed.unpack() if isinstance(packed, _Packed) else packed
    return found


class HostMemory:
    """The host's page-locked memory, reached by a stream of its own beside the device's work."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch ships it without types

    def put(self, flat: Tensor) -> Placed:
        return _OnHost(flat, self.stream)


class _OnHost:
    def __init__(self, flat: Tensor, stream: torch.cuda.Stream) -> None:
        self._stream, self._device = stream, flat.device
        self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)  # its memory is not given to others before it has been read

    def fetch(self) -> None:
        if self._back is not None:
            return
        with torch.cuda.stream(self._stream):
            self._back = self._host.to(self._device, non_blocking=True)
            self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        self.fetch()
        assert self._back is not None
        assert self._arrived is not None
        found, self._back = self._back, None
        torch.cuda.current_stream().wait_event(self._arrived)
        found.record_stream(torch.cuda.current_stream())
        return found
