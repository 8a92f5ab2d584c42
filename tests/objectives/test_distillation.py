"""Holds objectives/distillation.py to its promise and its formula."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from dougong.core.signature import Task
from dougong.objectives.distillation import distillation_loss

TASKS: tuple[Task, ...] = ("single_label", "multi_label", "regression")


@pytest.mark.parametrize("task", TASKS)
def test_one_who_is_agreed_with_teaches_nothing_and_the_teacher_never_learns(task: Task) -> None:
    torch.manual_seed(0)
    teacher_BC = torch.randn(5, 1 if task == "regression" else 4, requires_grad=True)
    same_BC = teacher_BC.detach().clone().requires_grad_()

    loss = distillation_loss(same_BC, teacher_BC, task)
    loss.backward()  # type: ignore[no-untyped-call]

    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert same_BC.grad is not None
    assert same_BC.grad.abs().max() < 1e-6
    assert teacher_BC.grad is None


@pytest.mark.parametrize("task", TASKS)
def test_it_is_a_sum_over_records(task: Task) -> None:
    torch.manual_seed(0)
    shape = (6, 1 if task == "regression" else 4)
    own_BC, teacher_BC = torch.randn(shape), torch.randn(shape)
    halves = [distillation_loss(own_BC[part], teacher_BC[part], task) for part in (slice(2), slice(2, None))]
    torch.testing.assert_close(torch.stack(halves).sum(), distillation_loss(own_BC, teacher_BC, task))


def test_of_classes_and_labels_it_is_the_divergence_from_the_teacher() -> None:
    torch.manual_seed(0)
    own_BC, teacher_BC = torch.randn(6, 4), torch.randn(6, 4)
    want = kl_divergence(Categorical(logits=teacher_BC), Categorical(logits=own_BC)).sum()
    torch.testing.assert_close(distillation_loss(own_BC, teacher_BC, "single_label"), want)
    each = kl_divergence(Bernoulli(logits=teacher_BC), Bernoulli(logits=own_BC)).mean(dim=1).sum()
    torch.testing.assert_close(distillation_loss(own_BC, teacher_BC, "multi_label"), each)
