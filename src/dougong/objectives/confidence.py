"""Teaching scores to be high where they are right.

Here        `ranking_loss`.
Elsewhere   the votes that confidence weighs (model/votes.py).
Promise     a sum over records; zero where confidence is ordered as the losses are, by at least their difference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranking_loss(logit_BC: Tensor, target_B: Tensor) -> Tensor:
    """Each record against its neighbour in the batch: the one that is answered better must be the more confident.

    After QMF (Zhang et al. 2023, arXiv:2306.02050), whose regulariser is that of Moon et al. 2020 (arXiv:2007.01458):
    max(0, -sign(d) (confidence difference) + |d|), with confidence logsumexp / 10. They take d from each record's
    history of losses over the epochs; ours is the difference of the present probabilities of the right class, so that
    a resumed run needs no memory of records.
    """
    if logit_BC.shape[0] < 2:
        return logit_BC.sum() * 0.0
    confidence_B = logit_BC.float().logsumexp(dim=-1) / 10.0
    right_B = logit_BC.detach().float().softmax(dim=-1).gather(1, target_B[:, None])[:, 0]
    difference_B = right_B - right_B.roll(1)
    gap_B = confidence_B - confidence_B.roll(1)
    return functional.relu(difference_B.abs() - torch.sign(difference_B) * gap_B).sum()
