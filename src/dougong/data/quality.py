"""How good a medium is as a recording of anything, in a few named figures of about 0 to 1.

Here        the figures of each kind of medium and which side of them is worse (WORSE); `text_troubles`, and the share
            of words that have any.
Elsewhere   who asks for them (data/modality/); adding them up over a table (data/check.py); the gate that reads them.
Promise     computed on a batch's finished values, so whatever was done to a medium on the way is in them (but for a
            text's `trouble`, which its letters alone show); a figure depends on its own medium alone, is finite, and
            costs little beside decoding.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from dougong.data.batch import Array

Quality = npt.NDArray[np.float32]

IMAGE: Final = ("sharpness", "exposure", "contrast", "clipped", "noise", "colour", "flat")
AUDIO: Final = ("snr", "silence", "clipping", "length", "high")
TEXT: Final = ("length", "unknown", "pieces", "trouble")
TABLE: Final = ("known", "farthest", "spread")
SIGNAL: Final = ("noise", "flat", "farthest", "spread", "length")
VOLUME: Final = ("sharpness", "flat", "farthest", "spread")

WORSE: Final[dict[str, Literal["low", "high", "either"]]] = {
    "sharpness": "low",
    "exposure": "either",
    "contrast": "low",
    "clipped": "high",
    "noise": "high",
    "colour": "either",
    "flat": "high",
    "snr": "low",
    "silence": "high",
    "clipping": "high",
    "length": "either",
    "high": "either",
    "unknown": "high",
    "pieces": "high",
    "trouble": "high",
    "known": "low",
    "farthest": "high",
    "spread": "either",
}
"""Where a worse medium lies."""

SHARP: Final = 0.1
NOISY: Final = 0.05
FAR: Final = 3.0
"""These three are the figures that come out as one half: of white, of white, and standard deviations."""

FLAT: Final = 1.5 / 255
MOST_DECIBELS: Final = 60.0
QUIET: Final = 1e-3
"""Of the sound's mean energy: 30 dB below it."""

NOTHING: Final = 1e-9
FRAMES_PER_SECOND: Final = 50
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)


def image_quality(pixels_UCHW: Array, mean: tuple[float, ...], scale: tuple[float, ...]) -> Quality:
    """Of normalised pixels; `mean` and `scale` undo that.

    sharpness   standard deviation of the Laplacian of the grey picture, as x / (x + 0.1)
    exposure    mean grey, 0 black to 1 white
    contrast    twice the standard deviation of the grey values
    clipped     share of pixels that are black or white
    noise       its standard deviation as Immerkaer 1996 ("Fast noise variance estimation") has it, as x / (x + 0.05)
    colour      mean distance of the three channels from grey, doubled, of every second pixel each way
    flat        share of pixels at which nothing changes

    A picture of two pixels or less a side has no Laplacian: its figures of change are 0.
    """
    weight_C = LUMA * np.array(scale, np.float32)
    grey_UHW = np.tensordot(weight_C, pixels_UCHW, (0, 1)) + np.float32(LUMA @ np.array(mean, np.float32))
    num, height, width = grey_UHW.shape
    if height > 2 and width > 2:
        inner = grey_UHW[:, 1:-1, 1:-1]
        across = grey_UHW[:, 1:-1, :-2] + grey_UHW[:, 1:-1, 2:] - 2 * inner
        down = grey_UHW[:, :-2, 1:-1] + grey_UHW[:, 2:, 1:-1] - 2 * inner
        laplacian = _by_medium(across + down)
        # The mask [1 -2 1]' [1 -2 1] sees neither edges nor slopes along an axis; on white noise it gives six sigma.
        second = _by_medium(np.diff(np.diff(grey_UHW, 2, axis=2), 2, axis=1))
        sharpness, flat = laplacian.std(axis=1), (np.abs(laplacian) < FLAT).mean(axis=1)
        noise = np.sqrt(np.pi / 2) / 6 * np.abs(second).mean(axis=1)
    else:
        sharpness = flat = noise = np.zeros(num, np.float32)
    grey_UP = _by_medium(grey_UHW)
    # Of a quarter of the pixels: colour is broad, and this would cost as much as all the rest.
    some_UCHW = pixels_UCHW[:, :, ::2, ::2] * np.array(scale, np.float32)[:, None, None]
    some_UCHW += np.array(mean, np.float32)[:, None, None]
    some_UCHW -= grey_UHW[:, None, ::2, ::2]
    away = np.abs(some_UCHW).mean(axis=(1, 2, 3))
    clipped = ((grey_UP < 1 / 255) | (grey_UP > 254 / 255)).mean(axis=1)
    return _figures(
        _half_at(SHARP, sharpness),
        grey_UP.mean(axis=1),
        2 * grey_UP.std(axis=1),
        clipped,
        _half_at(NOISY, noise),
        2 * away,
        flat,
    )


