"""How much each modality counts for what a model answers.

Here        `shapley_values`, `modality_shapley` (SHAPE), `removals`, `perceptual_scores`, `additive_projection` (EMAP),
            `token_shares` (MM-SHAP), each of a model that is seen as a function; Probe, which sees any BlockStack so.
Elsewhere   asking a bundle (bundle/contribution.py); rates that follow what is lost (engine/sampling.py).
Promise     Shapley values add up to the score with everything less the score with nothing; a modality that the model
            ignores has a contribution and a perceptual score of exactly 0; a model that adds up what each modality
            says is its own projection; the same seed gives the same figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dougong.core.errors import ConfigError, DataError
from dougong.core.seeds import derive_seed
from dougong.core.signature import Target
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import evaluating
from dougong.engine.metrics import DecisionMetrics, decide, primary_metric
from dougong.nn.batch import Batch, only_media
from dougong.nn.block_stack import BlockStack

Floats: TypeAlias = npt.NDArray[np.float64]
Answer: TypeAlias = Callable[[npt.NDArray[np.int64]], Tensor]
"""A model as a function. Shapes: R rows, M modalities, C outputs. Row r of the answer, (R, C), is to a record whose
modality m is that of record `source_RM[r, m]`, or which lacks it where that is ABSENT."""

Score: TypeAlias = Callable[[Tensor], float]
"""How good the answers (B, C) to all records are, in their order; more is better."""

ABSENT: Final = -1

MOST_EXACT: Final = 12
"""Players up to which every set of them can be asked for: 4096 sets."""

FEW_MODALITIES: Final = 6
"""Up to which all their sets are asked for, 64; of more, orders are drawn."""

PERMUTATIONS: Final = 8

ROWS_AT_ONCE: Final = 1024


class ModalityShapley(NamedTuple):
    """What each modality adds to a score."""

    value: dict[str, float]
    """Shapley values, in units of the score; they add up to `with_all - with_none`."""

    with_all: float
    with_none: float
    """Of records that lack everything: what the model answers without having seen anything."""

    sets: dict[tuple[str, ...], float]
    """The score with each set of modalities that was asked for."""

    @property
    def share(self) -> dict[str, float]:
        """Each one's part of all that is gained; what harms counts 0, and where nothing helps all are alike."""
        gained = {name: max(0.0, value) for name, value in self.value.items()}
        total = sum(gained.values())
        return {name: gain / total if total > 0 else 1 / len(gained) for name, gain in gained.items()}


class Removals(NamedTuple):
    """What a score is with and without."""

    with_all: float
    with_none: float
    without: dict[str, float]

    @property
    def reliance(self) -> dict[str, float]:
        """The part of what was learnt that is lost without each one, from 0 to 1; 0 where nothing was learnt yet."""
        learnt = self.with_all - self.with_none
        return {
            name: min(max((self.with_all - score) / learnt, 0.0), 1.0) if learnt > 0 else 0.0
            for name, score in self.without.items()
        }


class PerceptualScore(NamedTuple):
    """What is lost where a modality is another record's."""

    drop: float
    """Of the score, on average over the permutations."""

    of_model: float | None
    """Divided by the score: the share of the model's success that hangs on this modality. None where that is not
    above 0."""

    of_task: float | None
    """Divided by what the task leaves to be won over always giving the commonest answer, `1 - commonest`. None where
    there is no such accuracy, or nothing to be won."""


class AdditiveProjection(NamedTuple):
    """The nearest model that adds up what each modality says. Shapes: B records, C outputs."""

    output_BC: Tensor
    """Of the first B records; B may be a little less than what was there, see `additive_projection`."""

    original_BC: Tensor


# Shapley values ----------------------------------------------------------------------------------------------------


