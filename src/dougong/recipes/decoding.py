"""The whole description of a run that trains the large decoder to write a text from whatever else a record has.

Here        DecodeRecipe and its objective; the recipe caption-decoder.
Elsewhere   carrying one out (recipes/decode.py); the model (model/decoder.py); other kinds of runs (recipes/recipe.py,
            recipes/generation.py).
Promise     `dougong show` prints all of it, and what it prints runs as it is, on one process and on any layout.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dougong.core.config import Config
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.decoder import DecoderConfig, ExpertsConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.sampling import SamplingConfig
from dougong.recipes.generation import caption_records
from dougong.recipes.recipe import DataConfig


class DecodeObjective(Config):
    """What is minimised: each record's mean cross entropy of its words. Experts are kept busy by
    model.experts.balance_speed, without a loss."""

    further_weight: float = Field(default=0.3, ge=0)
    """Of words after the next one, where model.num_further asks for some."""


class DecodeRecipe(Config):
    """One run."""

    kind: Literal["decode"] = "decode"
    name: str
    about: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    """`conditions` are judged with the written text in each; the target is not learnt."""

    model: DecoderConfig = DecoderConfig()
    objective: DecodeObjective = DecodeObjective()
    sampling: SamplingConfig = SamplingConfig(temperature=0)
    """How what is shown is written; the bundle's own settings too."""

    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    plan: PlanConfig | None = PlanConfig()
    """How the run is laid out on the ranks that are started. None: the planner chooses for as many as there are."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.sampling.guidance != 1:
            raise ValueError(
                f"sampling.guidance={self.sampling.guidance} draws away from what is written without the others, "
                "which the decoder does not do. Use 1."
            )
        if self.train.sampling is not None:
            raise ValueError("train.sampling follows what a decision loses, and none is made. Use data.withhold.")
        return self


def caption_decoder() -> DecodeRecipe:
    """Captions of easy-VQA's pictures, by the large decoder's architecture made small, experts included."""
    return DecodeRecipe(
        name="caption-decoder",
        about="Some minutes on one core. Start it with --ranks 4 --set plan.tensor=2, or expert, context, pipeline.",
        data=caption_records(batch_size=32),
        model=DecoderConfig(
            width=64,
            num_layers=4,
            num_dense=1,
            num_heads=4,
            hidden=128,
            experts=ExpertsConfig(num=4, num_chosen=2, num_shared=1, hidden=32),
            encoders={
                "image": ImageEncoderConfig(
                    width=64, num_layers=1, num_heads=4, feedforward_ratio=2.0, patch_size=4, stem="convolution", pool=2
                )
            },
        ),
        train=TrainConfig(
            steps=600,
            precision="fp32",
            evaluate_every=200,
            optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_ratio=0.1),
        ),
    )
