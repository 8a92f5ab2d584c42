"""Rows of all ranks side by side, with their gradients.

Here        `all_gather_rows`.
Elsewhere   what needs no gradient (ranks.py); adding up gradients of weights (replicate.py).
Promise     the gradient of each rank's rows is exactly the sum over the ranks of what each made of them, however uneven
            the ranks are, and however the incoming gradient lies in memory. A rank without rows takes part like any
            other, forward and backward, so that none waits for it in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dougong.engine.parallel.collectives import all_gather, reduce_scatter


def all_gather_rows(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each tensor (N, ...) as (G, ...), G the rows of all ranks, by rank. One exchange for all of them.

    Every rank must call this with as many tensors, of the same type and shape but for N, which may be 0; and every one
    must use the results in its loss, in which it may be multiplied by 0 but not left out: backward is an exchange too.
    """
    counts_RK = torch.zeros(dist.get_world_size(group), len(tensors), dtype=torch.int64, device=tensors[0].device)
    counts_RK[dist.get_rank(group)] = torch.tensor([tensor.shape[0] for tensor in tensors])
    dist.all_reduce(counts_RK, group=group)
    # Nothing here may need a gradient where others do: without one of its own, this rank would skip the backward.
    anchor = torch.zeros((), device=tensors[0].device, requires_grad=torch.is_grad_enabled())
    gathered: tuple[Tensor, ...] = _AllGatherRows.apply(group, counts_RK.tolist(), anchor, *tensors)  # type: ignore[no-untyped-call]
    return list(gathered)


class _AllGatherRows(torch.autograd.Function):
    """Laid flat and padded to the fullest rank, since a collective needs the same size everywhere."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, counts_RK: list[list[int]], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        row_sizes = [tensor[:0].new_empty(tensor.shape[1:]).numel() for tensor in tensors]
        sizes_RK = [[count * size for count, size in zip(counts, row_sizes, strict=True)] for counts in counts_RK]
        longest = max(1, *(sum(sizes) for sizes in sizes_RK))
        flat = tensors[0].new_zeros(longest)
        own = torch.cat([tensor.reshape(-1) for tensor in tensors])
        flat[: own.numel()] = own
        every = flat.new_empty(len(counts_RK) * longest)
        all_gather(every, flat, group)
        ctx.group, ctx.sizes_RK, ctx.longest = group, sizes_RK, longest
        ctx.shapes = [tensor.shape for tensor in tensors]

        parts_RK = [
            torch.split(part[: sum(sizes)], sizes)
            for part, sizes in zip(torch.split(every, longest), sizes_RK, strict=True)
        ]
        return tuple(
            torch.cat([parts_K[index] for parts_K in parts_RK]).reshape(-1, *tensor.shape[1:])
            for index, tensor in enumerate(tensors)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank(ctx.group)
        flat_K = [gradient.reshape(-1) for gradient in gradients]  # in the order of its rows, wherever they lie
        every = flat_K[0].new_zeros(len(ctx.sizes_RK), ctx.longest)
        starts = [0] * len(flat_K)
        for place, sizes in enumerate(ctx.sizes_RK):
            filled = 0
            for index, size in enumerate(sizes):
                every[place, filled : filled + size] = flat_K[index][starts[index] : starts[index] + size]
                starts[index] += size
                filled += size
        own = every.new_empty(ctx.longest)
        reduce_scatter(own, every.reshape(-1), ctx.group)
        parts = torch.split(own[: sum(ctx.sizes_RK[rank])], ctx.sizes_RK[rank])
        return None, None, None, *(part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
