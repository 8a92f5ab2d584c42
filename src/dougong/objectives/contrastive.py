"""How far modalities are from saying the same of a record.

Here        `contrastive_loss` of two modalities, `all_pairs_loss` of any number; `held_against` and `negative_weights`,
            which say how much is held against what; pieces of them for ranks.
Elsewhere   the same where ranks share out a batch (gathered.py); the vectors and the learnt temperature
            (model/heads.py); whether two belong together, asked of each pair (matching.py); adding it to what else is
            learnt (recipes/).
Promise     two records that share a medium are never held against each other; a medium that weighs 0 as a negative
            changes nothing, not even a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.mining import Keyed, spared

TEMPERATURE = 0.07

Pairs: TypeAlias = Sequence[tuple[str, str]]

WeightOf: TypeAlias = Callable[[Tensor], Tensor]
"""From K distinct keys to how much records of each two are held against each other, (K, K), from 0 to 1. Of equal keys
as little as of any."""


def contrastive_loss(
    left_UD: Tensor,
    right_VD: Tensor,
    left_B: Tensor,
    right_B: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    negative_UV: Tensor | None = None,
) -> Tensor:
    """The sum of the records' losses, in float32 or more: each must find its own partner among all the batch has.

    Shapes: U and V distinct media of two modalities, as vectors of length 1; `left_B` and `right_B` say which of them
    each of B records has.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) both ways, as CLIP has it (Radford et al. 2021,
    arXiv:2103.00020), over distinct media. Where a medium has several partners (a sentence said by two voices), any of
    them is right. It is a sum over records, but of this batch's partners alone: micro-batches add up to something
    easier than one big batch.

    Args:
        temperature: divides the scores; a tensor where it is learnt.
        negative_UV: how much each pair that is no partnership is held against both, from 0, not at all, to 1, as any
            other. It multiplies the pair's share of the softmax. None: 1 everywhere.
    """
    with torch.autocast(left_UD.device.type, enabled=False):  # which would round the scores, and so all that follows
        score_UV = (exact(left_UD) @ exact(right_VD).T) / temperature
    pair_UV = _partners(score_UV, left_B, right_B)
    # A finite floor, not -inf: a medium without any partner here would get NaN gradients.
    paired_UV = score_UV.masked_fill(~pair_UV, torch.finfo(score_UV.dtype).min)
    if negative_UV is not None:
        score_UV = weighted(score_UV, pair_UV, negative_UV)
    to_right_U = score_UV.logsumexp(dim=1) - paired_UV.logsumexp(dim=1)
    to_left_V = score_UV.logsumexp(dim=0) - paired_UV.logsumexp(dim=0)
    return 0.5 * (to_right_U[left_B] + to_left_V[right_B]).sum()


def all_pairs_loss(
    vectors: Mapping[str, Tensor],
    index: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    *,
    pairs: Pairs = (),
    temperature: float | Tensor = TEMPERATURE,
    key_B: Tensor | None = None,
    weight_of: WeightOf | None = None,
) -> Tensor:
    """The contrastive loss of each pair of modalities, averaged over the pairs that the batch has; of a batch that has
    none a loss of 0, which teaches nothing.

    Args:
        vectors: of each modality its U distinct media, (U, D); a modality that the batch lacks may be missing.
        index: of each modality, which of its media each of the B records has.
        there: of each modality, whether the record has one.
        pairs: which modalities are drawn together; empty: all with all.
        temperature: as `contrastive_loss` has it.
        key_B: what says how much records are held against each other (`held_against`). None: wholly, all of them.
        weight_of: so much by their keys. None: not at all where these are equal, else wholly.

    Raises:
        ConfigError: a pair names a modality that `index` does not know.
    """
    losses = []
    for left, right in wanted_pairs(pairs, index):
        if left not in vectors or right not in vectors:
            continue
        both_B = there[left] & there[right]
        left_B, right_B = index[left][both_B], index[right][both_B]
        negative_UV = None
        if key_B is not None:
            one, other = (Keyed(index[n][there[n]], key_B[there[n]], vectors[n].shape[0]) for n in (left, right))
            negative_UV = held_against(one, other, weight_of)
        losses.append(
            contrastive_loss(
                vectors[left], vectors[right], left_B, right_B, temperature=temperature, negative_UV=negative_UV
            )
        )
    if not losses:
        return nothing_to_tell_apart(vectors, next(iter(index.values())).device)
    return torch.stack(losses).mean()


def wanted_pairs(pairs: Pairs, names: Iterable[str]) -> Pairs:
    """The pairs that are named; all, where none is.

    Raises:
        ConfigError: a pair names what is none of `names`.
    """
    known = tuple(names)
    strange = [name for pair in pairs for name in pair if name not in known]
    if strange:
        raise ConfigError(f"a pair names {strange[0]!r}, which is no modality here. Use two of {', '.join(known)}.")
    return pairs or tuple(itertools.combinations(known, 2))


def nothing_to_tell_apart(vectors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The loss of a batch without any pair, which asks nothing of anybody."""
    # A leaf of its own, since a batch may have no medium at all, and a backward must still be possible.
    nothing = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    return sum((exact(each).sum() * 0.0 for each in vectors.values()), nothing)


