"""How far two modalities are from saying the same of a record, where a batch is spread over ranks.

Here        `gathered_contrastive_loss`.
Elsewhere   the same of one process (objectives/contrastive.py); the exchange and its gradients
            (engine/parallel/gather.py); adding up the weights' gradients (engine/parallel/replicate.py).
Promise     the losses and gradients of all ranks add up to those of one process that has the whole batch. A medium that
            several ranks have is one medium: never its own negative, and never counted twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dougong.engine.parallel.gather import all_gather_rows
from dougong.objectives.contrastive import TEMPERATURE


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
        left_id_P, right_id_P = left.id_U[left.index_B], right.id_U[right.index_B]
        left_G, right_H, left_P, right_P = all_gather_rows([left.id_U, right.id_U, left_id_P, right_id_P], group)
    lefts, rights = _distinct(left_G), _distinct(right_H)

    # Which distinct media go together, by any record of any rank; and this rank's own records among them.
    pair_UV = torch.zeros(len(lefts.id_U), len(rights.id_U), dtype=torch.bool, device=left_GD.device)
    pair_UV[_places(lefts, left_P), _places(rights, right_P)] = True
    left_B, right_B = _places(lefts, left_id_P), _places(rights, right_id_P)

    left_UD, right_VD = left_GD[lefts.first_U], right_HD[rights.first_U]
    # Only the rows and columns of this rank's own records: the scores are shared out like the records.
    with torch.autocast(left_UD.device.type, enabled=False):  # as contrastive.py
        to_right_B = _surprise(left_UD[left_B] @ right_VD.T / temperature, pair_UV[left_B])
        to_left_B = _surprise(right_VD[right_B] @ left_UD.T / temperature, pair_UV.T[right_B])
    return 0.5 * (to_right_B + to_left_B).sum()


def _surprise(score_BV: Tensor, pair_BV: Tensor) -> Tensor:
    """How little was given to all partners together."""
    # A finite floor, not -inf, keeps gradients finite; every record has a partner, its own.
    paired_BV = score_BV.masked_fill(~pair_BV, torch.finfo(score_BV.dtype).min)
    return score_BV.logsumexp(dim=1) - paired_BV.logsumexp(dim=1)


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
