"""Whether what stands in one row belongs together.

Here        find_misaligned, Alignment, SuspiciousPair, suspicious_rows.
Elsewhere   the numbers it compares (data/features.py); joining tables (data/join.py).
Promise     the p-value is of pairs that trained nothing of what judges them; no record's own pair, nor one of its unit,
            trains its score; where no relation is found, no record is called suspicious.

A pair scorer is trained on pairs as they stand: regularised canonical correlation of the two sides' numbers and of
random cosine features of them (Rahimi and Recht 2007; Lopez-Paz et al. 2014), scored as the log-likelihood ratio of
"these two belong together" under the Gaussian model of Bach and Jordan (2005). Everything is in closed form. What we
do differently: directions, correlations and scores come from three disjoint sets of units.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.core.seeds import derive_seed
from dougong.data.columns import ColumnRole
from dougong.data.features import SideValues, read_sides, sides_of
from dougong.data.modality.medium import unit_key
from dougong.data.table import Table, cells_of

ROWS_LOOKED_AT: Final = 4000
MOST_SIDES: Final = 6
"""Of more, the first ones and the target are compared with each other."""

FEWEST_PAIRS: Final = 40
FEWEST_UNITS: Final = 4
FOLDS: Final = 6
MOST_DIRECTIONS: Final = 24
COMPONENTS: Final = 64
COSINES: Final = 192
RIDGES: Final = (0.003, 0.03, 0.3)
FARTHEST: Final = 3.0
"""Standard deviations beyond which a projection counts as so many."""

PERMUTATIONS: Final = 1999
BELONGS: Final = 0.01
"""The p-value at which two sides are called related, over the number of pairs of sides looked at."""

TELLING: Final = 0.9
"""The AUC from which single records are called mismatched: below it true pairs often look shuffled, if the two are not
apart."""

MOST_MISMATCHED: Final = 0.15

QUANTILES: Final = (0.2, 0.3, 0.4, 0.5)
"""Of shuffled scores, below which mismatched pairs are counted."""

LISTED: Final = 200
SHIFTS: Final = (-2, -1, 1, 2)
SHIFT_GAIN: Final = 0.05
"""In AUC over chance, from which a shift is looked into."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class SuspiciousPair(NamedTuple):
    """A record whose two sides fit badly."""

    row: int
    score: float
    """Log-likelihood ratio of belonging together; below 0 speaks against it."""

    percentile: float
    """Share of others' values that would fit this record better than its own: near 0 is good, 0.5 is chance."""

    flagged: bool
    """Among those that are likely to be mismatched; else only the next in the ranking."""


class Alignment(NamedTuple):
    """What was found between two sides."""

    left: str
    right: str
    num_rows: int
    """Looked at."""

    num_pairs: int
    """Distinct pairs judged."""

    related: bool
    auc: float
    """How often a true pair scores above a shuffled one, on held-out units. 0.5 is chance."""

    p_value: float
    """Of the held-out half's mean score, among shuffled pairings of it."""

    misfit_share: float
    """About how many of the pairs fit no better than shuffled ones do; 0.0 where nothing can be said."""

    num_flagged: int
    suspicious: tuple[SuspiciousPair, ...]
    """The worst first; empty where no relation was found, or it is too weak to point at records."""

    margin_percentiles: dict[str, float]
    """Of the true pairs' scores: p1, p5, p25, p50, p95."""

    shift: int
    """The right side fits better when it is taken from so many rows further down; 0: as it stands."""

    shift_auc: float
    shift_rows: tuple[int, int] | None
    """The first and last row that it concerns."""

    verdict: str

    def as_json(self) -> dict[str, object]:
        values = self._asdict()
        values["suspicious"] = [pair._asdict() for pair in self.suspicious]
        return values


class _Pairs(NamedTuple):
    """Distinct pairs of distinct values, and where they stand. P pairs."""

    left_P: Ints
    right_P: Ints
    unit_P: Ints
    row_P: Ints
    """The first row that has it."""


