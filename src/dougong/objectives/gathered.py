"""How far modalities are from saying the same of a record, where a batch is spread over ranks.

Here        `gathered_contrastive_loss` of two modalities, `gathered_all_pairs_loss` of any number.
Elsewhere   the same of one process (objectives/contrastive.py); the exchange and its gradients
            (engine/parallel/gather.py); adding up the weights' gradients (engine/parallel/replicate.py).
Promise     the losses and gradients of all ranks add up to those of one process that has the whole batch, whatever is
            spared or counts less. A medium that several ranks have is one medium: never its own negative, and never
            counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dougong.engine.parallel.gather import all_gather_rows
from dougong.model.mining import Keyed
from dougong.objectives.contrastive import (
    TEMPERATURE,
    Pairs,
    WeightOf,
    exact,
    held_against,
    nothing_to_tell_apart,
    wanted_pairs,
    weighted,
)

NONE: Final = -1
"""In place of the number of a medium that a record lacks."""


class Side(NamedTuple):
    """One of the two modalities, as this rank has it. Shapes: U media, D channels, B records that have both."""

    vector_UD: Tensor
    """Of length 1; (0, D) where the rank has none."""

    id_U: Tensor
    """A number for each medium, the same on every rank that has it, and another one for another medium."""

    index_B: Tensor
    """Which of the U media each record has."""


def gathered_contrastive_loss(
    left: Side, right: Side, group: dist.ProcessGroup, *, temperature: float | Tensor = TEMPERATURE
) -> Tensor | None:
    """The sum of this rank's records' losses, in float32: each must find its partner among all that any rank has.

    Every rank must call this, also one without records, and use what it returns. None where no rank has any medium of
    one side: there is nothing to learn, on any rank. Where several ranks have a medium, the vector of the first one
    speaks for it everywhere, and gets the gradient.

    InfoNCE both ways (van den Oord et al. 2018, arXiv:1807.03748), as contrastive.py has it, with each rank's loss over
    its own records alone, as OpenCLIP's local loss (Cherti et al. 2023, arXiv:2212.07143), and gathered vectors that
    keep their gradients; beyond both, media are told apart by their ids, and ranks may be uneven or empty.
    """
    left_GD, right_HD = all_gather_rows([left.vector_UD.float(), right.vector_UD.float()], group)
    if not (len(left_GD) and len(right_HD)):
        return None
    with torch.no_grad():
        left_id_B, right_id_B = left.id_U[left.index_B], right.id_U[right.index_B]
        left_G, right_H, left_P, right_P = all_gather_rows([left.id_U, right.id_U, left_id_B, right_id_B], group)
    lefts, rights = _distinct(left_G), _distinct(right_H)
    records = _Records(
        _places(lefts, left_id_B), _places(rights, right_id_B), _places(lefts, left_P), _places(rights, right_P)
    )
    return _own_loss(left_GD[lefts.first_U], right_HD[rights.first_U], records, temperature)


def gathered_all_pairs_loss(
    vectors: Mapping[str, Tensor],
    index: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    ids: Mapping[str, Tensor],
    group: dist.ProcessGroup,
    *,
    width: int,
    temperature: Tensor,
    pairs: Pairs = (),
    key_B: Tensor | None = None,
    weight_of: WeightOf | None = None,
) -> Tensor:
    """This rank's part of what `all_pairs_loss` (contrastive.py) is of the whole batch.

    Every rank must call this, also one without records, with the same pairs, and use what it returns.

    Args:
        vectors: of each modality this rank's U distinct media, (U, D); one that it lacks may be missing.
        index, there, key_B: of this rank's records.
        ids: of each modality, a number for each of the U media, the same on every rank that has it; none is negative.
        width: D, which a rank without media does not know otherwise.
        temperature, pairs, weight_of: as `all_pairs_loss` has them.

    Raises:
        ConfigError: a pair names a modality that `index` does not know.
    """
    wanted = wanted_pairs(pairs, index)
    names = list(dict.fromkeys(name for pair in wanted for name in pair))
    with torch.no_grad():
        own = {name: _ids_of_records(ids[name], index[name], there[name]) for name in names}
        keys = [] if key_B is None else [key_B]
        told = all_gather_rows([*(ids[name] for name in names), *own.values(), *keys], group)
    media = {name: _distinct(id_G) for name, id_G in zip(names, told, strict=False)}
    everyones = dict(zip(names, told[len(names) :], strict=False))
    # What some rank has is in a pair on all of them, as in one process.
    found = [pair for pair in wanted if all(len(media[name].id_U) for name in pair)]
    if not found:
        return nothing_to_tell_apart(vectors, temperature.device)
    # Of no other modality: what no pair uses must have no gradient, as in one process.
    used = list(dict.fromkeys(name for pair in found for name in pair))
    nothing_UD = exact(temperature.detach()).new_zeros(0, width)
    gathered = all_gather_rows([exact(vectors[name]) if name in vectors else nothing_UD for name in used], group)
    vector = {name: every_GD[media[name].first_U] for name, every_GD in zip(used, gathered, strict=True)}

    losses = []
    for left, right in found:
        both_B, both_P = there[left] & there[right], (everyones[left] != NONE) & (everyones[right] != NONE)
        records = _Records(
            _places(media[left], own[left][both_B]),
            _places(media[right], own[right][both_B]),
            _places(media[left], everyones[left][both_P]),
            _places(media[right], everyones[right][both_P]),
        )
        negative_UV = None
        if key_B is not None:
            one, other = (_keyed(media[name], everyones[name], told[-1]) for name in (left, right))
            negative_UV = held_against(one, other, weight_of)
        losses.append(_own_loss(vector[left], vector[right], records, temperature, negative_UV))
    return torch.stack(losses).mean()


def _keyed(media: _Distinct, id_P: Tensor, key_P: Tensor) -> Keyed:
    """Of the records of all ranks those that have one of these."""
    there_P = id_P != NONE
    return Keyed(_places(media, id_P[there_P]), key_P[there_P], len(media.id_U))


class _Records(NamedTuple):
    """Which of the distinct media of all ranks records have that have both. Shapes: B of this rank, P of all ranks."""

    left_B: Tensor
    right_B: Tensor
    left_P: Tensor
    right_P: Tensor


def _own_loss(
    left_UD: Tensor,
    right_VD: Tensor,
    records: _Records,
    temperature: float | Tensor,
    negative_UV: Tensor | None = None,
) -> Tensor:
    """Of this rank's records, among the distinct media of all."""
    left_B, right_B, left_P, right_P = records
    # Which media go together, by any record of any rank.
    pair_UV = torch.zeros(len(left_UD), len(right_VD), dtype=torch.bool, device=left_UD.device)
    pair_UV[left_P, right_P] = True
    # Only the rows and columns of this rank's own records: the scores are shared out like the records.
    with torch.autocast(left_UD.device.type, enabled=False):  # as contrastive.py
        score_BV = left_UD[left_B] @ right_VD.T / temperature
        score_BU = right_VD[right_B] @ left_UD.T / temperature
    if negative_UV is not None:
        score_BV = weighted(score_BV, pair_UV[left_B], negative_UV[left_B])
        score_BU = weighted(score_BU, pair_UV.T[right_B], negative_UV.T[right_B])
    return 0.5 * (_surprise(score_BV, pair_UV[left_B]) + _surprise(score_BU, pair_UV.T[right_B])).sum()


