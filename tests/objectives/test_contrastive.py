import pytest
import torch
from torch.nn import functional

from dougong.objectives.contrastive import contrastive_loss


def unit(*shape: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape), dim=-1)


def test_where_every_medium_has_one_partner_it_is_clip() -> None:
    left_UD, right_VD, order = unit(6, 8), unit(6, 8), torch.randperm(6)

    found = contrastive_loss(left_UD, right_VD, torch.arange(6), order, temperature=0.1)

    score_UV = left_UD @ right_VD.T / 0.1
    there = functional.cross_entropy(score_UV, order, reduction="sum")
    back = functional.cross_entropy(score_UV.T, order.argsort(), reduction="sum")
    torch.testing.assert_close(found, (there + back) / 2)


def test_two_voices_of_one_sentence_are_never_held_against_each_other() -> None:
    sentence_D, other_D = unit(2, 8)
    voices_UD = torch.stack([sentence_D, sentence_D, other_D])
    right_VD = torch.stack([sentence_D, other_D])

    found = contrastive_loss(voices_UD, right_VD, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), temperature=0.01)

    assert found == pytest.approx(0.0, abs=1e-4)


def test_records_that_repeat_a_pair_count_each() -> None:
    left_UD, right_VD = unit(3, 8), unit(3, 8)
    once = contrastive_loss(left_UD, right_VD, torch.arange(3), torch.arange(3))
    twice = contrastive_loss(left_UD, right_VD, torch.arange(3).repeat(2), torch.arange(3).repeat(2))
    torch.testing.assert_close(twice, 2 * once)


def test_a_medium_without_a_partner_is_something_to_be_told_from_and_no_more() -> None:
    left_UD, right_VD = unit(3, 8).requires_grad_(), unit(2, 8).requires_grad_()

    loss = contrastive_loss(left_UD, right_VD, torch.tensor([0, 1]), torch.tensor([0, 1]))
    loss.backward()

    assert left_UD.grad is not None
    assert left_UD.grad.isfinite().all()
    assert left_UD.grad[2].abs().sum() > 0
    assert (
        contrastive_loss(left_UD, right_VD, torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)) == 0
    )
