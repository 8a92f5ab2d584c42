"""Weights, gradients and optimizer spread over ranks, a few blocks' gathered when it is their turn (ZeRO).

Here        `apply_shard`, Sharded, `units_of`.
Elsewhere   gathering and spreading itself is torch's FSDP2; adding up over copies, once a step (layout.py).
Promise     a step gives every rank its part of the gradients that one process with all records would have, within
            rounding; ranks may hold any number of records, also none, and any modality may be absent on any of them: no
            rank waits for another in vain. A weight that no rank has a gradient of gets none.

FSDP2 (Zhao et al. 2023, arXiv:2304.11277) takes for granted that every rank does the same work. Here a rank without
pictures has no gradient of the picture encoder, and its backward may come to blocks in another order. So each unit, of
blocks that are gathered together, is held between two joints that a scalar runs through besides the state: all of a
unit's gradients have arrived before the unit before it begins, on every rank; and gradients that a rank lacks are
filled up with zeros, and told.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dougong.engine.parallel.parcel import pack, unpack
from dougong.engine.precision.choice import autocast
from dougong.engine.step import TrainParts
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class _Anchored(NamedTuple):
    """A state, and the scalar that runs beside it."""

    state: Any
    anchor: Tensor


class Sharded:
    """A model whose weights are spread."""

    def __init__(
        self,
        model: BlockStack[Any, Any],
        mesh: DeviceMesh,
        units: Sequence[range],
        *,
        keep_gathered: bool,
        ignored: set[nn.Parameter],
    ) -> None:
        self.model = model
        self.names = [name for name, parameter in model.named_parameters() if parameter not in ignored]
        self._known = set(self.names)
        self._seen: set[str] = set()
        """Of weights that had a gradient here, in this step."""

        # Nothing in a model changes a state in place, which is what it warns of where a block returns a view.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        owned = {name for place, _ in enumerate(model.blocks) for name in self._names_of(place)}
        self._others = [name for name in self.names if name not in owned]
        for unit in units:
            for place in unit:
                block = model.blocks[place]
                block.forward = self._joined(unit, place, block.forward)
            together = [model.blocks[place] for place in unit]
            fully_shard(together, mesh=mesh, reshard_after_forward=not keep_gathered, ignored_params=ignored)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A loss is divided by the records of all ranks already.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._anchor: Tensor | None = None
        model.forward = self._forward  # type: ignore[method-assign]

    def _names_of(self, place: int) -> list[str]:
        own = [f"blocks.{place}.{name}" for name, _ in self.model.blocks[place].named_parameters()]
        return [name for name in own if name in self._known]

    def _forward(self, batch: Batch) -> Any:
        anchor = torch.zeros((), device=batch.media[next(iter(batch.media))].index_B.device, requires_grad=True)
        anchored = _Anchored(self.model.embed(batch), anchor)
        for block in self.model.blocks:
            anchored = block(anchored)
        self._anchor = anchored.anchor
        return self.model.head(anchored.state)

    def _joined(self, unit: range, place: int, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        types = (*self.model.state_types, _Anchored)

        def joint(anchored: _Anchored, then: Callable[[], None] | None) -> _Anchored:
            parcel = pack(anchored)
            moving = [n for n, tensor in enumerate(parcel.tensors) if tensor.requires_grad]
            joined = _Joint.apply(then, *(parcel.tensors[n] for n in moving))  # type: ignore[no-untyped-call]
            for n, tensor in zip(moving, joined, strict=True):
                parcel.tensors[n] = tensor
            found: _Anchored = unpack(parcel, types)
            return found

        def anchored_forward(state: Any) -> Any:
            if not isinstance(state, _Anchored):  # somebody walks through the blocks alone
                return forward(state)
            if not torch.is_grad_enabled():
                return state._replace(state=forward(state.state))
            if place == unit[0]:
                state = joint(state, lambda: self._fill(unit))
            state = state._replace(state=forward(state.state))
            return joint(state, None) if place == unit[-1] else state

        return anchored_forward

    def _fill(self, unit: range) -> None:
        """All of these blocks' gradients have been made that will be."""
        for place in unit:
            self._fill_up({f"blocks.{place}.{name}": p for name, p in self.model.blocks[place].named_parameters()})

    def _fill_rest(self) -> None:
        parameters = dict(self.model.named_parameters())
        self._fill_up({name: parameters[name] for name in self._others})

    def _fill_up(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if name not in self._known or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                self._seen.add(name)

    def backward(self, parts: TrainParts, batch: Batch, num_records: float) -> Tensor:
        """In place of the step's own: adds a micro-batch's gradients to each rank's part."""
        with autocast(parts.precision, parts.device_type):
            loss = parts.loss(self.model(batch), batch).float() / num_records
        assert self._anchor is not None
        anchored = loss + 0.0 * self._anchor
        self._anchor = None
        # Before what FSDP does at a backward's end, which it asks for later.
        fill = self._fill_rest
        anchored.register_hook(lambda _: Variable._execution_engine.queue_callback(fill))  # type: ignore[no-untyped-call]
        anchored.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def let_go(self) -> None:
        """Each rank has its part alone. After a forward without a backward, some weights are still gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def present(self) -> list[bool]:
        """By name: whether this rank had a gradient of it in this step."""
        return [name in self._seen for name in self.names]

    def settle(self, anywhere: Sequence[bool]) -> None:
        """After the last micro-batch: weights that no rank had a gradient of have none."""
        parameters = dict(self.model.named_parameters())
        for name, there in zip(self.names, anywhere, strict=True):
            if not there:
                parameters[name].grad = None
        self._seen.clear()


def apply_shard(
    model: BlockStack[Any, Any],
    mesh: DeviceMesh,
    units: Sequence[range],
    *,
    keep_gathered: bool = False,
    ignored: set[nn.Parameter] | None = None,
) -> Sharded:
    """Spread the model over the mesh, in place; over its copies gradients are still to be added up.

    `units` are blocks that are gathered together (`units_of`), all blocks in order. With `keep_gathered` weights stay
    gathered from forward to backward. `ignored` parameters are left as they are.
    """
    return Sharded(model, mesh, units, keep_gathered=keep_gathered, ignored=ignored or set())


def units_of(sizes: Sequence[float], unit_bytes: float) -> list[range]:
    """Blocks of these bytes that are gathered together: neighbours, until they are enough. A message costs something by
    itself, so that there should be few small ones; what is large already gains nothing by it."""
    units, first, held = [], 0, 0.0
    for place, size in enumerate(sizes):
        held += size
        if held >= unit_bytes or place + 1 == len(sizes):
            units.append(range(first, place + 1))
            first, held = place + 1, 0.0
    return units


class _Joint(torch.autograd.Function):
    """Tensors go on as they are; going back, all of their gradients are there before any goes on."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.then is not None:
            ctx.then()
        return None, *gradients
