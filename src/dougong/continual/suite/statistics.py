"""Is a loss real, and could it have been seen?

Here        `loss_beyond` (McNemar's test with a margin, or a paired bootstrap), `holm`, `detectable_loss`.
Elsewhere   what is compared (gate.py).
Promise     pure functions of numbers; a test that has nothing to go by says 1, never 0; the same numbers give the same
            answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES: Final = 9999
FEW: Final = 1000
"""Discordant records up to which McNemar's test without a margin is exact."""

Floats = npt.NDArray[np.float64]


class Loss(NamedTuple):
    """By how much the newer one is worse."""

    mean: float
    low: float
    high: float
    """95 %, normal."""

    p: float
    """Chance of such a loss, or a larger one, were the true one no larger than the tolerance."""


def loss_beyond(
    before_N: Floats, after_N: Floats, tolerance: float, *, unit_N: npt.NDArray[np.int64] | None = None, seed: int = 0
) -> Loss:
    """Scores of the same N records, higher is better, before and after.

    Of zeros and ones: McNemar's exact test where the tolerance is 0; else the score test of a paired difference beyond
    a margin (Tango 1998, Statistics in Medicine 17:891), which is McNemar's where the margin is 0. Of other scores, or
    where records come in units: a studentised paired bootstrap over the units (Efron and Tibshirani 1993, chapter 16).
    """
    assert before_N.shape == after_N.shape, "scores of the same records"
    loss_N = before_N - after_N
    number = len(loss_N)
    if not number:
        return Loss(0.0, 0.0, 0.0, 1.0)
    mean = float(loss_N.mean())
    binary = bool(np.isin(before_N, (0.0, 1.0)).all() and np.isin(after_N, (0.0, 1.0)).all())
    if unit_N is None and binary:
        lost, won = int((loss_N > 0).sum()), int((loss_N < 0).sum())
        p = _mcnemar_exact(lost, won) if tolerance == 0 and lost + won <= FEW else _tango(lost, won, number, tolerance)
        half = 1.96 * math.sqrt(max(0.0, (lost + won) / number - mean**2) / number)
        return Loss(mean, mean - half, mean + half, p)
    sum_U, count_U = _by_unit(loss_N, np.arange(number) if unit_N is None else unit_N)
    spread = _spread(sum_U, count_U)
    return Loss(mean, mean - 1.96 * spread, mean + 1.96 * spread, _bootstrap(sum_U, count_U, tolerance, seed))


def holm(p_M: Sequence[float]) -> list[float]:
    """Adjusted for M tests, so that the chance of any false alarm stays below alpha (Holm 1979)."""
    order = np.argsort(p_M, kind="stable")
    adjusted = [0.0] * len(p_M)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_M) - place) * float(p_M[index])))
        adjusted[int(index)] = highest
    return adjusted


def detectable_loss(
    number: int, churn: float, tolerance: float, *, alpha: float, tests: int, power: float, spread: float | None = None
) -> float:
    """The smallest true loss that is caught with this power, in the worst case that it is the only one of many tests.

    `churn` is the share of records that differ between two versions that are equally good; `spread` the standard
    deviation of a record's loss, where scores are no zeros and ones. More than 1 means that none can be seen.
    """
    if number < 2:
        return math.inf
    level, caught = NormalDist().inv_cdf(1 - alpha / max(1, tests)), NormalDist().inv_cdf(power)
    loss = tolerance
    for _ in range(200):
        if spread is None:
            deviation = math.sqrt(max(1e-12, min(1.0, churn + loss) - min(1.0, loss) ** 2))
        else:
            deviation = spread
        following = tolerance + (level + caught) * deviation / math.sqrt(number)
        if abs(following - loss) < 1e-9:
            break
        loss = following
    # The normal approximation is too hopeful where fewer than a handful of records decide.
    fewest = 0.0 if spread is not None else tolerance + _fewest(alpha / max(1, tests)) / number
    return max(loss, fewest)


def _fewest(alpha: float) -> float:
    """So many records must be lost, none won, for an exact test to say anything at this level."""
    return math.ceil(-math.log2(alpha))


def _mcnemar_exact(lost: int, won: int) -> float:
    """One-sided: at least so many lost of those that differ, were either as likely."""
    total = lost + won
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(lost, total + 1)]
    return min(1.0, math.fsum(math.exp(log - total * math.log(2)) for log in logs))


def _tango(lost: int, won: int, number: int, margin: float) -> float:
    """One-sided score test of (lost - won) / number > margin."""
    a = 2.0 * number
    b = -lost - won + (2.0 * number - lost + won) * margin
    c = -won * margin * (1.0 - margin)
    q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = number * (2 * q + margin * (1.0 - margin))
    excess = lost - won - number * margin
    if variance <= 0:
        return 1.0 if excess <= 0 else 0.0 if number > 1 else 1.0
    return 1.0 - NormalDist().cdf(excess / math.sqrt(variance))


def _by_unit(loss_N: Floats, unit_N: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    _, place_N = np.unique(unit_N, return_inverse=True)
    return np.bincount(place_N, weights=loss_N).astype(np.float64), np.bincount(place_N).astype(np.float64)


def _spread(sum_U: Floats, count_U: Floats) -> float:
    """Standard error of a mean over records that come in units."""
    if len(sum_U) < 2:
        return math.inf
    mean = sum_U.sum() / count_U.sum()
    rest_U = sum_U - mean * count_U
    units = len(sum_U)
    return float(np.sqrt(units / (units - 1) * (rest_U**2).sum()) / count_U.sum())


def _bootstrap(sum_U: Floats, count_U: Floats, tolerance: float, seed: int) -> float:
    if len(sum_U) < 2:
        return 1.0
    spread = _spread(sum_U, count_U)
    mean = float(sum_U.sum() / count_U.sum())
    if spread == 0:
        return 1.0 if mean <= tolerance else 1.0 / (RESAMPLES + 1)
    observed = (mean - tolerance) / spread
    random = np.random.default_rng(seed)
    units, beyond, done = len(sum_U), 0, 0
    at_once = max(1, min(RESAMPLES, 4_000_000 // units))
    while done < RESAMPLES:
        count = min(at_once, RESAMPLES - done)
        drawn_RU = random.integers(units, size=(count, units))
        sum_RU, count_RU = sum_U[drawn_RU], count_U[drawn_RU]
        total_R = count_RU.sum(axis=1)
        mean_R = sum_RU.sum(axis=1) / total_R
        rest_RU = sum_RU - mean_R[:, None] * count_RU
        spread_R = np.sqrt(units / (units - 1) * (rest_RU**2).sum(axis=1)) / total_R
        with np.errstate(divide="ignore", invalid="ignore"):
            t_R = (mean_R - mean) / spread_R
        beyond += int((t_R >= observed).sum())
        done += count
    return (beyond + 1) / (RESAMPLES + 1)