class _Scorer(NamedTuple):
    """Projections to K canonical directions, scaled to unit variance, and what each says."""

    left_FK: Floats
    left_K: Floats
    right_FK: Floats
    right_K: Floats
    corr_K: Floats
    """Measured on pairs that chose no direction."""

    def project(self, x_PF: Floats, *, right: bool = False) -> Floats:
        weight, shift = (self.right_FK, self.right_K) if right else (self.left_FK, self.left_K)
        return np.clip(x_PF @ weight + shift, -FARTHEST, FARTHEST)

    def scores(self, u_PK: Floats, v_QK: Floats) -> Floats:
        """log p(u, v) - log p(u) - log p(v) of every u with every v, (P, Q)."""
        r = self.corr_K
        both, alone = r / (1 - r**2), r**2 / (2 * (1 - r**2))
        constant = -0.5 * np.log(1 - r**2).sum()
        score_PQ: Floats = constant + (u_PK * both) @ v_QK.T - (u_PK**2 @ alone)[:, None] - (v_QK**2 @ alone)[None]
        return score_PQ


def find_misaligned(
    table: Table,
    roles: Mapping[str, ColumnRole],
    *,
    unit: str | None = None,
    seed: int = 0,
    num_rows: int = ROWS_LOOKED_AT,
) -> tuple[Alignment, ...]:
    """Judge every two modalities of a table, and each with the target.

    At most about `num_rows` rows are looked at, in runs of neighbours from all over the table. `unit` is a column whose
    values are held out whole.
    """
    sides = sides_of(roles)
    sides = sides[: MOST_SIDES - 1] + sides[-1:] if len(sides) > MOST_SIDES else sides
    if len(sides) < 2:
        return ()
    places = _runs(table, num_rows)
    read = [values for values in read_sides(table, sides, places) if len(values.x_NF) > 1]
    row_R = np.concatenate([table.numbers_of(chunk)[inner] for chunk, inner in places.items()])
    unit_R = np.arange(len(row_R)) if unit is None else _units(table, unit, places)
    spread = {values.side.name: _spread(values.x_NF, derive_seed(seed, "cosines", values.side.name)) for values in read}
    pairs = list(itertools.combinations(read, 2))
    return tuple(
        judge_pairs(a, b, spread[a.side.name], spread[b.side.name], unit_R, row_R, seed=seed, num_tests=len(pairs))
        for a, b in pairs
    )


def suspicious_rows(alignments: Sequence[Alignment]) -> dict[int, tuple[str, ...]]:
    """Rows flagged in any pair, with those pairs: in the most pairs first, then by the worst score."""
    found: dict[int, list[tuple[float, str]]] = {}
    for alignment in alignments:
        for pair in alignment.suspicious:
            if pair.flagged:
                found.setdefault(pair.row, []).append((pair.score, f"{alignment.left} and {alignment.right}"))
    order = sorted(found, key=lambda row: (-len(found[row]), min(found[row]), row))
    return {row: tuple(name for _, name in found[row]) for row in order}


