"""Rows of a table, signals and volumes, spoilt.

Here        `rows`, SIGNALS, VOLUMES: by name, what is done to standardised numbers.
Elsewhere   decoding them (data/modality/numbers.py, data/modality/array.py); what sees it (data/quality.py).
Promise     strengths are in standard deviations of the training data; what is missing stays missing, and something
            that was known stays known.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np

from dougong.data.batch import Array
from dougong.data.damage.damage import Damage, about
from dougong.data.damage.pictures import blur_matrix

NOISE: Final = 2.0
SPIKE: Final = 8.0
PIECES: Final = 50
"""A signal is lost in pieces of so many to the whole."""


def rows(num_numbers: int, category_sizes: Sequence[int]) -> dict[str, Damage]:
    """Of a row: numbers, NaN where missing, then categories, 0 where unknown."""
    damages: dict[str, Damage] = {}
    if num_numbers:
        damages |= {"gaussian": functools.partial(_row_gaussian, numbers=num_numbers)}
        damages |= {"drift": functools.partial(_row_drift, numbers=num_numbers)}
        damages |= {"spikes": functools.partial(_row_spikes, numbers=num_numbers)}
    if any(size > 2 for size in category_sizes):  # one category besides the unknown has none to be mistaken for
        damages |= {"mistaken": functools.partial(_row_mistaken, numbers=num_numbers, sizes=tuple(category_sizes))}
    return damages | {"dropped": functools.partial(_row_dropped, numbers=num_numbers)}


def _row_gaussian(row: Array, level: float, random: np.random.Generator, *, numbers: int) -> Array:
    """Noise of up to two standard deviations on each number."""
    changed = row.copy()
    changed[:numbers] += NOISE * level * random.standard_normal(numbers)
    return changed


def _row_drift(row: Array, level: float, random: np.random.Generator, *, numbers: int) -> Array:
    """All numbers too high, or all too low, by up to two standard deviations."""
    changed = row.copy()
    changed[:numbers] += random.choice((-1.0, 1.0)) * NOISE * level
    return changed


def _row_spikes(row: Array, level: float, random: np.random.Generator, *, numbers: int) -> Array:
    """One number in four, and at least one, is off by up to eight standard deviations."""
    changed = row.copy()
    places = random.permutation(numbers)[: max(1, numbers // 4)]
    changed[places] += random.choice((-1.0, 1.0), len(places)) * SPIKE * level
    return changed


def _row_mistaken(
    row: Array, level: float, random: np.random.Generator, *, numbers: int, sizes: tuple[int, ...]
) -> Array:
    """Each known category is another one, with a chance of up to 0.8."""
    changed = row.copy()
    for place, size in enumerate(sizes, start=numbers):
        other = int(random.integers(1, max(2, size - 1)))
        wrong = random.random() < 0.8 * level
        if wrong and row[place] > 0 and size > 2:
            changed[place] = other + (other >= row[place])  # every one but the true one
    return changed


def _row_dropped(row: Array, level: float, random: np.random.Generator, *, numbers: int) -> Array:
    """Up to nine of ten known values are lost."""
    known = np.flatnonzero(np.concatenate([~np.isnan(row[:numbers]), row[numbers:] > 0]))
    lost = random.permutation(known)[: min(about(0.9 * level * len(known), random), max(0, len(known) - 1))]
    changed = row.copy()
    changed[lost[lost < numbers]] = np.nan
    changed[lost[lost >= numbers]] = 0
    return changed


def _gaussian(array: Array, level: float, random: np.random.Generator) -> Array:
    """Noise of up to two standard deviations."""
    noisy: Array = array + np.float32(NOISE * level) * random.standard_normal(array.shape, np.float32)
    return noisy


def _gaps(samples_CT: Array, level: float, random: np.random.Generator) -> Array:
    """Up to eight of ten pieces are lost, on all channels."""
    pieces = min(PIECES, samples_CT.shape[1])
    lost = random.permutation(pieces)[: about(0.8 * level * pieces, random)]
    piece_T = np.arange(samples_CT.shape[1]) * pieces // samples_CT.shape[1]
    return np.where(np.isin(piece_T, lost), np.float32(0), samples_CT)


def _drift(samples_CT: Array, level: float, random: np.random.Generator) -> Array:
    """Each channel wanders off by up to four standard deviations from beginning to end."""
    end_C1 = 2 * NOISE * level * random.choice((-1.0, 1.0), (len(samples_CT), 1))
    return (samples_CT + end_C1 * np.linspace(0, 1, samples_CT.shape[1])).astype(np.float32)


def _spikes(samples_CT: Array, level: float, random: np.random.Generator) -> Array:
    """One sample in fifty, and at least one, is off by up to eight standard deviations."""
    changed = samples_CT.copy()
    count = max(1, changed.size // 50)
    changed.reshape(-1)[random.permutation(changed.size)[:count]] += np.float32(SPIKE * level) * random.choice(
        np.array([-1, 1], np.float32), count
    )
    return changed


def _blur(voxels_DHW: Array, level: float, random: np.random.Generator) -> Array:
    """Smear with a Gaussian of up to a tenth of each side."""
    for axis, size in enumerate(voxels_DHW.shape):
        smeared = np.tensordot(blur_matrix(size, max(0.1 * level * size, 1e-3)), voxels_DHW, (1, axis))
        voxels_DHW = np.moveaxis(smeared, 0, axis)
    return np.ascontiguousarray(voxels_DHW, np.float32)


def _occlusion(voxels_DHW: Array, level: float, random: np.random.Generator) -> Array:
    """Cover a box of up to three quarters of the volume with the training data's mean."""
    corner = []
    for size in voxels_DHW.shape:
        long = max(1, round(size * (0.75 * level) ** (1 / 3)))
        start = int(random.integers(0, size - long + 1))
        corner.append(slice(start, start + long))
    covered = voxels_DHW.copy()
    covered[tuple(corner)] = 0
    return covered


def _contrast(voxels_DHW: Array, level: float, random: np.random.Generator) -> Array:
    """Leave as little as a tenth of the distance from the mean."""
    mean = np.float32(voxels_DHW.mean(dtype=np.float64))
    return mean + np.float32(1 - 0.9 * level) * (voxels_DHW - mean)


SIGNALS: Final[dict[str, Damage]] = {"gaussian": _gaussian, "gaps": _gaps, "drift": _drift, "spikes": _spikes}
VOLUMES: Final[dict[str, Damage]] = {
    "gaussian": _gaussian,
    "blur": _blur,
    "occlusion": _occlusion,
    "contrast": _contrast,
}
