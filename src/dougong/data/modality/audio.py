"""Sound.

Here        AudioConfig, AudioModality.
Elsewhere   fetching the file (medium.py); making tokens of samples (model/encoders/audio.py).
Promise     a recording is mono, at one rate, as loud as every other; a file that is not whole sound is refused.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from pydantic import field_validator

from dougong.core.config import Config
from dougong.core.signature import AudioInput
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.damage.sounds import sounds
from dougong.data.modality.medium import BadValue, Modality, media_bytes, media_key, pad
from dougong.data.quality import AUDIO, Quality, audio_quality

PAD_TO: Final = 800
"""Batches are padded to multiples of this, so that shapes repeat and memory is reused."""

KEPT_SCALE: Final = 4096.0
"""Decoded sound is kept as 16-bit numbers of so many steps per standard deviation: +-8 of them fit."""


UNKNOWN_FRAMES: Final = 2**62
"""The library claims more than this for a file that does not say how long it is."""

MOST_CHUNKS: Final = 1000
"""Of a WAV file, looked at for its samples."""

BLOCK_NUMBERS: Final = 2**18
"""Decoded at a time, so that a long recording of which the beginning is kept takes no more room than that."""

SLOWEST_RATE: Final = 100
FASTEST_RATE: Final = 768_000
"""Samples a second that a recording may have; what is made of it grows with them."""

MARGIN_SECONDS: Final = 0.1
"""Read beyond what is kept: the filter of another rate looks ahead."""


class AudioAugment(Config):
    """Random changes that leave the answer as it is."""

    gain_decibels: float = 0.0
    """Louder or softer by up to so much."""

    noise: float = 0.0
    """Add white noise of up to this standard deviation; the sound's own is 1."""

    shift_seconds: float = 0.0
    """Begin later by up to so much."""

    speed: float = 0.0
    """Play faster or slower by up to this share, voice and all (Ko et al. 2015): as if others had spoken."""

    @field_validator("speed")
    @classmethod
    def _below_half(cls, speed: float) -> float:
        if not 0 <= speed <= 0.5:
            raise ValueError(
                f"{speed} must be from 0 to 0.5: it is a share of the speed. Use 0.0 for none, 0.2 for much."
            )
        return speed


class AudioConfig(Config):
    """How a recording becomes samples."""

    kind: Literal["audio"] = "audio"
    column: str
    sample_rate: int = 16_000
    max_seconds: float = 10.0
    """What is longer is cut at the end."""

    largest_seconds: float = 3600.0
    """A file that claims more is refused before decoding."""

    augment: AudioAugment = AudioAugment()


