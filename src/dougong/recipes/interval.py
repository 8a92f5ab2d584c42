"""How sure a figure is.

Here        `paired_gain`: one model's accuracy over another's on the same records.
Elsewhere   the figures themselves (engine/evaluate.py).
Promise     units (images, speakers) are resampled whole, since their records are not independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Gain(NamedTuple):
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float


def paired_gain(
    ours_B: npt.NDArray[np.bool_], theirs_B: npt.NDArray[np.bool_], units: Sequence[Hashable], *, seed: int = 0
) -> Gain:
    """Ours minus theirs, right or wrong per record, by the percentile bootstrap over units (Efron 1979)."""
    place: dict[Hashable, int] = {}
    unit_B = np.array([place.setdefault(unit, len(place)) for unit in units])
    sums_U = np.bincount(unit_B, ours_B.astype(np.float64) - theirs_B)
    counts_U = np.bincount(unit_B)
    random = np.random.default_rng(seed)
    drawn = [random.integers(0, len(place), len(place)) for _ in range(2000)]
    gains = np.array([sums_U[chosen].sum() / counts_U[chosen].sum() for chosen in drawn])
    low, high = np.quantile(gains, (0.025, 0.975))
    return Gain(float(sums_U.sum() / counts_U.sum()), float(low), float(high))
