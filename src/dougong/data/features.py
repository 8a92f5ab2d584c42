"""Cheap numbers of a medium, by formula: what it is like, without a model.

Here        Side (what is compared as one), sides_of, read_sides, describe_image|text|audio|array.
Elsewhere   pairs that do not belong together (data/alignment.py); media that are nearly the same (data/duplicates.py).
Promise     the same medium gives the same numbers, whatever else is in the table; a medium that cannot be read gives
            none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from dougong.data.columns import ColumnRole
from dougong.data.modality.array import list_content, read_array
from dougong.data.modality.audio import check_rate
from dougong.data.modality.image import ImageConfig, open_picture
from dougong.data.modality.medium import BadValue, media_bytes, media_key
from dougong.data.modality.numbers import to_category, to_number
from dougong.data.table import Table, cells_of

Floats = npt.NDArray[np.float64]
Kind = Literal["image", "text", "audio", "signal", "volume", "table"]

THUMBNAIL: Final = 12
HASHED_WORDS: Final = 1024
LONGEST_TEXT: Final = 20_000
"""Letters looked at."""

MEL_BANDS: Final = 24
SLOTS: Final = 10
"""Parts of a recording or a signal, each with its own mean."""

SECONDS_LOOKED_AT: Final = 30.0
LARGEST_SECONDS: Final = 3600.0
BLOCK_NUMBERS: Final = 2**20
WINDOW_SECONDS: Final = 0.032
MOST_CATEGORIES: Final = 40
FEWEST_NUMBERS: Final = 0.9
"""Of a column's cells, for it to be one of numbers."""

NOTHING: Final = -2


class Side(NamedTuple):
    """One modality, or all numbers and categories together."""

    name: str
    kind: Kind
    columns: tuple[str, ...]


class SideValues(NamedTuple):
    """What a side holds in some rows. Letters: N distinct values, F numbers of each, R rows."""

    side: Side
    x_NF: Floats
    value_R: npt.NDArray[np.int64]
    """Which distinct value a row has; -1: none, or one that cannot be read."""

    num_bad: int


def sides_of(roles: Mapping[str, ColumnRole], *, with_target: bool = True) -> list[Side]:
    """What can be compared: each medium, the numbers and categories together, and the target."""
    kinds: tuple[Kind, ...] = ("image", "text", "audio", "signal", "volume")
    sides = [Side(name, found.role, (name,)) for name, found in roles.items() if found.role in kinds]
    numbers = tuple(name for name, found in roles.items() if found.role in ("number", "category"))
    if numbers:
        sides.append(Side("table", "table", numbers))
    if with_target:
        sides += [Side(name, "table", (name,)) for name, found in roles.items() if found.role == "target"]
    return sides


def read_sides(
    table: Table, sides: Sequence[Side], rows_by_chunk: Mapping[int, npt.NDArray[np.int64]]
) -> list[SideValues]:
    """Decode each distinct value of the given places in the given chunks once."""
    return [_read_side(table, side, rows_by_chunk) for side in sides]


def _read_side(table: Table, side: Side, rows_by_chunk: Mapping[int, npt.NDArray[np.int64]]) -> SideValues:
    number: dict[Hashable, int] = {}
    found: dict[int, Any] = {}
    value_R: list[int] = []
    for chunk, places in rows_by_chunk.items():
        part = table.read(chunk, list(side.columns)).take(places)
        for cells in zip(*(cells_of(part.column(name)) for name in side.columns), strict=True):
            key = value_key(side, cells)
            if key is None:
                value_R.append(NOTHING)
                continue
            if key not in number:
                number[key] = len(number)
                with contextlib.suppress(BadValue):
                    found[number[key]] = _describe(side, cells, table.folder)
            value_R.append(number[key])
    if side.kind != "table" and found:
        # One of another shape than most cannot be held against them.
        (usual, _), *_ = Counter(len(values) for values in found.values()).most_common(1)
        found = {place: values for place, values in found.items() if len(values) == usual}
    place_of = {place: new for new, place in enumerate(found)}
    value_R = [place_of.get(place, -1) if place >= 0 else NOTHING for place in value_R]
    num_bad = sum(place == -1 for place in value_R)
    x_NF = _as_array(side, list(found.values()))
    return SideValues(side, x_NF, np.array(value_R, np.int64).clip(-1), num_bad)


