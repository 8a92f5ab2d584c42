"""A first convolution over sound that begins as a filter bank.

Here        `gabor_filters`.
Elsewhere   the encoder that may begin so (audio.py).
Promise     each band has four filters a quarter of a turn apart, so that whatever follows can read off how loud the
            band is, whenever the wave began; every filter is of unit length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PHASES = 4
LOWEST_HERTZ = 60.0
NARROWEST_HERTZ = 60.0


def gabor_filters(*, num_filters: int, kernel: int, sample_rate: int) -> Tensor:
    """Waves under a bell, their bands evenly spaced on the mel scale; of shape (num_filters, 1, kernel).

    After Zeghidour et al. 2018, "Learning filterbanks from raw speech" (arXiv:1711.01161), with four phases and the
    encoder's own norm and bend in place of their squared modulus and logarithm.
    """
    num_bands = num_filters // PHASES
    edges = torch.linspace(_mel(LOWEST_HERTZ), _mel(0.49 * sample_rate), num_bands + 2, dtype=torch.float64)
    edge_hertz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    centre_F1 = edge_hertz[1:-1, None]
    # The bell's width at half its height, in hertz: half of the way between the neighbours' centres.
    width_F1 = (edge_hertz[2:] - edge_hertz[:-2]).clamp(min=NARROWEST_HERTZ)[:, None] / 2.0
    seconds_K = (torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2.0) / sample_rate
    spread_F1 = math.sqrt(8.0 * math.log(2.0)) / (2.0 * math.pi * width_F1)
    bell_FK = torch.exp(-(seconds_K**2) / (2.0 * spread_F1**2))
    phase_P11 = torch.arange(PHASES, dtype=torch.float64)[:, None, None] * (2.0 * math.pi / PHASES)
    filters_PFK = bell_FK * torch.cos(2.0 * math.pi * centre_F1 * seconds_K + phase_P11)
    filters_FPK = filters_PFK.transpose(0, 1).reshape(num_bands * PHASES, kernel)
    filters_F1K: Tensor = (filters_FPK / filters_FPK.norm(dim=1, keepdim=True))[:, None].float()
    return filters_F1K


def _mel(hertz: float) -> float:
    return 2595.0 * math.log10(1.0 + hertz / 700.0)
