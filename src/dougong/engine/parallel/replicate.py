"""What copies of a model on many ranks tell each other.

Here        `copy_from_first`, `gradients_anywhere`, `add_up`, `average_moves`, `in_buckets`.
Elsewhere   the order in which a step calls them (layout.py).
Promise     a weight that some ranks have no gradient of, since their records lack a modality, gets that of the others;
            one that no rank has a gradient of is left alone, as by one process: an optimizer must not decay it.
            Nothing is averaged but what buffers moved by: a loss must be divided by the records of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

BUCKET_BYTES: Final = 25 * 2**20
"""Sent at once: enough that the number of messages does not matter, little enough to hold twice."""


@torch.no_grad()
def copy_from_first(model: nn.Module, group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Weights and buffers of the group's first rank, to all of it, in place."""
    everything: list[Tensor] = [*model.parameters(), *model.buffers()]
    for bucket in in_buckets(everything, everything, bucket_bytes):
        flat = _flat(bucket)
        dist.broadcast(flat, group_src=0, group=group)
        _put(flat, bucket)


def gradients_anywhere(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, loss: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of what has one on some rank, zeros where it is another; and the sum of the ranks' losses.

    Agreed on by one exchange that looks the same everywhere, on which the loss rides along: ranks that each sent what
    they happened to have would wait for each other forever.
    """
    told = loss.new_tensor([float(each.grad is not None) for each in parameters] + [0.0])
    told[-1] = loss
    dist.all_reduce(told, group=group)
    *counts, total = told.unbind()
    found = []
    for parameter, count in zip(parameters, torch.stack(counts).tolist() if counts else [], strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
    return found, total


def average_moves(
    buffers: Sequence[Tensor], before: Sequence[Tensor], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Move floating-point buffers by what the ranks moved theirs on average, in place.

    Moves, not values: a buffer that no rank moved stays exactly as it was.
    """
    pairs = [(now, then) for now, then in zip(buffers, before, strict=True) if now.is_floating_point()]
    moves = [now - then for now, then in pairs]
    add_up(moves, group, bucket_bytes)
    world = dist.get_world_size(group)
    for (now, then), move in zip(pairs, moves, strict=True):
        now.copy_(then + move / world)


def add_up(
    tensors: list[Tensor],
    group: dist.ProcessGroup,
    bucket_bytes: int = BUCKET_BYTES,
    by: Callable[[Tensor, str], None] | None = None,
) -> None:
    """Sum over the ranks, in place. `by` adds up one buffer, in place, which has the same name in every step; None: by
    plain collectives, all under way at once."""
    buckets = list(in_buckets(tensors, tensors, bucket_bytes))
    flats = [_flat(bucket) for bucket in buckets]
    if by is not None:
        for number, (flat, bucket) in enumerate(zip(flats, buckets, strict=True)):
            by(flat, f"{number} of {len(flats)}, {flat.numel()}")
            _put(flat, bucket)
        return
    works = [dist.all_reduce(flat, group=group, async_op=True) for flat in flats]
    for work, flat, bucket in zip(works, flats, buckets, strict=True):
        if work is not None:
            work.wait()
        _put(flat, bucket)


def in_buckets(items: Sequence[T], tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[T]]:
    """Items in order, each bucket's tensors of one type on one device, and of about so many bytes; one is the least."""
    held: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for item, tensor in zip(items, tensors, strict=True):
        kind = (tensor.dtype, tensor.device)
        bucket = held.setdefault(kind, [])
        if bucket and sizes[kind] + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket = held[kind] = []
        sizes[kind] = tensor.nbytes + (sizes[kind] if bucket else 0)
        bucket.append(item)
    yield from (bucket for bucket in held.values() if bucket)


def _flat(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def _put(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))
