"""What several witnesses say together, and how sure and how agreed they are.

Here        Opinion, `combine` (Dempster's rule, or averaging), `conflict`.
Elsewhere   the witnesses: each modality's own head (model/sandwich.py); teaching them (objectives/evidence.py).
Promise     vacuity (nobody knows) and conflict (they know different things) are two numbers: fused evidence alone
            hides a conflict, for two sure witnesses who disagree make one sure opinion or an empty one by turns.
            An absent witness changes nothing.

Shapes: B records, V witnesses, C classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Rule = Literal["dempster", "average"]
SMALLEST = 1e-6


class Opinion(NamedTuple):
    """A Dirichlet over the classes (Sensoy et al. 2018, arXiv:1806.01768)."""

    alpha_BC: Tensor
    """One more than the evidence for each class."""

    vacuity_B: Tensor
    """Share of belief that is given to no class: 1 without any evidence, near 0 with much."""

    @property
    def probability_BC(self) -> Tensor:
        """The expected probabilities."""
        return self.alpha_BC / self.alpha_BC.sum(dim=-1, keepdim=True)


def evidence(logit_BVC: Tensor) -> Tensor:
    """What an output says for each class, never below 0."""
    return functional.softplus(logit_BVC.float())


def combine(evidence_BVC: Tensor, present_BV: Tensor, rule: Rule) -> Opinion:
    """One opinion of those who are present.

    dempster: the reduced rule of Han et al. 2021 (TMC, arXiv:2102.02051): belief that agrees grows, belief that
    disagrees is thrown away and the rest scaled up. average: the mean of the evidence (averaging belief fusion,
    Josang 2016): more witnesses of the same opinion make it no surer.
    """
    evidence_BVC = evidence_BVC.masked_fill(~present_BV[..., None], 0.0)
    if rule == "average":
        count_B1 = present_BV.sum(dim=1, keepdim=True).clamp(min=1)
        return _opinion(evidence_BVC.sum(dim=1) / count_B1)
    num_classes = evidence_BVC.shape[-1]
    strength_BV1 = evidence_BVC.sum(dim=-1, keepdim=True) + num_classes
    belief_BVC, doubt_BV1 = evidence_BVC / strength_BV1, num_classes / strength_BV1
    belief_BC, doubt_B1 = belief_BVC[:, 0], doubt_BV1[:, 0]
    for other in range(1, evidence_BVC.shape[1]):
        other_BC, other_B1 = belief_BVC[:, other], doubt_BV1[:, other]
        agreed_BC = belief_BC * other_BC
        # All that two witnesses believe together, less what they believe of the same class.
        thrown_B1 = belief_BC.sum(dim=-1, keepdim=True) * other_BC.sum(dim=-1, keepdim=True) - agreed_BC.sum(
            dim=-1, keepdim=True
        )
        kept_B1 = (1.0 - thrown_B1).clamp(min=SMALLEST)
        belief_BC = (agreed_BC + belief_BC * other_B1 + other_BC * doubt_B1) / kept_B1
        doubt_B1 = doubt_B1 * other_B1 / kept_B1
    return _opinion(belief_BC * (num_classes / doubt_B1.clamp(min=SMALLEST)))


def conflict(probability_BVC: Tensor, present_BV: Tensor) -> Tensor:
    """The largest total variation between two present witnesses' probabilities, (B,): 0 agreed, 1 opposed.

    0 where fewer than two are present.
    """
    probability_BVC = probability_BVC.masked_fill(~present_BV[..., None], 0.0)
    distance_BVV = 0.5 * (probability_BVC[:, :, None] - probability_BVC[:, None]).abs().sum(dim=-1)
    both_BVV = present_BV[:, :, None] & present_BV[:, None]
    return distance_BVV.masked_fill(~both_BVV, 0.0).flatten(1).amax(dim=1)


def _opinion(evidence_BC: Tensor) -> Opinion:
    alpha_BC = evidence_BC + 1.0
    return Opinion(alpha_BC, torch.full_like(alpha_BC[:, 0], alpha_BC.shape[-1]) / alpha_BC.sum(dim=-1))
