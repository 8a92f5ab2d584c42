"""What a model must know of its data, and a caller of its model: the shapes of inputs and the target.

Here        one input class per kind of modality, Target (NOTHING where nothing is decided), Signature.
Elsewhere   making it from a table (data/preparation.py); building a model for it (model/sandwich.py).
Promise     it is plain data: the same JSON in a run, in a bundle and in a server.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from dougong.core.config import Config


class _Input(Config):
    quality: tuple[str, ...] = ()
    """The figures of quality that come beside the values, by name (data/quality.py); empty: none are measured."""


class TextInput(_Input):
    """Token ids. Values: `ids_UT` int64, `mask_UT` bool."""

    kind: Literal["text"] = "text"
    vocabulary_size: int
    max_tokens: int


class ImageInput(_Input):
    """Normalised pixels. Values: `pixels_UCHW` float32."""

    kind: Literal["image"] = "image"
    height: int
    width: int
    channels: int = 3


class AudioInput(_Input):
    """Normalised mono samples. Values: `samples_UT` float32, `mask_UT` bool."""

    kind: Literal["audio"] = "audio"
    sample_rate: int
    max_samples: int


class TableInput(_Input):
    """Numbers and categories. Values: `numbers_UN` float32, `known_UN` bool, `categories_UK` int64 (0: unknown)."""

    kind: Literal["table"] = "table"
    num_numbers: int
    category_sizes: tuple[int, ...]
    """For each categorical column, its number of categories, the unknown one included."""


class SignalInput(_Input):
    """Channels over time. Values: `samples_UCT` float32, `mask_UT` bool."""

    kind: Literal["signal"] = "signal"
    num_channels: int
    max_samples: int


class VolumeInput(_Input):
    """Voxels. Values: `voxels_U1DHW` float32."""

    kind: Literal["volume"] = "volume"
    depth: int
    height: int
    width: int


Input = Annotated[
    TextInput | ImageInput | AudioInput | TableInput | SignalInput | VolumeInput, Field(discriminator="kind")
]

Task = Literal["single_label", "multi_label", "regression"]


class Target(Config):
    """What is predicted. A batch's target is int64 (B,), float32 (B, C) of zeros and ones, or float32 (B,)."""

    name: str
    task: Task
    labels: tuple[str, ...] = ()
    """The classes, in the order of the model's outputs; empty for regression."""

    mean: float = 0.0
    """Regression: what the standardised target was shifted by."""

    scale: float = 1.0
    """Regression: what it was divided by."""

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if self.task != "regression" and not self.labels:
            raise ValueError(f"target {self.name!r} has no labels: a {self.task} target chooses among some.")
        return self

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.task != "regression" else 1


NOTHING: Final = Target(name="(nothing is decided)", task="regression")
"""Of a model that decides nothing: no column is called so, and none is read."""


class Signature(Config):
    """Inputs by modality name, in the order in which a model holds them, and the target."""

    inputs: dict[str, Input]
    target: Target
