"""Pictures, spoilt.

Here        PICTURES: by name, what is done to bytes (H, W, 3); `blur_matrix`.
Elsewhere   decoding them (data/modality/image.py); what sees it (data/quality.py).
Promise     the stronger, the farther from the picture, and at level 1 something of it is left.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from dougong.data.batch import Array
from dougong.data.damage.damage import Damage

GREY: Final = 127.5


def _gaussian(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Add noise of up to 0.4 of white."""
    return _bytes(pixels_HWC + 255 * 0.4 * level * random.standard_normal(pixels_HWC.shape, np.float32))


def _blur(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Smear with a Gaussian of up to a tenth of the longer side."""
    height, width = pixels_HWC.shape[:2]
    sigma = 0.1 * level * max(height, width)
    smeared_HWC = np.einsum("hi,iwc->hwc", blur_matrix(height, sigma), pixels_HWC.astype(np.float32), optimize=True)
    return _bytes(np.einsum("wj,hjc->hwc", blur_matrix(width, sigma), smeared_HWC, optimize=True))


def _occlusion(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Cover a rectangle of up to three quarters of the picture with grey."""
    height, width = pixels_HWC.shape[:2]
    tall, wide = (max(1, round(size * (0.75 * level) ** 0.5)) for size in (height, width))
    top, left = int(random.integers(0, height - tall + 1)), int(random.integers(0, width - wide + 1))
    covered = pixels_HWC.copy()
    covered[top : top + tall, left : left + wide] = int(GREY)
    return covered


def _contrast(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Leave as little as a tenth of the distance from the mean."""
    mean = pixels_HWC.mean(dtype=np.float64)
    return _bytes(mean + (1 - 0.9 * level) * (pixels_HWC.astype(np.float32) - mean))


def _brightness(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Add or take up to 0.6 of white; what passes black or white is lost."""
    return _bytes(pixels_HWC.astype(np.float32) + random.choice((-1.0, 1.0)) * 255 * 0.6 * level)


def _saturation(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Take the colour out, at level 1 all of it."""
    grey_HW1 = (pixels_HWC @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]  # luma of ITU-R BT.601
    return _bytes(grey_HW1 + (1 - level) * (pixels_HWC - grey_HW1))


def _pixels(pixels_HWC: Array, level: float, random: np.random.Generator) -> Array:
    """Make one of blocks, of up to an eighth of the longer side; between two sizes, a mix of both."""
    size = 1 + level * (max(2.0, max(pixels_HWC.shape[:2]) / 8) - 1)
    mixed = math.ceil(size) - size
    return _bytes(mixed * _blocks(pixels_HWC, math.floor(size)) + (1 - mixed) * _blocks(pixels_HWC, math.ceil(size)))


def _blocks(pixels_HWC: Array, size: int) -> Array:
    height, width = pixels_HWC.shape[:2]
    tops, lefts = np.arange(0, height, size), np.arange(0, width, size)
    sums = np.add.reduceat(np.add.reduceat(pixels_HWC.astype(np.float32), tops, axis=0), lefts, axis=1)
    tall, wide = np.diff([*tops, height]), np.diff([*lefts, width])
    blocks = sums / (tall[:, None] * wide)[..., None]
    repeated: Array = blocks.repeat(tall, axis=0).repeat(wide, axis=1)
    return repeated


PICTURES: Final[dict[str, Damage]] = {
    "gaussian": _gaussian,
    "blur": _blur,
    "occlusion": _occlusion,
    "contrast": _contrast,
    "brightness": _brightness,
    "saturation": _saturation,
    "pixels": _pixels,
}


def blur_matrix(size: int, sigma: float) -> Array:
    """What smears a line of `size` points; each row sums to 1, so that no border grows dark."""
    far_II = np.subtract.outer(np.arange(size), np.arange(size))
    weight_II = np.exp(-0.5 * (far_II / sigma) ** 2)
    matrix: Array = (weight_II / weight_II.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def _bytes(pixels_HWC: Array) -> Array:
    changed: Array = pixels_HWC.round().clip(0, 255).astype(np.uint8)
    return changed
