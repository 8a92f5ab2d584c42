"""Learning how another's tokens stand to each other, whatever its width and number of heads.

Here        `relation_loss`, `attention_loss`, `weight_loss`.
Elsewhere   who teaches whom, and where tokens and weights are read (compress/distil.py); learning answers
            (distillation.py).
Promise     a sum over media or records; masked tokens leave no trace, not even NaN; the teacher gets no gradient, and
            one who is agreed with gives the learner none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-6


def relation_loss(own_UTD: Tensor, taught_UTE: Tensor, mask_UT: Tensor, *, num_heads: int) -> Tensor:
    """How far the tokens' relations are from the teacher's, in float32.

    Shapes: U media, T tokens, D and E channels, which `num_heads` divides both. A relation is the softmax of scaled
    products of each token with all: MiniLMv2 (Wang et al. 2021, arXiv:2012.15828), whose relation heads need not be
    those of the attention. The divergence from the teacher's, the mean over heads and real tokens of each medium.
    """
    own = _relations(own_UTD, mask_UT, num_heads)
    taught = _relations(taught_UTE.detach(), mask_UT, num_heads)
    # Logarithms of masked keys are a finite floor on both sides, and their probability is 0.
    divergence_URT = (taught.exp() * (taught - own)).sum(dim=-1)
    return _per_medium(divergence_URT.mean(dim=1), mask_UT)


def attention_loss(own_BTS: Tensor, taught_BTS: Tensor, mask_BT: Tensor) -> Tensor:
    """How far the tokens look elsewhere than the teacher's do, in float32.

    Shapes: B records, T queries, S keys; both are attention weights, the mean over heads. A query of the teacher that
    has nothing to look at is left out. The divergence from the teacher's, the mean over real queries of each record.
    """
    own_BTS, taught_BTS = own_BTS.float().clamp(min=SMALLEST), taught_BTS.detach().float()
    floored_BTS = taught_BTS.clamp(min=SMALLEST)
    looks_BT = taught_BTS.sum(dim=-1) > 0
    divergence_BT = (floored_BTS * (floored_BTS.log() - own_BTS.log())).sum(dim=-1)
    return _per_medium(divergence_BT, mask_BT & looks_BT)


def weight_loss(own_BM: Tensor, taught_BM: Tensor) -> Tensor:
    """How far a gate's weights are from the teacher's, in float32: the divergence, summed over records.

    Shapes: B records, M modalities; an absent one has weight 0 in both.
    """
    own_BM = own_BM.float().clamp(min=SMALLEST)
    taught_BM = taught_BM.detach().float().clamp(min=SMALLEST)
    return (taught_BM * (taught_BM.log() - own_BM.log())).sum()


def _relations(x_UTD: Tensor, mask_UT: Tensor, num_heads: int) -> Tensor:
    """Logarithms of each token's relation to all tokens, (U, R, T, T)."""
    x_UTD = x_UTD.float().masked_fill(~mask_UT[..., None], 0.0)
    x_URTK = x_UTD.view(*x_UTD.shape[:2], num_heads, -1).transpose(1, 2)
    score_URTT = x_URTK @ x_URTK.transpose(-1, -2) / math.sqrt(x_URTK.shape[-1])
    score_URTT = score_URTT.masked_fill(~mask_UT[:, None, None, :], torch.finfo(torch.float32).min / 2)
    relation_URTT: Tensor = score_URTT.log_softmax(dim=-1)
    return relation_URTT


def _per_medium(each_UT: Tensor, mask_UT: Tensor) -> Tensor:
    """The sum over media of the mean over their real tokens."""
    count_U = mask_UT.sum(dim=1).clamp(min=1)
    return (each_UT.masked_fill(~mask_UT, 0.0).sum(dim=1) / count_U).sum()
