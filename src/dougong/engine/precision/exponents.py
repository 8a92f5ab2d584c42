"""How large numbers are, as a histogram of their exponents that follows a run.

Here        Exponents, and what is read from such counts.
Elsewhere   what is decided by it (adaptive.py).
Promise     a few thousand numbers of a tensor are looked at, wherever they lie in it; zeros are counted apart, and so
            is what is not finite. The same tensors give the same histogram.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LOWEST: Final = -149
"""The exponent of the smallest number in fp32."""

HIGHEST: Final = 127
SAMPLE: Final = 4096
"""Numbers that are looked at, of one tensor."""

_BINS: Final = HIGHEST - LOWEST + 1


class Exponents:
    """Counts by exponent: of x, the largest power of two that is not above |x|. What was counted before fades."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.counts = torch.zeros(_BINS + 2, dtype=torch.float64)
        """By exponent, from the lowest; then zeros; then numbers that are not finite."""

        self.fresh = torch.zeros_like(self.counts)
        """What has been seen since it was last settled; of this rank alone."""

    def observe(self, x: Tensor, shift: int = 0) -> None:
        """Look at some of these numbers, which are 2 ** shift times what is to be counted."""
        self.fresh += counted(x, shift).to(self.fresh.device)

    def settle(self, fresh: Tensor) -> None:
        """What was seen, on all ranks, becomes part of what is known."""
        if fresh.any():
            self.counts = self.counts * self.decay + fresh
        self.fresh.zero_()

    def quantile(self, share: float) -> int | None:
        """The least exponent that so large a share of the numbers other than zero do not pass; None without any."""
        return quantile(self.counts, share)


def quantile(counts: Tensor, share: float) -> int | None:
    """The least exponent that so large a share of the numbers other than zero do not pass; None without any."""
    summed = counts[:_BINS].cumsum(0)
    if not summed[-1]:
        return None
    place = int(torch.searchsorted(summed, share * summed[-1]))
    return min(place, _BINS - 1) + LOWEST


def largest(counts: Tensor) -> int | None:
    """The exponent of the largest number; None without any but zeros."""
    places = counts[:_BINS].nonzero()
    return int(places[-1]) + LOWEST if len(places) else None


def has_broken(counts: Tensor) -> bool:
    """Whether there was a number that is not finite."""
    return bool(counts[-1] > 0)


def counted(x: Tensor, shift: int = 0) -> Tensor:
    """The histogram of some of these numbers, on their device."""
    flat = x.detach().reshape(-1)
    # An odd stride: rows and channels have even lengths, and all of them are to be met.
    sample = flat[:: (len(flat) // SAMPLE) | 1].float()
    finite = sample.isfinite()
    there = finite & (sample != 0)
    _, exponent = torch.frexp(torch.where(there, sample, 1.0))
    place = (exponent - 1 - shift - LOWEST).clamp(0, _BINS - 1)
    place = torch.where(there, place, torch.where(finite, _BINS, _BINS + 1))
    return torch.bincount(place, minlength=_BINS + 2).double()
