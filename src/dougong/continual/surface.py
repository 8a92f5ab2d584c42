"""What a record looks and sounds like before any network has seen it.

Here        `surface_of`: a few numbers of a medium, by what its values are.
Elsewhere   what the base makes of it (continual/recognition.py), beside which these numbers stand.
Promise     nothing in it is learnt, so that no training can make it forget; the same width for every kind of medium.

An encoder that was trained for one task leaves out what that did not need: one that hears questions does not hear who
speaks, and one that sees shapes hardly tells digits apart. Records of another task often differ in just that. So a
picture is also known by its brightness in 8 x 8 fields, a volume by that in 4 x 4 x 4, a sound or signal by mean and
spread of its level in bands of frequency. Shapes: U media, C channels, T samples, W samples of a window, K windows,
S = SURFACE numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

SURFACE: Final = 64
FIELDS: Final = 8
WINDOW: Final = {"samples_UT": 256, "samples_UCT": 64}
"""Samples of sound, and of a signal; windows overlap by half."""

BANDS: Final = 32
"""At most; of the lowest, several fall on one bin of a window's spectrum."""

SILENCE: Final = 1e-4
AT_ONCE: Final = 16
"""Media whose windows are in memory together."""


def surface_of(values: Mapping[str, Tensor]) -> Tensor:
    """(U, S), in this order and zeros behind it; all zeros of what has no surface, like words."""
    if "pixels_UCHW" in values:
        found = functional.adaptive_avg_pool2d(values["pixels_UCHW"].float().mean(dim=1, keepdim=True), FIELDS)
    elif "voxels_U1DHW" in values:
        found = functional.adaptive_avg_pool3d(values["voxels_U1DHW"].float(), FIELDS // 2)
    else:
        key = next((key for key in WINDOW if key in values), None)
        if key is None:
            first = next(iter(values.values()))
            return torch.zeros(len(first), SURFACE, device=first.device)
        samples_UCT = values[key].float().view(len(values[key]), -1, values[key].shape[-1])
        pairs = zip(torch.split(samples_UCT, AT_ONCE), torch.split(values["mask_UT"], AT_ONCE), strict=True)
        found = torch.cat([_levels(some, there, WINDOW[key]) for some, there in pairs])
    flat = found.flatten(1)
    return functional.pad(flat, (0, SURFACE - flat.shape[1]))


def _levels(samples_UCT: Tensor, mask_UT: Tensor, window: int) -> Tensor:
    """Mean and spread over time of the logarithm of the power in each band, channels together."""
    lacking = max(0, window - samples_UCT.shape[-1])
    samples_UCT = functional.pad(samples_UCT * mask_UT[:, None], (0, lacking))
    shape = torch.hann_window(window, device=samples_UCT.device)
    power_UCKF = torch.fft.rfft(samples_UCT.unfold(2, window, window // 2) * shape).abs().square()
    edges = sorted({round((window / 2) ** (band / BANDS)) for band in range(BANDS + 1)})
    band_FB = torch.zeros(window // 2 + 1, len(edges) - 1, device=samples_UCT.device)
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        band_FB[low:high, band] = 1.0
    level_UKB = (power_UCKF @ band_FB + SILENCE).log().mean(dim=1)
    # A window counts that is whole; of what is shorter than one, the first.
    whole_UK = functional.pad(mask_UT, (0, lacking))[:, window - 1 :: window // 2][:, : level_UKB.shape[1]].clone()
    whole_UK[:, 0] = True
    weight_UK1 = whole_UK[..., None] / whole_UK.sum(dim=1)[:, None, None]
    mean_UB = (level_UKB * weight_UK1).sum(dim=1)
    spread_UB = ((level_UKB - mean_UB[:, None]).square() * weight_UK1).sum(dim=1).sqrt()
    return torch.cat([mean_UB, spread_UB], dim=1)