def _surprise(score_BV: Tensor, pair_BV: Tensor) -> Tensor:
    """How little was given to all partners together."""
    # A finite floor, not -inf, keeps gradients finite; every record has a partner, its own.
    paired_BV = score_BV.masked_fill(~pair_BV, torch.finfo(score_BV.dtype).min)
    return score_BV.logsumexp(dim=1) - paired_BV.logsumexp(dim=1)


def _ids_of_records(id_U: Tensor, index_B: Tensor, there_B: Tensor) -> Tensor:
    id_B = torch.full_like(index_B, NONE)
    id_B[there_B] = id_U[index_B[there_B]]
    return id_B


class _Distinct(NamedTuple):
    """Shapes: U distinct media of all ranks."""

    id_U: Tensor
    """Ascending."""

    first_U: Tensor
    """The first place that has each of them, among those of all ranks."""


def _distinct(id_G: Tensor) -> _Distinct:
    id_U, of_G = torch.unique(id_G, return_inverse=True)
    first_U = torch.full_like(id_U, len(id_G))
    first_U.scatter_reduce_(0, of_G, torch.arange(len(id_G), device=id_G.device), reduce="amin")
    return _Distinct(id_U, first_U)


def _places(distinct: _Distinct, id_P: Tensor) -> Tensor:
    return torch.searchsorted(distinct.id_U, id_P)