def audio_quality(samples_UT: Array, mask_UT: npt.NDArray[np.bool_], sample_rate: int, max_samples: int) -> Quality:
    """Of samples of about unit variance.

    snr         the loud frames (their 90 % quantile) over the quiet ones (10 %), in units of 60 dB: what a room or
                a line adds all the time fills the pauses. A sound without pauses has little of it, however clean.
    silence     share of frames 30 dB below the mean
    clipping    share of samples within 2 % of the largest
    length      of the longest that is kept
    high        mean square of the samples' differences over four times that of the samples: 0 for the lowest
                frequencies, one half for white noise, 1 at half the sample rate

    Frames are 20 ms; a sound shorter than one has no pauses and no silence.
    """
    num, width = samples_UT.shape
    length_U = mask_UT.sum(axis=1)  # what is real comes first, and what is not is 0
    size = max(1, sample_rate // FRAMES_PER_SECOND)
    frames = width // size
    frame_UFS = samples_UT[:, : frames * size].reshape(num, frames, size)
    energy_UF = np.einsum("ufs,ufs->uf", frame_UFS, frame_UFS) / size
    whole_U = length_U // size
    whole_UF = np.arange(frames) < whole_U[:, None]
    total_U = np.einsum("ut,ut->u", samples_UT, samples_UT)
    mean_U = total_U / np.maximum(length_U, 1)
    silence_U = ((energy_UF < QUIET * mean_U[:, None]) & whole_UF).sum(axis=1) / np.maximum(whole_U, 1)
    decibels_U = _decibels(np.where(whole_UF & (energy_UF > NOTHING), energy_UF, np.inf))
    highest_U1 = samples_UT.max(axis=1, keepdims=True, initial=0)
    lowest_U1 = samples_UT.min(axis=1, keepdims=True, initial=0)
    limit_U1 = np.maximum(0.98 * np.maximum(highest_U1, -lowest_U1), NOTHING)
    loud_U = np.count_nonzero((samples_UT > limit_U1) | (samples_UT < -limit_U1), axis=1)
    # The squares of differences, without an array of them: twice those of the samples less twice the products.
    last_U = samples_UT[np.arange(num), np.maximum(length_U - 1, 0)]
    product_U = np.einsum("ut,ut->u", samples_UT[:, 1:], samples_UT[:, :-1])
    change_U = 2 * (total_U - product_U) - np.square(samples_UT[:, 0]) - np.square(last_U)
    return _figures(
        decibels_U.clip(0, MOST_DECIBELS) / MOST_DECIBELS,
        silence_U,
        loud_U / np.maximum(length_U, 1),
        length_U / max_samples,
        change_U.clip(0) / (4 * total_U + NOTHING),
    )


def _decibels(energy_UF: Array) -> Array:
    """Loud frames over quiet ones; infinite is what is no frame. Digital silence is none: it tells of no noise."""
    energy_UF = np.sort(energy_UF, axis=1)
    last_U = np.isfinite(energy_UF).sum(axis=1) - 1
    decibels_U = np.zeros(len(energy_UF))
    some = np.flatnonzero(last_U >= 0)
    low, high = (energy_UF[some, (share * last_U[some]).round().astype(np.int64)] for share in (0.1, 0.9))
    decibels_U[some] = 10 * np.log10(high / low)
    return decibels_U


def text_quality(
    ids_UT: npt.NDArray[np.int64],
    mask_UT: npt.NDArray[np.bool_],
    *,
    max_tokens: int,
    unknown: int,
    around_V: npt.NDArray[np.bool_],
    piece_V: npt.NDArray[np.bool_],
) -> Quality:
    """Of token ids; `around_V` and `piece_V` say of each id whether it stands around texts, or is a mere piece.

    length      tokens of the longest that is kept
    unknown     share of tokens that the vocabulary does not know
    pieces      share of tokens that are single letters or the inside of a word: many in what is misspelt
    """
    own_UT = mask_UT & ~around_V[ids_UT]
    count_U = np.maximum(own_UT.sum(axis=1), 1)
    return _figures(
        own_UT.sum(axis=1) / max_tokens,
        (own_UT & (ids_UT == unknown)).sum(axis=1) / count_U,
        (own_UT & piece_V[ids_UT]).sum(axis=1) / count_U,
    )


def table_quality(numbers_UN: Array, known_UN: npt.NDArray[np.bool_], categories_UK: npt.NDArray[np.int64]) -> Quality:
    """Of standardised numbers and categories.

    known       share of the columns that hold a value, of categories one that training has seen
    farthest    the largest distance from a column's mean, in standard deviations, as x / (x + 3)
    spread      the root of the mean square of the known ones, likewise
    """
    known_U = known_UN.sum(axis=1) + (categories_UK > 0).sum(axis=1)
    far_UN = np.where(known_UN, np.abs(numbers_UN), 0).astype(np.float64)  # the square of what float32 holds
    square_U = np.square(far_UN).sum(axis=1) / np.maximum(known_UN.sum(axis=1), 1)
    return _figures(
        known_U / max(1, known_UN.shape[1] + categories_UK.shape[1]),
        _half_at(FAR, far_UN.max(axis=1, initial=0)),
        _half_at(FAR, np.sqrt(square_U)),
    )


def signal_quality(samples_UCT: Array, mask_UT: npt.NDArray[np.bool_], max_samples: int) -> Quality:
    """Of standardised samples.

    noise       as `high` of sound
    flat        share of steps at which no channel changes
    farthest, spread    as of a table, over all samples
    length      of the longest that is kept
    """
    channels = samples_UCT.shape[1]
    count_U = np.maximum(mask_UT.sum(axis=1), 1)
    step_UCT = np.diff(samples_UCT.astype(np.float64), axis=2)
    both_UT = mask_UT[:, 1:] & mask_UT[:, :-1]
    steps_U = np.maximum(both_UT.sum(axis=1), 1)
    square_U = np.square(samples_UCT, dtype=np.float64).sum(axis=(1, 2))
    change_U = (np.square(step_UCT) * both_UT[:, None]).sum(axis=(1, 2))
    still_U = ((np.abs(step_UCT) < 1e-6).all(axis=1) & both_UT).sum(axis=1) / steps_U
    return _figures(
        change_U / (4 * square_U + 1e-9),
        still_U,
        _half_at(FAR, _by_medium(np.abs(samples_UCT)).max(axis=1, initial=0)),
        _half_at(FAR, np.sqrt(square_U / (channels * count_U))),
        mask_UT.sum(axis=1) / max_samples,
    )


def volume_quality(voxels_U1DHW: Array) -> Quality:
    """Of standardised voxels.

    sharpness   root of the mean square of the differences along all axes, as x / (x + 0.1)
    flat        share of voxels that equal their next one
    farthest, spread    as of a table, over all voxels
    """
    steps = [_by_medium(np.diff(voxels_U1DHW, axis=axis)) for axis in (2, 3, 4)]
    step_US = np.concatenate(steps, axis=1)
    far_UV = np.abs(_by_medium(voxels_U1DHW)).astype(np.float64)
    size = max(1, step_US.shape[1])
    return _figures(
        _half_at(SHARP, np.sqrt(np.square(step_US, dtype=np.float64).sum(axis=1) / size)),
        (np.abs(step_US) < 1e-6).sum(axis=1) / size,
        _half_at(FAR, far_UV.max(axis=1, initial=0)),
        _half_at(FAR, np.sqrt(np.square(far_UV).mean(axis=1))),
    )


def text_troubles(text: str) -> list[str]:
    """What went wrong with a text's letters before it came here; its tokens no longer show it.

    `lost`: replaced by a sign that says so (U+FFFD). `misread`: UTF-8 that was read as another encoding ("cafÃ©").
    `of control`: characters that no one types. `of markup`: HTML that was not taken out.
    """
    found = []
    if "\ufffd" in text:
        found.append("lost")
    # Not at the spaces of other encodings: U+00A0 is half of an "à" that was misread.
    if not text.isascii() and any(_misread(word) for word in re.split(r"[ \t\n\r]+", text)):
        found.append("misread")
    if any((letter < " " and letter not in "\t\n\r") or "\x7f" <= letter < "\xa0" for letter in text):
        found.append("of control")
    if any(mark in text for mark in ("&amp;", "&lt;", "&gt;", "&quot;", "&nbsp;", "&#", "</", "<br")):
        found.append("of markup")
    return found


def troubled_share(text: str) -> float:
    """The share of a text's words that have some of these, from 0 to 1."""
    if not text_troubles(text):
        return 0.0
    words = text.split()
    # A letter of control may be what parts two words.
    return max(1, sum(bool(text_troubles(word)) for word in words)) / max(1, len(words))


def _misread(word: str) -> bool:
    """Whether its letters, as bytes of an old encoding, spell other letters in UTF-8: by chance that is rare."""
    if word.isascii():
        return False
    # cp1252 has no letter at five of its places; who reads them passes them on as they are.
    for content in (b"".join(map(_byte_of, word)), word.encode("latin-1", "replace")):
        try:
            content.decode("utf-8")
        except UnicodeError:
            continue
        if not content.isascii():
            return True
    return False


def _byte_of(letter: str) -> bytes:
    for encoding in ("cp1252", "latin-1"):
        try:
            return letter.encode(encoding)
        except UnicodeError:
            continue
    return b"\xff"  # of no such encoding, and nowhere in UTF-8


def _by_medium(array: Array) -> Array:
    """(U, everything else), also where there is no medium at all."""
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _half_at(middle: float, figure: Array) -> Array:
    """From 0 upwards to between 0 and 1."""
    bent: Array = figure / (figure + middle)
    return bent


def _figures(*columns: Array) -> Quality:
    return np.stack([column.astype(np.float32) for column in columns], axis=1)
