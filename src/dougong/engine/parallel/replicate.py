"""What copies of a model on many ranks tell each other.

Here        `copy_from_first`, `add_up_gradients`; of what others add up too, `agree`, `gradients_anywhere`, `add_up`;
            `average_moves`, `in_buckets`; pieces of them for who adds up earlier (early.py).
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

from dougong.engine.parallel.collectives import begin_sum, is_narrow
from dougong.engine.precision.weights import gradient_type
from dougong.engine.step import Moved

T = TypeVar("T")

BUCKET_BYTES: Final = 25 * 2**20
"""Sent at once: enough that the number of messages does not matter, little enough to hold twice."""


@torch.no_grad()
def copy_from_first(model: nn.Module, group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Weights and buffers of the group's first rank, to all of it, in place."""
    everything: list[Tensor] = [*model.parameters(), *model.buffers()]
    for bucket in in_buckets(everything, everything, bucket_bytes):
        flat = flat_of(bucket)
        dist.broadcast(flat, group_src=0, group=group)
        _put(flat, bucket)


def add_up_gradients(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, loss: Tensor, bucket_bytes: int = BUCKET_BYTES
) -> Tensor:
    """Gradients become the sums over the ranks; returned is the sum of the losses.

    Whose gradients there are, and the loss, ride along: what a rank lacks it sends as zeros, so that ranks that each
    have others do not wait for each other forever, nor agree in an exchange of its own, which for a small model costs
    as much as the gradients do.
    """
    gradients = [zeros_like_gradient(each) if each.grad is None else each.grad for each in parameters]
    told = told_together([each.grad is not None for each in parameters], loss[None])
    *sums, told = _sums([*gradients, told], group, bucket_bytes)
    present, numbers = flags_and_numbers(told, len(parameters))
    for parameter, gradient, there in zip(parameters, sums, present, strict=True):
        parameter.grad = gradient if there else None
    return numbers[0]


def agree(present: Sequence[bool], numbers: Tensor, group: dist.ProcessGroup) -> tuple[list[bool], Tensor]:
    """For each flag, whether it is up on some rank; and the sums of the numbers (N). One exchange, which looks the same
    everywhere."""
    told = told_together(present, numbers)
    dist.all_reduce(told, group=group)
    return flags_and_numbers(told, len(present))


def told_together(present: Sequence[bool], numbers: Tensor) -> Tensor:
    """Flags and numbers in one row, to be added up."""
    return torch.cat([numbers.new_tensor([float(there) for there in present]), numbers])


def flags_and_numbers(told: Tensor, count: int) -> tuple[list[bool], Tensor]:
    """Of the sum of such rows with so many flags: which flag was up anywhere, and the sums of the numbers."""
    return [number > 0 for number in told[:count].tolist()], told[count:]


def gradients_anywhere(parameters: Sequence[nn.Parameter], present: Sequence[bool]) -> list[Tensor]:
    """Gradients of what has one on some rank, zeros where it is another."""
    found = []
    for parameter, there in zip(parameters, present, strict=True):
        if there:
            if parameter.grad is None:
                parameter.grad = zeros_like_gradient(parameter)
            found.append(parameter.grad)
    return found


def average_moves(moved: Sequence[Moved], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Move floating-point buffers by what the ranks moved theirs on average, in place.

    Moves, not values: a buffer that no rank moved stays exactly as it was.
    """
    floating = [(now, then) for now, then in moved if now.is_floating_point()]
    moves = [now - then for now, then in floating]
    add_up(moves, group, bucket_bytes)
    world = dist.get_world_size(group)
    for (now, then), move in zip(floating, moves, strict=True):
        now.copy_(then + move / world)


def add_up(
    tensors: list[Tensor],
    group: dist.ProcessGroup,
    bucket_bytes: int = BUCKET_BYTES,
    by: Callable[[Tensor, str], None] | None = None,
) -> None:
    """Sum over the ranks, in place. `by` adds up one buffer, in place, which has the same name in every step; None: by
    plain collectives, all under way at once."""
    if by is None:
        sums = _sums(tensors, group, bucket_bytes)
        if tensors:
            torch._foreach_copy_(tensors, sums)
        return
    buckets = list(in_buckets(tensors, tensors, bucket_bytes))
    for number, bucket in enumerate(buckets):
        flat = flat_of(bucket)
        flat = flat.float() if is_narrow(flat) else flat
        by(flat, f"{number} of {len(buckets)}, {flat.numel()}")
        _put(flat, bucket)


def _sums(tensors: Sequence[Tensor], group: dist.ProcessGroup, bucket_bytes: int) -> list[Tensor]:
    """Over the ranks, of all tensors; they lie beside each other in memory."""
    buckets = list(in_buckets(range(len(tensors)), tensors, bucket_bytes))
    flats = [flat_of([tensors[place] for place in bucket]) for bucket in buckets]
    works = [begin_sum(flat, group) for flat in flats]
    found: dict[int, Tensor] = {}
    for work, flat, bucket in zip(works, flats, buckets, strict=True):
        work.wait()
        parts = torch.split(flat, [tensors[place].numel() for place in bucket])
        found |= {place: part.view(tensors[place].shape) for place, part in zip(bucket, parts, strict=True)}
    return [found[place] for place in range(len(tensors))]


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


def zeros_like_gradient(parameter: nn.Parameter, device: str | None = None) -> Tensor:
    """In the gradient's own type; None: where the parameter is."""
    return torch.zeros_like(parameter, dtype=gradient_type(parameter), device=device)


def flat_of(bucket: Sequence[Tensor]) -> Tensor:
    """A copy of all, in a row."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def _put(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    torch._foreach_copy_(list(bucket), [part.view(tensor.shape) for tensor, part in zip(bucket, parts, strict=True)])
