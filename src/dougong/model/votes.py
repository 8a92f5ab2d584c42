"""One decision out of several: each modality has decided by itself, and the votes are counted.

Here        Decide, Ballot, `vote` and Voted, WeighedVotes.
Elsewhere   whose votes they are (model/sandwich.py); the opinions of evidence (model/evidence.py); learning how much
            each vote weighs (recipes/weigh.py).
Promise     an absent voter changes nothing, whatever stands in its place; a record without any voter still gets
            finite outputs and gradients.

Shapes: B records, V voters, C outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dougong.model.evidence import SMALLEST, Opinion, Rule, combine, evidence

Decide = Literal["fused", "mean", "weighed", "gated", "confidence", "evidence"]
ENERGY_SCALE = 0.1


class Ballot(NamedTuple):
    """What each voter says, and who has a voice."""

    logit_BVC: Tensor
    present_BV: Tensor


class Voted(NamedTuple):
    """What came of it."""

    output_BC: Tensor
    """Scores, as a head gives them; of evidence the logarithm of the expected probabilities."""

    opinion: Opinion | None
    """Where the votes are evidence."""


def vote(
    logit_BVC: Tensor, present_BV: Tensor, how: Decide, rule: Rule = "dempster", weight_BV: Tensor | None = None
) -> Voted:
    """Count the votes of those who are present.

    mean: of their scores. gated: the sum of their scores, each times `weight_BV`. confidence: their scores, each times
    its energy (logsumexp / 10, taken as a constant), after QMF (Zhang et al. 2023, arXiv:2306.02050). evidence: their
    Dirichlets, combined by `rule`.
    """
    logit_BVC = logit_BVC.masked_fill(~present_BV[..., None], 0.0)
    if how == "evidence":
        opinion = combine(evidence(logit_BVC), present_BV, rule)
        return Voted(opinion.probability_BC.clamp(min=SMALLEST).log(), opinion)
    if how == "confidence":
        weight_BV1 = (ENERGY_SCALE * logit_BVC.float().logsumexp(dim=-1, keepdim=True)).detach()
        return Voted((logit_BVC * weight_BV1).sum(dim=1), None)
    if how == "gated":
        assert weight_BV is not None, "gated votes are weighed by a gate"
        return Voted((logit_BVC * weight_BV[..., None].to(logit_BVC.dtype)).sum(dim=1), None)
    one_V = logit_BVC.new_ones(logit_BVC.shape[1])
    return Voted(weigh(Ballot(logit_BVC, present_BV), one_V, logit_BVC.new_ones(())), None)


class WeighedVotes(nn.Module):
    """The weighted mean of the scores of those who are present, times how sure it is; both equal to 1 until learnt.

    After Wolpert 1992 ("Stacked generalization"), with one weight for each voter, none below zero. They are no
    parameters: training would trust most whoever remembers most of it.
    """

    weight_V: Tensor
    scale: Tensor

    def __init__(self, num_voters: int) -> None:
        super().__init__()
        self.register_buffer("weight_V", torch.ones(num_voters))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ballot: Ballot) -> Tensor:
        """(B, C)."""
        return weigh(ballot, self.weight_V, self.scale)


def weigh(ballot: Ballot, weight_V: Tensor, scale: Tensor) -> Tensor:
    """The weighted mean of those who are present, times `scale`: (B, C)."""
    weight_BV = weight_V * ballot.present_BV
    weight_BV = weight_BV / weight_BV.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
    logit_BVC = ballot.logit_BVC.masked_fill(~ballot.present_BV[..., None], 0.0)
    return scale * (weight_BV[:, None].to(logit_BVC.dtype) @ logit_BVC)[:, 0]
