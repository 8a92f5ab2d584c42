"""Finds one thing among many by vectors.

Here        `ranks`, `retrieval_metrics`, Retrieved; `ranks_among` and `recall_among`, where several may ask for one
            thing, and some things count neither as right nor as wrong.
Elsewhere   making the vectors (bundle/aligner.py); drawing what was found (watch/retrieval.py).
Promise     a tie counts against what is looked for: a model that says the same of everything finds nothing. Where no
            record has both sides, nothing could be found, and the figures of what was are NaN.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

RECALL_AT: Final = (1, 10)


class Retrieved(NamedTuple):
    """What two sides of the same N records found of each other; an evaluation, for engine/trainer.py."""

    metrics: dict[str, float]
    num_records: int
    """How many there are to find one among."""

    score_NN: Floats
    """Queries by what they are looked for among."""


def ranks(score_NN: Floats) -> Places:
    """Of each query, how many others score at least as high as its own, which stands on the diagonal: 0 is best."""
    own_N1 = np.diagonal(score_NN)[:, None]
    # A score that is no number beats nothing, and an own one that is none is beaten by all.
    rank_N: Places = ((score_NN >= own_N1) | np.isnan(own_N1)).sum(axis=1) - 1
    return rank_N


def retrieval_metrics(query_ND: Floats, gallery_ND: Floats, *, names: tuple[str, str]) -> Retrieved:
    """Recall at 1 and 10 both ways, their mean at 10 as `recall_at_10`, and the median rank, from 1.

    Args:
        query_ND, gallery_ND: vectors of length 1 of the same records in the same order; of zeros where one has none.
        names: what the two sides are called.
    """
    score_NN = query_ND @ gallery_ND.T
    nothing = not (query_ND.any(axis=1) & gallery_ND.any(axis=1)).any()
    metrics: dict[str, float] = {}
    for (one, other), rank_N in (
        (names, ranks(score_NN)),
        (names[::-1], ranks(np.ascontiguousarray(score_NN.T))),
    ):
        for k in RECALL_AT:
            metrics[f"{one}_to_{other}_r{k}"] = math.nan if nothing else float((rank_N < k).mean())
        metrics[f"{one}_to_{other}_median_rank"] = math.nan if nothing else float(np.median(rank_N) + 1)
    last = RECALL_AT[-1]
    metrics["recall_at_10"] = float(
        np.mean([metrics[f"{one}_to_{other}_r{last}"] for one, other in (names, names[::-1])])
    )
    metrics["chance_at_10"] = min(1.0, last / max(1, len(score_NN)))
    return Retrieved(metrics, len(score_NN), score_NN)


def ranks_among(score_NV: Floats, own_N: Places, left_out_NV: Flags) -> Places:
    """The same of N queries among V things: each names the place of its own, which is never left out; of the others
    some are, as if they were not there."""
    own_N1 = np.take_along_axis(score_NV, own_N[:, None], axis=1)
    before_NV = ((score_NV >= own_N1) | np.isnan(own_N1)) & ~left_out_NV
    np.put_along_axis(before_NV, own_N[:, None], False, axis=1)
    rank_N: Places = before_NV.sum(axis=1)
    return rank_N


def recall_among(
    query_UD: Floats, gallery_VD: Floats, asked_N: Places, own_N: Places, left_out_UV: Flags
) -> dict[str, float]:
    """`recall_at_10` of N queries, and `chance_at_10`, which is what guessing has.

    Args:
        query_UD, gallery_VD: vectors of length 1 of distinct things.
        asked_N, own_N: of each query, which thing asks, and which it should find.
        left_out_UV: what is not looked for among; a query's own is all the same.
    """
    last = RECALL_AT[-1]
    left_out_NV = left_out_UV[asked_N]  # a copy
    np.put_along_axis(left_out_NV, own_N[:, None], False, axis=1)
    rank_N = ranks_among(query_UD[asked_N] @ gallery_VD.T, own_N, left_out_NV)
    chance_N = np.minimum(1.0, last / (~left_out_NV).sum(axis=1))
    return {f"recall_at_{last}": float((rank_N < last).mean()), f"chance_at_{last}": float(chance_N.mean())}
