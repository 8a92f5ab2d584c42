"""Collectives by the names that this torch knows them by.

Here        `all_gather`, `begin_all_gather`, `reduce_scatter`; sums that are rounded once, `begin_sum` and
            `scatter_sum`.
Elsewhere   what is built of them, with gradients (exchange.py, gather.py); gradients (replicate.py, step_shard.py).
Promise     none of torch's warnings about a name that it is giving up. A sum of 16-bit numbers that is rounded once is
            made in fp32, however many ranks there are; every rank has the same.

torch adds up 16-bit numbers in 16 bits, rank by rank: of 257 equal ones the last has no part in the sum. Here each rank
gets its share of everybody's numbers, adds that up, and tells the sum: as many bytes on the wire as torch's own takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed both.
_GATHER: Final[Callable[..., Any]] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER: Final[Callable[..., Any]] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's part, by rank along dimension 0."""
    _GATHER(whole, part, group=group)


def begin_all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """The same, on its way; `whole` is there once it has been waited for."""
    work: dist.Work = _GATHER(whole, part, group=group, async_op=True)
    return work


def reduce_scatter(part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """This rank's part of the sum over the ranks."""
    _SCATTER(part, whole, group=group)


def scatter_sum(part: Tensor, flat: Tensor, group: dist.ProcessGroup) -> None:
    """The same of numbers in a row, rounded once."""
    if is_narrow(flat):
        part.copy_(_Shared(flat, group).part())
    else:
        reduce_scatter(part, flat, group)


class UnderWay(Protocol):
    """A collective that has begun."""

    def wait(self) -> Any: ...


def begin_sum(flat: Tensor, group: dist.ProcessGroup) -> UnderWay:
    """The sum over the ranks of numbers in a row, in place, rounded once; it is there once it has been waited for."""
    if is_narrow(flat):
        return _Shared(flat, group)
    work: UnderWay = dist.all_reduce(flat, group=group, async_op=True)
    return work


def is_narrow(x: Tensor) -> bool:
    """Whether its numbers have 16 bits."""
    return x.dtype in (torch.bfloat16, torch.float16)


class _Shared:
    """A sum of which each rank makes a part, in fp32."""

    def __init__(self, flat: Tensor, group: dist.ProcessGroup) -> None:
        self._flat, self._group, self._world = flat, group, dist.get_world_size(group)
        sent = torch.nn.functional.pad(flat, (0, -len(flat) % self._world))
        self._arrived = torch.empty_like(sent)
        self._work = dist.all_to_all_single(self._arrived, sent, group=group, async_op=True)
        self._sent = sent  # until it has left

    def part(self) -> Tensor:
        self._work.wait()
        return self._arrived.view(self._world, -1).sum(dim=0, dtype=torch.float32).to(self._flat.dtype)

    def wait(self) -> None:
        part = self.part()
        all_gather(self._sent, part, self._group)
        self._flat.copy_(self._sent[: len(self._flat)])