def judge_pairs(
    a: SideValues,
    b: SideValues,
    x_NF: Floats,
    y_NF: Floats,
    unit_R: Ints,
    row_R: Ints,
    *,
    seed: int = 0,
    num_tests: int = 1,
) -> Alignment:
    """Judge one pair of sides, from the numbers of their distinct values."""
    pairs = _distinct(a.value_R, b.value_R, unit_R, row_R)
    seed = derive_seed(seed, "alignment", a.side.name, b.side.name)
    nothing = Alignment(
        a.side.name, b.side.name, len(row_R), len(pairs.row_P), False, 0.5, 1.0, 0.0, 0, (), {}, 0, 0.5, None, ""
    )
    num_units = len(np.unique(pairs.unit_P))
    if len(pairs.row_P) < FEWEST_PAIRS or num_units < FEWEST_UNITS:
        why = f"{len(pairs.row_P)} distinct pairs in {num_units} units are too few to tell"
        return nothing._replace(verdict=why)
    p_value = _permuted(x_NF, y_NF, pairs, seed)
    auc, score_P, rank_P, shuffled = _cross_fitted(x_NF, y_NF, pairs, seed)
    shift, shift_auc, shift_rows = _shifted(a.value_R, b.value_R, x_NF, y_NF, unit_R, row_R, auc, seed)
    related = p_value <= BELONGS / num_tests and auc > 0.5
    found = nothing._replace(
        related=related, auc=auc, p_value=p_value, shift=shift, shift_auc=shift_auc, shift_rows=shift_rows
    )
    if shift:
        assert shift_rows is not None
        return found._replace(
            verdict=f"{b.side.name} looks shifted: in rows {shift_rows[0]} to {shift_rows[1]} it fits {shift:+d} rows "
            f"away (AUC {shift_auc:.3f} so, {auc:.3f} as it stands)"
        )
    if not related:
        return found._replace(verdict="no relation found: nothing can be said of single records")
    percentiles = {f"p{q}": round(float(np.percentile(score_P, q)), 4) for q in (1, 5, 25, 50, 95)}
    found = found._replace(margin_percentiles=percentiles)
    # Where few values meet on both sides (templates and answers), a rare pair is no mismatched record.
    own_value = max(len(np.unique(side)) for side in (pairs.left_P, pairs.right_P)) > 0.5 * len(pairs.row_P)
    telling = own_value and (auc >= TELLING or _is_apart(score_P, shuffled))
    if telling:
        share, flagged_P = _mismatched(score_P, shuffled)
    else:
        share, flagged_P = 0.0, np.zeros(len(score_P), np.bool_)
    order = np.lexsort((score_P, ~flagged_P))
    suspicious = tuple(
        SuspiciousPair(int(pairs.row_P[p]), round(float(score_P[p]), 3), round(float(rank_P[p]), 3), bool(flagged_P[p]))
        for p in order[:LISTED]
    )
    num_flagged = int(flagged_P.sum())
    if not telling:
        said = "too weakly to say which pairs are mismatched: the list is a ranking"
    elif num_flagged:
        said = f"up to {share:.1%} of the pairs fit no better than shuffled ones"
    else:
        said = "no sign of mismatched pairs"
    return found._replace(
        misfit_share=share, num_flagged=num_flagged, suspicious=suspicious, verdict=f"related; {said}"
    )


