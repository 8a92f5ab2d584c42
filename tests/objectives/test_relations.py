"""Holds objectives/relations.py to its promise and its formulas."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from dougong.objectives.relations import attention_loss, relation_loss, weight_loss

MASK_UT = torch.tensor([[True, True, True, False], [True, True, False, False]])


def test_relations_are_softmaxes_of_scaled_products_of_any_width() -> None:
    torch.manual_seed(0)
    own_UTD, taught_UTE = torch.randn(2, 4, 6), torch.randn(2, 4, 12)

    found = relation_loss(own_UTD, taught_UTE, MASK_UT, num_heads=3)

    want = torch.zeros(())
    for medium, count in enumerate((3, 2)):
        own, taught = own_UTD[medium, :count].view(count, 3, 2), taught_UTE[medium, :count].view(count, 3, 4)
        for head in range(3):
            a = Categorical(logits=taught[:, head] @ taught[:, head].T / 4**0.5)
            b = Categorical(logits=own[:, head] @ own[:, head].T / 2**0.5)
            want = want + kl_divergence(a, b).mean() / 3
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_masked_tokens_leave_no_trace(garbage: float) -> None:
    torch.manual_seed(0)
    own_UTD, taught_UTD = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    spoilt = own_UTD.masked_fill(~MASK_UT[..., None], garbage).requires_grad_()

    loss = relation_loss(spoilt, taught_UTD, MASK_UT, num_heads=2)
    loss.backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(loss.detach(), relation_loss(own_UTD, taught_UTD, MASK_UT, num_heads=2))
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[~MASK_UT].any()


def test_one_who_is_agreed_with_teaches_nothing_and_the_teacher_never_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, requires_grad=True)
    weight = torch.randn(2, 4, 5).softmax(dim=-1).requires_grad_()
    gate = torch.tensor([[0.3, 0.7], [1.0, 0.0]], requires_grad=True)
    pairs = {
        x: lambda own: relation_loss(own, x, MASK_UT, num_heads=2),
        weight: lambda own: attention_loss(own, weight, MASK_UT),
        gate: lambda own: weight_loss(own, gate),
    }
    for taught, loss_of in pairs.items():
        own = taught.detach().clone().requires_grad_()
        loss = loss_of(own)
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        assert taught.grad is None
        assert own.grad is not None


def test_attention_and_gate_are_divergences_from_the_teacher() -> None:
    torch.manual_seed(0)
    own, taught = torch.randn(2, 4, 5).softmax(dim=-1), torch.randn(2, 4, 5).softmax(dim=-1)
    each = kl_divergence(Categorical(probs=taught), Categorical(probs=own))
    want = each[0, :3].mean() + each[1, :2].mean()
    torch.testing.assert_close(attention_loss(own, taught, MASK_UT), want, rtol=1e-4, atol=1e-5)

    own, taught = own[:, 0], taught[:, 0]
    want = kl_divergence(Categorical(probs=taught), Categorical(probs=own)).sum()
    torch.testing.assert_close(weight_loss(own, taught), want, rtol=1e-4, atol=1e-5)


def test_a_query_that_has_nothing_to_look_at_teaches_nothing() -> None:
    taught = torch.zeros(1, 4, 5)
    own = torch.full((1, 4, 5), 0.2)
    assert attention_loss(own, taught, torch.ones(1, 4, dtype=torch.bool)).item() == 0.0
