"""Teaches a model to live with its bits, where rounding it once costs too much.

Here        RecoverConfig, `recover`.
Elsewhere   the plan (quantise.py); its rounding (bits.py); carrying it out (export.py).
Promise     the model that is given stays as it is; what comes back has other weights and the same shape, and is to be
            rounded to the nearest, as it was taught. Records need no target.

Shapes: B records, C outputs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dougong.compress.bits import Range, to_eight, to_four
from dougong.compress.plan import Plan, weight_bits
from dougong.compress.sensitivity import Seen, divergence
from dougong.core.config import Config
from dougong.core.signature import Task
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch


class RecoverConfig(Config):
    """How long, and how fast."""

    steps: int = Field(default=100, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)


def recover(
    network: Sandwich,
    plan: Plan,
    seen: Mapping[str, Seen],
    batches: Sequence[Batch],
    task: Task,
    config: RecoverConfig,
    announce: Callable[[str, int, int], None] | None = None,
) -> Sandwich:
    """A copy whose weights answer as the model does, once they are rounded as the plan says.

    Gradients pass rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432), and the teacher is the model
    itself before rounding, by the divergence of the answers, so that unlabelled records will do. Ranges of inputs stay
    as they were seen.
    """
    student = copy.deepcopy(network).eval()  # no dropout: what is to be learnt is exact
    held = [
        student.get_submodule(name).register_forward_hook(
            _Rounding(weight_bits(choice), seen[name].range if choice.endswith("a8") else None)
        )
        for name, choice in plan.layers.items()
    ]
    weights = [weight for weight in student.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), config.steps)):
        if announce is not None:
            announce("recovering", step, config.steps)
        with torch.no_grad():
            exact_BC = network(batch).output_BC
        loss: Tensor = divergence(exact_BC, student(batch).output_BC, task).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # as torch has it
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    for each in held:
        each.remove()
    return student


class _Rounding:
    """A layer's answer with rounded weights and inputs, in place of its own."""

    def __init__(self, bits: int, range_: Range | None) -> None:
        self.bits, self.range = bits, range_

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight: Any = module.weight
        if self.bits < 16:
            rounded = (to_eight if self.bits == 8 else to_four)(weight.detach()).widened()
            weight = weight + (rounded - weight).detach()
        if isinstance(module, nn.Embedding):
            return functional.embedding(given[0], weight)
        x = given[0] if self.range is None else given[0] + (self.range.rounded(given[0]) - given[0]).detach()
        return functional.linear(x, weight, module.bias)
