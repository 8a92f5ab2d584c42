"""The gate is DESIGN's formula, and an absent modality leaves no trace in it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dougong.model.gate import GateConfig
from dougong.model.heads import DecisionConfig


@pytest.mark.parametrize("garbage", [7.0, float("inf"), float("nan")])
def test_an_absent_modality_leaves_no_trace(garbage: float) -> None:
    torch.manual_seed(0)
    gate = GateConfig(width=4, num_modalities=2).build()
    x_BMD = torch.randn(3, 2, 4)
    present_BM = torch.tensor([[True, True], [True, False], [False, False]])
    spoiled_BMD = x_BMD.masked_fill(~present_BM[..., None], garbage)

    clean, spoiled = gate(x_BMD, present_BM), gate(spoiled_BMD, present_BM)
    spoiled.fused_BD.sum().backward()

    torch.testing.assert_close(spoiled.fused_BD, clean.fused_BD, rtol=0, atol=0)
    assert torch.equal(spoiled.weight_BM[1:], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(spoiled.fused_BD[2], torch.zeros(4))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


def test_of_two_modalities_it_is_a_sigmoid() -> None:
    torch.manual_seed(0)
    gate = GateConfig(width=4, num_modalities=2).build()
    x_BMD = torch.randn(5, 2, 4)
    weight, bias = gate.score.weight[0] - gate.score.weight[1], gate.score.bias[0] - gate.score.bias[1]

    alpha_B = torch.sigmoid(x_BMD.flatten(1) @ weight + bias)
    want_BD = alpha_B[:, None] * x_BMD[:, 0] + (1 - alpha_B)[:, None] * x_BMD[:, 1]

    out = gate(x_BMD, torch.ones(5, 2, dtype=torch.bool))
    torch.testing.assert_close(out.weight_BM[:, 0], alpha_B)
    torch.testing.assert_close(out.fused_BD, want_BD)


def test_below_temperature_one_it_chooses_harder() -> None:
    torch.manual_seed(0)
    soft, hard = GateConfig(width=4, num_modalities=3), GateConfig(width=4, num_modalities=3, temperature=0.1)
    gates = [soft.build(), hard.build()]
    gates[1].load_state_dict(gates[0].state_dict())
    x_BMD, present_BM = torch.randn(5, 3, 4), torch.ones(5, 3, dtype=torch.bool)

    softest_B, hardest_B = (gate(x_BMD, present_BM).weight_BM.amax(dim=1) for gate in gates)

    assert (hardest_B > softest_B).all()


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"0\.0 must be above 0: it divides the scores"):
        GateConfig(width=4, num_modalities=2, temperature=0.0)


def test_a_record_with_nothing_gets_an_answer_and_finite_gradients() -> None:
    head = DecisionConfig(width=4, hidden=8, num_outputs=3).build()
    fused_BD = torch.zeros(2, 4, requires_grad=True)

    output_BC = head(fused_BD)
    output_BC.sum().backward()

    assert output_BC.shape == (2, 3)
    assert fused_BD.grad is not None
    assert fused_BD.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_quality_moves_its_own_modality_and_an_absent_ones_leaves_no_trace(garbage: float) -> None:
    torch.manual_seed(0)
    gate = GateConfig(width=4, num_modalities=3, num_quality=(2, 0, 3)).build()
    for scorer in gate.quality:
        torch.nn.init.normal_(scorer.narrow.weight)
    x_BMD, present_BM = torch.randn(2, 3, 4), torch.tensor([[True, True, True], [True, True, False]])
    first, last = torch.rand(2, 2), torch.rand(2, 3)
    spoiled = last.masked_fill(~present_BM[:, 2:], garbage)

    plain = gate(x_BMD, present_BM)
    moved = gate(x_BMD, present_BM, (first, None, spoiled))
    moved.fused_BD.sum().backward()

    ratio = (moved.weight_BM / plain.weight_BM)[0].log()
    scores = [gate.quality[0](first)[0, 0], torch.zeros(()), gate.quality[1](last)[0, 0]]
    torch.testing.assert_close(ratio - ratio[1], torch.stack(scores))
    assert moved.weight_BM[1, 2] == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())
    torch.testing.assert_close(gate(x_BMD, present_BM, (first, None, last)).weight_BM, moved.weight_BM)


def test_quality_says_nothing_before_it_is_learnt() -> None:
    torch.manual_seed(0)
    gate = GateConfig(width=4, num_modalities=2, num_quality=(2, 2)).build()
    x_BMD, present_BM = torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    told = gate(x_BMD, present_BM, (torch.rand(3, 2), torch.rand(3, 2)))
    torch.testing.assert_close(told.weight_BM, gate(x_BMD, present_BM).weight_BM, rtol=0, atol=0)


def test_a_completed_modality_has_no_quality_of_its_own() -> None:
    """Whether anybody else in the batch was measured changes nothing of a record."""
    torch.manual_seed(0)
    gate = GateConfig(width=4, num_modalities=2, num_quality=(2, 2)).build()
    for scorer in gate.quality:
        torch.nn.init.normal_(scorer.narrow.weight)
        torch.nn.init.normal_(scorer.narrow.bias)
    x_BMD, present_BM = torch.randn(2, 2, 4), torch.ones(2, 2, dtype=torch.bool)
    given_BM, figures_BQ = torch.tensor([[True, False], [True, True]]), torch.rand(2, 2)

    together = gate(x_BMD, present_BM, (figures_BQ, torch.rand(2, 2)), given_BM)
    alone = gate(x_BMD[:1], present_BM[:1], (figures_BQ[:1], None), given_BM[:1])

    torch.testing.assert_close(together.weight_BM[:1], alone.weight_BM)
