"""How much of its accuracy a model keeps when its records are spoilt.

Here        `relative_robustness`, `effective_robustness`, Robustness.
Elsewhere   spoiling records (data/corruption.py); judging a model at each level (recipes/robust.py).
Promise     pure figures of a curve, on the metric's own scale; a figure says nothing of who else was compared, and
            stands beside the clean one.

Both after MultiBench (Liang et al. 2021, arXiv:2107.07502), whose effective robustness is after Taori et al. 2020
(arXiv:2007.00644). Let f(s) be a model's accuracy at level s of corruption, s from 0 to S, and b(s) a baseline's:

    relative    1/S  integral of f(s) ds
    effective   1/S  integral of f(s) - [b(s) + f(0) - b(0)] ds

The bracket is what the baseline predicts for a model of this clean accuracy: positive is robust beyond being good.
What we do differently: MultiBench integrates the first and sums the second over levels a tenth apart, and then maps
both to 0..1 by the best and the worst of the compared methods, so that a figure changes with its company and a hair's
breadth looks like the whole. Here both are means over the levels, trapezoid by trapezoid for any spacing, in units of
the metric.
For an error, lower being better, relative is its mean, and effective is negated: positive stays the better side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Robustness(NamedTuple):
    """One curve and what it comes to."""

    what: str
    """What was spoilt."""

    metric: str
    levels: tuple[float, ...]
    scores: tuple[float, ...]
    """The metric at each level; the first is of records as they are."""

    relative: float
    effective: float | None
    """None without a baseline."""

    @property
    def clean(self) -> float:
        return self.scores[0]


def relative_robustness(levels: Sequence[float], scores: Sequence[float]) -> float:
    """The mean score over all levels."""
    level_L, score_L = _curve(levels, scores)
    return float(np.trapezoid(score_L, level_L) / (level_L[-1] - level_L[0]))


def effective_robustness(
    levels: Sequence[float], scores: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool = True
) -> float:
    """How far above the baseline's curve, shifted to the same clean score, the model's lies in the mean."""
    _, score_L = _curve(levels, scores)
    _, base_L = _curve(levels, baseline)
    above_L = score_L - (base_L + score_L[0] - base_L[0])
    return relative_robustness(levels, (above_L if higher_is_better else -above_L).tolist())


def _curve(levels: Sequence[float], scores: Sequence[float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    level_L, score_L = np.array(levels, np.float64), np.array(scores, np.float64)
    assert len(level_L) == len(score_L) > 1, "a curve has a score at each of two levels or more"
    assert level_L[0] == 0, "the first score is of records as they are"
    assert (np.diff(level_L) > 0).all(), "levels rise"
    return level_L, score_L
