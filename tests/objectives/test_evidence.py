"""The losses that teach witnesses and the gate, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from dougong.objectives.confidence import ranking_loss
from dougong.objectives.evidence import evidence_loss
from dougong.objectives.gate import gate_loss


def test_without_punishment_it_is_the_expected_cross_entropy() -> None:
    alpha_BC = torch.tensor([[4.0, 2.0, 1.0]])
    # digamma(7) - digamma(4) = 1/4 + 1/5 + 1/6
    assert float(evidence_loss(alpha_BC, torch.tensor([0]), doubt_weight=0.0)) == pytest.approx(1 / 4 + 1 / 5 + 1 / 6)


def test_the_punishment_is_the_divergence_of_the_wrong_classes_evidence() -> None:
    alpha_BC, target_B = torch.tensor([[9.0, 3.0, 2.0]]), torch.tensor([0])
    plain = evidence_loss(alpha_BC, target_B, doubt_weight=0.0)
    want = kl_divergence(Dirichlet(torch.tensor([1.0, 3.0, 2.0])), Dirichlet(torch.ones(3)))
    torch.testing.assert_close(evidence_loss(alpha_BC, target_B, doubt_weight=0.5) - plain, 0.5 * want)


def test_the_gate_is_taught_by_records_whose_modalities_are_unlike() -> None:
    weight_BM = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    level_BM = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.3, 0.0], [0.0, 0.5]])
    present_BM = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    want = -math.log(0.25) - math.log(0.5)  # the first trusts only one; the last 2/3 and 1/3, both weighed one half
    assert float(gate_loss(weight_BM, level_BM, present_BM)) == pytest.approx(want)


def test_the_gates_gradient_is_finite_where_it_has_shut_a_modality() -> None:
    score_BM = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = gate_loss(score_BM.softmax(-1), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert score_BM.grad is not None
    assert score_BM.grad.isfinite().all()


def test_the_better_answered_must_be_the_surer() -> None:
    logit_BC = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    right_B = logit_BC.softmax(-1)[:, 0]
    gap = float(logit_BC[0].logsumexp(0) - logit_BC[1].logsumexp(0)) / 10
    difference = float(right_B[0] - right_B[1])
    # Each is the other's neighbour: the pair is judged twice.
    want = 2 * max(0.0, difference - gap)
    assert float(ranking_loss(logit_BC, torch.tensor([0, 0]))) == pytest.approx(want)
    assert float(ranking_loss(logit_BC[:1], torch.tensor([0]))) == 0.0
