"""What a recipe says of its memory.

Here        MemoryConfig, `keep_of`; `settled_keep`, where it may be a budget.
Elsewhere   carrying it out (recompute.py); finding what fits a budget (budget.py).
Promise     settings that contradict each other, or cannot take effect, are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.sizes import read_bytes
from dougong.engine.memory.blocks import measure_blocks
from dougong.engine.memory.budget import fit_budget
from dougong.engine.memory.offload import OffloadConfig
from dougong.engine.memory.recompute import KEEPS, Keep
from dougong.engine.memory.saved import Saved, SavedAs
from dougong.engine.precision.choice import Chosen
from dougong.engine.step import Loss
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class MemoryConfig(Config):
    """How much of a step is kept, where, and how much made anew. Losses and weights are the same to the bit but where a
    setting says otherwise."""

    recompute: Literal["none", "cheap", "blocks"] = "none"
    """In the backward. cheap: all but products, convolutions and attention, in every block. blocks: whole blocks, from
    what they were given."""

    every: int = Field(default=1, gt=0)
    """Of blocks in a row, one so many is made anew."""

    activations: float | str | None = None
    """Or a budget for a rank's activations at their most: a share of what keeping all takes, or bytes like 6GiB. What
    each block keeps is then chosen by what was measured, so that a step takes least time."""

    keep: tuple[Keep, ...] | None = None
    """What each block keeps; found from the budget where it is not given."""

    offload: OffloadConfig = OffloadConfig()
    """What lies on the disk but for the blocks that are at work; `offload: disk` is all that can."""

    segments: int | Literal["auto"] | None = None
    """recompute=blocks: so many blocks in a row are compiled into one piece, which is made anew as a whole. auto: as
    many as are measured to be fastest without more memory, or none. Numbers are the same within rounding alone."""

    saved: Saved = "kept"
    """Where what autograd saves inside blocks is until the backward. kept: where it is. host: in the host's memory,
    from a device's. disk: in a file of the run's folder, which is gone with the run."""

    saved_as: SavedAs = "same"
    """bf16: 32-bit activations are saved in 16 bits; gradients are then not exact (docs/numerics.md)."""

    @field_validator("activations")
    @classmethod
    def _a_budget(cls, activations: float | str | None) -> float | str | None:
        if isinstance(activations, str):
            try:
                read_bytes(activations)
            except ConfigError as error:
                raise ValueError(f"{error} Or a share of what keeping all takes, like 0.4.") from None
        elif activations is not None and not 0 < activations <= 1:
            raise ValueError(f"{activations} is no share of what keeping all takes. Use 0.4, or bytes like 6GiB.")
        return activations

    @model_validator(mode="after")
    def _one_way(self) -> MemoryConfig:
        if self.every != 1 and self.recompute == "none":
            raise ValueError(f"every={self.every} has no effect with recompute: none. Use cheap or blocks.")
        if self.recompute != "none" and (self.activations is not None or self.keep is not None):
            raise ValueError(
                f"recompute={self.recompute} says what all blocks keep, and so does "
                f"{'keep' if self.activations is None else 'activations'}. Give one of them."
            )
        return self

    @model_validator(mode="after")
    def _segments_of_something(self) -> MemoryConfig:
        if isinstance(self.segments, int) and self.segments < 1:
            raise ValueError(f"segments={self.segments} must be at least 1 block. Use 2, or auto.")
        if self.segments is not None and (self.recompute != "blocks" or self.every != 1):
            raise ValueError(
                f"segments={self.segments} makes all blocks anew, and recompute={self.recompute} with "
                f"every={self.every} does not. Use recompute: blocks, and leave every out."
            )
        return self


def settled_keep(
    config: MemoryConfig,
    model: BlockStack[Any, Any],
    loss: Loss,
    batch: Batch,
    measured: Callable[[Sequence[Keep]], int],
    *,
    precision: Chosen,
    keeps: Sequence[Keep] = KEEPS,
) -> tuple[Keep, ...] | None:
    """What each block is to keep; where that is a budget, what meets it in least time. None: all.

    `measured` carries a step out and says what activations took at their most; `keeps` are what a block may keep.

    Raises:
        ConfigError: nothing meets the budget.
    """
    if config.activations is None or config.keep is not None:
        return keep_of(config, len(model.blocks))
    profile = measure_blocks(model, loss, batch, precision=precision, keeps=keeps)
    return fit_budget(profile, functools.partial(_budget_bytes, config), measured).keep


def _budget_bytes(config: MemoryConfig, whole: float) -> float:
    """The budget, where there is one; `whole` is what keeping all takes."""
    assert config.activations is not None
    return read_bytes(config.activations) if isinstance(config.activations, str) else config.activations * whole


def keep_of(config: MemoryConfig, num_blocks: int) -> tuple[Keep, ...] | None:
    """What each block keeps; None: all.

    Raises:
        ConfigError: `keep` is of another number of blocks.
    """
    if config.keep is not None:
        if len(config.keep) != num_blocks:
            raise ConfigError(
                f"memory.keep says what {len(config.keep)} blocks keep, and the model has {num_blocks}. "
                "Leave it out, or give one for each."
            )
        return config.keep
    if config.recompute == "none":
        return None
    less: Keep = "products" if config.recompute == "cheap" else "nothing"
    return tuple(less if place % config.every == 0 else "all" for place in range(num_blocks))
