import math
from typing import Any

import numpy as np
import pytest
import torch

from dougong.core.signature import Target
from dougong.engine.metrics import DecisionMetrics, decide, primary_metric

KIND = Target(name="kind", task="single_label", labels=("a", "b", "c", "d"))
TAGS = Target(name="tags", task="multi_label", labels=("a", "b", "c"))
PRICE = Target(name="price", task="regression", mean=100.0, scale=10.0)


def judge(target: Target, output: list[list[float]], known: list[Any], *, parts: int = 1) -> dict[str, float]:
    metrics = DecisionMetrics(target)
    dtype = torch.int64 if target.task == "single_label" else torch.float32
    output_BC, target_B = torch.tensor(output), torch.tensor(known, dtype=dtype)
    for chosen in torch.arange(len(known)).chunk(parts):
        metrics.update(decide(target, output_BC[chosen]), target_B[chosen])
    return metrics.compute()


def one_hot(*classes: int) -> list[list[float]]:
    return [[5.0 * (c == k) for c in range(4)] for k in classes]


@pytest.mark.parametrize("parts", [1, 3])
def test_single_label_figures_are_those_of_a_hand(parts: int) -> None:
    # known      a a a a b b c      d never occurs and is never predicted
    # predicted  a a a b b c c
    found = judge(KIND, one_hot(0, 0, 0, 1, 1, 2, 2), [0, 0, 0, 0, 1, 1, 2], parts=parts)

    assert found == pytest.approx(
        {
            "accuracy": 5 / 7,
            "balanced_accuracy": (3 / 4 + 1 / 2 + 1) / 3,
            # 2 * hits / (known + predicted)
            "macro_f1": (6 / 7 + 2 / 4 + 2 / 3) / 3,
        }
    )


def test_the_confusion_has_true_classes_in_rows() -> None:
    metrics = DecisionMetrics(KIND)
    assert metrics.confusion().tolist() == np.zeros((4, 4)).tolist()  # type: ignore[union-attr]
    metrics.update(decide(KIND, torch.tensor(one_hot(1, 1, 0))), torch.tensor([0, 0, 3]))
    confusion = metrics.confusion()
    assert confusion is not None
    assert confusion.tolist() == [[0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert DecisionMetrics(PRICE).confusion() is None


def test_a_target_of_one_class_can_be_judged() -> None:
    only = Target(name="kind", task="single_label", labels=("a",))
    metrics = DecisionMetrics(only)
    metrics.update(decide(only, torch.tensor([[1.0], [2.0]])), torch.tensor([0, 0]))
    assert metrics.compute() == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}
    assert metrics.confusion().tolist() == [[2]]  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [1, 2])
def test_multi_label_figures_are_those_of_a_hand(parts: int) -> None:
    # label  scores               known      predicted
    # a      2, 1, -1, -2         1 0 1 0    1 1 0 0
    # b      -1, 1, -2, 2         0 1 0 0    0 1 0 1
    # c      never occurs and is never predicted
    output = [[2.0, -1.0, -3.0], [1.0, 1.0, -3.0], [-1.0, -2.0, -3.0], [-2.0, 2.0, -3.0]]
    known = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]

    found = judge(TAGS, output, known, parts=parts)

    assert found == pytest.approx(
        {
            "micro_f1": 2 * 2 / (3 + 4),
            "macro_f1": (2 * 1 / (2 + 2) + 2 * 1 / (1 + 2)) / 2,
            # of each label that occurs: precision where each known one stands in the ranking
            "mean_average_precision": ((1 / 1 + 2 / 3) / 2 + 1 / 2) / 2,
        }
    )


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_faultless_model_has_full_marks_whatever_the_number_of_labels(num_labels: int) -> None:
    target = Target(name="tags", task="multi_label", labels=("a", "b")[:num_labels])
    found = judge(target, [[3.0] * num_labels, [-3.0] * num_labels], [[1] * num_labels, [0] * num_labels])
    assert found == {"micro_f1": 1.0, "macro_f1": 1.0, "mean_average_precision": 1.0}


def test_a_label_that_is_predicted_and_never_occurs_costs_f1() -> None:
    found = judge(TAGS, [[3.0, 3.0, -3.0]], [[1, 0, 0]])
    assert found == pytest.approx({"micro_f1": 2 / 3, "macro_f1": 0.5, "mean_average_precision": 1.0})


def test_figures_that_the_records_do_not_define_are_left_out() -> None:
    assert DecisionMetrics(KIND).compute() == DecisionMetrics(TAGS).compute() == DecisionMetrics(PRICE).compute() == {}
    assert judge(TAGS, [[-3.0] * 3], [[0, 0, 0]]) == {}
    assert set(judge(TAGS, [[3.0] * 3], [[0, 0, 0]])) == {"micro_f1", "macro_f1"}
    assert set(judge(PRICE, [[0.0], [1.0]], [0.5, 0.5])) == {"rmse", "mae"}  # r2 divides by the spread
    assert set(judge(PRICE, [[0.0]], [0.5])) == {"rmse", "mae"}


@pytest.mark.parametrize("parts", [1, 3])
def test_regression_figures_are_in_the_targets_own_units(parts: int) -> None:
    # known 100, 110, 120; predicted 103, 110, 116
    found = judge(PRICE, [[0.3], [1.0], [1.6]], [0.0, 1.0, 2.0], parts=parts)

    assert found == pytest.approx(
        {"rmse": math.sqrt((9 + 0 + 16) / 3), "mae": 7 / 3, "r2": 1 - (9 + 16) / (100 + 100)}, rel=1e-6
    )


def test_a_large_mean_costs_no_digits() -> None:
    far = Target(name="year", task="regression", mean=1e9, scale=1.0)
    assert judge(far, [[0.5], [1.5]], [0.0, 1.0])["rmse"] == pytest.approx(0.5)


def test_decisions_are_the_likeliest_class_the_likely_labels_and_the_value() -> None:
    single = decide(KIND, torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16))
    assert single.prediction_B.tolist() == [1]
    assert single.probability_BC is not None
    assert single.probability_BC.sum().item() == pytest.approx(1.0)
    assert single.probability_BC[0, 1].item() == pytest.approx(math.e / (math.e + 3))

    multi = decide(TAGS, torch.tensor([[0.1, 0.0, -0.1]]))
    assert multi.prediction_B.tolist() == [[1, 0, 0]]
    assert multi.probability_BC is not None
    assert multi.probability_BC[0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.1)))

    value = decide(PRICE, torch.tensor([[-0.5]]))
    assert value.prediction_B.tolist() == [95.0]
    assert value.probability_BC is None


def test_each_task_has_a_figure_to_be_steered_by() -> None:
    for target, output, known in (
        (KIND, one_hot(0), [0]),
        (TAGS, [[1.0, -1.0, -1.0]], [[1, 0, 0]]),
        (PRICE, [[1.0]], [0.0]),
    ):
        assert primary_metric(target.task).name in judge(target, output, known)
    assert [primary_metric(t).higher_is_better for t in ("single_label", "multi_label", "regression")] == [
        True,
        True,
        False,
    ]
