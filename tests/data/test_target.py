"""Holds data/target.py to its promise: one order of labels everywhere, and no unknown label becomes another class."""

import math
import subprocess
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dougong.core.errors import DataError
from dougong.core.signature import Target
from dougong.data.modality.medium import BadValue
from dougong.data.target import encode_target, infer_target

CLASSES = Target(name="label", task="single_label", labels=("1", "2", "no"))
MARKS = Target(name="label", task="multi_label", labels=("cat", "dog"))
NUMBER = Target(name="label", task="regression", mean=10.0, scale=2.0)

ORDER_IN_ANOTHER_PROCESS = """
import pyarrow as pa
from dougong.data.target import infer_target
print(infer_target(pa.chunked_array([["nan", "2", "b", "10", "inf", "1", "a"]]), "label", None).labels)
"""


def inferred(cells: Any, task: Any = None) -> Target:
    return infer_target(pa.chunked_array([cells if isinstance(cells, pa.Array) else pa.array(cells)]), "label", task)


@pytest.mark.parametrize(
    ("cells", "task", "labels"),
    [
        (["b", "a", "b", None], "single_label", ("a", "b")),
        (["10", "9", "x"], "single_label", ("9", "10", "x")),
        ([3, 1, 20], "single_label", ("1", "3", "20")),
        ([True, False], "single_label", ("False", "True")),
        ([["dog"], ["cat", "dog"], []], "multi_label", ("cat", "dog")),
        ([0.5, 1.5], "regression", ()),
        ([Decimal("0.5"), Decimal("1.5")], "regression", ()),
        (list(range(21)), "regression", ()),
        (pa.array(["b", "a"]).dictionary_encode(), "single_label", ("a", "b")),
    ],
)
def test_the_task_and_its_labels_follow_from_the_column(cells: Any, task: str, labels: tuple[str, ...]) -> None:
    found = inferred(cells)
    assert (found.task, found.labels) == (task, labels)


def test_a_named_task_wins() -> None:
    assert inferred([1, 2, 3], "regression").mean == 2.0
    assert inferred([1.0, 2.0, math.nan], "single_label").labels == ("1", "2")
    assert inferred(["1.5", "2.5", "abc"], "regression").mean == 2.0


def test_the_order_of_labels_is_the_same_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", ORDER_IN_ANOTHER_PROCESS],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }
    assert found == {"('1', '2', '10', 'inf', 'a', 'b', 'nan')"}


@pytest.mark.parametrize(
    ("cells", "task", "message"),
    [
        ([None, None], None, "target 'label' is empty: it has no value to learn"),
        ([[], []], None, "target 'label' is empty: it has no value to learn"),
        (["a", "a"], None, "target 'label' has one value only, 'a': there is nothing to learn"),
        ([0.1, 0.1, 0.1], None, "target 'label' has no two different numbers: there is nothing to learn"),
        (["a", "b"], "regression", "target 'label' has no two different numbers"),
        ([[1.0], [2.0]], "regression", "target 'label' has no two different numbers"),
        (["ab", "cd"], "multi_label", "target 'label' holds string, which task: multi_label cannot learn"),
        ([["a"], ["b"]], "single_label", r"target 'label' holds list<.*>, which task: single_label cannot learn"),
        ([{"a": 1}, {"a": 2}], None, r"target 'label' holds struct<.*>, which task: single_label cannot learn"),
        ([str(i) for i in range(10_001)], None, r"has 10,001 different values\. For classes use at most 10,000"),
    ],
)
def test_a_column_that_cannot_be_learnt_is_refused(cells: Any, task: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inferred(cells, task)


def test_numbers_are_standardised_by_what_was_learnt_of_the_finite_ones() -> None:
    found = inferred([1.0, 3.0, None, math.nan, math.inf])
    assert (found.mean, found.scale) == (2.0, 1.0)
    np.testing.assert_allclose(encode_target([3.0, 2], found), np.array([1, 0], np.float32))


def test_the_largest_numbers_have_a_scale() -> None:
    found = inferred([-1e308, 1e308])
    assert found.scale == pytest.approx(1e308)
    assert encode_target([1e308], found)[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("cells", "target", "want"),
    [
        (["no", 2, 2.0, "1"], CLASSES, np.array([2, 1, 1, 0], np.int64)),
        ([["dog"], [], ["dog", "cat"]], MARKS, np.array([[0, 1], [0, 0], [1, 1]], np.float32)),
        ([12, "8"], NUMBER, np.array([1, -1], np.float32)),
        ([], MARKS, np.zeros((0, 2), np.float32)),
    ],
)
def test_cells_become_numbers_of_the_promised_kind(cells: list[Any], target: Target, want: Any) -> None:
    encoded = encode_target(cells, target)
    assert encoded.dtype == want.dtype
    np.testing.assert_array_equal(encoded, want)


@pytest.mark.parametrize(
    ("cell", "target", "reason"),
    [
        (None, CLASSES, "the target is missing"),
        (math.nan, CLASSES, "the target is missing"),
        ("maybe", CLASSES, "target 'maybe' was not among the 3 labels of the training data"),
        (["1"], CLASSES, r"target \"\['1'\]\" was not among the 3 labels"),
        (None, MARKS, "the target is missing"),
        (["cow"], MARKS, "target 'cow' was not among the 2 labels of the training data"),
        ([None], MARKS, "the target is missing"),
        ("cat", MARKS, "target holds 'cat', not a list of labels"),
        (None, NUMBER, "the target is missing"),
        (math.inf, NUMBER, "label holds inf"),
        ("many", NUMBER, "label holds 'many', not a number"),
        (1e300, NUMBER, r"target holds 1e\+300, which is too far from the others to be learnt"),
    ],
)
def test_a_target_that_cannot_be_learnt_from_is_a_bad_value(cell: Any, target: Target, reason: str) -> None:
    with pytest.raises(BadValue, match=reason):
        encode_target([cell], target)
