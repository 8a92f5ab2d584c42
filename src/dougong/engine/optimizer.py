"""How far each step moves the weights.

Here        OptimizerConfig: AdamW, its warm-up and its way down.
Elsewhere   taking the step (engine/step.py); AdamW of weights and state in few bits (engine/precision/adamw.py).
Promise     the learning rate depends on the step and the number of steps alone, so a resumed run needs no
            scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import field_validator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.precision.adamw import NarrowAdamW
from dougong.engine.precision.states import StateFormat, States
from dougong.engine.precision.weights import Narrowed
from dougong.nn.block_stack import BlockStack


class OptimizerConfig(Config):
    """AdamW with a linear warm-up, then a half cosine."""

    learning_rate: float = 1e-3
    """The highest one, right after the warm-up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """How long the gradient's mean and its square are remembered."""

    weight_decay: float = 0.01
    """Of matrices only: biases, norms and other 1-D parameters keep their scale."""

    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises."""

    multipliers: dict[str, float] = {}
    """Of the learning rate, by part of the model (an encoder has its modality's name). The others have 1."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What comes after the warm-up."""

    final_ratio: float = 0.0
    """Where the cosine ends, as a ratio of `learning_rate`."""

    states: States = "fp32"
    """Of the gradient's mean and its square, for every weight: 8 bytes, or 2 (8bit), or 1 (4bit). Needs
    dougong[lowbit]."""

    @field_validator("learning_rate")
    @classmethod
    def _above_zero(cls, learning_rate: float) -> float:
        if not (learning_rate > 0 and math.isfinite(learning_rate)):
            raise ValueError(f"{learning_rate} must be above 0 and finite. Use for example 1e-3.")
        return learning_rate

    @field_validator("multipliers")
    @classmethod
    def _each_above_zero(cls, multipliers: dict[str, float]) -> dict[str, float]:
        for name, multiplier in multipliers.items():
            if not (multiplier > 0 and math.isfinite(multiplier)):
                raise ValueError(f"{name}: {multiplier} must be above 0. Use for example 4.0, or 1.0 for no change.")
        return multipliers

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{betas} must both be in [0, 1). Use for example [0.9, 0.999].")
        return betas

    @field_validator("weight_decay")
    @classmethod
    def _not_below_zero(cls, weight_decay: float) -> float:
        if not weight_decay >= 0:
            raise ValueError(f"{weight_decay} must not be below 0. Use 0 for none.")
        return weight_decay

    @field_validator("warmup_ratio", "final_ratio")
    @classmethod
    def _a_ratio(cls, ratio: float) -> float:
        if not 0 <= ratio <= 1:
            raise ValueError(f"{ratio} must be a ratio, from 0 to 1. Use for example 0.05.")
        return ratio

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of the step that follows `step` steps."""
        warmup_steps = round(self.warmup_ratio * total_steps)
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / (warmup_steps + 1)
        if self.schedule == "constant":
            return self.learning_rate
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        ratio = self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * ratio

    def build(self, model: nn.Module, narrowed: Narrowed | None = None, *, seed: int = 0) -> Optimizer:
        """The optimizer of every parameter that is to be trained; each group holds its `multiplier`.

        `narrowed` is what has become of the weights, where they are in 16 bits; the seed is of what rounding draws.

        Raises:
            ConfigError: a multiplier is for no part of this model; `states` needs what is not installed.
        """
        parts = model.parts() if isinstance(model, BlockStack) else {}
        strange = [name for name in self.multipliers if name not in parts]
        if strange:
            known = f"Use some of {', '.join(parts)}." if parts else "This model names no parts."
            raise ConfigError(f"optimizer.multipliers names {strange[0]!r}, which is no part of the model. {known}")
        multiplier_of = {parameter: self.multipliers[name] for name in self.multipliers for parameter in parts[name]}
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {
                "params": chosen,
                "weight_decay": self.weight_decay if decays else 0.0,
                "multiplier": multiplier,
            }
            for multiplier in sorted({1.0, *self.multipliers.values()})
            for decays in (True, False)
            for chosen in alike(
                p for p in parameters if (p.ndim >= 2) is decays and multiplier_of.get(p, 1.0) == multiplier
            )
        ]
        # Three times faster than the loop on a CPU too; other devices and integers have no fused kernel.
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        # An optimizer wants something; a rank of a pipeline may have nothing that is to be trained.
        groups = groups or [{"params": [nn.Parameter(torch.zeros(()))], "multiplier": 1.0}]
        if self.states == "fp32" and (narrowed is None or narrowed.how == "fp32"):
            return AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=fused)
        return NarrowAdamW(
            groups,
            lr=self.learning_rate,
            betas=self.betas,
            narrowed=narrowed or Narrowed("fp32", {}),
            states=StateFormat(self.states),
            seed=seed,
        )


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one kernel can step together: spread ones apart from others. Nothing is left empty."""
    spread: list[nn.Parameter] = []
    here: list[nn.Parameter] = []
    for parameter in parameters:
        (spread if isinstance(parameter, DTensor) else here).append(parameter)
    return [each for each in (here, spread) if each]