def _as_array(side: Side, found: list[Any]) -> Floats:
    if not found:
        return np.zeros((0, 0))
    return _columns_as_numbers(found) if side.kind == "table" else np.array(found, np.float64)


def value_key(side: Side, cells: tuple[Any, ...]) -> Hashable:
    """Equal for equal values; None where there is nothing."""
    if side.kind == "table":
        return None if all(cell is None for cell in cells) else tuple(map(repr, cells))
    cell = cells[0]
    if side.kind == "text":
        return cell if isinstance(cell, str) and cell.strip() else None
    return media_key(list_content(cell) if isinstance(cell, list) else cell)


def _describe(side: Side, cells: tuple[Any, ...], folder: Path) -> Any:
    if side.kind == "image":
        return describe_image(open_picture(media_bytes(cells[0], folder), ImageConfig(column="").largest_pixels))
    if side.kind == "text":
        return describe_text(cells[0])
    if side.kind == "audio":
        return describe_audio(*read_sound(media_bytes(cells[0], folder)))
    if side.kind == "table":
        return cells
    return describe_array(np.asarray(read_array(cells[0], folder), np.float64))


def describe_image(picture: Image.Image) -> Floats:
    """A small picture in colour, and how much of it each of 64 colours has (its square root: rare ones count too)."""
    small = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = np.asarray(small, np.float64).ravel() / 255
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.int64) // 64
    colours = np.bincount((pixels @ np.array([16, 4, 1])).ravel(), minlength=64) / pixels[..., 0].size
    return np.concatenate([thumbnail, np.sqrt(colours)])


def describe_text(text: str) -> Floats:
    """Words and pairs of neighbouring words, hashed with signs (Weinberger et al. 2009), their counts dampened."""
    words = re.findall(r"\w+|[^\w\s]", text[:LONGEST_TEXT].lower())
    counts = np.zeros(HASHED_WORDS)
    for piece in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]:
        number = zlib.crc32(piece.encode("utf-8", "surrogatepass"))
        counts[number % HASHED_WORDS] += 1 if number & 0x80000000 else -1
    counts = np.sign(counts) * np.log1p(np.abs(counts))
    return counts / max(float(np.linalg.norm(counts)), 1e-9)


def read_sound(content: bytes) -> tuple[Floats, int]:
    """The channels' mean of the first half minute, and its rate.

    Raises:
        BadValue: it is not sound.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            check_rate(file.samplerate)
            if file.frames > LARGEST_SECONDS * file.samplerate:
                raise BadValue(f"claims over {LARGEST_SECONDS:.0f} seconds")
            rate, blocks = int(file.samplerate), [np.zeros(0)]
            left = int(SECONDS_LOOKED_AT * rate)
            while left > 0 and len(block := file.read(min(left, BLOCK_NUMBERS // file.channels), always_2d=True)):
                blocks.append(block.mean(axis=1))
                left -= len(block)
            samples = np.concatenate(blocks)
    except soundfile.LibsndfileError:
        raise BadValue("is not sound") from None
    if len(samples) < 2 or not np.isfinite(samples).all():
        raise BadValue("has no samples, or some that are not numbers")
    return samples, rate


def describe_audio(samples: Floats, rate: int) -> Floats:
    """Log-mel energies, the recording's mean over all taken away, in parts of its length: which sound, when."""
    mel_TM = log_mel(samples, rate)
    slots_SM = in_slots(mel_TM, SLOTS)
    return np.concatenate([(slots_SM - slots_SM.mean()).ravel(), [math.log(len(samples) / rate), *mel_TM.std(axis=0)]])


def describe_array(array: Floats) -> Floats:
    """Signals (C, T): each channel in parts of its length, and the logarithm of its spectrum's bands. Volumes: means of
    6 x 6 x 6 parts, and how values are spread."""
    if array.ndim >= 3:
        for axis in range(array.ndim):
            array = np.moveaxis(in_slots(np.moveaxis(array, axis, 0), 6), 0, axis)
        return np.concatenate([array.ravel(), np.quantile(array, [0.05, 0.25, 0.5, 0.75, 0.95])])
    signal_CT = np.atleast_2d(array)[:8]
    spectrum = np.abs(np.fft.rfft(signal_CT, axis=1))
    bands = [in_slots(np.log(one**2 + 1e-12)[:, None], 32)[:, 0] for one in spectrum]
    parts = [in_slots(one[:, None], 32)[:, 0] for one in signal_CT]
    return np.concatenate([*bands, *parts, np.zeros(64 * (8 - len(signal_CT)))])


