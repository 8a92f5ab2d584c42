"""Pooling, feed-forward, and modules under a user's names."""

from __future__ import annotations

import torch
from torch import nn

from dougong.nn.feedforward import FeedForward
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.pooling import AttentionPooling

MASK_BT = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_pooling_ignores_what_is_masked_and_gives_zeros_for_nothing() -> None:
    torch.manual_seed(0)
    pooling = AttentionPooling(width=4)
    x_BTD = torch.randn(3, 3, 4)
    spoiled_BTD = x_BTD.masked_fill(~MASK_BT[..., None], 1e6).requires_grad_()

    clean, spoiled = pooling(x_BTD, MASK_BT), pooling(spoiled_BTD, MASK_BT)
    spoiled.x_BD.square().sum().backward()

    assert torch.equal(spoiled.x_BD, clean.x_BD)
    assert torch.equal(clean.x_BD[2], torch.zeros(4))
    torch.testing.assert_close(clean.x_BD[1], x_BTD[1, 0])
    torch.testing.assert_close(clean.weight_BT.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert spoiled_BTD.grad is not None
    assert torch.equal(spoiled_BTD.grad[~MASK_BT], torch.zeros(5, 4))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())


def test_feed_forward_answers_each_token_alone() -> None:
    torch.manual_seed(0)
    feedforward = FeedForward(width=4, ratio=1.5)
    x_BTD = torch.randn(2, 3, 4)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 1] += 1

    difference_BTD = feedforward(changed_BTD) - feedforward(x_BTD)

    assert feedforward.widen.out_features == 6
    assert difference_BTD[:, 1].abs().sum() > 0
    torch.testing.assert_close(difference_BTD[:, [0, 2]], torch.zeros(2, 2, 4))


def test_modules_may_have_any_name_that_a_column_has() -> None:
    names = ["keys", "a.b", "a b", "a_b", "Frage?", "", "training", "forward"]

    modules = ModulesByName({name: nn.Linear(1, place + 1) for place, name in enumerate(names)})

    assert [modules[name].out_features for name in names] == list(range(1, len(names) + 1))
    assert len(modules.state_dict()) == 2 * len(names)
    assert "1_a_b.weight" in modules.state_dict()
