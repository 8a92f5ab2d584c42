"""What each block of a model takes in memory and time, measured one by one.

Here        `measure_blocks`; Profile, PartCost.
Elsewhere   choosing what blocks keep by it (budget.py); showing it (watch/).
Promise     bytes are counted, not guessed (account.py); weights, gradients, buffers and random states are afterwards as
            they were before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dougong.engine.memory.account import Alive
from dougong.engine.memory.recompute import KEEPS, Keep, recomputed
from dougong.engine.parallel.parcel import Parcel, fresh, pack, unpack
from dougong.engine.precision.choice import Chosen, autocast
from dougong.engine.random_state import random_state_kept
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class PartCost(NamedTuple):
    """Of embedding, a block or the head, with one micro-batch. Bytes are beyond what was there before its forward."""

    kept: int
    """Bytes that are there from its forward to its backward, with what it gives the next one."""

    forward_bytes: int
    """At their most in the forward."""

    backward_bytes: int
    """At their most in the backward, gradients of weights left out."""

    seconds: float
    """Forward and backward, with what is made anew: the least of some times."""


class Profile(NamedTuple):
    """A model, part by part."""

    embed: PartCost
    blocks: tuple[dict[Keep, PartCost], ...]
    head: PartCost
    """With the loss."""


def measure_blocks(
    model: BlockStack[Any, Any],
    loss: Callable[[Any, Batch], Tensor],
    batch: Batch,
    *,
    precision: Chosen = "fp32",
    keeps: Sequence[Keep] = KEEPS,
    repeats: int = 3,
) -> Profile:
    """Run each part by itself, forward and backward, for each thing that it may keep.

    The model must be in one piece, in training mode, and no recomputing applied to it yet.
    """
    before = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    walk = _Walk(model, precision, repeats)
    try:
        with random_state_kept():
            embed = walk.measured(model.embed, batch)
            walk.go_on(model.embed, batch)
            blocks = []
            for block in model.blocks:
                found = {keep: walk.measured(_keeping(block, keep)) for keep in keeps}
                walk.go_on(block)
                blocks.append(found)
            head = walk.measured(lambda state: loss(model.head(state), batch))
        return Profile(embed, tuple(blocks), head)
    finally:
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)
        for parameter, gradient in before:
            parameter.grad = gradient


def _keeping(block: nn.Module, keep: Keep) -> Callable[[Any], Any]:
    return block if keep == "all" else recomputed(block, block, keep)


class _Walk:
    """From part to part."""

    def __init__(self, model: BlockStack[Any, Any], precision: Chosen, repeats: int) -> None:
        self._model, self._precision, self._repeats = model, precision, repeats
        self._device_type = next(model.parameters()).device.type
        self._state: Parcel | None = None
        """What the next part is given."""

    def go_on(self, part: Callable[[Any], Any], batch: Batch | None = None) -> None:
        self._state = fresh(pack(self._run(part, batch)))

    def measured(self, part: Callable[[Any], Any], batch: Batch | None = None) -> PartCost:
        seconds = []
        for _ in range(self._repeats):
            self._forget()
            _finish(self._device_type)
            started = time.perf_counter()
            self._back(self._run(part, batch))
            _finish(self._device_type)
            seconds.append(time.perf_counter() - started)
        self._forget()
        alive = Alive(self._model.parameters())
        with alive:
            made = self._run(part, batch)
            forward, kept = alive.activations, alive.now
            alive.begin()
            self._back(made)
            backward = alive.activations
        self._forget()
        return PartCost(kept, forward, backward, min(seconds))

    def _run(self, part: Callable[[Any], Any], batch: Batch | None) -> Any:
        given = batch
        if given is None:
            assert self._state is not None
            given = unpack(fresh(self._state), self._model.state_types)
        with autocast(self._precision, self._device_type):
            return part(given)

    def _back(self, made: Any) -> None:
        outputs = [tensor for tensor in pack(made).tensors if tensor.requires_grad]
        del made
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])

    def _forget(self) -> None:
        self._model.zero_grad(set_to_none=True)


def _finish(device_type: str) -> None:
    if device_type != "cpu":
        torch.accelerator.synchronize()
