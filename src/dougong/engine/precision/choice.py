"""Which number format the products are computed in, decided by a measurement.

Here        Precision, `autocast`, `choose_precision`.
Elsewhere   the step that obeys (engine/step.py); keeping the choice for a resumed run (engine/checkpoint.py).
Promise     weights stay in fp32; measuring leaves gradients, weights, buffers and random states as they were.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dougong.engine.random_state import random_state_kept
from dougong.nn.batch import Batch

Chosen = Literal["fp32", "bf16", "fp16", "adaptive"]
"""Of matrix products. adaptive: fp16 or bf16, group by group (adaptive.py)."""

Precision = Literal[Chosen, "auto"]

ENOUGH_GAIN = 1.1
"""How many times faster bf16 must be to be worth its rounding."""


class PrecisionChoice(NamedTuple):
    """What was chosen, and why."""

    precision: Chosen
    ratio: float | None
    """Seconds in fp32 divided by seconds in bf16, the median of pairs; None where it was not measured."""


def autocast(precision: Chosen, device_type: str) -> torch.autocast:
    """A context in which matrix products are computed in `precision`; adaptive groups have contexts of their own."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype=dtype, enabled=precision != "fp32")


def choose_precision(
    model: nn.Module,
    loss: Callable[[Any, Batch], Tensor],
    batch: Batch,
    *,
    pairs: int = 5,
    budget_seconds: float = 20.0,
    agree: Callable[[bool], bool] = bool,
) -> PrecisionChoice:
    """Time forward and backward of one batch in both formats, by turns.

    bf16 is chosen where it is clearly faster and its loss is finite; a loss that is not makes
    it fp32 without more ado. After `budget_seconds` no new pair begins. What depends on a clock or on this rank's
    records is decided by `agree`: ranks that measured another number of times would wait for each other.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device_type = parameters[0].device.type

    def run(precision: Chosen) -> bool:
        """Forward and backward; whether the loss is finite."""
        with autocast(precision, device_type):
            value = loss(model(batch), batch).float()
        # Not .backward(): that would add to the gradients that are there. Other leaves are asked for too, since what
        # leads to nothing that is asked for is not run, and an exchange between ranks may lead to no parameter here.
        torch.autograd.grad(value, [*parameters, *_other_leaves(value)], allow_unused=True)
        return math.isfinite(value.item())

    with random_state_kept(), _buffers_kept(model):
        return measure_precision(run, pairs=pairs, budget_seconds=budget_seconds, agree=agree)


def measure_precision(
    run: Callable[[Chosen], bool],
    *,
    pairs: int = 5,
    budget_seconds: float = math.inf,
    agree: Callable[[bool], bool] = bool,
) -> PrecisionChoice:
    """Time `run` in both formats by turns, after one untimed turn each; it says whether its result was finite."""
    deadline = time.perf_counter() + budget_seconds
    run("fp32")
    if not agree(run("bf16")):
        return PrecisionChoice("fp32", None)
    ratios: list[float] = []
    while len(ratios) < pairs and (not ratios or agree(time.perf_counter() < deadline)):
        ratios.append(_seconds(run, "fp32") / _seconds(run, "bf16"))
    ratio = statistics.median(ratios)
    return PrecisionChoice("bf16" if agree(ratio >= ENOUGH_GAIN) else "fp32", ratio)


def _other_leaves(value: Tensor) -> list[Tensor]:
    """What the value is made of that needs a gradient and is no parameter."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    ahead = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            found.append(leaf)
        ahead += [before for before, _ in node.next_functions]
    return found


def _seconds(run: Callable[[Chosen], bool], precision: Chosen) -> float:
    _wait_for_device()
    started = time.perf_counter()
    run(precision)
    _wait_for_device()
    return max(time.perf_counter() - started, 1e-9)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass in training does to running means."""
    buffers = list(model.buffers())
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