class AudioModality(Modality):
    """Kept decoded as 16-bit samples of zero mean and unit variance."""

    quality_names = AUDIO

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self.max_samples = int(config.max_seconds * config.sample_rate)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.config.column,)

    def signature(self) -> AudioInput:
        later = int(self.config.augment.shift_seconds * self.config.sample_rate)
        slowest = int(self.max_samples / (1 - self.config.augment.speed))
        return AudioInput(sample_rate=self.config.sample_rate, max_samples=slowest + later + PAD_TO)

    def key(self, cells: tuple[Any, ...]) -> Hashable:
        return media_key(cells[0])

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        content = media_bytes(cells[0], folder)
        missing = _missing_bytes(content)
        if missing:
            raise BadValue(f"is truncated: {missing} bytes of its samples are not there")
        try:
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                rate = file.samplerate
                samples = self._read(file)
        except soundfile.LibsndfileError as error:
            raise BadValue(f"is not sound, or is cut short ({_reason(error)})") from None
        if rate != self.config.sample_rate:
            samples = soxr.resample(samples, rate, self.config.sample_rate)
        samples = samples[: self.max_samples]
        if len(samples) == 0:
            raise BadValue("has no samples")
        samples = samples - samples.mean(dtype=np.float64)
        samples = samples / max(float(samples.std()), 1e-4)
        kept: Array = (samples * KEPT_SCALE).clip(-32767, 32767).astype(np.int16)
        return kept

    def _read(self, file: soundfile.SoundFile) -> npt.NDArray[np.float32]:
        """The channels' mean, a little longer than what is kept; the rest is read only to see that it is there."""
        rate, frames = file.samplerate, file.frames
        check_rate(rate)
        if frames >= UNKNOWN_FRAMES:
            raise BadValue("does not say how long it is, as a stream that was never closed. Write it again whole")
        if frames > self.config.largest_seconds * rate:
            raise BadValue(f"claims {frames / rate:.0f} seconds, over the limit of largest_seconds")
        wanted = int((self.config.max_seconds + MARGIN_SECONDS) * rate) + 1
        kept: list[npt.NDArray[np.float32]] = []
        done = 0
        while len(block := file.read(max(1, BLOCK_NUMBERS // file.channels), dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise BadValue("has samples that are not numbers")
            if done < wanted:
                kept.append(block.mean(axis=1, dtype=np.float64).astype(np.float32)[: wanted - done])
            done += len(block)
        if done < frames:
            raise BadValue(f"is truncated: {done} of {frames} samples are there")
        return np.concatenate(kept) if kept else np.zeros(0, np.float32)

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        change = self.config.augment
        if augment is not None and change.speed:
            speeds = augment.uniform(1 - change.speed, 1 + change.speed, len(media))
            media = [_played(medium, speed) for medium, speed in zip(media, speeds, strict=True)]
        late = np.zeros(len(media), np.int64)
        if augment is not None and change.shift_seconds:
            late = augment.integers(0, int(change.shift_seconds * self.config.sample_rate) + 1, len(media))
        longest = max((len(medium) + start for medium, start in zip(media, late, strict=True)), default=1)
        width = -(-int(longest) // PAD_TO) * PAD_TO
        rows = [np.pad(medium, (int(start), 0)) for medium, start in zip(media, late, strict=True)]
        samples_UT, mask_UT = pad(rows, width, np.float32)
        samples_UT /= KEPT_SCALE
        if augment is not None and change.noise:
            level = augment.random((len(media), 1), np.float32) * np.float32(change.noise)
            samples_UT += level * _noise((len(media), width), augment)
        if augment is not None and change.gain_decibels:
            decibels = augment.uniform(-change.gain_decibels, change.gain_decibels, (len(media), 1))
            samples_UT *= (10 ** (decibels / 20)).astype(np.float32)
        samples_UT *= mask_UT
        return {"samples_UT": samples_UT, "mask_UT": mask_UT}

    @functools.cached_property
    def damages(self) -> Mapping[str, Damage]:
        return sounds(self.config.sample_rate, KEPT_SCALE)

    def quality(self, values: Mapping[str, Array]) -> Quality:
        return audio_quality(values["samples_UT"], values["mask_UT"], self.config.sample_rate, self.max_samples)


def check_rate(rate: int) -> None:
    """Before anything is made of its size.

    Raises:
        BadValue: no recording has such a rate.
    """
    if not SLOWEST_RATE <= rate <= FASTEST_RATE:
        raise BadValue(f"claims {rate} samples a second: sound has {SLOWEST_RATE} to {FASTEST_RATE}")


def _played(medium: Array, speed: float) -> Array:
    """The same samples at another speed, by linear interpolation: what it blurs at the top is part of the change."""
    count = max(1, int((len(medium) - 1) / speed))
    at = np.arange(count, dtype=np.float32) * np.float32(speed)
    before = at.astype(np.int32)
    low = medium[before].astype(np.float32)
    high = medium[np.minimum(before + 1, len(medium) - 1)]
    return low + (at - before) * (high - low)


def _missing_bytes(content: bytes) -> int:
    """How many bytes of its samples a WAV or AIFF file lacks; the library would read on as if it had never had them."""
    big = content[:4] == b"FORM"
    if content[:4] != b"RIFF" and not big:
        return 0
    start = 12
    for _ in range(MOST_CHUNKS):
        if start + 8 > len(content):
            break
        size = int.from_bytes(content[start + 4 : start + 8], "big" if big else "little")
        if content[start : start + 4] in (b"data", b"SSND"):
            # A recorder that writes into a pipe cannot know the size and claims one beyond all bounds.
            return 0 if size >= 0x7FFF0000 else max(0, start + 8 + size - len(content))
        start += 8 + size + size % 2
    return 0


def _reason(error: soundfile.LibsndfileError) -> str:
    """Its words without the address of what was opened, which differs at each run."""
    return str(error.error_string).strip().rstrip(".")[:80]


@functools.cache
def _noise_bank() -> Array:
    return np.random.default_rng(0).standard_normal(2**22, np.float32)


def _noise(shape: tuple[int, int], random: np.random.Generator) -> Array:
    """White noise: where it fits, a piece of a long recording, for drawing costs more than all the rest of a batch."""
    count, bank = shape[0] * shape[1], _noise_bank()
    if count >= len(bank):
        return random.standard_normal(shape, np.float32)
    start = int(random.integers(0, len(bank) - count))
    return bank[start : start + count].reshape(shape)
