"""Holds data/modality/numbers.py to its promise: a missing value is marked, what is no number is refused."""

from typing import Any

import numpy as np
import pytest
from data_builders import HERE

from dougong.data.modality.medium import BadValue
from dougong.data.modality.numbers import CategoryColumn, NumberColumn, TableConfig, TableModality

MODALITY = TableModality(
    TableConfig(
        numbers=(NumberColumn(name="age", mean=40, scale=10), NumberColumn(name="height")),
        categories=(CategoryColumn(name="colour", values=("blue", "red")), CategoryColumn(name="room", values=("1",))),
    )
)


def test_numbers_are_standardised_and_names_become_places() -> None:
    rows = [MODALITY.decode(cells, HERE) for cells in [(50, 1.5, "red", 1), (40, "2", "blue", "1")]]
    stacked = MODALITY.stack(rows, None)
    np.testing.assert_array_equal(stacked["numbers_UN"], np.array([[1, 1.5], [0, 2]], np.float32))
    np.testing.assert_array_equal(stacked["categories_UK"], [[2, 1], [1, 1]])
    assert stacked["known_UN"].all()


def test_a_missing_value_is_marked_and_never_guessed() -> None:
    stacked = MODALITY.stack([MODALITY.decode((None, 1.5, None, None), HERE)], None)
    np.testing.assert_array_equal(stacked["known_UN"], [[False, True]])
    np.testing.assert_array_equal(stacked["numbers_UN"], [[0, 1.5]])
    np.testing.assert_array_equal(stacked["categories_UK"], [[0, 0]])


def test_a_category_not_seen_in_training_is_the_unknown_one() -> None:
    assert MODALITY.decode((1, 1, "green", 1), HERE)[2] == 0


@pytest.mark.parametrize("room", [1, 1.0, "1"])
def test_a_whole_number_is_one_category_however_it_is_stored(room: Any) -> None:
    assert MODALITY.decode((1, 1, "red", room), HERE)[3] == 1


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (float("nan"), "age holds nan: leave a missing number empty"),
        (float("inf"), "age holds inf: leave a missing number empty"),
        ("-inf", "age holds -inf: leave a missing number empty"),
        ("forty", "age holds 'forty', not a number"),
        ("", "age holds '', not a number"),
        ([1.0], r"age holds '\[1.0\]', not a number"),
        (10**400, "age holds a number of 401 digits: nothing computes with those"),
        (1e300, r"age holds 1e\+300, which is too far from the others to be computed with"),
    ],
)
def test_what_is_no_number_is_refused(age: Any, reason: str) -> None:
    with pytest.raises(BadValue, match=reason):
        MODALITY.decode((age, 1, "red", 1), HERE)


def test_a_row_with_nothing_is_absent_and_one_with_anything_is_not() -> None:
    assert MODALITY.key((None,) * 4) is None
    assert MODALITY.key((None, None, None, 1)) is not None
    assert MODALITY.stack([], None)["numbers_UN"].shape == (0, 2)
    assert MODALITY.stack([], None)["categories_UK"].shape == (0, 2)