def shapley_values(
    score: Callable[[npt.NDArray[np.bool_]], Floats],
    num_players: int,
    *,
    num_permutations: int | None = None,
    seed: int = 0,
) -> Floats:
    """What each player adds (P,), on average over all orders in which they may come (Shapley 1953).

    Shapes: K sets of players, P players.

    Args:
        score: from sets (K, P), True where a player is in it, to the value of each (K,). No set is asked for twice.
        num_players: P.
        num_permutations: None goes through all sets. Else so many orders are drawn, each with its reverse (as the
            permutation estimator of Lundberg's shap does): the values still add up to `score(all) - score(none)`,
            up to rounding, since what the players of one order add does.
        seed: of the orders.

    Raises:
        ConfigError: too many players for all sets, or no permutations.
    """
    if num_permutations is None:
        if num_players > MOST_EXACT:
            raise ConfigError(
                f"{num_players} players have 2^{num_players} sets, too many to ask for. Give num_permutations."
            )
        return _exact(score, num_players)
    if num_permutations < 1:
        raise ConfigError(f"num_permutations {num_permutations} must be at least 1.")
    random = np.random.default_rng(derive_seed(seed, "shapley"))
    drawn = [random.permutation(num_players) for _ in range(num_permutations)]
    order_NP = np.stack([order for each in drawn for order in (each, each[::-1])])
    rank_NP = np.argsort(order_NP, axis=1)
    # The sets that grow by one player after the other: (N, P + 1, P).
    sets_NSP = rank_NP[:, None, :] < np.arange(num_players + 1)[None, :, None]
    distinct_KP, where = np.unique(sets_NSP.reshape(-1, num_players), axis=0, return_inverse=True)
    value_NS = np.asarray(score(distinct_KP), np.float64)[where.reshape(len(order_NP), num_players + 1)]
    added_NP = np.take_along_axis(np.diff(value_NS, axis=1), rank_NP, axis=1)
    found: Floats = added_NP.mean(axis=0)
    return found


def _exact(score: Callable[[npt.NDArray[np.bool_]], Floats], num_players: int) -> Floats:
    numbers = np.arange(2**num_players)
    sets_KP = (numbers[:, None] >> np.arange(num_players)) & 1 == 1
    value_K = np.asarray(score(sets_KP), np.float64)
    size_K = sets_KP.sum(axis=1)
    found = np.zeros(num_players)
    for player in range(num_players):
        without = numbers[~sets_KP[:, player]]
        weight = np.array(
            [
                math.factorial(size) * math.factorial(num_players - size - 1) / math.factorial(num_players)
                for size in size_K[without]
            ]
        )
        found[player] = weight @ (value_K[without + (1 << player)] - value_K[without])
    return found


def modality_shapley(
    answer: Answer,
    score: Score,
    names: Sequence[str],
    num_records: int,
    *,
    num_permutations: int | None = None,
    seed: int = 0,
) -> ModalityShapley:
    """The contribution of each modality to a score of a whole split (SHAPE, Hu et al. 2022, arXiv:2205.00302).

    A modality that is not in a set is absent, which our models are made for, where the paper puts zeros in its place;
    and the score of the empty set is what the model answers to a record without anything.
    Asks for 2^M sets, or with `num_permutations` for about twice as many times M.
    """
    found: dict[tuple[str, ...], float] = {}

    def of_sets(sets_KM: npt.NDArray[np.bool_]) -> Floats:
        for kept_M in sets_KM:
            source_BM = np.where(kept_M, np.arange(num_records)[:, None], ABSENT)
            found[tuple(name for name, kept in zip(names, kept_M, strict=True) if kept)] = score(answer(source_BM))
        return np.array(list(found.values()))

    value_M = shapley_values(of_sets, len(names), num_permutations=num_permutations, seed=seed)
    return ModalityShapley(dict(zip(names, value_M.tolist(), strict=True)), found[tuple(names)], found[()], found)


def removals(answer: Answer, score: Score, names: Sequence[str], num_records: int) -> Removals:
    """What is lost without each modality: what it adds as the last one to come. Asks for M + 2 sets."""

    def of(kept: Sequence[str]) -> float:
        kept_M = np.array([name in kept for name in names])
        return score(answer(np.where(kept_M, np.arange(num_records)[:, None], ABSENT)))

    return Removals(of(names), of(()), {name: of([other for other in names if other != name]) for name in names})


# Permuted modalities -----------------------------------------------------------------------------------------------


def perceptual_scores(
    answer: Answer,
    score: Score,
    names: Sequence[str],
    present_BM: npt.NDArray[np.bool_],
    *,
    num_permutations: int = 5,
    commonest: float | None = None,
    seed: int = 0,
) -> dict[str, PerceptualScore]:
    """What the score loses where a modality is given to other records (Gat et al. 2021, arXiv:2110.14375).

    A modality is permuted among the records that have it, so that who lacks what stays the same. `commonest` is the
    accuracy of always giving the commonest answer.

    Raises:
        ConfigError: no permutations.
    """
    if num_permutations < 1:
        raise ConfigError(f"num_permutations {num_permutations} must be at least 1.")
    own_BM = np.where(present_BM, np.arange(len(present_BM))[:, None], ABSENT)
    whole = score(answer(own_BM))
    found = {}
    for place, name in enumerate(names):
        having = np.flatnonzero(present_BM[:, place])
        random = np.random.default_rng(derive_seed(seed, "perceptual", name))
        drops = []
        for _ in range(num_permutations):
            source_BM = own_BM.copy()
            source_BM[having, place] = random.permutation(having)
            drops.append(whole - score(answer(source_BM)))
        drop = math.fsum(drops) / num_permutations
        to_win = None if commonest is None or commonest >= 1 else 1 - commonest
        found[name] = PerceptualScore(
            drop, drop / whole if whole > 0 else None, None if to_win is None else drop / to_win
        )
    return found


