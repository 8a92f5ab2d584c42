"""How far two modalities are from saying the same of a record.

Here        `contrastive_loss`.
Elsewhere   the vectors (model/heads.py's ContrastiveHead); adding it to what else is learnt (recipes/run.py).
Promise     two records that share a medium are never held against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 0.07


def contrastive_loss(
    left_UD: Tensor, right_VD: Tensor, left_B: Tensor, right_B: Tensor, *, temperature: float = TEMPERATURE
) -> Tensor:
    """The sum of the records' losses, in float32: each must find its own partner among all that the batch has.

    Shapes: U and V distinct media of two modalities, as vectors of length 1; `left_B` and `right_B` say which of them
    each of B records has.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) both ways, as CLIP has it (Radford et al. 2021,
    arXiv:2103.00020), over distinct media, and with a fixed temperature. Where a medium has several partners (a
    sentence said by two voices), any of them is right. It is a sum over records, but of this batch's partners alone:
    micro-batches add up to something easier than one big batch.
    """
    score_UV = (left_UD.float() @ right_VD.float().T) / temperature
    pair_UV = score_UV.new_zeros(score_UV.shape, dtype=torch.bool)
    pair_UV[left_B, right_B] = True
    # A finite floor, not -inf: a medium without any partner here would get NaN gradients.
    paired_UV = score_UV.masked_fill(~pair_UV, torch.finfo(score_UV.dtype).min)
    to_right_U = score_UV.logsumexp(dim=1) - paired_UV.logsumexp(dim=1)
    to_left_V = score_UV.logsumexp(dim=0) - paired_UV.logsumexp(dim=0)
    return 0.5 * (to_right_U[left_B] + to_left_V[right_B]).sum()
