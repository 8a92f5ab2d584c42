"""The whole description of a run that learns to write between two modalities.

Here        GenerateRecipe and its parts; the recipes vqa-generate and pretrain-joint.
Elsewhere   carrying one out (recipes/generate.py); a run that learns to decide (recipes/recipe.py).
Promise     `dougong show` prints all of it, and what it prints runs as it is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dougong.core.config import Config
from dougong.data.loader import LoaderConfig
from dougong.data.modality.image import ImageAugment
from dougong.data.preparation import PreparationConfig
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.completion import CompletionConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sampling import SamplingsConfig
from dougong.model.vq import TokenizerConfig
from dougong.model.writer import WriterConfig
from dougong.recipes.recipe import DataConfig


class TokenizerStage(Config):
    """How the picture tokenizer is trained, before the writer; its shape stands in model.tokenizer."""

    take: str | None = None
    """A run or a bundle of a writer whose tokenizer is taken as it is, in place of training one."""

    batch_size: int = Field(default=32, gt=0)
    train: TrainConfig = TrainConfig()


class GenerationObjective(Config):
    """What is learnt, and how much each part counts."""

    caption_weight: float = 1.0
    """Of a caption's mean cross entropy."""

    draw_weight: float = 1.0
    """Of a picture's mean cross entropy."""

    align_weight: float = 1.0
    """Of the contrastive loss between pictures and their words, where model.align is set."""

    spare: str | None = None
    """A column: records that share its value are not held against each other by the contrastive loss. None: all are."""

    completion_weight: float = 1.0
    """Of the loss between what model.completion makes and what the other encoder says. 0: what is written alone teaches
    it."""

    @field_validator("caption_weight", "draw_weight", "align_weight")
    @classmethod
    def _above_zero(cls, weight: float) -> float:
        if not weight > 0:
            raise ValueError(f"{weight} must be above 0. To leave a part out, set model.directions or model.align.")
        return weight

    @field_validator("completion_weight")
    @classmethod
    def _not_below_zero(cls, weight: float) -> float:
        if not weight >= 0:
            raise ValueError(f"{weight} must not be below 0. Use 0 for none.")
        return weight


class GenerateRecipe(Config):
    """One run."""

    kind: Literal["generate"] = "generate"
    name: str
    about: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    tokenizer: TokenizerStage = TokenizerStage()
    model: WriterConfig = WriterConfig()
    objective: GenerationObjective = GenerationObjective()
    sampling: SamplingsConfig = SamplingsConfig()
    """How what is judged and shown is sampled; a bundle's own settings too."""

    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    """Of the writer. The tokenizer, which is small, keeps all."""

    @model_validator(mode="after")
    def _guidance_learnt(self) -> GenerateRecipe:
        for direction in self.model.directions:
            guidance = getattr(self.sampling, direction).guidance
            if guidance != 1 and not self.model.condition_dropped:
                raise ValueError(
                    f"sampling.{direction}.guidance={guidance} needs model.condition_dropped above 0, for some records "
                    "to be learnt without their condition. Use for example 0.1, or guidance 1."
                )
        return self

    @model_validator(mode="after")
    def _parts_to_weigh(self) -> GenerateRecipe:
        completes = self.model.completion is not None
        idle = {"align_weight": not self.model.align, "spare": not self.model.align, "completion_weight": not completes}
        for name, without_effect in idle.items():
            given = getattr(self.objective, name)
            if without_effect and given != GenerationObjective.model_fields[name].default:
                part = "model.completion" if name == "completion_weight" else "model.align: true"
                raise ValueError(f"objective.{name}={given} cannot take effect. Set {part}, or leave {name} out.")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> GenerateRecipe:
        for name in ("views", "one_view_a_batch", "withhold", "corrupt", "conditions"):
            given = getattr(self.data, name)
            if given != DataConfig.model_fields[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"data.{name}={given} has no effect: a writer reads each record as it is, to write one part of it "
                    "from the other. Leave it out; model.condition_dropped leaves conditions out."
                )
        if self.train.sampling is not None or self.tokenizer.train.sampling is not None:
            raise ValueError("train.sampling follows what a decision loses, and none is made. Leave it out.")
        if self.data.loader.batch_size < len(self.model.directions):
            raise ValueError(
                f"data.loader.batch_size={self.data.loader.batch_size} leaves some of {len(self.model.directions)} "
                "directions without a record. Use as many or more."
            )
        return self


def vqa_generate() -> GenerateRecipe:
    """Captions of easy-VQA's pictures, and pictures of captions, by one decoder."""
    return _captions("vqa-generate", "One model of both directions; model.directions chooses one of them.", joint=False)


def pretrain_joint() -> GenerateRecipe:
    """The same with a contrastive loss on the same encoders, and what is missing completed before it is written."""
    return _captions(
        "pretrain-joint",
        "One model learns at once to tell what belongs together, to complete what is missing, and to write it.",
        joint=True,
    )


def caption_records(*, batch_size: int) -> DataConfig:
    """easy-VQA's pictures with captions; none on two sides of a split."""
    return DataConfig(
        source="captions",
        target="named",
        columns={"colour": "ignore", "shape": "ignore", "image_id": "ignore"},
        unit="image_id",
        validation_share=0.05,
        # A moved or mirrored picture keeps its caption, and is another picture to draw.
        # At half their size a code of 4 pixels still tells corners from curves, and all costs a quarter.
        preparation=PreparationConfig(image_size=32, image_augment=ImageAugment(flip=True, shift_pixels=3)),
        loader=LoaderConfig(batch_size=batch_size),
    )


def _captions(name: str, about: str, *, joint: bool) -> GenerateRecipe:
    return GenerateRecipe(
        name=name,
        about=about,
        data=caption_records(batch_size=64),
        tokenizer=TokenizerStage(
            train=TrainConfig(
                steps=5400,
                precision="fp32",
                optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
            )
        ),
        model=WriterConfig(
            width=64,
            align=joint,
            # Four: of a picture, a token for each quarter of its height.
            completion=CompletionConfig(num_tokens=4) if joint else None,
            image_encoder=ImageEncoderConfig(
                width=64, num_layers=1, num_heads=4, feedforward_ratio=2.0, patch_size=4, stem="convolution", pool=2
            ),
            text_encoder=TextEncoderConfig(width=64, num_layers=1, num_heads=4, feedforward_ratio=2.0),
            tokenizer=TokenizerConfig(cell=4, width=48, num_codes=512),
        ),
        # Few colours and shapes, each in a few wordings: another record's caption is often true of the picture too.
        objective=GenerationObjective(spare="named") if joint else GenerationObjective(),
        train=TrainConfig(
            steps=8000,
            precision="fp32",
            evaluate_every=500,
            optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_ratio=0.1),
        ),
    )
