"""How far completed tokens are from what was really there.

Here        `completion_loss`; Unexplained, the same of many batches, for judging.
Elsewhere   completing (model/completion.py); withholding what a record has (data/collate.py); adding it to what else
            is learnt (recipes/losses.py, recipes/generate.py).
Promise     the truth is taken as it is: no gradient reaches the encoder that found it. What is judged is the same
            whatever the batches were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass
class Unexplained:
    """How much of the spread of all batches' truths is left unexplained, added up in float64.

    Shapes: B records of a batch, U distinct media, K tokens, D channels.
    """

    num_records: int = 0
    error: float = 0.0
    squares: float = 0.0
    sum_KD: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, completed_BKD: Tensor, truth_UKD: Tensor, medium_B: Tensor) -> None:
        """Count these records, as `completion_loss` takes them."""
        truth_BKD = truth_UKD.index_select(0, medium_B).double()
        self.num_records += len(truth_BKD)
        self.error += float((completed_BKD.double() - truth_BKD).square().sum())
        self.squares += float(truth_BKD.square().sum())
        self.sum_KD = self.sum_KD + truth_BKD.sum(dim=0).cpu()

    def left(self) -> float | None:
        """0 is exact, 1 is what the mean of all records' truths would leave. None: fewer than 2 records, or truths of
        nothing but zeros, have no spread.

        The mean is of records: a medium that several of them share counts as often.
        """
        if self.num_records < 2:
            return None
        spread = self.squares - float(self.sum_KD.square().sum()) / self.num_records
        spread = max(spread, LEAST_SPREAD * self.squares)
        return self.error / spread if spread > 0 else None
