"""Weights, gradients and optimizer spread over ranks, all gathered once for a step (ZeRO-2 by the step).

Here        `apply_step_shard`, StepShard.
Elsewhere   spreading a model of which a few blocks are gathered at a time (shard.py); adding up what is not spread
            (layout.py).
Promise     a step gives every rank its part of the gradients that one process would have, within rounding, under every
            schedule of a pipeline: weights are gathered once before the first micro-batch, and gradients are added up
            and spread once after the last. A weight that no rank has a gradient of gets none.

FSDP2, which spreads other models, gathers and adds up around a few blocks' forward and backward, in an order that all
ranks share. In a pipeline a block has many of both, which zero-bubble schedules also cut in two; gathered for the whole
step (after Rajbhandari et al. 2020, arXiv:1910.02054), blocks are as plain there as without spreading. So they are in a
model small enough to be gathered at one time anyway, for which FSDP2's own work would be a good part of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dougong.engine.parallel.collectives import all_gather, scatter_sum
from dougong.engine.parallel.replicate import BUCKET_BYTES, in_buckets
from dougong.engine.precision.weights import gradient_type
from dougong.engine.step import AllBackward, TrainParts
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class _Spread(NamedTuple):
    """A weight that lies spread."""

    name: str
    weight: nn.Parameter
    """This rank's rows; the last ranks may have fewer, or none."""

    places: list[tuple[nn.Module, str]]
    """Where it stands; in several, where it is tied."""

    shape: torch.Size
    """Of the whole weight."""

    rows: int
    """Of every rank, counting those that fill up the last ones."""

    @property
    def numbers(self) -> int:
        """In these rows."""
        return self.rows * self.shape[1:].numel()


class StepShard:
    """The weights of a model, or of a rank's stages of it, of which each rank holds some rows between steps."""

    def __init__(self, model: BlockStack[Any, Any], shard: dist.ProcessGroup, ignored: set[nn.Parameter]) -> None:
        self._shard, self._world = shard, dist.get_world_size(shard)
        self._gathered: dict[str, nn.Parameter] = {}
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                places.setdefault(parameter, []).append((module, own))
        self._spread = [
            self._made(name, parameter, places[parameter])
            for name, parameter in model.named_parameters()
            if parameter not in ignored and parameter.ndim  # a number alone has no rows
        ]
        self.names = [each.name for each in self._spread]
        self._forward = model.forward
        model.forward = self._answer  # type: ignore[method-assign]
        self.let_go()

    def _made(self, name: str, whole: nn.Parameter, places: list[tuple[nn.Module, str]]) -> _Spread:
        rows = -(-whole.shape[0] // self._world)  # as FSDP cuts, which checkpoints know
        first = min(dist.get_rank(self._shard) * rows, whole.shape[0])
        local = whole.detach()[first : first + rows].clone()
        return _Spread(name, nn.Parameter(local, requires_grad=whole.requires_grad), places, whole.shape, rows)

    def _answer(self, batch: Batch) -> Any:
        """The model's forward; outside of a step, all ranks of the shard group call it together."""
        if self._gathered:
            return self._forward(batch)
        self.gather()
        try:
            return self._forward(batch)
        finally:
            self.let_go()

    def around(self, work: AllBackward) -> AllBackward:
        """A step's forwards and backwards with weights that are gathered, until they are settled."""

        def gathered(parts: TrainParts, batches: Sequence[Batch], num_records: float) -> Tensor:
            self.gather()
            return work(parts, batches, num_records)

        return gathered

    @torch.no_grad()
    def gather(self) -> None:
        """The model has whole weights, until they are let go. All ranks of the shard group call this."""
        for bucket in in_buckets(self._spread, [each.weight for each in self._spread], BUCKET_BYTES):
            flat = torch.cat([_filled(each.weight, each.rows).reshape(-1) for each in bucket])
            whole = flat.new_empty(self._world * flat.numel())
            all_gather(whole, flat, self._shard)
            parts = torch.split(whole.view(self._world, -1), [each.numbers for each in bucket], dim=1)
            for each, part in zip(bucket, parts, strict=True):
                found = part.reshape(-1, *each.shape[1:])[: each.shape[0]]
                self._gathered[each.name] = gathered = nn.Parameter(found, requires_grad=each.weight.requires_grad)
                gathered.grad_dtype = gradient_type(each.weight)
        self._put(self._gathered)

    def present(self) -> list[bool]:
        """By name: whether this rank had a gradient of it in this step."""
        return [self._gathered[name].grad is not None for name in self.names]

    @torch.no_grad()
    def settle(self, anywhere: Sequence[bool]) -> None:
        """After the last micro-batch: each rank has its rows of the shard group's gradients, and its rows of weights
        alone."""
        due = [each for each, there in zip(self._spread, anywhere, strict=True) if there]
        gradients = [self._gradient(each) for each in due]
        for pairs in in_buckets(list(zip(due, gradients, strict=True)), gradients, BUCKET_BYTES):
            bucket = [each for each, _ in pairs]
            flat = torch.cat([self._by_rank(each, gradient) for each, gradient in pairs], dim=1)
            part = flat.new_empty(flat.shape[1])
            scatter_sum(part, flat.view(-1), self._shard)
            for each, rows in zip(bucket, torch.split(part, [each.numbers for each in bucket]), strict=True):
                each.weight.grad = rows.view(-1, *each.shape[1:])[: each.weight.shape[0]].clone()
        self.let_go()

    def _gradient(self, each: _Spread) -> Tensor:
        """A whole one; zeros where this rank has none."""
        whole = self._gathered[each.name]
        return torch.zeros_like(whole, dtype=gradient_type(whole)) if whole.grad is None else whole.grad

    def _by_rank(self, each: _Spread, gradient: Tensor) -> Tensor:
        """The rows of each rank beside each other."""
        return _filled(gradient, each.rows * self._world).reshape(self._world, -1)

    def let_go(self) -> None:
        """Each rank has its rows alone."""
        self._put({each.name: each.weight for each in self._spread})
        self._gathered.clear()

    def _put(self, weights: dict[str, nn.Parameter]) -> None:
        for each in self._spread:
            for module, own in each.places:
                module._parameters[own] = weights[
                    each.name
                ]  # what setattr comes to, after checks that take milliseconds


def apply_step_shard(model: BlockStack[Any, Any], shard: dist.ProcessGroup, *, ignored: set[nn.Parameter]) -> StepShard:
    """Spread what is here of the model over `shard`, in place; over its copies gradients are still to be added up.

    `ignored` parameters are left as they are.
    """
    return StepShard(model, shard, ignored)


def _filled(local: Tensor, rows: int) -> Tensor:
    """With zeros at the end, to so many rows."""
    if local.shape[0] == rows:
        return local
    return torch.cat([local, local.new_zeros(rows - local.shape[0], *local.shape[1:])])
