"""How a run is laid out on devices.

Here        PlanConfig, `check_plan`.
Elsewhere   choosing one (engine/planner/); carrying it out (engine/prepare.py, and beside this).
Promise     a layout that cannot be, and a setting that cannot take effect, are refused before any rank has sent
            anything, with what would fit.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.parallel.context import Form
from dougong.engine.parallel.schedule import V_SHAPED, Schedule, check_schedule

GATHERED_BYTES: Final = 25 * 2**20

Sharding = Literal["zero1", "zero2", "zero3"]


class PlanConfig(Config):
    """Along which axes the ranks stand. What is left of them by the other axes shares out the records."""

    tensor: int = Field(default=1, gt=0)
    """Ranks that compute every layer together."""

    sequence: bool = True
    """Ranks of the tensor axis also share out the tokens between layers, where the model can: the same numbers, less
    memory."""

    context: int = Field(default=1, gt=0)
    """Ranks that share out the tokens of each record, for sequences that are long; what is computed of a token is
    computed on one of them."""

    context_form: Form = "gather"
    """gather: each rank makes keys and values of all tokens, from what the others send. swap: in attention each rank
    has all tokens and a part of the heads, of which there must be as many."""

    pipeline: int = Field(default=1, gt=0)
    """Ranks that blocks are spread over."""

    chunks: int = Field(default=1, gt=0)
    """Stages on each rank of the pipeline."""

    schedule: Schedule = "1f1b"
    """In which order stages work."""

    shard: int = Field(default=1, gt=0)
    """Ranks, of those that share out records and tokens, over which the optimizer is spread, and weights and gradients
    where `sharding` says so (ZeRO). What is left of them holds copies (hybrid sharding)."""

    sharding: Sharding = "zero3"
    """zero1: the optimizer's state alone is spread; all ranks have all weights. zero2: weights too, and gathered ones
    stay until their backward. zero3: they go after their forward, and are gathered again. Of a model that is gathered
    in one piece, all are for the whole step, zero2 or zero3."""

    gathered_bytes: int = Field(default=GATHERED_BYTES, ge=0)
    """Blocks next to each other are gathered together until they are so many bytes: fewer messages, for memory. 0: each
    block by itself."""

    expert: int = Field(default=1, gt=0)
    """Ranks, of those that share out records and tokens, over which routed experts are spread."""

    reduction: Literal["flat", "hierarchical"] = "flat"
    """How gradients of copies are added up. hierarchical: inside nodes and across them, in the form that a short
    measurement at the start finds fastest for each size, flat among them. A resumed run measures anew, and may add up
    in another order: its losses are equal within rounding, not to the bit."""

    wire: Literal["fp32", "bf16"] = "fp32"
    """What goes between nodes; bf16 halves it, and what rounding loses in a step is added to the next."""

    per_node: int | None = Field(default=None, gt=0)
    """Ranks of a node. None: as torchrun says."""

    def in_words(self) -> str:
        """The axes along which ranks stand, in a few words."""
        chunks = f" x {self.chunks}" if self.chunks > 1 else ""
        axes = (
            (self.tensor > 1, f"tensor {self.tensor}"),
            (self.context > 1, f"context {self.context} by {self.context_form}"),
            (self.pipeline > 1, f"pipeline {self.pipeline}{chunks} {self.schedule}"),
            (self.expert > 1, f"expert {self.expert}"),
            (self.shard > 1, f"{self.sharding} over {self.shard}"),
        )
        return ", ".join(words for there, words in axes if there) or "copies"

    @model_validator(mode="after")
    def _fits_together(self) -> PlanConfig:
        for name, can, needed in (
            ("context_form", self.context > 1, "context: 2 or more"),
            ("sequence", self.tensor > 1, "tensor: 2 or more"),
            ("chunks", self.pipeline > 1, "pipeline: 2 or more"),
            ("schedule", self.pipeline > 1, "pipeline: 2 or more"),
            ("sharding", self.shard > 1, "shard: 2 or more"),
            (
                "gathered_bytes",
                self.shard > 1 and self.pipeline == 1 and self.sharding != "zero1",
                "shard: 2 or more, pipeline: 1, and sharding: zero2 or zero3",
            ),
            ("wire", self.reduction == "hierarchical", "reduction: hierarchical"),
            ("per_node", self.reduction == "hierarchical", "reduction: hierarchical"),
        ):
            given = getattr(self, name)
            if not can and given != type(self).model_fields[name].default:  # what is stored has all defaults
                raise ValueError(f"{name}={given} cannot take effect. Leave it out, or set {needed}.")
        if self.schedule in V_SHAPED and self.chunks != 2:
            raise ValueError(f"schedule={self.schedule} has 2 stages on each rank, not {self.chunks}. Use chunks: 2.")
        if self.schedule in ("gpipe", "1f1b") and self.chunks != 1:
            raise ValueError(f"schedule={self.schedule} has 1 stage on each rank. Use chunks: 1, or interleaved.")
        if self.shard > 1 and self.pipeline > 1 and self.sharding == "zero3":
            raise ValueError(
                f"sharding=zero3 with pipeline={self.pipeline} would gather a stage's weights for every micro-batch "
                "again. Use sharding: zero2 or zero1, or pipeline: 1."
            )
        return self


def check_plan(plan: PlanConfig, world: int, *, accumulation: int) -> int:
    """How many ranks share out the records.

    Raises:
        ConfigError: so many ranks cannot stand so; the message says what fits.
    """
    together = plan.tensor * plan.context * plan.pipeline
    if world % together:
        fits = sorted({n for n in range(1, world + 1) if world % n == 0})
        context = f" x context={plan.context}" if plan.context > 1 else ""
        raise ConfigError(
            f"plan tensor={plan.tensor}{context} x pipeline={plan.pipeline} takes {together} ranks at a time, and "
            f"there are {world}. Use a product in {fits}, or start a multiple of {together} ranks."
        )
    copies = world // (plan.tensor * plan.pipeline)
    for name in ("shard", "expert"):
        size = getattr(plan, name)
        if copies % size:
            fits = [n for n in range(1, copies + 1) if copies % n == 0]
            shared = "the records" if plan.context == 1 else "records and tokens"
            raise ConfigError(
                f"plan {name}={size} cannot be a part of the {copies} ranks that share out {shared}. "
                f"Use {name} in {fits}."
            )
    if plan.reduction == "hierarchical" and 1 < plan.shard == copies:
        raise ConfigError(
            f"plan reduction=hierarchical adds up gradients of copies, and shard={plan.shard} leaves none on {world} "
            "ranks. Use a smaller shard, or reduction: flat."
        )
    if plan.pipeline > 1:
        check_schedule(plan.schedule, plan.pipeline, plan.chunks, accumulation)
    return world // together
