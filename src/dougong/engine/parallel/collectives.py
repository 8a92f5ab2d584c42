"""Collectives by the names that this torch knows them by.

Here        `all_gather`, `begin_all_gather`, `reduce_scatter`.
Elsewhere   what is built of them, with gradients (exchange.py, gather.py).
Promise     none of torch's warnings about a name that it is giving up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

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