def additive_projection(answer: Answer, num_records: int, num_modalities: int) -> AdditiveProjection:
    """The outputs of the additive model nearest to this one (EMAP, Hessel and Lee 2020, arXiv:2010.06572).

    For two modalities the paper's formula, over all pairs of records: the mean with this record's first modality, plus
    the mean with its second, less the mean of all. For M it is the sum of M such means less M - 1 means of all,
    where each mean is over B combinations in which this modality meets every record of each other one once (modality
    m is shifted m times as far as the first), not over all B^(M-1): for an additive model the same, exactly.

    A model whose projection answers as well as itself gains nothing from how modalities belong together.
    It takes B^2 rows. B is the largest number up to `num_records` that no number below M divides, since only then do
    the shifts of any two modalities meet in every pair: all of them for two modalities, an odd number for three.

    Raises:
        ConfigError: there is one modality, or fewer than two records.
    """
    if num_modalities < 2:
        raise ConfigError("an additive projection needs two modalities: one alone adds up to itself.")
    usable = num_records
    while usable > 1 and any(usable % factor == 0 for factor in range(2, num_modalities)):
        usable -= 1
    if usable < 2:
        raise ConfigError(f"{num_records} records are too few to recombine. Give some hundreds.")
    records_B, shifts_M = np.arange(usable), np.arange(num_modalities)
    sum_MBC: Tensor | None = None
    original_BC: Tensor | None = None
    at_once = max(1, ROWS_AT_ONCE // usable)
    for first in range(0, usable, at_once):
        rounds_R = np.arange(first, min(first + at_once, usable))
        source_RBM = (records_B[None, :, None] + rounds_R[:, None, None] * shifts_M) % usable
        output_RBC = answer(source_RBM.reshape(-1, num_modalities)).double()
        output_RBC = output_RBC.view(len(rounds_R), usable, -1)
        if original_BC is None:  # nothing is shifted in the first round
            original_BC = output_RBC[0]
            sum_MBC = output_RBC.new_zeros(num_modalities, *original_BC.shape)
        assert sum_MBC is not None
        for place in range(num_modalities):
            for row, output_BC in enumerate(output_RBC):
                sum_MBC[place].index_add_(
                    0, torch.from_numpy(source_RBM[row, :, place]).to(output_BC.device), output_BC
                )
    assert sum_MBC is not None
    assert original_BC is not None
    mean_MBC = sum_MBC / usable
    projected_BC = mean_MBC.sum(dim=0) - (num_modalities - 1) * mean_MBC[0].mean(dim=0)
    return AdditiveProjection(projected_BC, original_BC)


# Tokens ------------------------------------------------------------------------------------------------------------


def token_shares(
    score: Callable[[npt.NDArray[np.bool_]], Floats],
    owner_T: Sequence[str],
    names: Sequence[str],
    *,
    num_permutations: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Each modality's share of how one record's tokens move the answer (MM-SHAP, Parcalabescu and Frank 2023,
    arXiv:2212.08158): the sum of the absolute Shapley values of its tokens, divided by the sum of all.

    Shapes: K sets of tokens, T tokens. `score` gives the model's output for its own answer with the tokens of each set
    (K, T) alone; `owner_T` says whose they are. Few tokens are gone through exactly. Where no token moves
    anything, every share is 0.
    """
    exact = len(owner_T) <= MOST_EXACT and 2 ** len(owner_T) <= 2 * num_permutations * (len(owner_T) + 1)
    value_T = np.abs(
        shapley_values(score, len(owner_T), num_permutations=None if exact else num_permutations, seed=seed)
    )
    total = value_T.sum()
    owned = {name: value_T[[owner == name for owner in owner_T]].sum() for name in names}
    return {name: float(value / total) if total > 0 else 0.0 for name, value in owned.items()}


# A model as a function -----------------------------------------------------------------------------------------------


class Probe:
    """A model, and records to ask it about in any combination."""

    def __init__(
        self,
        model: BlockStack[Any, Any],
        batch: Batch,
        target: Target,
        quality_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`quality_names` are what the figures of quality of each modality's media are, in their order.

        Raises:
            DataError: the records' target is not known, or there are none.
        """
        self.quality_names = quality_names or {}
        if batch.target is None or not batch.num_records:
            raise DataError("contributions are measured on records whose target is known, and there is none here.")
        self.model, self.batch, self.target = model, batch, target
        self.names = tuple(batch.media)
        self.metric = primary_metric(target.task)

    @classmethod
    def on(
        cls, model: BlockStack[Any, Any], table: Table, preparation: Preparation, *, most: int, seed: int = 0
    ) -> Probe:
        """With at most so many records of a table, drawn from all over it, mixed, and held in memory.

        Raises:
            DataError: the table has no target, or none of the records can be used.
        """
        chosen = sample_table(table, most, seed=derive_seed(seed, "probe"))
        config = LoaderConfig(batch_size=chosen.num_rows, window_rows=sys.maxsize, window_bytes=sys.maxsize, workers=0)
        (arrays,) = Loader(chosen, preparation, config).one_pass()
        batch = to_tensors(arrays, next(model.parameters()).device)
        # What is measured on the first few of them is to be of all kinds, however the table is sorted.
        order_B = np.random.default_rng(derive_seed(seed, "probe", "order")).permutation(batch.num_records)
        mixed = recombine(batch, order_B[:, None].repeat(len(batch.media), axis=1))
        target = None if batch.target is None else batch.target[torch.from_numpy(order_B).to(batch.target.device)]
        return cls(model, mixed._replace(target=target), preparation.target, preparation.quality_names)

    @property
    def num_records(self) -> int:
        return self.batch.num_records

    def presence(self) -> npt.NDArray[np.bool_]:
        """Who has what, (B, M)."""
        return torch.stack([media.present_B for media in self.batch.media.values()], dim=1).cpu().numpy()

    def answer(self, source_RM: npt.NDArray[np.int64]) -> Tensor:
        """As `Answer` says; the model is left in the modes it had."""
        with torch.inference_mode(), evaluating(self.model):
            parts = [
                self.model(recombine(self.batch, source_RM[start : start + ROWS_AT_ONCE])).output_BC.float()
                for start in range(0, len(source_RM), ROWS_AT_ONCE)
            ]
        return torch.cat(parts)

    def score(self, output_BC: Tensor) -> float:
        """The task's first figure on the first B records, its sign turned where less is better."""
        metrics = DecisionMetrics(self.target, output_BC.device)
        assert self.batch.target is not None
        metrics.update(decide(self.target, output_BC), self.batch.target[: len(output_BC)])
        figures = metrics.compute()
        if self.metric.name not in figures:
            raise DataError(f"these records do not define {self.metric.name}. Measure contributions on more records.")
        value = figures[self.metric.name]
        return value if self.metric.higher_is_better else -value

    def commonest(self) -> float | None:
        """The accuracy of always giving the commonest answer; None where the task has no accuracy."""
        if self.target.task != "single_label":
            return None
        assert self.batch.target is not None
        return float(self.batch.target.bincount().max()) / self.num_records

    def shapley(self, *, num_permutations: int | None = None, seed: int = 0) -> ModalityShapley:
        """`modality_shapley` of this model. Many modalities are sampled where no number of permutations is given."""
        if num_permutations is None and len(self.names) > FEW_MODALITIES:
            num_permutations = PERMUTATIONS
        return modality_shapley(
            self.answer, self.score, self.names, self.num_records, num_permutations=num_permutations, seed=seed
        )

    def removals(self) -> Removals:
        """`removals` of this model."""
        return removals(self.answer, self.score, self.names, self.num_records)


def recombine(batch: Batch, source_RM: npt.NDArray[np.int64]) -> Batch:
    """Records put together anew, as `Answer` says; without a target. A medium that nobody has is left out."""
    media = {}
    for place, (name, old) in enumerate(batch.media.items()):
        source_R = torch.from_numpy(np.ascontiguousarray(source_RM[:, place])).to(old.index_B.device)
        wanted_R = source_R.clamp(min=0)
        media[name] = only_media(
            old._replace(
                index_B=old.index_B[wanted_R],
                present_B=old.present_B[wanted_R] & (source_R != ABSENT),
                there_B=None,
            )
        )
    return Batch(media, None)
