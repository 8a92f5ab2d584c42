"""The whole description of a run that draws modalities together.

Here        AlignRecipe and its parts; the recipe emoji-retrieval.
Elsewhere   carrying one out (recipes/align.py); a run that learns to decide (recipes/recipe.py).
Promise     `dougong show` prints all of it, and what it prints runs as it is.
"""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from dougong.core.config import Config
from dougong.data.modality.image import ImageAugment
from dougong.data.preparation import PreparationConfig
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.dual import DualConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig

# fmt: off
LANGUAGES: Final = (
    "bn", "da", "de", "en_gb", "es", "es_mx", "et", "fi", "fr", "hi", "hu", "it", "ja", "ko", "lt", "ms", "nb", "nl",
    "pl", "pt", "ru", "sv", "th", "uk", "vi", "zh", "zh_hant",
)
"""Of emoji's names, besides English."""
# fmt: on


class HeldOutConfig(Config):
    """Which emoji are held out: subgroups, whole."""

    subgroups: int = Field(default=15, gt=0)
    """For the test, of 81."""

    validation: int = Field(default=6, ge=1)
    """More of them, to choose the checkpoint by."""

    between: tuple[int, int] | None = (280, 320)
    """Drawn again until the test has so many emoji: it is what one is looked for among. None: as they come."""

    seed: int | None = None
    """Of the draw. None: the run's."""


class AlignDataConfig(Config):
    """Where records come from, and which columns show what."""

    source: Literal["emoji"] | None = None
    """A collection that Dougong prepares by itself; None: the tables below."""

    folder: str | None = None
    """emoji: a folder with its npm packages. None: they are fetched by npm, once, into the user's cache."""

    held_out: HeldOutConfig = HeldOutConfig()
    """emoji: how it is split."""

    train: str | None = None
    """A table: Parquet (or a folder of shards), CSV or JSONL."""

    validation: str | None = None
    """Chooses the best checkpoint."""

    test: str | None = None
    """Judged once, at the end. None: the validation records are, and the report says so."""

    sides: dict[str, tuple[str, ...]]
    """By name, the columns that show one side of a record: views of a picture, names in many languages. All columns of
    a side are read alike, and by one encoder of that name."""

    judged: dict[str, tuple[str, ...]] = {}
    """Columns by which a side is judged; their vectors are averaged. A side not named here: its first column."""

    views: int = Field(default=2, gt=0)
    """Columns of each side that a batch shows of a record, drawn anew each time."""

    spare: str | None = None
    """A column: records that share its value are not held against each other (objective.spare_alike: or less, those of
    values that are alike). None: all are."""

    group: str | None = None
    """A column by whose values the report shows what was found."""

    allow_leak: bool = False
    """Whether a medium may stand in two of the tables. A run refuses it otherwise."""

    batch_size: int = Field(default=64, gt=1)
    """Records of one batch: each is told from so many less one."""

    preparation: PreparationConfig = PreparationConfig()

    @field_validator("sides")
    @classmethod
    def _two_sides(cls, sides: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if len(sides) < 2 or not all(sides.values()):
            raise ValueError(
                f"{', '.join(sides) or 'nothing'} cannot be drawn together: name two sides or more, with a column each."
            )
        return sides

    @model_validator(mode="after")
    def _known_sides(self) -> Self:
        strange = [name for name in self.judged if name not in self.sides]
        if strange:
            raise ValueError(f"judged names {strange[0]!r}, which is no side. Use some of {', '.join(self.sides)}.")
        if (self.source is None) == (self.train is None):
            raise ValueError(f"source {self.source!r} and train {self.train!r}: give exactly one of them.")
        return self

    def judged_columns(self, side: str) -> tuple[str, ...]:
        return self.judged.get(side) or self.sides[side][:1]


class AlignObjectiveConfig(Config):
    """What is learnt, and how much each part counts."""

    matching_weight: float = Field(default=1.0, gt=0)
    """Of the question whether two belong together, where model.bridge is set; the contrastive loss has 1."""

    spare_alike: tuple[float, float] | None = None
    """Spares records whose values of data.spare are alike, too: up to the first of these numbers they are held wholly
    against each other, from the second on not at all, and between less and less. Texts are as alike as the share of
    their words that both have, lists of numbers (a frozen model's vectors) as their cosine. model.bridge's wrong pairs
    keep from equal values alone. None: so does the contrastive loss."""

    @field_validator("spare_alike")
    @classmethod
    def _in_order(cls, spare_alike: tuple[float, float] | None) -> tuple[float, float] | None:
        if spare_alike is not None and not 0 <= spare_alike[0] < spare_alike[1] <= 1:
            raise ValueError(
                f"{list(spare_alike)} must rise from 0 or more to 1 or less: between them a pair counts less and less. "
                "Use for example [0.3, 0.8]."
            )
        return spare_alike


class AlignRecipe(Config):
    """One run."""

    kind: Literal["align"] = "align"
    name: str
    about: str = ""
    seed: int = 0
    data: AlignDataConfig
    model: DualConfig = DualConfig()
    objective: AlignObjectiveConfig = AlignObjectiveConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if self.objective.spare_alike is not None and self.data.spare is None:
            raise ValueError(
                f"objective.spare_alike={list(self.objective.spare_alike)} compares values of data.spare, and no "
                "column is named there. Set data.spare."
            )
        return self


def emoji_retrieval() -> AlignRecipe:
    """Emoji and their names in 28 languages, subgroups held out whole; from scratch, a few minutes."""
    return AlignRecipe(
        name="emoji-retrieval",
        about="From scratch, so that it needs no pretrained weights; benchmarks/emoji_retrieval.py has frozen ones.",
        data=AlignDataConfig(
            source="emoji",
            sides={
                "picture": ("picture", "second_picture"),
                "words": ("name", "tags", *(f"name_{language}" for language in LANGUAGES)),
            },
            judged={"picture": ("picture", "second_picture"), "words": ("name", "tags")},
            group="subgroup",
            batch_size=96,
            preparation=PreparationConfig(
                image_size=48, max_tokens=24, image_augment=ImageAugment(flip=True, shift_pixels=4)
            ),
        ),
        model=DualConfig(
            width=96,
            encoders={
                "picture": ImageEncoderConfig(
                    width=96, num_layers=1, num_heads=3, patch_size=8, stem="convolution", dropout=0.1
                ),
                "words": TextEncoderConfig(width=96, num_layers=1, num_heads=4, feedforward_ratio=2.0, dropout=0.1),
            },
        ),
        train=TrainConfig(
            steps=300,
            evaluate_every=100,
            precision="fp32",
            ema=0.99,
            optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.1),
        ),
    )
