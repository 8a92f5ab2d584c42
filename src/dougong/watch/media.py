"""Records' media as pages show them that look into single records.

Here        `show_medium`, `text_of`, `arrays_of`; `check_rows`, of those that are asked for.
Elsewhere   the pages (watch/inside.py, watch/word_by_word.py); the cards of a report, which show files of a run's
            folder (watch/cards.py).
Promise     what is shown is what the model was given, after it was cut and brought to its size.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
from PIL import Image

from dougong.core.errors import ConfigError, DataError
from dougong.data.batch import BatchArrays, MediaArrays
from dougong.data.collate import Collator, Request
from dougong.data.modality.array import SignalModality
from dougong.data.modality.audio import AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.medium import Modality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.data.table import Table

MOST_RECORDS: Final = 24
POINTS: Final = 300


def show_medium(
    modality: Modality, media: MediaArrays, record: Mapping[str, Any], *, num_tokens: int | None = None
) -> dict[str, Any]:
    """The first medium of a batch of one record, whose cells these are; of a text so many tokens (None: all)."""
    if isinstance(modality, TextModality):
        text = str(record[modality.config.column])
        return {"text": text, "tokens": modality.tokenizer.encode(text).tokens[:num_tokens]}
    if isinstance(modality, ImageModality):
        pixels_HWC = media.values["pixels_UCHW"][0].transpose(1, 2, 0)
        pixels_HWC = pixels_HWC * np.array(modality.config.scale) + np.array(modality.config.mean)
        return {"picture": _picture((pixels_HWC * 255).round().clip(0, 255).astype(np.uint8))}
    if isinstance(modality, AudioModality):
        samples_T = media.values["samples_UT"][0][media.values["mask_UT"][0]]
        return {
            "sound": _sound(samples_T, modality.config.sample_rate),
            "spectrogram": _picture(spectrogram(samples_T)),
            "seconds": len(samples_T) / modality.config.sample_rate,
        }
    if isinstance(modality, SignalModality):
        points_T = media.values["samples_UCT"][0][:, media.values["mask_UT"][0]].mean(axis=0)
        return {"points": [round(float(point), 4) for point in points_T[:: max(1, len(points_T) // POINTS)]]}
    if isinstance(modality, TableModality):
        return {"values": {column: text_of(record.get(column)) for column in modality.columns}}
    return {}


def arrays_of(preparation: Preparation, row: int, cells: Mapping[str, Any], folder: Path) -> BatchArrays:
    """A batch of one record, whose cells these are by column.

    Raises:
        DataError: one cannot be read.
    """
    request = Request(np.array([row]), {column: [cell] for column, cell in cells.items()}, (0, 0))
    arrays = Collator(preparation, folder, seed=0)(request)
    if arrays.bad:
        raise DataError(f"record {row} cannot be looked into: {arrays.bad[0].reason}. Choose another one.")
    return arrays


def text_of(value: Any) -> str:
    """A cell or an answer for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spectrogram(samples_T: Any, window: int = 128, hop: int = 32) -> Any:
    """Grey picture of a sound, low tones at the bottom: the logarithm of its power over 60 decibels."""
    lacking = max(0, window - len(samples_T))
    samples_T = np.pad(np.asarray(samples_T, np.float64), (0, lacking))
    windows = np.lib.stride_tricks.sliding_window_view(samples_T, window)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(window), axis=1)) ** 2
    decibels = 10 * np.log10(power + 1e-12)
    grey = ((decibels - decibels.max() + 60) / 60).clip(0, 1)
    return (255 - 255 * grey.T[::-1]).astype(np.uint8)


def _picture(pixels: Any) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _sound(samples: Any, sample_rate: int) -> str:
    content = io.BytesIO()
    loudest = max(float(np.abs(samples).max()), 1e-6)
    soundfile.write(content, samples / loudest * 0.9, sample_rate, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def check_rows(rows: Sequence[int], table: Table) -> None:
    """
    Raises:
        ConfigError: no such record, or too many.
    """
    if len(rows) > MOST_RECORDS:
        raise ConfigError(f"{len(rows)} records are too many for one page. Name at most {MOST_RECORDS}.")
    for row in rows:
        if not 0 <= row < table.num_rows:
            raise ConfigError(
                f"--record {row} is not in {table.path.name}, which has {table.num_rows:,} records. "
                f"Use 0 to {table.num_rows - 1}."
            )