def in_slots(x_TM: Floats, num_slots: int) -> Floats:
    """Means of `num_slots` equal parts of the first axis; where it is shorter, parts repeat values."""
    edges = np.linspace(0, len(x_TM), num_slots + 1)
    starts = np.minimum(edges[:-1].astype(np.int64), len(x_TM) - 1)
    stops = np.maximum(edges[1:].astype(np.int64), starts + 1)
    return np.stack([x_TM[start:stop].mean(axis=0) for start, stop in zip(starts, stops, strict=True)])


def log_mel(samples: Floats, rate: int, *, steps: int = 2, floor: float = 1e-5, silence: float = 1e-3) -> Floats:
    """Logarithms of the energies in `MEL_BANDS` bands from 60 Hz to the highest (T, M).

    Args:
        samples: one channel.
        rate: of the samples, in Hz.
        steps: a window begins every so-manieth of its length.
        floor: added, as a share of the largest energy: what is fainter says nothing.
        silence: what is fainter at both ends, as a share of the loudest window, is cut off.
    """
    size = max(16, int(WINDOW_SECONDS * rate))
    hop = size // steps
    if len(samples) < size:
        samples = np.pad(samples, (0, size - len(samples)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    energy = power @ _mel_filters(size, rate).T
    loud = energy.sum(axis=1)
    heard = np.flatnonzero(loud > silence * loud.max())
    if len(heard):
        energy = energy[heard[0] : heard[-1] + 1]
    return np.log(energy + floor * float(energy.max()) + 1e-20)


@functools.lru_cache(maxsize=8)
def _mel_filters(size: int, rate: int) -> Floats:
    """Triangles, evenly spread on the mel scale 2595 log10(1 + f/700) up to 4 kHz, or what the rate allows."""
    top = 2595 * math.log10(1 + min(4000.0, rate / 2) / 700)
    bottom = 2595 * math.log10(1 + 60 / 700)
    hertz = 700 * (10 ** (np.linspace(bottom, top, MEL_BANDS + 2) / 2595) - 1)
    of_bin = np.fft.rfftfreq(size, 1 / rate)
    rising = (of_bin - hertz[:-2, None]) / np.diff(hertz)[:-1, None]
    falling = (hertz[2:, None] - of_bin) / np.diff(hertz)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def _columns_as_numbers(rows: Sequence[tuple[Any, ...]]) -> Floats:
    """Numbers standardised by ranks' cousin, the clipped z-score, and whether there is one; categories one by one."""
    columns: list[Floats] = []
    for cells in zip(*rows, strict=True):
        numbers = _numbers(cells)
        if numbers is not None:
            known = ~np.isnan(numbers)
            middle = float(np.median(numbers[known])) if known.any() else 0.0
            spread = float(np.std(np.clip(numbers[known] - middle, -1e30, 1e30))) if known.any() else 0.0
            columns.append(np.where(known, np.clip((numbers - middle) / (spread or 1.0), -5, 5), 0.0)[:, None])
            # A number that takes few values is often a name (a class, a digit).
            if len(np.unique(numbers[known])) > MOST_CATEGORIES:
                continue
        words = ["" if cell is None else to_category(cell) for cell in cells]
        distinct, place, counts = np.unique(words, return_inverse=True, return_counts=True)
        common = np.argsort(-counts, kind="stable")[:MOST_CATEGORIES]
        columns.append((place[:, None] == common[None]).astype(np.float64))
        assert len(distinct)
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0))


def _numbers(cells: Sequence[Any]) -> Floats | None:
    """Not a number where one cell is none; nothing where more than a few are none."""
    numbers = np.array([_number(cell) for cell in cells], np.float64)
    given = sum(cell is not None for cell in cells)
    return numbers if given and (~np.isnan(numbers)).sum() >= FEWEST_NUMBERS * given else None


def _number(cell: Any) -> float:
    if isinstance(cell, (bool, list, dict, bytes)):
        return math.nan
    try:
        return to_number(cell, "")
    except BadValue:
        return math.nan
