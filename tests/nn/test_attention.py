"""Attention ignores what is masked, gives zero where there is nothing, and says where it looked."""

from __future__ import annotations

import pytest
import torch

from dougong.nn.attention import Attention, key_mask

MASK_BS = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])


def build() -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(width=8, num_heads=2), torch.randn(3, 4, 8), torch.randn(3, 5, 8)


@pytest.mark.parametrize("mask_BS", [None, MASK_BS, torch.ones(3, 5, dtype=torch.bool)])
def test_asking_for_the_weights_does_not_change_the_answer(mask_BS: torch.Tensor | None) -> None:
    attention, x_BTD, context_BSD = build()

    fast = attention(x_BTD, context_BSD, mask_BS)
    slow = attention(x_BTD, context_BSD, mask_BS, need_weights=True)

    assert fast.weight_BHTS is None
    torch.testing.assert_close(fast.x_BTD, slow.x_BTD, rtol=1e-5, atol=1e-6)


def test_agrees_with_torch() -> None:
    attention, x_BTD, context_BSD = build()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    # Ours has each head's key and value side by side, theirs all keys and then all values.
    weight = attention.key_value.weight.view(2, 2, 4, 8).transpose(0, 1).reshape(16, 8)
    bias = attention.key_value.bias.view(2, 2, 4).transpose(0, 1).reshape(16)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([attention.query.weight, weight]))
        theirs.in_proj_bias.copy_(torch.cat([attention.query.bias, bias]))
    theirs.out_proj = attention.out
    some = slice(0, 2)  # torch gives NaN where all is masked

    want, _ = theirs(x_BTD[some], context_BSD[some], context_BSD[some], key_padding_mask=~MASK_BS[some])

    torch.testing.assert_close(attention(x_BTD, context_BSD, MASK_BS).x_BTD[some], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_with_nothing_to_look_at_gets_zero_and_finite_gradients(need_weights: bool) -> None:
    attention, x_BTD, context_BSD = build()
    x_BTD.requires_grad_()

    attended = attention(x_BTD, context_BSD, MASK_BS, need_weights=need_weights)
    attended.x_BTD.square().sum().backward()

    assert torch.equal(attended.x_BTD[2], torch.zeros(4, 8))
    assert x_BTD.grad is not None
    assert torch.equal(x_BTD.grad[2], torch.zeros(4, 8))
    assert x_BTD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    if attended.weight_BHTS is not None:
        seen_B = attended.weight_BHTS.sum(dim=-1).amax(dim=(1, 2))
        torch.testing.assert_close(seen_B, torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_masked_token_leaves_no_trace(need_weights: bool) -> None:
    attention, x_BTD, context_BSD = build()
    spoiled_BSD = context_BSD.masked_fill(~MASK_BS[..., None], 1e6).requires_grad_()

    clean = attention(x_BTD, context_BSD, MASK_BS, need_weights=need_weights)
    spoiled = attention(x_BTD, spoiled_BSD, MASK_BS, need_weights=need_weights)
    spoiled.x_BTD.square().sum().backward()

    torch.testing.assert_close(spoiled.x_BTD, clean.x_BTD, rtol=0, atol=0)
    assert spoiled_BSD.grad is not None
    assert torch.equal(spoiled_BSD.grad[~MASK_BS], torch.zeros(8, 8))


def test_no_kernel_is_ever_given_a_row_without_keys() -> None:
    mask_B11S = key_mask(MASK_BS)

    assert mask_B11S is not None
    assert mask_B11S.shape == (3, 1, 1, 5)
    assert torch.equal(mask_B11S[:2, 0, 0], MASK_BS[:2])
    assert mask_B11S[2].all()
    assert key_mask(torch.ones(3, 5, dtype=torch.bool)) is None
