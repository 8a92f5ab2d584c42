"""Adding up gradients of copies while the backward is still under way.

Here        EarlySums; `apply_early_sums`, where it is worth it.
Elsewhere   adding them up afterwards (replicate.py), or in levels (hierarchical.py); the order of a step (layout.py).
Promise     the sums are those that would be made afterwards, within rounding, and the same on every rank, whatever
            records each has. Buckets go out in one order on all ranks: one that lacks a gradient waits, and what comes
            after it with it, until the backward has ended.

A bucket holds parameters in the reverse of their order in the model, about as a backward comes to them (Li et al. 2020,
arXiv:2006.15704). Only the last micro-batch's backward is listened to: before it, gradients are still being added to.
What DistributedDataParallel asks beforehand, whether a parameter takes part at all, ranks tell each other at the end:
what nobody had a gradient of is not waited for in the next step, and goes out afterwards if it has one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dougong.engine.parallel.collectives import UnderWay, begin_sum
from dougong.engine.parallel.replicate import (
    add_up,
    flags_and_numbers,
    flat_of,
    gradients_anywhere,
    in_buckets,
    told_together,
    zeros_like_gradient,
)
from dougong.engine.precision.weights import gradient_type
from dougong.engine.step import TrainParts, plain_backward
from dougong.nn.batch import Batch

EARLY_BYTES: Final = 4 * 2**20
"""Of a bucket: small enough that a small model has several, and large enough for a wire's whole rate."""


def apply_early_sums(parameters: Sequence[nn.Parameter]) -> EarlySums | None:
    """Of a model that all ranks have whole copies of; all of them call this together. None where all would go out at
    once."""
    if len(_buckets(parameters, EARLY_BYTES)) < 2:
        return None
    # A group of their own: a loss may exchange something within the backward, at another moment on every rank.
    return EarlySums(parameters, dist.new_group(), EARLY_BYTES)


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    backwards = parameters[::-1]
    like = [zeros_like_gradient(parameter, "meta") for parameter in backwards]
    return list(in_buckets(backwards, like, bucket_bytes))


class EarlySums:
    """Gradients of these parameters, each added up over the ranks as soon as it and those before it are there."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int) -> None:
        """Nobody else uses the group within a step."""
        self._parameters, self._group = list(parameters), group
        self._buckets = _buckets(self._parameters, bucket_bytes)
        self._bucket_of = {p: place for place, bucket in enumerate(self._buckets) for p in bucket}
        self._expected = set(self._parameters)
        """What some rank had a gradient of in the last step; the same on all."""

        self._listening = False
        self._lacking: list[set[nn.Parameter]] = []
        """Of each bucket, what of it has no gradient yet."""

        self._sent: list[tuple[Tensor, UnderWay]] = []
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._is_there)  # type: ignore[no-untyped-call]

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    @property
    def num_sent(self) -> int:
        """Buckets of this step that are on their way, or have come."""
        return len(self._sent)

    def backward(self, parts: TrainParts, batches: Sequence[Batch], num_records: float) -> Tensor:
        """As one_by_one (engine/step.py); the last backward sends what it has."""
        backward = parts.backward or plain_backward
        losses = []
        for number, batch in enumerate(batches):
            if number == len(batches) - 1:
                self._lacking = [self._expected.intersection(bucket) for bucket in self._buckets]
                self._sent, self._listening = [], True
                self._send_what_is_there()
            losses.append(backward(parts, batch, num_records))
        self._listening = False
        return torch.stack(losses).sum()

    def _is_there(self, parameter: nn.Parameter) -> None:
        """Its gradient is whole."""
        if not self._listening or parameter not in self._expected:
            return
        lacking = self._lacking[self._bucket_of[parameter]]
        if parameter not in lacking:
            raise RuntimeError("a backward came to a parameter twice: its gradient had been sent before it was whole")
        lacking.remove(parameter)
        self._send_what_is_there()

    def _send_what_is_there(self) -> None:
        while self.num_sent < self.num_buckets and not self._lacking[self.num_sent]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self.num_sent]
        there = [p.grad if p in self._expected else None for p in bucket]
        flat = flat_of([zeros_like_gradient(p) if g is None else g for p, g in zip(bucket, there, strict=True)])
        self._sent.append((flat, begin_sum(flat, self._group)))

    @torch.no_grad()
    def settle(self, loss: Tensor) -> Tensor:
        """After the backward: gradients are the sums; returned is the sum of the losses."""
        if not self._lacking:  # nobody listened to this backward
            self._sent = []
        present = [parameter.grad is not None for parameter in self._parameters]
        while self.num_sent < self.num_buckets:
            self._send()
        told = told_together(present, loss[None])
        telling = begin_sum(told, self._group)
        for (flat, under_way), bucket in zip(self._sent, self._buckets, strict=True):
            under_way.wait()
            for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                if parameter in self._expected:
                    parameter.grad = part.view(parameter.shape).to(gradient_type(parameter))
        telling.wait()
        anywhere, numbers = flags_and_numbers(told, len(self._parameters))
        there = {parameter for parameter, flag in zip(self._parameters, anywhere, strict=True) if flag}
        back = [parameter for parameter in self._parameters if parameter in there - self._expected]
        add_up(gradients_anywhere(back, [True] * len(back)), self._group)
        for parameter in self._expected - there:
            parameter.grad = None
        self._expected, self._lacking, self._sent = there, [], []
        return numbers[0]
