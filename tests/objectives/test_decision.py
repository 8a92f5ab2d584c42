"""Losses add up over micro-batches and are what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.core.signature import Task
from dougong.objectives.decision import decision_loss, decision_probabilities

CASES: list[tuple[Task, torch.Tensor, torch.Tensor]] = [
    ("single_label", torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])),
    ("multi_label", torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()),
    ("regression", torch.randn(6, 1), torch.randn(6)),
]


@pytest.mark.parametrize(("task", "output_BC", "target"), CASES)
def test_uneven_micro_batches_add_up(task: Task, output_BC: torch.Tensor, target: torch.Tensor) -> None:
    whole = decision_loss(output_BC, target, task)

    parts = decision_loss(output_BC[:1], target[:1], task) + decision_loss(output_BC[1:], target[1:], task)

    assert whole.shape == ()
    torch.testing.assert_close(parts, whole)


def test_each_task_has_its_loss() -> None:
    even = torch.zeros(2, 4)
    log2, log4 = torch.tensor(2.0).log(), torch.tensor(4.0).log()

    torch.testing.assert_close(decision_loss(even, torch.tensor([0, 3]), "single_label"), 2 * log4)
    torch.testing.assert_close(decision_loss(even, torch.ones(2, 4), "multi_label"), 2 * log2)
    torch.testing.assert_close(decision_loss(even[:, :1], torch.tensor([3.0, 1.0]), "regression"), torch.tensor(10.0))


def test_smoothing_costs_a_sure_answer() -> None:
    sure, target = torch.tensor([[20.0, -20.0]]), torch.tensor([0])
    for task, labels in (("single_label", target), ("multi_label", torch.tensor([[1.0, 0.0]]))):
        kind: Any = task
        assert decision_loss(sure, labels, kind, 0.1) > decision_loss(sure, labels, kind) + 0.5


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_is_no_share_is_refused(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=f"label_smoothing={smoothing} is no share"):
        decision_loss(torch.zeros(1, 2), torch.tensor([0]), "single_label", smoothing)


def test_smoothing_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 has no labels to smooth"):
        decision_loss(torch.zeros(1, 1), torch.zeros(1), "regression", 0.1)


def test_probabilities_are_over_the_classes_or_of_each() -> None:
    output_BC = torch.randn(3, 4)

    torch.testing.assert_close(decision_probabilities(output_BC, "single_label").sum(dim=1), torch.ones(3))
    assert torch.equal(decision_probabilities(output_BC, "multi_label"), output_BC.sigmoid())
    assert torch.equal(decision_probabilities(output_BC, "regression"), output_BC)


def test_half_precision_outputs_are_judged_in_full() -> None:
    loss = decision_loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]), "single_label")
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_what_is_computed_in_float64_stays_so(task: Task) -> None:
    output = torch.randn(4, 3, dtype=torch.float64)
    target = {"single_label": torch.tensor([0, 1, 2, 0]), "multi_label": torch.ones(4, 3), "regression": torch.ones(4)}
    found = decision_loss(output, target[task], task)
    assert found.dtype == torch.float64
    assert found != decision_loss(output.float(), target[task], task).double()
