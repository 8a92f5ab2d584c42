"""How a run is laid out on devices.

Here        PlanConfig, `check_plan`.
Elsewhere   choosing one (engine/planner/); carrying it out (engine/prepare.py, and beside this).
Promise     a layout that cannot be is refused before any rank has sent anything, with what would fit.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.parallel.schedule import V_SHAPED, Schedule, check_schedule


class PlanConfig(Config):
    """Along which axes the ranks stand. What is left of them by the other axes shares out the records."""

    tensor: int = Field(default=1, gt=0)
    """Ranks that compute every layer together."""

    sequence: bool = True
    """Ranks of the tensor axis also share out the tokens between layers, where the model can: the same numbers, less
    memory."""

    pipeline: int = Field(default=1, gt=0)
    """Ranks that blocks are spread over."""

    chunks: int = Field(default=1, gt=0)
    """Stages on each rank of the pipeline."""

    schedule: Schedule = "1f1b"
    """In which order stages work."""

    shard: int = Field(default=1, gt=0)
    """Ranks, of those that share out the records, over which weights, gradients and optimizer are spread (ZeRO). What
    is left of them holds copies (hybrid sharding)."""

    sharding: Literal["zero2", "zero3"] = "zero3"
    """zero2: gathered weights stay until the step's end. zero3: they go after each block, and are gathered again."""

    expert: int = Field(default=1, gt=0)
    """Ranks, of those that share out the records, over which routed experts are spread."""

    reduction: Literal["flat", "hierarchical"] = "flat"
    """How gradients of copies are added up. hierarchical: inside nodes and across them, in the form that a short
    measurement at the start finds fastest for each size, flat among them."""

    wire: Literal["fp32", "bf16"] = "fp32"
    """What goes between nodes; bf16 halves it, and what rounding loses in a step is added to the next."""

    per_node: int | None = Field(default=None, gt=0)
    """Ranks of a node. None: as torchrun says."""

    @model_validator(mode="after")
    def _fits_together(self) -> PlanConfig:
        if self.schedule in V_SHAPED and self.chunks != 2:
            raise ValueError(f"schedule={self.schedule} has 2 stages on each rank, not {self.chunks}. Use chunks: 2.")
        if self.schedule in ("gpipe", "1f1b") and self.chunks != 1:
            raise ValueError(f"schedule={self.schedule} has 1 stage on each rank. Use chunks: 1, or interleaved.")
        if self.pipeline == 1 and self.chunks != 1:
            raise ValueError(f"chunks={self.chunks} cannot take effect without a pipeline. Use pipeline: 2 or more.")
        if self.shard > 1 and self.pipeline > 1 and self.sharding == "zero3":
            raise ValueError(
                f"sharding=zero3 with pipeline={self.pipeline} would gather a stage's weights for every micro-batch "
                "again. Use sharding: zero2, or pipeline: 1."
            )
        if self.reduction == "flat" and self.wire != "fp32":
            raise ValueError(
                f"wire={self.wire} is what goes between nodes. Use reduction: hierarchical, or wire: fp32."
            )
        if self.reduction == "hierarchical" and self.shard > 1:
            raise ValueError(
                f"reduction=hierarchical adds up gradients of copies, and shard={self.shard} has the sharder add them "
                "up. Use reduction: flat, or shard: 1."
            )
        return self


def check_plan(plan: PlanConfig, world: int, *, accumulation: int) -> int:
    """How many ranks share out the records.

    Raises:
        ConfigError: so many ranks cannot stand so; the message says what fits.
    """
    together = plan.tensor * plan.pipeline
    if world % together:
        fits = sorted({n for n in range(1, world + 1) if world % n == 0})
        raise ConfigError(
            f"plan tensor={plan.tensor} x pipeline={plan.pipeline} takes {together} ranks at a time, and there are "
            f"{world}. Use a product in {fits}, or start a multiple of {together} ranks."
        )
    data = world // together
    for name in ("shard", "expert"):
        size = getattr(plan, name)
        if data % size:
            fits = [n for n in range(1, data + 1) if data % n == 0]
            raise ConfigError(
                f"plan {name}={size} cannot be a part of the {data} ranks that share out the records. "
                f"Use {name} in {fits}."
            )
    if plan.pipeline > 1:
        check_schedule(plan.schedule, plan.pipeline, plan.chunks, accumulation)
    return data
