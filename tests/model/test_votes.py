"""Holds model/votes.py to its promise: who is absent says nothing, and each way counts by its formula."""

from __future__ import annotations

import pytest
import torch

from dougong.model.votes import Ballot, Decide, WeighedVotes, vote

HOW: tuple[Decide, ...] = ("mean", "confidence", "evidence", "gated")


@pytest.mark.parametrize("how", HOW)
def test_who_is_absent_says_nothing(how: Decide) -> None:
    torch.manual_seed(0)
    logit_BVC, present_BV = torch.randn(3, 3, 4), torch.tensor([[True] * 3, [True, False, True], [False] * 3])
    spoiled_BVC = logit_BVC.masked_fill(~present_BV[..., None], float("nan"))
    weight_BV = torch.rand(3, 3)
    found = vote(spoiled_BVC, present_BV, how, weight_BV=weight_BV).output_BC
    torch.testing.assert_close(found, vote(logit_BVC, present_BV, how, weight_BV=weight_BV).output_BC)
    assert found.isfinite().all()


def test_weighed_votes_are_their_mean_before_anything_is_learnt() -> None:
    torch.manual_seed(0)
    ballot = Ballot(torch.randn(3, 3, 4), torch.tensor([[True] * 3, [True, False, True], [False] * 3]))
    torch.testing.assert_close(WeighedVotes(3)(ballot), vote(*ballot, "mean").output_BC)


def test_weighed_votes_are_a_mean_of_those_present_whatever_stands_elsewhere() -> None:
    votes = WeighedVotes(2)
    votes.weight_V.copy_(torch.tensor([1.5, 0.5]))
    votes.scale.fill_(2.0)
    logit_BVC = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [float("nan")] * 2]])
    found = votes(Ballot(logit_BVC, torch.tensor([[True, True], [True, False]])))
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.5], [2.0, 0.0]]))
    assert set(votes.state_dict()) == {"weight_V", "scale"}  # a bundle keeps them
    assert not list(votes.parameters())
