"""What a worker does with records: the model itself.

Here        Backend (the interface), BundleBackend, WritingBackend, load_backend, sample, Outcome, answer_batch.
Elsewhere   being asked (worker.py); bundles (bundle/).
Promise     one record that fails, in whatever way short of ending the process, fails alone: its neighbours get the
            answers that they would have had without it. What an answer says is what `dougong predict` would say.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import soundfile
from PIL import Image

from dougong.core.bundle import bundle_in, kind_of
from dougong.core.errors import ConfigError, DataError
from dougong.core.signature import ImageInput, Input
from dougong.data.collate import Collator, Request

if TYPE_CHECKING:
    from dougong.bundle.model import Model

_log = logging.getLogger(__name__)

WRITING_KINDS: Final = ("decoder", "writer")
WARM_SIZES: Final = (1, 2, 8)
NOT_SHOWN: Final = "what it looked at is not shown: an export's inner values stay inside its engine"


class Outcome(NamedTuple):
    """What became of one record."""

    status: int
    """As HTTP means it: 200 answered, 422 the record cannot be read, 500 our bug."""

    body: bytes
    """A JSON object: the answer, or {"error": why not}."""


class Backend(Protocol):
    """A model in a worker. It is used by one thread."""

    def warm(self) -> None:
        """Do once what only the first call would pay for."""

    def answer(self, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each. May raise, if it cannot say which record is to blame."""

    def explain(self, record: Mapping[str, Any]) -> Outcome:
        """The answer, and what the model looked at."""

    def quality(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        """How good its media are as recordings of anything, by modality and figure."""

    def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
        """Words as they are written; of a model that writes."""

    def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
        """A picture of what a text says, as a PNG file; of a model that draws."""


def answer_batch(backend: Backend, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Answer all; where that fails, halve until the one to blame is alone."""
    try:
        return backend.answer(records)
    except Exception as error:
        if len(records) == 1:
            # Not the message: it may quote what the record holds.
            _log.error("a record could not be answered: %s", type(error).__name__)
            return [Outcome(500, _json({"error": f"the model failed on this record ({type(error).__name__})"}))]
        half = len(records) // 2
        return answer_batch(backend, records[:half]) + answer_batch(backend, records[half:])


class BundleBackend:
    """A bundle of a model that decides."""

    def __init__(
        self, model: Model, *, most_pixels: int | None = None, most_audio_seconds: float | None = None
    ) -> None:
        from dougong.data.modality.audio import AudioModality
        from dougong.data.modality.image import ImageModality

        self.model = model
        for modality in model.preparation.modalities.values():
            # Held where a file is opened, before anything of it is decoded.
            if isinstance(modality, ImageModality) and most_pixels is not None:
                least = min(most_pixels, modality.config.largest_pixels)
                modality.config = modality.config.model_copy(update={"largest_pixels": least})
            if isinstance(modality, AudioModality) and most_audio_seconds is not None:
                shorter = min(most_audio_seconds, modality.config.largest_seconds)
                modality.config = modality.config.model_copy(update={"largest_seconds": shorter})

    def warm(self) -> None:
        cells = [
            dict.fromkeys(modality.columns, sample(modality.signature()))
            for modality in self.model.preparation.modalities.values()
        ]
        record = {column: value for each in cells for column, value in each.items()}
        for number in WARM_SIZES:
            # Alone as well: an export opens an encoder by itself only when a record first lacks another.
            for warmed in (record, *cells, {}):
                self.model.predict([warmed] * number)

    def answer(self, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        found = self.model.predict(records, batch_size=max(1, len(records)))
        return [
            Outcome(200, each.model_dump_json(exclude={"row", "error"}).encode())
            if each.error is None
            else Outcome(422, _json({"error": each.error}))
            for each in found
        ]

    def explain(self, record: Mapping[str, Any]) -> Outcome:
        (outcome,) = self.answer([record])
        if outcome.status != 200:
            return outcome
        if self.model.is_export:
            return Outcome(200, _json({**json.loads(outcome.body), "attention": {}, "not_shown": NOT_SHOWN}))
        from dougong.serve.explain import attention

        return Outcome(200, _json({**json.loads(outcome.body), "attention": attention(self.model, record)}))

    def quality(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        preparation = self.model.preparation
        cells = {column: [record.get(column)] for column in preparation.columns}
        arrays = Collator(preparation, Path("."), seed=0, quality=True, cache_bytes=0)(
            Request(np.zeros(1, np.int64), cells, (0, 0))
        )
        return {
            f"{name}.{figure}": round(float(value), 4)
            for name, media in arrays.media.items()
            if media.quality_UQ is not None and len(media.quality_UQ)
            for figure, value in zip(preparation.modalities[name].quality_names, media.quality_UQ[0], strict=True)
        }

    def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
        raise ConfigError("this model decides and writes no words. Ask it without streaming.")

    def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
        return Outcome(422, _json({"error": "this model decides and draws nothing: ask it at /v1/predict"}))


class WritingBackend:
    """A bundle of a model that writes words about a picture."""

    def __init__(self, folder: Path) -> None:
        from dougong.bundle.describer import load_writing

        self.model = load_writing(folder)
        inputs = self.model.preparation.signature().inputs
        self._picture = next((name for name, each in inputs.items() if isinstance(each, ImageInput)), None)

    def warm(self) -> None:
        return

    def answer(self, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        return [self._one(record) for record in records]

    def explain(self, record: Mapping[str, Any]) -> Outcome:
        return self._one(record)

    def quality(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        return {}

    def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
        from dougong.serve.streaming import words_as_written

        return words_as_written(self.model, self._content(record), options)

    def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
        from dougong.serve.streaming import drawn

        try:
            return Outcome(200, drawn(self.model, text, options))
        except (ConfigError, DataError) as error:
            return Outcome(422, _json({"error": str(error)}))

    def _one(self, record: Mapping[str, Any]) -> Outcome:
        try:
            (text,) = self.model.caption([self._content(record)])
        except (ConfigError, DataError) as error:
            return Outcome(422, _json({"error": str(error)}))
        return Outcome(200, _json({"answer": text}))

    def _content(self, record: Mapping[str, Any]) -> bytes:
        modality = self.model.preparation.modalities[self._picture] if self._picture is not None else None
        cell = None if modality is None else record.get(modality.columns[0])
        if not isinstance(cell, Mapping) or not isinstance(cell.get("bytes"), bytes):
            raise DataError("there is no picture to write about")
        content: bytes = cell["bytes"]
        return content


def load_backend(folder: Path, options: Mapping[str, Any]) -> Backend:
    """The model of a bundle of any kind that can be asked for one record at a time; sums are checked.

    Raises:
        BundleError: it is not a whole, unaltered bundle.
        ConfigError: its model answers no single records.
    """
    kind = kind_of(bundle_in(folder))
    if kind in WRITING_KINDS:
        return WritingBackend(folder)
    if kind == "align":
        raise ConfigError(f"{folder} holds a model that gives vectors to media and answers nothing. Serve another one.")
    from dougong.bundle.exported import EngineConfig
    from dougong.bundle.files import load_from

    model = load_from(folder, EngineConfig(threads=options.get("threads", 1)))
    return BundleBackend(
        model, most_pixels=options.get("most_pixels"), most_audio_seconds=options.get("most_audio_seconds")
    )


BackendMaker = Callable[[Mapping[str, Any]], Backend]


def from_bundle(settings: Mapping[str, Any]) -> Backend:
    """As a worker is told: `folder`, and limits."""
    import torch

    torch.set_num_threads(1)  # threads that load weights would not outlive the fork
    return load_backend(Path(settings["folder"]), settings)


def sample(signature: Input) -> Any:
    """A cell of this kind that can be read, and says nothing."""
    if signature.kind == "text":
        return "warm"
    if signature.kind == "table":
        return 0.0
    content = io.BytesIO()
    if signature.kind == "image":
        Image.new("RGB", (signature.width, signature.height)).save(content, format="PNG")
    elif signature.kind == "audio":
        soundfile.write(content, np.zeros(signature.sample_rate // 2), signature.sample_rate, format="WAV")
    elif signature.kind == "signal":
        np.save(content, np.zeros((signature.num_channels, signature.max_samples), np.float32))
    else:
        np.save(content, np.zeros((signature.depth, signature.height, signature.width), np.float32))
    return {"bytes": content.getvalue(), "path": None}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
