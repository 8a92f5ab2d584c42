"""How much was learnt, task after task, and how much of it was kept.

Here        Scores, `scores_of`.
Elsewhere   measuring the matrix (benchmarks/continual.py).
Promise     pure figures of one matrix, each as its paper defines it, and held to matrices worked out by hand.

Let R[i, j] be the score on task j after learning tasks 0 to i, T tasks in all, b[j] the score of a model before it has
learnt anything.

    acc         mean of R[T-1, j] over all j                                   (Lopez-Paz and Ranzato 2017)
    bwt         mean of R[T-1, j] - R[j, j] over j < T-1                       (the same)
    fwt         mean of R[j-1, j] - b[j] over j > 0                            (the same)
    forgetting  mean over j < T-1 of (max of R[i, j] over j <= i < T-1) - R[T-1, j]
                                                                               (Chaudhry et al. 2018, arXiv:1801.10112)
    retention   mean of R[T-1, j] / R[j, j] over j < T-1

The maximum of forgetting is over the moments at which the task had been learnt, the last one left out; it is negative
where a task was best at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dougong.core.errors import ConfigError


class Scores(NamedTuple):
    """In units of the score. None where too few tasks define it."""

    acc: float
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    retention: float | None


def scores_of(score_TT: Sequence[Sequence[float]], before_T: Sequence[float] | None = None) -> Scores:
    """Of R, row by row; `before_T` is b, without which there is no fwt.

    Raises:
        ConfigError: it is no square of numbers, or `before_T` has another length.
    """
    try:
        r_TT = np.array(score_TT, np.float64)
    except ValueError:
        r_TT = np.zeros(0)
    if r_TT.ndim != 2 or r_TT.shape[0] != r_TT.shape[1] or not r_TT.size:
        raise ConfigError("scores need a square: a row after each task, in it a score on every task, learnt or not.")
    number = len(r_TT)
    if before_T is not None and len(before_T) != number:
        raise ConfigError(
            f"{len(before_T)} scores from before learning stand beside {number} tasks. Give one for each."
        )
    acc = float(r_TT[-1].mean())
    if number == 1:
        return Scores(acc, None, None, None, None)
    last_J, own_J = r_TT[-1, :-1], r_TT.diagonal()[:-1]
    best_J = np.array([r_TT[j:-1, j].max() for j in range(number - 1)])
    fwt = None
    if before_T is not None:
        fwt = float(np.mean([r_TT[j - 1, j] - before_T[j] for j in range(1, number)]))
    kept = last_J[own_J > 0] / own_J[own_J > 0]
    return Scores(
        acc=acc,
        bwt=float((last_J - own_J).mean()),
        fwt=fwt,
        forgetting=float((best_J - last_J).mean()),
        retention=float(kept.mean()) if len(kept) else None,
    )
