"""How far completed tokens are from what was really there.

Here        `completion_loss`.
Elsewhere   completing (model/completion.py); withholding what a record has (data/collate.py); adding it to what else
            is learnt (recipes/run.py).
Promise     the truth is taken as it is: no gradient reaches the encoder that found it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LEAST_SPREAD: Final = 0.01
"""Of the truths' mean square: where they hardly differ, no difference is made out of rounding."""


def completion_loss(completed_BKD: Tensor, truth_UKD: Tensor, medium_B: Tensor) -> Tensor:
    """The sum over records of the share of the truth's spread that is left unexplained, in float32.

    Shapes: B records whose modality was withheld, U distinct media of it, K tokens, D channels; `medium_B` says which
    medium each record really has.

    With the mean truth t of the media, a record costs |completed - truth|^2 / mean of |truth - t|^2: 0 is exact, 1 is
    what the mean itself would cost, whatever the scale of the tokens. Squared error is the regression that the
    published completions use (Zhao et al. 2021, MMIN); measuring it in the truth's own spread, which is of this batch
    alone, keeps its weight the same as an encoder's outputs grow or shrink. Fewer than 2 media have no spread and
    cost nothing.
    """
    completed_BKD, truth_UKD = completed_BKD.float(), truth_UKD.detach().float()
    if truth_UKD.shape[0] < 2:
        return completed_BKD.sum() * 0.0
    spread = (truth_UKD - truth_UKD.mean(dim=0)).square().mean()
    spread = torch.maximum(spread, LEAST_SPREAD * truth_UKD.square().mean())
    error_B = (completed_BKD - truth_UKD.index_select(0, medium_B)).square().flatten(1).mean(dim=1)
    return error_B.sum() / torch.where(spread > 0, spread, torch.ones_like(spread))
