"""Opinions by hand: Dempster's rule on two witnesses, vacuity and conflict as two numbers, absence without a trace."""

from __future__ import annotations

import pytest
import torch

from dougong.model.evidence import combine, conflict
from dougong.model.votes import Decide, vote

BOTH = torch.tensor([[True, True]])


def test_dempsters_rule_is_that_of_the_textbook() -> None:
    # Evidence (8, 0) and (2, 2) of 2 classes: beliefs (.8, 0) doubt .2, and (1/3, 1/3) doubt 1/3.
    opinion = combine(torch.tensor([[[8.0, 0.0], [2.0, 2.0]]]), BOTH, "dempster")

    thrown = 0.8 / 3  # one believes in the first class, the other in the second
    belief = torch.tensor([0.8 / 3 + 0.8 / 3 + 0.2 / 3, 0.2 / 3]) / (1 - thrown)
    doubt = (0.2 / 3) / (1 - thrown)
    assert float(belief.sum()) + doubt == pytest.approx(1.0)
    torch.testing.assert_close(opinion.vacuity_B, torch.tensor([doubt]))
    torch.testing.assert_close((opinion.alpha_BC - 1) / opinion.alpha_BC.sum(), belief[None])


def test_averaging_makes_no_surer() -> None:
    evidence_BVC = torch.tensor([[[6.0, 0.0], [2.0, 4.0]]])
    torch.testing.assert_close(combine(evidence_BVC, BOTH, "average").alpha_BC, torch.tensor([[5.0, 3.0]]))

    alike_BVC = torch.tensor([[[6.0, 0.0], [6.0, 0.0]]])
    once, averaged = combine(alike_BVC[:, :1], BOTH[:, :1], "average"), combine(alike_BVC, BOTH, "average")
    surer = combine(alike_BVC, BOTH, "dempster")
    torch.testing.assert_close(averaged.vacuity_B, once.vacuity_B)
    assert surer.vacuity_B < once.vacuity_B


def test_conflict_is_seen_where_vacuity_is_blind() -> None:
    """Two sure witnesses agree, or disagree: their averaged vacuity is the same, their conflict 0 and nearly 1."""
    agree, oppose = torch.tensor([[[50.0, 0.0], [50.0, 0.0]]]), torch.tensor([[[50.0, 0.0], [0.0, 50.0]]])
    torch.testing.assert_close(
        combine(agree, BOTH, "average").vacuity_B, combine(oppose, BOTH, "average").vacuity_B, rtol=0, atol=0
    )
    probability = [(each + 1) / (each + 1).sum(-1, keepdim=True) for each in (agree, oppose)]
    assert float(conflict(probability[0], BOTH)) == 0.0
    assert float(conflict(probability[1], BOTH)) == pytest.approx(50 / 52)


def test_conflict_is_the_largest_total_variation_of_those_present() -> None:
    probability_BVC = torch.tensor([[[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]).repeat(3, 1, 1)
    present_BV = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    torch.testing.assert_close(conflict(probability_BVC, present_BV), torch.tensor([1.0, 0.4, 0.0]))


@pytest.mark.parametrize("how", ["mean", "confidence", "evidence"])
@pytest.mark.parametrize("garbage", [9.0, float("nan")])
def test_an_absent_voter_changes_nothing(how: Decide, garbage: float) -> None:
    logit_BVC = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    present_BV = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    spoiled_BVC = logit_BVC.masked_fill(~present_BV[..., None], garbage).requires_grad_()

    output_BC = vote(spoiled_BVC, present_BV, how).output_BC
    output_BC.sum().backward()

    two = vote(logit_BVC[1:2, [0, 2]], torch.ones(1, 2, dtype=torch.bool), how).output_BC
    torch.testing.assert_close(output_BC[1], two[0])
    assert output_BC.isfinite().all()
    assert spoiled_BVC.grad is not None
    assert spoiled_BVC.grad.isfinite().all()


def test_confidence_weighs_by_energy() -> None:
    logit_BVC = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]])
    energy_BV = logit_BVC.logsumexp(dim=-1) / 10
    want_BC = energy_BV[:, :1] * logit_BVC[:, 0] + energy_BV[:, 1:] * logit_BVC[:, 1]
    torch.testing.assert_close(vote(logit_BVC, BOTH, "confidence").output_BC, want_BC)
