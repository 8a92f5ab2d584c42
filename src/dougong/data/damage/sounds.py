"""Sounds, spoilt.

Here        `sounds`: by name, what is done to 16-bit samples (T,); `noise_decibels`.
Elsewhere   decoding them (data/modality/audio.py); what sees it (data/quality.py).
Promise     no sound falls silent: noise stands at a stated distance from the sound itself, and what is spoilt is as
            loud as decoding makes every sound.
"""

from __future__ import annotations

import functools

import numpy as np

from dougong.data.batch import Array
from dougong.data.damage.damage import Damage, about


def sounds(sample_rate: int, kept_scale: float) -> dict[str, Damage]:
    """`kept_scale` is how many steps of 16 bits stand for one standard deviation."""
    damages: dict[str, Damage] = {
        "noise": _noise,
        "clipping": _clipping,
        "gaps": functools.partial(_gaps, sample_rate=sample_rate),
        "lowpass": _lowpass,
    }
    return {name: functools.partial(_as_decoded, damage, kept_scale) for name, damage in damages.items()}


def noise_decibels(level: float) -> float:
    """How far the sound stands above the noise: 30 dB, hardly heard, at level 0, and -10 dB at level 1.

    Of the sound's own energy, so that a level means the same for a loud and for a soft one.
    """
    return 30.0 - 40.0 * level


def _as_decoded(damage: Damage, scale: float, medium: Array, level: float, random: np.random.Generator) -> Array:
    samples = damage(medium.astype(np.float32) / scale, level, random)
    samples = samples - samples.mean(dtype=np.float64)
    samples = samples / max(float(samples.std()), 1e-4)
    kept: Array = (samples * scale).round().clip(-32767, 32767).astype(np.int16)
    return kept


def _noise(samples: Array, level: float, random: np.random.Generator) -> Array:
    """Add white noise."""
    loudness = np.sqrt(np.square(samples, dtype=np.float64).mean())
    ratio = loudness * 10 ** (-noise_decibels(level) / 20)
    noisy: Array = samples + np.float32(ratio) * random.standard_normal(len(samples), np.float32)
    return noisy


def _clipping(samples: Array, level: float, random: np.random.Generator) -> Array:
    """Cut off the loudest samples, up to nine tenths of them."""
    limit = np.quantile(np.abs(samples), 1 - 0.9 * level)
    return samples.clip(-limit, limit)


def _gaps(samples: Array, level: float, random: np.random.Generator, *, sample_rate: int) -> Array:
    """Lose pieces of 40 ms, up to eight of ten; the loudest one is kept."""
    size = max(1, round(0.04 * sample_rate))
    starts = np.arange(0, len(samples), size)
    loudest = int(np.add.reduceat(np.square(samples), starts).argmax())
    others = np.delete(np.arange(len(starts)), loudest)
    lost = random.permutation(others)[: about(0.8 * level * len(starts), random)]
    kept = np.ones(len(starts), np.bool_)
    kept[lost] = False
    return samples * kept.repeat(size)[: len(samples)]


def _lowpass(samples: Array, level: float, random: np.random.Generator) -> Array:
    """Take the height out: a Butterworth gain of order 4; its corner falls from half the rate to a twentieth of it."""
    spectrum = np.fft.rfft(samples)
    corner = 0.05**level
    gain = 1 / np.sqrt(1 + (np.linspace(0, 1, len(spectrum)) / corner) ** 8)
    low: Array = np.fft.irfft(spectrum * gain, len(samples)).astype(np.float32)
    return low