def held_against(left: Keyed, right: Keyed, weight_of: WeightOf | None = None) -> Tensor:
    """How much each of U x V pairs of media is held against both: not at all where they come from records of one key;
    by `weight_of` as much as those two of their records that are held against each other least. Records that have
    only one of the two count as well."""
    if weight_of is None:
        return (~spared(left, right)).float()
    key_K, place_M = torch.unique(torch.cat([left.key_N, right.key_N]), return_inverse=True)
    weight_KK = weight_of(key_K)
    # From records to media, one side after the other; what no record here has is held against all.
    weight_UK = weight_KK.new_ones(left.num_media, len(key_K))
    of_left_NK = weight_KK[place_M[: len(left.key_N)]]
    weight_UK.scatter_reduce_(0, left.medium_N[:, None].expand_as(of_left_NK), of_left_NK, reduce="amin")
    weight_VU = weight_KK.new_ones(right.num_media, left.num_media)
    of_right_NU = weight_UK.T[place_M[len(left.key_N) :]]
    weight_VU.scatter_reduce_(0, right.medium_N[:, None].expand_as(of_right_NU), of_right_NU, reduce="amin")
    return weight_VU.T


def weighted(score_UV: Tensor, pair_UV: Tensor, negative_UV: Tensor) -> Tensor:
    """Scores as the softmax is to see them, where what is no pair has such a share of it."""
    weight_UV = negative_UV.to(score_UV.dtype).masked_fill(pair_UV, 1.0)
    # log(0) is -inf, and so would be what is left of the softmax's sum; its gradient, 0 * inf, would be NaN.
    gone_UV = weight_UV <= 0
    score_UV = score_UV + weight_UV.masked_fill(gone_UV, 1.0).log()
    return score_UV.masked_fill(gone_UV, torch.finfo(score_UV.dtype).min)


def exact(x: Tensor) -> Tensor:
    """In float32, where it is in fewer bits."""
    return x if x.dtype == torch.float64 else x.float()


def negative_weights(similarity_UV: Tensor, *, low: float, high: float) -> Tensor:
    """1 for pairs whose given similarity is at most `low`, 0 from `high` on, and straight down between.

    What is too alike is perhaps no negative at all: two pictures of dogs, two names of one thing. The similarity comes
    from elsewhere (a frozen model's, equal words), so that training cannot make its own task easier.

    Raises:
        ConfigError: `low` is not below `high`.
    """
    if not low < high:
        raise ConfigError(f"low={low} must be below high={high}: between them a pair counts less and less.")
    return ((high - similarity_UV.float()) / (high - low)).clamp(0.0, 1.0)


def _partners(score_UV: Tensor, left_B: Tensor, right_B: Tensor) -> Tensor:
    pair_UV = score_UV.new_zeros(score_UV.shape, dtype=torch.bool)
    pair_UV[left_B, right_B] = True
    return pair_UV
