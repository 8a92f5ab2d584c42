"""A pipeline's stage whose weights, gradients and optimizer are spread over ranks (ZeRO-2 by the step).

Here        `apply_stage_shard`, StageShard.
Elsewhere   the stages (pipeline.py); spreading a model that is not cut into stages (shard.py); adding up what is not
            spread (layout.py).
Promise     a step gives every rank its part of the gradients that one process would have, within rounding, under every
            schedule: weights are gathered once before the first micro-batch, and gradients are added up and spread once
            after the last. A weight that no rank has a gradient of gets none.

FSDP2, which spreads other models, gathers and adds up around each block's forward and backward, in an order that all
ranks share. In a pipeline a block has many of both, which zero-bubble schedules also cut in two; gathered for the whole
step (after Rajbhandari et al. 2020, arXiv:1910.02054), blocks are as plain there as without spreading.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dougong.engine.parallel.collectives import all_gather, reduce_scatter
from dougong.engine.parallel.replicate import BUCKET_BYTES, in_buckets
from dougong.engine.weights import local_part


class _Spread(NamedTuple):
    """A weight that lies spread."""

    name: str
    weight: nn.Parameter
    """This rank's rows, as a DTensor."""

    places: list[tuple[nn.Module, str]]
    """Where it stands; in several, where it is tied."""

    rows: int
    """Of every rank, counting those that fill up the last ones."""

    @property
    def numbers(self) -> int:
        """In these rows."""
        return self.rows * torch.Size(self.weight.shape[1:]).numel()


class StageShard:
    """The weights of a rank's stages, of which each rank holds some rows between steps."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        shard: dist.ProcessGroup,
        group: dist.ProcessGroup,
        ignored: set[nn.Parameter],
    ) -> None:
        self._mesh, self._shard, self._group = mesh, shard, group
        self._world = dist.get_world_size(shard)
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
        self.let_go()

    def _made(self, name: str, whole: nn.Parameter, places: list[tuple[nn.Module, str]]) -> _Spread:
        rows = -(-whole.shape[0] // self._world)  # as FSDP cuts, which checkpoints know
        first = min(dist.get_rank(self._shard) * rows, whole.shape[0])
        local = whole.detach()[first : first + rows].clone()
        weight = nn.Parameter(self._as_spread(local, whole), requires_grad=whole.requires_grad)
        return _Spread(name, weight, places, rows)

    def _as_spread(self, local: Tensor, like: Tensor) -> DTensor:
        shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
        found: DTensor = DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return found

    @torch.no_grad()
    def gather(self) -> None:
        """The model has whole weights, until they are let go. All ranks of the shard group call this."""
        for bucket in in_buckets(self._spread, [local_part(each.weight) for each in self._spread], BUCKET_BYTES):
            flat = torch.cat([_filled(local_part(each.weight), each.rows).reshape(-1) for each in bucket])
            whole = flat.new_empty(self._world * flat.numel())
            all_gather(whole, flat, self._shard)
            parts = torch.split(whole.view(self._world, -1), [each.numbers for each in bucket], dim=1)
            for each, part in zip(bucket, parts, strict=True):
                shape = each.weight.shape
                found = part.reshape(-1, *shape[1:])[: shape[0]]
                self._gathered[each.name] = nn.Parameter(found, requires_grad=each.weight.requires_grad)
        self._put(self._gathered)

    @torch.no_grad()
    def settle(self) -> None:
        """After the last micro-batch: each rank has its rows of the shard group's gradients, and its rows of weights
        alone."""
        trained = [each for each in self._spread if each.weight.requires_grad]
        given = [self._gathered[each.name].grad for each in trained]
        told = torch.tensor([float(gradient is not None) for gradient in given], device=self._mesh.device_type)
        dist.all_reduce(told, group=self._group)
        due = [each for each, count in zip(trained, told.tolist(), strict=True) if count]
        for bucket in in_buckets(due, [self._gathered[each.name] for each in due], BUCKET_BYTES):
            flat = torch.cat([self._by_rank(each) for each in bucket], dim=1)
            part = flat.new_empty(flat.shape[1])
            reduce_scatter(part, flat.view(-1), self._shard)
            for each, rows in zip(bucket, torch.split(part, [each.numbers for each in bucket]), strict=True):
                local = local_part(each.weight)
                found = rows.view(-1, *local.shape[1:])[: local.shape[0]].clone()
                each.weight.grad = self._as_spread(found, each.weight)
        self.let_go()

    def _by_rank(self, each: _Spread) -> Tensor:
        """A whole gradient, the rows of each rank beside each other; zeros where this rank has none."""
        whole = self._gathered[each.name]
        gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
        return _filled(gradient, each.rows * self._world).reshape(self._world, -1)

    def let_go(self) -> None:
        """Each rank has its rows alone."""
        self._put({each.name: each.weight for each in self._spread})
        self._gathered.clear()

    def _put(self, weights: dict[str, nn.Parameter]) -> None:
        for each in self._spread:
            for module, own in each.places:
                setattr(module, own, weights[each.name])


def apply_stage_shard(
    model: nn.Module,
    mesh: DeviceMesh,
    shard: dist.ProcessGroup,
    group: dist.ProcessGroup,
    *,
    ignored: set[nn.Parameter],
) -> StageShard:
    """Spread what is here of the model over `shard`, in place; over its copies gradients are still to be added up.

    The mesh has that one axis. `group` are all ranks that begin with the same weights. `ignored` parameters are left as
    they are.
    """
    return StageShard(model, mesh, shard, group, ignored)


def _filled(local: Tensor, rows: int) -> Tensor:
    """With zeros at the end, to so many rows."""
    if local.shape[0] == rows:
        return local
    return torch.cat([local, local.new_zeros(rows - local.shape[0], *local.shape[1:])])