def _runs(table: Table, num_rows: int) -> dict[int, Ints]:
    """Places by chunk: neighbours together, since a shift is seen between them."""
    if table.num_rows <= num_rows:
        return {chunk: np.arange(len(table.rows_of(chunk))) for chunk in range(table.num_chunks)}
    wanted = min(table.num_chunks, 8)
    chosen = sorted({round(i * (table.num_chunks - 1) / max(1, wanted - 1)) for i in range(wanted)})
    share, found = -(-num_rows // len(chosen)), {}
    for chunk in chosen:
        size = len(table.rows_of(chunk))
        # Of a large chunk the beginning, the middle and the end.
        runs = (
            [np.arange(size)]
            if size <= share
            else [start + np.arange(share // 4) for start in np.linspace(0, size - share // 4, 4).astype(np.int64)]
        )
        found[chunk] = np.unique(np.concatenate(runs))
    return found


def _units(table: Table, unit: str, places: Mapping[int, Ints]) -> Ints:
    keys = [
        unit_key(cell)
        for chunk, inner in places.items()
        for cell in cells_of(table.read(chunk, [unit]).column(unit).take(inner))
    ]
    number: dict[Hashable, int] = {}
    # A record whose unit nobody knows is one by itself.
    alone = [("alone", place) if key is None else key for place, key in enumerate(keys)]
    return np.array([number.setdefault(key, len(number)) for key in alone], np.int64)


def _distinct(left_R: Ints, right_R: Ints, unit_R: Ints, row_R: Ints) -> _Pairs:
    """Each distinct pair once. One that stands in several units is a unit by itself: else it would judge itself."""
    there = np.flatnonzero((left_R >= 0) & (right_R >= 0))
    both = np.stack([left_R[there], right_R[there]], axis=1)
    distinct, first, place = np.unique(both, axis=0, return_index=True, return_inverse=True)
    unit = unit_R[there][first]
    several = np.zeros(len(distinct), np.bool_)
    np.logical_or.at(several, place.ravel(), unit_R[there] != unit[place.ravel()])
    unit = np.where(several, unit_R.max(initial=0) + 1 + np.arange(len(distinct)), unit)
    order = np.argsort(row_R[there][first], kind="stable")
    return _Pairs(distinct[order, 0], distinct[order, 1], unit[order], row_R[there][first][order])


def _spread(x_NF: Floats, seed: int) -> Floats:
    """Principal components, and random cosines of them, each of unit variance. No pairing is looked at."""
    x_NF = x_NF - x_NF.mean(axis=0)
    _, values, axes = np.linalg.svd(x_NF if len(x_NF) <= 3000 else _even(x_NF, 3000), full_matrices=False)
    kept = min(COMPONENTS, int((values > 1e-6 * max(values[0], 1e-12)).sum()), max(1, len(x_NF) // 3))
    z_NK = x_NF @ axes[:kept].T
    random = np.random.default_rng(seed)
    some = z_NK[random.permutation(len(z_NK))[:300]]
    apart = np.sqrt(((some[:, None] - some[None]) ** 2).sum(axis=2))
    width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    cosines = min(COSINES, len(x_NF) // 4)
    x_cosines = np.cos(
        z_NK @ random.standard_normal((kept, cosines)) * (1.25 / width) + random.uniform(0, 2 * np.pi, cosines)
    )
    scale = z_NK.std(axis=0).max(initial=1e-12)
    return np.concatenate([z_NK / scale, (x_cosines - x_cosines.mean(axis=0)) * 0.5], axis=1)


def _even(x_NF: Floats, count: int) -> Floats:
    return x_NF[np.linspace(0, len(x_NF) - 1, count).astype(np.int64)]


def _fit(x_PF: Floats, y_PF: Floats, calibrate_x: Floats, calibrate_y: Floats) -> _Scorer:
    """Directions from the first pairs, under the ridge whose correlations hold best on the second ones."""
    x, y = x_PF - x_PF.mean(axis=0), y_PF - y_PF.mean(axis=0)
    n = len(x)
    xx, yy = np.linalg.eigh(x.T @ x / n), np.linalg.eigh(y.T @ y / n)
    cross = xx[1].T @ (x.T @ y / n) @ yy[1]
    found: list[tuple[float, _Scorer]] = []
    for ridge in RIDGES:
        root_x = 1 / np.sqrt(np.maximum(xx[0], 0) + ridge * max(xx[0][-1], 1e-12))
        root_y = 1 / np.sqrt(np.maximum(yy[0], 0) + ridge * max(yy[0][-1], 1e-12))
        left, _, right = np.linalg.svd(root_x[:, None] * cross * root_y, full_matrices=False)
        keep = min(MOST_DIRECTIONS, left.shape[1])
        weight_x = xx[1] @ (root_x[:, None] * left[:, :keep])
        weight_y = yy[1] @ (root_y[:, None] * right[:keep].T)
        scorer = _calibrated(weight_x, weight_y, calibrate_x, calibrate_y)
        found.append((float(-np.log(1 - scorer.corr_K**2).sum()), scorer))
    return max(found, key=lambda one: one[0])[1]


def _calibrated(weight_x: Floats, weight_y: Floats, x_PF: Floats, y_PF: Floats) -> _Scorer:
    u, v = x_PF @ weight_x, y_PF @ weight_y
    scale_u, scale_v = u.std(axis=0) + 1e-9, v.std(axis=0) + 1e-9
    u, v = (u - u.mean(axis=0)) / scale_u, (v - v.mean(axis=0)) / scale_v
    u, v = np.clip(u, -FARTHEST, FARTHEST), np.clip(v, -FARTHEST, FARTHEST)
    corr = (u * v).mean(axis=0) / np.sqrt((u**2).mean(axis=0) * (v**2).mean(axis=0) + 1e-12)
    # What chance gives so many directions and pairs is no correlation.
    corr = np.where(corr > 2 / np.sqrt(len(u)), np.minimum(corr, 0.98), 0.0)
    raw_u, raw_v = (x_PF @ weight_x).mean(axis=0), (y_PF @ weight_y).mean(axis=0)
    return _Scorer(weight_x / scale_u, -raw_u / scale_u, weight_y / scale_v, -raw_v / scale_v, corr)


def _permuted(x_NF: Floats, y_NF: Floats, pairs: _Pairs, seed: int) -> float:
    """A scorer from one half of the units; the mean score of the other half's pairs, among those of its shuffles.

    Shuffled are the partners within units where both sides vary inside them, for what a unit shares (a voice, a day)
    relates everything in it to everything else; whole units where a side does not vary; single pairs without units.
    """
    part_P = _parts(pairs.unit_P, 8, derive_seed(seed, "halves"))
    learn, calibrate, judge = np.flatnonzero(part_P < 3), np.flatnonzero(part_P == 3), np.flatnonzero(part_P > 3)
    if min(len(learn), len(calibrate), len(judge)) < 5:
        return 1.0
    scorer = _fit(
        x_NF[pairs.left_P[learn]],
        y_NF[pairs.right_P[learn]],
        x_NF[pairs.left_P[calibrate]],
        y_NF[pairs.right_P[calibrate]],
    )
    if not scorer.corr_K.any():
        return 1.0
    random = np.random.default_rng(derive_seed(seed, "permutations"))
    if len(judge) > 2000:
        judge = np.sort(random.permutation(judge)[:2000])
    unit = pairs.unit_P[judge]
    u_PK = scorer.project(x_NF[pairs.left_P[judge]])
    v_PK = scorer.project(y_NF[pairs.right_P[judge]], right=True)
    score_PP = scorer.scores(u_PK, v_PK)
    here = np.arange(len(judge))
    true = score_PP[here, here].mean()
    shuffle = _shuffler(pairs.left_P[judge], pairs.right_P[judge], unit, random)
    above = sum(score_PP[here, shuffle()].mean() >= true for _ in range(PERMUTATIONS))
    return float((1 + above) / (1 + PERMUTATIONS))


def _shuffler(left_P: Ints, right_P: Ints, unit_P: Ints, random: np.random.Generator) -> Callable[[], Ints]:
    count = len(unit_P)
    groups = [np.flatnonzero(unit_P == unit) for unit in np.unique(unit_P)]
    if len(groups) > 0.7 * count:
        return lambda: random.permutation(count)
    varies = [all(len(np.unique(side[group])) > 1 for side in (left_P, right_P)) for group in groups if len(group) > 1]
    if np.mean(varies) > 0.5:

        def within() -> Ints:
            moved = np.empty(count, np.int64)
            for group in groups:
                moved[group] = random.permutation(group)
            return moved

        return within

    def whole() -> Ints:
        # A unit's rows take the rows of another unit, from its first on, over and over where it has fewer.
        moved = np.empty(count, np.int64)
        for group, other in zip(groups, random.permutation(len(groups)), strict=True):
            moved[group] = np.resize(groups[other], len(group))
        return moved

    return whole


def _parts(unit_P: Ints, num_parts: int, seed: int) -> Ints:
    """A part for each unit, at random, of about as many pairs each."""
    random = np.random.default_rng(seed)
    units, place, counts = np.unique(unit_P, return_inverse=True, return_counts=True)
    sizes = np.zeros(num_parts)
    part_of = np.empty(len(units), np.int64)
    # The largest first, into the emptiest part; ties by chance.
    for index in np.lexsort((random.random(len(units)), -counts)):
        part_of[index] = int(np.argmin(sizes))
        sizes[part_of[index]] += counts[index]
    return part_of[place.ravel()]


def _cross_fitted(
    x_NF: Floats, y_NF: Floats, pairs: _Pairs, seed: int, judged_folds: int = FOLDS
) -> tuple[float, Floats, Floats, Floats]:
    """AUC, each pair's own score, the share of others that would fit it better, and scores of shuffled pairs.

    With fewer `judged_folds`, the AUC of those alone.
    """
    part_P = _parts(pairs.unit_P, FOLDS, derive_seed(seed, "folds"))
    num_folds = int(part_P.max()) + 1
    score_P, rank_P, auc_P = np.zeros(len(part_P)), np.full(len(part_P), 0.5), np.full(len(part_P), 0.5)
    shuffled: list[Floats] = []
    judged_folds = min(judged_folds, num_folds)
    for fold in range(judged_folds):
        judge, calibrate = np.flatnonzero(part_P == fold), np.flatnonzero(part_P == (fold + 1) % num_folds)
        learn = np.flatnonzero((part_P != fold) & (part_P != (fold + 1) % num_folds))
        scorer = _fit(
            x_NF[pairs.left_P[learn]],
            y_NF[pairs.right_P[learn]],
            x_NF[pairs.left_P[calibrate]],
            y_NF[pairs.right_P[calibrate]],
        )
        u_PK = scorer.project(x_NF[pairs.left_P[judge]])
        v_PK = scorer.project(y_NF[pairs.right_P[judge]], right=True)
        score_PP = scorer.scores(u_PK, v_PK)
        own = np.diagonal(score_PP)
        other = (pairs.left_P[judge][:, None] != pairs.left_P[judge]) & (
            pairs.right_P[judge][:, None] != pairs.right_P[judge]
        )
        score_P[judge] = own
        better = ((score_PP > own[:, None]) + 0.5 * (score_PP == own[:, None])) * other
        worse = ((score_PP > own[None]) + 0.5 * (score_PP == own[None])) * other
        num_other = np.maximum(1, other.sum(axis=1))
        rank_P[judge] = 0.5 * (better.sum(axis=1) / num_other + worse.sum(axis=0) / num_other)
        drawn = score_PP[other]
        drawn = drawn if len(drawn) <= 200_000 else drawn[:: len(drawn) // 200_000]
        shuffled.append(drawn)
        ordered = np.sort(drawn)
        below = np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")
        auc_P[judge] = below / (2 * max(1, len(ordered)))
    return float(auc_P[part_P < judged_folds].mean()), score_P, rank_P, np.concatenate(shuffled)


def _is_apart(score_P: Floats, shuffled: Floats) -> bool:
    """Whether low scores are of another kind than true pairs', although many shuffled pairs score like true ones.

    Of few classes many shuffled pairs are true by chance, so no AUC is high. But then the pairs below the quantiles .2
    and .4 of the shuffled scores are the mismatched ones, twice as many below the second; where true pairs are only
    hard to tell, they grow at least threefold (by the normal distributions of AUC .75 to .9).
    """
    few, more = (int((score_P <= np.quantile(shuffled, quantile)).sum()) for quantile in (0.2, 0.4))
    return few <= MOST_MISMATCHED * 0.2 * len(score_P) and more <= 2.2 * few + 2


def _mismatched(score_P: Floats, shuffled: Floats) -> tuple[float, npt.NDArray[np.bool_]]:
    """The share that fits no better than shuffled pairs, and who belongs to it.

    Where a share s of the pairs is mismatched, the scores' distribution is (1 - s) true + s shuffled. Where true pairs
    hardly ever are, below a quantile q of the shuffled scores, s is about the share of pairs there over q (as Storey
    2002 does with p-values): the q with the smallest such bound is taken, twice its counting error added. Flagged are
    the lowest scores, as many as hold the most mismatched pairs over others by that count, and at least three of four.
    """
    count = len(score_P)
    bounds = []
    for quantile in QUANTILES:
        below = int((score_P <= np.quantile(shuffled, quantile)).sum())
        bounds.append(((below + 2 * np.sqrt(below + 1)) / quantile, below / quantile / count, below))
    _, share, count_low = min(bounds)
    ordered = np.sort(score_P)
    of_shuffled = np.searchsorted(np.sort(shuffled), ordered, "right") / len(shuffled)
    of_all = np.arange(1, len(ordered) + 1) / len(ordered)
    gained = 2 * share * of_shuffled - of_all  # mismatched ones less others, among the lowest
    good = np.flatnonzero(min(share, 1.0) * of_shuffled >= 0.75 * of_all)
    # Fewer than a hundredth, or a handful, is what any table's hardest records look like.
    if share < 0.01 or count_low < 4 or not len(good):
        return min(share, 1.0), np.zeros(len(score_P), np.bool_)
    return min(share, 1.0), score_P <= ordered[good[np.argmax(gained[good])]]


def _shifted(
    left_R: Ints, right_R: Ints, x_NF: Floats, y_NF: Floats, unit_R: Ints, row_R: Ints, auc: float, seed: int
) -> tuple[int, float, tuple[int, int] | None]:
    """The shift under which the sides fit clearly better, everywhere or in a stretch of rows, if there is one."""
    own = _distinct(left_R, right_R, unit_R, row_R)
    score_own: Floats | None = None
    found: list[tuple[float, int, float, tuple[int, int]]] = []
    for shift in SHIFTS:
        neighbour = np.roll(row_R, -shift) == row_R + shift
        pairs = _distinct(np.where(neighbour, left_R, -1), np.roll(right_R, -shift), unit_R, row_R)
        if len(pairs.row_P) < FEWEST_PAIRS or len(np.unique(pairs.unit_P)) < FEWEST_UNITS:
            continue
        shift_seed = derive_seed(seed, "shift", shift)
        shift_auc, *_ = _cross_fitted(x_NF, y_NF, pairs, shift_seed, judged_folds=2)
        if shift_auc < 0.5 + SHIFT_GAIN or _permuted(x_NF, y_NF, pairs, shift_seed) > BELONGS / 10:
            continue
        shift_auc, score_P, *_ = _cross_fitted(x_NF, y_NF, pairs, shift_seed)
        if score_own is None:
            _, score_own, *_ = _cross_fitted(x_NF, y_NF, own, derive_seed(seed, "unshifted"))
        _, here, there = np.intersect1d(own.row_P, pairs.row_P, return_indices=True)
        gain, stretch = _better_stretch(score_P[there] - score_own[here], shift_seed)
        if stretch is not None:
            row_P = own.row_P[here]
            found.append((gain, shift, shift_auc, (int(row_P[stretch[0]]), int(row_P[stretch[1]]))))
    if not found:
        return 0, auc, None
    _, shift, shift_auc, rows = max(found)
    return shift, shift_auc, rows


def _better_stretch(gain_P: Floats, seed: int) -> tuple[float, tuple[int, int] | None]:
    """The neighbouring records that gain the most together, where chance does not put so much gain side by side."""
    gain_P = np.clip(gain_P, -FARTHEST, FARTHEST)

    def most(gains: Floats) -> tuple[float, int, int]:
        total = np.concatenate([[0.0], np.cumsum(gains)])
        lowest = np.minimum.accumulate(total)
        stop = int(np.argmax(total - lowest))
        return float((total - lowest)[stop]), int(np.argmin(total[: stop + 1])), stop - 1

    total, start, stop = most(gain_P)
    inside = gain_P[start : stop + 1]
    if len(inside) < FEWEST_PAIRS or (inside > 0).mean() < 0.6 or inside.mean() < 0.5:
        return 0.0, None
    if len(inside) < 0.9 * len(gain_P):
        # Where all gain, every order has all of it; a part is compared with the same gains in other orders.
        random = np.random.default_rng(seed)
        if any(most(random.permutation(gain_P))[0] >= total for _ in range(199)):
            return 0.0, None
    return total, (start, stop)
