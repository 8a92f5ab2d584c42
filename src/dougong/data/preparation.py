"""From a table to what a model can read: learnt once on training records, kept with the run and the bundle.

Here        PreparationConfig, Preparation (fit, save, load).
Elsewhere   roles of columns (data/columns.py); each modality's settings (data/modality/); using it (data/collate.py).
Promise     it is learnt from training records alone; what is saved and loaded again decodes every record the same.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image
from pydantic import Field, field_validator
from tokenizers import Tokenizer

from dougong.core.config import Config, parse
from dougong.core.errors import BundleError, ConfigError, DataError
from dougong.core.files import write_atomic, write_json
from dougong.core.signature import Signature, Target
from dougong.data.columns import MEDIA, ColumnRole, Role
from dougong.data.modality.array import SignalConfig, SignalModality, VolumeConfig, VolumeModality, read_array
from dougong.data.modality.audio import AudioAugment, AudioConfig, AudioModality
from dougong.data.modality.image import ImageAugment, ImageConfig, ImageModality, open_picture
from dougong.data.modality.medium import BadValue, Modality, media_bytes
from dougong.data.modality.numbers import (
    CategoryColumn,
    NumberColumn,
    TableConfig,
    TableModality,
    to_category,
    to_number,
)
from dougong.data.modality.text import TextConfig, TextModality, learn_tokenizer
from dougong.data.table import Table, cells_of

LEARNT_FROM: Final = 20_000
MEDIA_LOOKED_AT: Final = 200
LOOKED_AT_PIXELS: Final = 256
MOST_CATEGORIES: Final = 1000
TABLE_MODALITY: Final = "table"

FoundT = TypeVar("FoundT")

ModalityConfig = Annotated[
    TextConfig | ImageConfig | AudioConfig | TableConfig | SignalConfig | VolumeConfig, Field(discriminator="kind")
]


class PreparationConfig(Config):
    """What a recipe may say of how records are read; the rest is learnt from them."""

    image_size: int | None = None
    """Height and width in pixels. None: as the pictures are, up to 64."""

    sample_rate: int | None = None
    """Of sound. None: as most recordings have it, up to 16000."""

    max_seconds: float = 10.0
    """Longer sound is cut."""

    max_tokens: int = 128
    """Longer text is cut."""

    vocabulary_size: int = 8000
    """At most so many word pieces are learnt."""

    image_augment: ImageAugment = ImageAugment()
    """Random changes of training pictures."""

    audio_augment: AudioAugment = AudioAugment()
    """Random changes of training sound."""

    tokenizer: str | None = None
    """A tokenizer.json to use in place of learning one, as beside a pretrained text encoder."""

    image_mean: tuple[float, float, float] | None = None
    """Of pixels between 0 and 1, per channel. None: learnt; a pretrained encoder brings its own."""

    image_scale: tuple[float, float, float] | None = None
    """The standard deviation, likewise."""

    quality: bool = False
    """Measure each medium's quality beside decoding it, as a gate that reads it needs (model.gate_quality)."""

    @field_validator("image_size", "sample_rate", "vocabulary_size", "max_seconds", "image_scale")
    @classmethod
    def _above_zero(cls, value: Any) -> Any:
        if value is not None and any(number <= 0 for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{value} must be above 0.")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _room_for_a_word(cls, max_tokens: int) -> int:
        if max_tokens < 3:
            raise ValueError(f"{max_tokens} must be at least 3: a text begins with [CLS] and ends with [SEP].")
        return max_tokens


class _Saved(Config):
    modalities: dict[str, ModalityConfig]
    target: Target
    quality: bool = False


class Preparation:
    """The modalities of a table by name (a column's, or "table"), and the target."""

    def __init__(self, modalities: Mapping[str, Modality], target: Target, *, quality: bool = False) -> None:
        """With `quality`, each medium's quality is measured wherever it is decoded."""
        self.modalities = dict(modalities)
        self.target = target
        self.quality = quality

    def signature(self) -> Signature:
        inputs = {name: modality.signature() for name, modality in self.modalities.items()}
        if self.quality:
            figures = self.quality_names
            inputs = {name: found.model_copy(update={"quality": figures[name]}) for name, found in inputs.items()}
        return Signature(inputs=inputs, target=self.target)

    @property
    def quality_names(self) -> dict[str, tuple[str, ...]]:
        """What the figures of quality of each modality's media are, in their order."""
        return {name: modality.quality_names for name, modality in self.modalities.items()}

    @property
    def columns(self) -> list[str]:
        """Of the inputs, without the target."""
        return [column for modality in self.modalities.values() for column in modality.columns]

    @property
    def media(self) -> dict[str, Role]:
        """Of these columns, those of pictures, recordings, signals and volumes, and which each is."""
        kinds = {column: one.signature().kind for one in self.modalities.values() for column in one.columns}
        return {column: kind for column in kinds for kind in MEDIA if kind == kinds[column]}

    def only(self, names: Sequence[str]) -> Preparation:
        """The same with fewer modalities."""
        kept = {name: self.modalities[name] for name in self.modalities if name in names}
        return Preparation(kept, self.target, quality=self.quality)

    def reading(self, columns: Mapping[str, Sequence[str]]) -> Preparation:
        """For each of these columns, by modality, one that reads it as that modality reads its own."""
        modalities: dict[str, Modality] = {}
        for name, named in columns.items():
            for column in named:
                one: Any = copy.copy(self.modalities[name])
                one.config = one.config.model_copy(update={"column": column})
                modalities[column] = one
        return Preparation(modalities, self.target, quality=self.quality)

    def save(self, folder: Path) -> list[str]:
        """Write preparation.json and a tokenizer file for each text; return the files' names."""
        configs = {name: modality.config for name, modality in self.modalities.items()}  # type: ignore[attr-defined]
        saved = _Saved(modalities=configs, target=self.target, quality=self.quality)
        write_json(folder / "preparation.json", saved.model_dump(mode="json"))
        names = ["preparation.json"]
        for place, modality in enumerate(self.modalities.values()):
            if isinstance(modality, TextModality):
                names.append(_tokenizer_file(place))
                write_atomic(folder / names[-1], modality.tokenizer.to_str(pretty=False))
        return names

    @classmethod
    def load(cls, folder: Path) -> Preparation:
        """Read what `save` wrote.

        Raises:
            BundleError: a file is missing or is not what was saved.
        """
        try:
            values = json.loads((folder / "preparation.json").read_text(encoding="utf-8"))
            saved = parse(_Saved, values, where="preparation.json")
            modalities = {
                name: _build(config, folder / _tokenizer_file(place))
                for place, (name, config) in enumerate(saved.modalities.items())
            }
        except (OSError, ValueError, ConfigError) as error:
            raise BundleError(f"{folder} has no readable preparation ({error}). Save the bundle again.") from None
        return cls(modalities, saved.target, quality=saved.quality)


def _tokenizer_file(place: int) -> str:
    # By place, not name: a column's name may be no file's name.
    return f"tokenizer-{place}.json"


def _build(config: ModalityConfig, tokenizer_file: Path) -> Modality:
    if isinstance(config, TextConfig):
        text = tokenizer_file.read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(f"{tokenizer_file.name}: {error}") from None
        return TextModality(config, tokenizer)
    kinds: dict[type[Any], type[Any]] = {
        ImageConfig: ImageModality,
        AudioConfig: AudioModality,
        TableConfig: TableModality,
        SignalConfig: SignalModality,
        VolumeConfig: VolumeModality,
    }
    modality: Modality = kinds[type(config)](config)
    return modality


def fit_preparation(
    table: Table, roles: Mapping[str, ColumnRole], target: Target, config: PreparationConfig
) -> Preparation:
    """Learn what the columns hold from up to 20,000 training records.

    Raises:
        DataError: a column has not one usable value.
    """
    modalities: dict[str, Modality] = {}
    numbers: list[NumberColumn] = []
    categories: list[CategoryColumn] = []
    for name, (role, _) in roles.items():
        if role in ("ignore", "target"):
            continue
        # Column by column, and of media no more than is looked at: they are what makes a table large.
        few = role in MEDIA
        cells = _spread_cells(table.head(LEARNT_FROM, [name]).column(name), MEDIA_LOOKED_AT if few else LEARNT_FROM)
        if not cells:
            raise DataError(f"column {name!r} has no value in the records looked at. Set columns: {{{name}: ignore}}.")
        if role == "text":
            modalities[name] = _fit_text(name, cells, config)
        elif role == "image":
            modalities[name] = _fit_image(name, cells, table.folder, config)
        elif role == "audio":
            modalities[name] = _fit_audio(name, cells, table.folder, config)
        elif role == "number":
            numbers.append(_fit_number(name, cells))
        elif role == "category":
            commonest = Counter(map(to_category, cells)).most_common(MOST_CATEGORIES)
            categories.append(CategoryColumn(name=name, values=tuple(sorted(value for value, _ in commonest))))
        else:
            modalities[name] = _fit_array(name, role, cells, table.folder)
    if numbers or categories:
        name = TABLE_MODALITY
        while name in modalities:
            name += "_"
        modalities[name] = TableModality(TableConfig(numbers=tuple(numbers), categories=tuple(categories)))
    return Preparation(modalities, target, quality=config.quality)


def _fit_text(name: str, cells: list[Any], config: PreparationConfig) -> TextModality:
    texts = sorted({cell for cell in cells if isinstance(cell, str) and cell.strip()})
    if not texts:
        raise DataError(f"column {name!r} has no text in the records looked at: the first holds {_short(cells[0])}.")
    if config.tokenizer is not None:
        try:
            tokenizer = Tokenizer.from_file(config.tokenizer)
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(
                f"tokenizer {config.tokenizer!r} cannot be read ({error}). Name a tokenizer.json."
            ) from None
    else:
        tokenizer = learn_tokenizer(texts, config.vocabulary_size)
    # No longer than what training shows, with room: positions cost memory and are never learnt otherwise.
    longest = max((len(tokenizer.encode(text).ids) for text in texts[:2000]), default=2)
    return TextModality(TextConfig(column=name, max_tokens=min(config.max_tokens, max(16, 2 * longest))), tokenizer)


def _short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 60 else text[:57] + "..."


def _spread_cells(column: pa.ChunkedArray, most: int) -> list[Any]:
    """Values of an even choice of rows, the missing ones left out first."""
    column = column.drop_null()
    step = max(1, len(column) // most)
    return cells_of(column.take(pa.array(range(0, len(column), step)))) if step > 1 else cells_of(column)


def _usable(name: str, cells: list[Any], read: Callable[[Any], FoundT]) -> list[FoundT]:
    """What can be decoded of cells; a few bad ones do not matter here."""
    found: list[FoundT] = []
    reason = ""
    for cell in cells:
        try:
            found.append(read(cell))
        except BadValue as bad:
            reason = str(bad)
    if not found:
        raise DataError(f"column {name!r} has no usable value: the last one looked at {reason}.")
    return found


def _fit_image(name: str, cells: list[Any], folder: Path, config: PreparationConfig) -> ImageModality:
    largest = ImageConfig(column=name).largest_pixels

    def look(cell: Any) -> tuple[tuple[int, int], Image.Image]:
        picture = open_picture(media_bytes(cell, folder), largest)
        size = picture.size
        picture.thumbnail((LOOKED_AT_PIXELS, LOOKED_AT_PIXELS))  # hundreds of photographs would fill the memory
        return size, picture

    sizes, pictures = zip(*_usable(name, cells, look), strict=True)
    side = config.image_size
    if side is None:
        side = max(16, min(64, round(float(np.median([max(size) for size in sizes])) / 8) * 8))
    pixels_NC = np.concatenate([np.asarray(picture.resize((side, side))).reshape(-1, 3) for picture in pictures]) / 255
    mean = config.image_mean or tuple(round(float(m), 4) for m in pixels_NC.mean(axis=0))
    scale = config.image_scale or tuple(round(max(float(s), 0.01), 4) for s in pixels_NC.std(axis=0))
    settings = ImageConfig(
        column=name,
        height=side,
        width=side,
        mean=mean,
        scale=scale,
        augment=config.image_augment,
    )
    return ImageModality(settings)


def _fit_audio(name: str, cells: list[Any], folder: Path, config: PreparationConfig) -> AudioModality:
    def look(cell: Any) -> tuple[int, float]:
        try:
            info = soundfile.info(io.BytesIO(media_bytes(cell, folder)))
        except soundfile.LibsndfileError:
            raise BadValue("is not sound") from None
        return int(info.samplerate), float(info.duration)

    found = _usable(name, cells, look)
    rate = config.sample_rate or min(16_000, statistics.mode(sorted(rate for rate, _ in found)))
    seconds = min(config.max_seconds, 1.2 * max(seconds for _, seconds in found))
    settings = AudioConfig(
        column=name, sample_rate=rate, max_seconds=round(max(0.2, seconds), 2), augment=config.audio_augment
    )
    return AudioModality(settings)


def _fit_number(name: str, cells: list[Any]) -> NumberColumn:
    numbers = np.array(_usable(name, cells, lambda cell: to_number(cell, name)))
    if numbers.min() == numbers.max():  # the standard deviation of equal numbers is a rounding error, not always 0
        return NumberColumn(name=name, mean=float(numbers[0]))
    # Against overflow the numbers are made small first.
    largest = float(np.abs(numbers).max())
    small = numbers / largest
    return NumberColumn(name=name, mean=largest * float(small.mean()), scale=largest * float(small.std()))


def _fit_array(name: str, role: str, cells: list[Any], folder: Path) -> Modality:
    def look(cell: Any) -> tuple[tuple[int, ...], float, float]:
        array = read_array(cell, folder)
        dims = (3,) if role == "volume" else (1, 2, 3)
        if array.ndim not in dims:
            raise BadValue(f"has {array.ndim} dimensions, which is no {role}")
        return array.shape, float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))

    found = _usable(name, cells, look)
    mean, scale = (float(np.mean([figures[place] for figures in found])) for place in (1, 2))
    # What most are; a record that is otherwise is set aside.
    num_dims = statistics.mode(len(shape) for shape, _, _ in found)
    shapes = [shape for shape, _, _ in found if len(shape) == num_dims]
    if num_dims == 3:
        depth, height, width = (int(size) for size in np.median(np.array(shapes), axis=0))
        return VolumeModality(
            VolumeConfig(column=name, depth=depth, height=height, width=width, mean=mean, scale=scale or 1.0)
        )
    channels = 1 if num_dims == 1 else statistics.mode(shape[0] for shape in shapes)
    longest = max(shape[-1] for shape in shapes)
    return SignalModality(
        SignalConfig(column=name, num_channels=channels, max_samples=longest, mean=mean, scale=scale or 1.0)
    )
