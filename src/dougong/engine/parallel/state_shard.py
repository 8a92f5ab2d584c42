"""The optimizer's state alone spread over ranks: each steps a part of the weights, and all have all of them (ZeRO-1).

Here        `apply_state_shard`, StateShard; `cut_rows`.
Elsewhere   spreading weights and gradients too (shard.py, step_shard.py); adding up what is not spread (layout.py).
Promise     every rank has all weights of one process, within rounding and equal to each other, before and after each
            step; a weight that no rank has a gradient of is not stepped, nor is anything where a step is skipped.

After Rajbhandari et al. 2020 (arXiv:1910.02054). Forward and backward are those of copies. Once a step, after the last
micro-batch, gradients are added up, each rank getting those of its part alone; and once after it the stepped parts are
gathered: as many bytes on the wire as adding up gradients takes. A part is whole weights next to each other, cut
between two rows at either end: so a rank steps a few large tensors and not a few rows of every small one, and
checkpoints can name what it holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.engine.parallel.collectives import all_gather, reduce_scatter
from dougong.engine.parallel.replicate import BUCKET_BYTES, in_buckets
from dougong.nn.block_stack import BlockStack


class _Rows(NamedTuple):
    """Of a weight, what one rank steps."""

    name: str
    weight: nn.Parameter
    rows: range

    def of(self, whole: Tensor) -> Tensor:
        """These rows of the weight, or of what has its shape; a look at the same memory."""
        return whole.detach()[self.rows.start : self.rows.stop]


class _Bucket(NamedTuple):
    """Weights that are sent together."""

    by_rank: list[list[_Rows]]
    longest: int
    """Numbers of the rank that steps most of it: every rank's part is filled up to so many."""

    filler: Tensor
    """Zeros, as many as the rank lacks that steps least of it."""

    def filled(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What one rank steps, in a row, and what fills it up."""
        flat = [part.reshape(-1) for part in parts]
        return [*flat, self.filler[: self.longest - sum(part.numel() for part in flat)]]


class StateShard:
    """A model that every rank holds whole and steps a part of."""

    def __init__(self, model: BlockStack[Any, Any], shard: dist.ProcessGroup, ignored: set[nn.Parameter]) -> None:
        self._shard, self._world, self._rank = shard, dist.get_world_size(shard), dist.get_rank(shard)
        self._weights = {
            name: weight
            for name, weight in model.named_parameters()
            # A number alone has no rows.
            if weight.requires_grad and weight not in ignored and weight.ndim and weight.numel()
        }
        self.names = list(self._weights)
        self._buckets = [self._bucket(names) for names in in_buckets(self.names, self._all(), BUCKET_BYTES)]
        own = [rows for bucket in self._buckets for rows in bucket.by_rank[self._rank]]
        self.rows = {each.name: each.rows for each in own}
        """Of each weight that this rank steps some of."""

        self.stepped = {each.name: nn.Parameter(each.of(each.weight)) for each in own}
        """Those rows, in the weights' own memory."""

        self._optimizer: Optimizer | None = None

    def _all(self) -> list[nn.Parameter]:
        return list(self._weights.values())

    def _bucket(self, names: list[str]) -> _Bucket:
        weights = [self._weights[name] for name in names]
        by_rank = [
            [_Rows(names[place], weights[place], rows) for place, rows in part]
            for part in cut_rows([tuple(weight.shape) for weight in weights], self._world)
        ]
        numbers = [sum(each.of(each.weight).numel() for each in part) for part in by_rank]
        return _Bucket(by_rank, max(numbers), weights[0].detach().new_zeros(max(numbers) - min(numbers)))

    def share_out(self, optimizer: Optimizer) -> None:
        """Have an optimizer of the model's weights step this rank's part alone, in place; after each of its steps all
        ranks have all weights. It must not have stepped before."""
        own = {self._weights[name]: stepped for name, stepped in self.stepped.items()}
        spread = set(self._all())
        for group in optimizer.param_groups:
            group["params"] = [own.get(p, p) for p in group["params"] if p in own or p not in spread]
        optimizer.register_step_post_hook(lambda *_: self.gather())
        self._optimizer = optimizer

    def present(self) -> list[bool]:
        """By name: whether this rank had a gradient of it in this step."""
        return [weight.grad is not None for weight in self._all()]

    @torch.no_grad()
    def settle(self, anywhere: Sequence[bool]) -> None:
        """After the last micro-batch: each rank has its part of the shard group's gradients, and no others."""
        assert self._optimizer is not None, "the optimizer was not shared out: it would step nothing"
        there = dict(zip(self.names, anywhere, strict=True))
        for bucket in self._buckets:
            flat = torch.cat([x for part in bucket.by_rank for x in bucket.filled([_gradient(each) for each in part])])
            received = flat.new_empty(bucket.longest)
            reduce_scatter(received, flat, self._shard)
            own = bucket.by_rank[self._rank]
            for each, gradient in zip(own, _parted(received, own), strict=True):
                self.stepped[each.name].grad = gradient if there[each.name] else None
            for part in bucket.by_rank:
                for each in part:
                    each.weight.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """All ranks have what each has stepped. All of the shard group call this."""
        for bucket in self._buckets:
            flat = torch.cat(bucket.filled([each.of(each.weight) for each in bucket.by_rank[self._rank]]))
            whole = flat.new_empty(self._world * bucket.longest)
            all_gather(whole, flat, self._shard)
            theirs, sent = [], []
            for rank, (part, row) in enumerate(zip(bucket.by_rank, whole.view(self._world, -1), strict=True)):
                if rank != self._rank:
                    theirs += [each.of(each.weight) for each in part]
                    sent += _parted(row, part)
            if theirs:
                torch._foreach_copy_(theirs, sent)

    def let_go(self) -> None:
        """What is gathered stays."""


def apply_state_shard(
    model: BlockStack[Any, Any], shard: dist.ProcessGroup, *, ignored: set[nn.Parameter]
) -> StateShard:
    """Spread over `shard` what is stepped of the model; over its copies gradients are still to be added up. The
    optimizer is then to be shared out (`StateShard.share_out`).

    `ignored` parameters are left as they are.
    """
    return StateShard(model, shard, ignored)


def cut_rows(shapes: Sequence[tuple[int, ...]], parts: int) -> list[list[tuple[int, range]]]:
    """Weights of these shapes in parts of as many numbers, but for half a row at either end: of each part, which rows
    of which weights, in order."""
    sizes = [math.prod(shape) for shape in shapes]
    cuts: list[list[tuple[int, range]]] = [[] for _ in range(parts)]
    before = 0
    for place, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        row = size // shape[0]
        ends = [min(max(round((sum(sizes) * part / parts - before) / row), 0), shape[0]) for part in range(parts + 1)]
        for part, (first, last) in enumerate(itertools.pairwise(ends)):
            if first < last:
                cuts[part].append((place, range(first, last)))
        before += size
    return cuts


def _gradient(each: _Rows) -> Tensor:
    """Of these rows on this rank; zeros where it has none."""
    gradient = each.weight.grad
    return torch.zeros_like(each.of(each.weight)) if gradient is None else each.of(gradient)


def _parted(flat: Tensor, part: Sequence[_Rows]) -> list[Tensor]:
    """What lies in a row, by the rows of weights that it is of."""
    shapes = [each.of(each.weight).shape for each in part]
    found = torch.split(flat[: sum(shape.numel() for shape in shapes)], [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(found, shapes, strict=True)] if part else []
