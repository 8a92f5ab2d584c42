"""The completion loss against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dougong.objectives.missing import Unexplained, completion_loss


def test_it_is_the_share_of_the_truth_s_spread_that_is_left() -> None:
    # Two media of one token with two channels: mean (2, 0); spread, the mean over all numbers: (1 + 1 + 4 + 4) / 4.
    truth_UKD = torch.tensor([[[1.0, 2.0]], [[3.0, -2.0]]])
    completed_BKD = torch.tensor([[[1.0, 2.0]], [[2.0, 0.0]], [[3.0, 0.0]]])
    medium_B = torch.tensor([0, 0, 1])

    # Exact; the mean itself, (1 + 4) / 2; one channel right, 4 / 2.
    assert completion_loss(completed_BKD, truth_UKD, medium_B).item() == pytest.approx((0 + 2.5 + 2.0) / 2.5)


def test_guessing_the_mean_costs_one_a_record_whatever_the_scale() -> None:
    truth_UKD = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)) * 50
    guess_BKD = truth_UKD.mean(dim=0).expand(6, -1, -1)

    assert completion_loss(guess_BKD, truth_UKD, torch.arange(6)).item() == pytest.approx(6.0, rel=1e-5)


def test_it_is_a_sum_over_records() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_UKD, completed_BKD = torch.randn(4, 2, 3, generator=generator), torch.randn(5, 2, 3, generator=generator)
    medium_B = torch.tensor([0, 3, 1, 1, 2])
    each = [completion_loss(completed_BKD[[b]], truth_UKD, medium_B[[b]]) for b in range(5)]

    torch.testing.assert_close(completion_loss(completed_BKD, truth_UKD, medium_B), torch.stack(each).sum())


def test_no_gradient_reaches_the_truth() -> None:
    truth_UKD = torch.randn(3, 1, 4, requires_grad=True)
    completed_BKD = torch.randn(3, 1, 4, requires_grad=True)

    completion_loss(completed_BKD, truth_UKD, torch.arange(3)).backward()

    assert truth_UKD.grad is None
    assert completed_BKD.grad is not None
    assert completed_BKD.grad.abs().sum() > 0


@pytest.mark.parametrize("num_media", [0, 1])
def test_media_without_a_spread_cost_nothing(num_media: int) -> None:
    completed_BKD = torch.randn(num_media, 1, 4, requires_grad=True)

    loss = completion_loss(completed_BKD, torch.randn(num_media, 1, 4), torch.zeros(num_media, dtype=torch.int64))
    loss.backward()

    assert loss.item() == 0.0


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_media_that_are_all_alike_make_no_difference_out_of_rounding(value: float) -> None:
    completed_BKD = torch.ones(2, 1, 4, requires_grad=True)

    loss = completion_loss(completed_BKD, torch.full((2, 1, 4), value), torch.arange(2))
    loss.backward()

    # Against the least spread, a hundredth of the mean square; or, where that is 0, against 1.
    assert loss.item() == pytest.approx(2 * (1 - value) ** 2 / (0.01 * value**2 or 1.0), rel=1e-5)
    assert completed_BKD.grad is not None
    assert completed_BKD.grad.isfinite().all()


def test_what_is_left_is_the_same_whatever_the_batches_were() -> None:
    torch.manual_seed(0)
    completed_BKD, truth_UKD, medium_B = torch.randn(9, 2, 4), torch.randn(5, 2, 4) + 7.0, torch.arange(9) % 5
    at_once, by_two = Unexplained(), Unexplained()

    at_once.add(completed_BKD, truth_UKD, medium_B)
    for start in range(0, 9, 2):
        by_two.add(completed_BKD[start : start + 2], truth_UKD, medium_B[start : start + 2])

    truth_BKD = truth_UKD[medium_B]
    wanted = (completed_BKD - truth_BKD).square().sum() / (truth_BKD - truth_BKD.mean(dim=0)).square().sum()
    assert at_once.left() == pytest.approx(float(wanted), rel=1e-5)
    assert by_two.left() == pytest.approx(at_once.left(), rel=1e-9)


def test_the_truth_leaves_nothing_its_mean_all_and_one_record_has_no_spread() -> None:
    truth_UKD = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0))
    exact, mean, alone, zeros = (Unexplained() for _ in range(4))

    exact.add(truth_UKD, truth_UKD, torch.arange(6))
    mean.add(truth_UKD.mean(dim=0).expand(6, -1, -1), truth_UKD, torch.arange(6))
    alone.add(truth_UKD[:1], truth_UKD, torch.zeros(1, dtype=torch.int64))
    zeros.add(torch.ones(2, 1, 4), torch.zeros(2, 1, 4), torch.arange(2))

    assert exact.left() == 0.0
    assert mean.left() == pytest.approx(1.0)
    assert alone.left() is None
    assert zeros.left() is None
    assert Unexplained().left() is None
