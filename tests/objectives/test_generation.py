"""The formulas, by hand."""

from __future__ import annotations

import math

import torch

from dougong.model.decoder import DecoderOutput
from dougong.objectives.generation import generation_loss, token_losses, words_loss
from dougong.objectives.reconstruction import reconstruction_loss


def test_a_records_tokens_are_averaged_and_records_summed() -> None:
    chance_RNV = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.1, 0.9], [0.5, 0.5]]])
    target_RN = torch.tensor([[0, 1], [1, 0]])
    due_RN = torch.tensor([[True, True], [True, False]])

    loss = generation_loss(chance_RNV.log(), target_RN, due_RN)

    want = (-math.log(0.5) - math.log(0.75)) / 2 - math.log(0.9)
    torch.testing.assert_close(loss, torch.tensor(want))


def test_what_is_not_due_has_no_gradient_and_no_token_at_all_adds_nothing() -> None:
    score_RNV = torch.randn(2, 3, 4, requires_grad=True)
    due_RN = torch.tensor([[True, False, True], [False, False, False]])

    loss = generation_loss(score_RNV, torch.zeros(2, 3, dtype=torch.long), due_RN)
    loss.backward()

    assert score_RNV.grad is not None
    touched_RN = score_RNV.grad.abs().sum(dim=-1) > 0
    assert torch.equal(touched_RN, due_RN)
    empty = generation_loss(torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3).bool())
    assert empty == 0


def test_micro_batches_add_up() -> None:
    score_RNV, target_RN = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    due_RN = torch.rand(5, 3) < 0.6

    parts = [generation_loss(score_RNV[cut], target_RN[cut], due_RN[cut]) for cut in (slice(0, 2), slice(2, 5))]

    torch.testing.assert_close(generation_loss(score_RNV, target_RN, due_RN), torch.stack(parts).sum())
    assert token_losses(score_RNV.half(), target_RN).dtype == torch.float32


def test_reconstruction_counts_a_shared_picture_for_each_record() -> None:
    made_UCHW, true_UCHW = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.5]]]])
    strayed_U = torch.tensor([0.4, 0.8])

    loss = reconstruction_loss(made_UCHW, true_UCHW, strayed_U, torch.tensor([0, 0, 1]), commitment=0.25)

    first, second = 5.0 + 0.1, 0.125 + 0.2
    torch.testing.assert_close(loss, torch.tensor(2 * first + second))


def test_words_weigh_by_record_and_further_ones_by_their_weight() -> None:
    loss_BN = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    due_BN = torch.tensor([[True, True], [True, False]])
    none = torch.zeros(2, 2, dtype=torch.bool)
    score = torch.zeros(2, 3, 4)

    plain = words_loss(DecoderOutput(score, loss_BN, due_BN, ()))
    more = words_loss(
        DecoderOutput(score, loss_BN, due_BN, ((2 * loss_BN, due_BN), (loss_BN, none))), further_weight=0.5
    )

    assert plain == 2.0 + 5.0
    assert more == 7.0 + 0.5 * (14.0 + 0.0) / 2
