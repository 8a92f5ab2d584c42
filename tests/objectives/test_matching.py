import math

import pytest
import torch

from dougong.objectives.matching import matching_loss


def test_right_and_wrong_pairs_have_half_the_weight_each() -> None:
    match_P = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, 0.0])
    is_pair_P = torch.tensor([True, True, False, False, False, False])

    right = math.log1p(math.exp(-2.0)) + math.log(2)
    wrong = math.log1p(math.e) + math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.5)) + math.log(2)

    # Twice as many wrong ones as right ones: each counts half.
    assert matching_loss(match_P, is_pair_P) == pytest.approx(0.5 * (right + wrong / 2))


def test_a_pair_that_is_not_known_counts_nothing() -> None:
    match_P = torch.tensor([2.0, 30.0, 1.0, -50.0], requires_grad=True)
    is_pair_P = torch.tensor([True, True, False, False])
    known_P = torch.tensor([True, False, True, False])

    loss = matching_loss(match_P, is_pair_P, known_P)
    loss.backward()

    want = 0.5 * (math.log1p(math.exp(-2.0)) + math.log1p(math.e))
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert match_P.grad is not None
    assert match_P.grad[[1, 3]].tolist() == [0.0, 0.0]


def test_without_any_wrong_pair_the_right_ones_are_left() -> None:
    loss = matching_loss(torch.zeros(2), torch.tensor([True, True]))
    assert loss == pytest.approx(0.5 * 2 * math.log(2))
