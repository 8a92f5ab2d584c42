"""Where a token stands, as an angle by which its query and key are turned.

Here        Stretch, Rotation, `frequencies`, `magnitude`, `rotation`, `turned`.
Elsewhere   who is turned (nn/latent_attention.py).
Promise     what two turned vectors have in common depends on how far apart they stand, not on where.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Stretch(NamedTuple):
    """How to read far more tokens than the weights were trained for: YaRN (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    """How many times as many."""

    original: int
    """Tokens that the weights were trained for."""

    fast: float = 32.0
    """Channels that turn more often than this over the original tokens are left as they are."""

    slow: float = 1.0
    """Channels that turn less often than this are stretched by the whole factor; those between, by part of it."""

    magnitude: float | None = None
    magnitude_all: float | None = None
    """How much larger scores become, of the turned channels, and of all; DeepSeek's mscale and mscale_all_dim."""


class Rotation(NamedTuple):
    """What turns tokens. Shapes: B records, T tokens, R channels that are turned."""

    cos_BTR: Tensor
    sin_BTR: Tensor
    """R / 2 of them: pairs of channels turn together."""


def frequencies(dim: int, base: float, stretch: Stretch | None = None) -> Tensor:
    """How far each of the dim / 2 pairs of channels turns from one token to the next, in radians."""
    pair = torch.arange(0, dim, 2, dtype=torch.float32)
    plain = 1.0 / base ** (pair / dim)
    if stretch is None:
        return plain

    def pair_that_turns(times: float) -> float:
        return dim * math.log(stretch.original / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(0, math.floor(pair_that_turns(stretch.fast)))
    last = min(dim - 1, math.ceil(pair_that_turns(stretch.slow)))
    share = ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - share) + plain / stretch.factor * share


def magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's larger scores, for a context that is so many times longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation(position_BT: Tensor, frequency_R: Tensor, scale: float = 1.0) -> Rotation:
    """The angles of tokens at these places; `scale` makes what is turned by so much longer."""
    angle_BTR = position_BT[..., None].float() * frequency_R
    return Rotation(angle_BTR.cos() * scale, angle_BTR.sin() * scale)


def turned(x_BTHR: Tensor, by: Rotation) -> Tensor:
    """Channels 0 and 1 turn together, then 2 and 3, and so on; the first of all pairs come out first."""
    cos_BT1R, sin_BT1R = (each[:, :, None].to(x_BTHR.dtype) for each in by)
    first, second = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    return torch.cat([first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R], dim=-1)
