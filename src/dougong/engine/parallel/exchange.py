"""What ranks that compute one layer together tell each other, with its gradient.

Here        `entered`, `added_up`, `tokens_entered`, `tokens_added_up`, `own_tokens`, `all_tokens`, `all_channels`,
            `exchanged`.
Elsewhere   where they stand in a model (tensor.py, context.py).
Promise     each is exact: the gradient of every rank's input is that of one process with all of it.

Named by what they do going forward. In terms of collectives, forward and backward:

    entered          nothing        all-reduce        each rank goes on with a part of what follows
    added_up         all-reduce     nothing           each rank had a part of it
    tokens_entered   all-gather     reduce-scatter    the same of ranks that hold a part of the tokens each
    tokens_added_up  reduce-scatter all-gather
    own_tokens       a part         all-gather        all ranks had computed the same
    all_tokens       all-gather     a part            all ranks go on to compute the same
    all_channels     all-gather     a part            the same along the last dimension
    exchanged        all-to-all     all-to-all        each rank had a part along one dimension, and has one of another

(Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dougong.engine.parallel.collectives import all_gather, reduce_scatter


def entered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _Entered.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def added_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _AddedUp.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def tokens_entered(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _TokensEntered.apply(x_BTD, group)  # type: ignore[no-untyped-call]
    return found


def tokens_added_up(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _TokensAddedUp.apply(x_BTD, group)  # type: ignore[no-untyped-call]
    return found


def own_tokens(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _OwnPart.apply(x_BTD, group, 1)  # type: ignore[no-untyped-call]
    return found


def all_tokens(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _AllParts.apply(x_BTD, group, 1)  # type: ignore[no-untyped-call]
    return found


def all_channels(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = _AllParts.apply(x, group, x.ndim - 1)  # type: ignore[no-untyped-call]
    return found


def exchanged(x: Tensor, group: dist.ProcessGroup, *, split_dim: int, joined_dim: int) -> Tensor:
    found: Tensor = _Exchanged.apply(x, group, split_dim, joined_dim)  # type: ignore[no-untyped-call]
    return found


def _reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    world = dist.get_world_size(group)
    part = x.movedim(dim, 0).contiguous()
    whole = part.new_empty(world * part.shape[0], *part.shape[1:])
    all_gather(whole, part, group)
    return whole.movedim(0, dim)


def _scattered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The sum over the ranks, of which each has a part."""
    world = dist.get_world_size(group)
    whole = x.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.shape[0] // world, *whole.shape[1:])
    reduce_scatter(part, whole, group)
    return part.movedim(0, dim)


def _part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size)


def _swapped(x: Tensor, group: dist.ProcessGroup, split_dim: int, joined_dim: int) -> Tensor:
    """Parts along one dimension go to their ranks, and what comes from each stands in a row along the other."""
    parts = torch.stack(x.chunk(dist.get_world_size(group), dim=split_dim))
    arrived = torch.empty_like(parts)
    dist.all_to_all_single(arrived, parts, group=group)
    return torch.cat(arrived.unbind(), dim=joined_dim)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _reduced(gradient, ctx.group), None


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class _TokensEntered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_BTD, group, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _scattered(gradient, ctx.group, 1), None


class _TokensAddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x_BTD, group, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradient, ctx.group, 1), None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _part(x, group, dim).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradient, ctx.group, ctx.dim), None, None


class _AllParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _part(gradient, ctx.group, ctx.dim).clone(), None, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split_dim: int, joined_dim: int) -> Tensor:
        ctx.group, ctx.split_dim, ctx.joined_dim = group, split_dim, joined_dim
        return _swapped(x, group, split_dim, joined_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _swapped(gradient, ctx.group, ctx.joined_dim, ctx.split_dim), None, None, None
