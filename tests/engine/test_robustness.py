"""Holds engine/robustness.py to its formulas."""

import pytest

from dougong.engine.robustness import Robustness, effective_robustness, relative_robustness


def test_relative_robustness_is_the_mean_height_of_the_curve() -> None:
    # Trapezoids of 0.2, 0.3 and 0.5: 0.2 * 0.85 + 0.3 * 0.7 + 0.5 * 0.4 = 0.58.
    assert relative_robustness([0.0, 0.2, 0.5, 1.0], [0.9, 0.8, 0.6, 0.2]) == pytest.approx(0.58)
    assert relative_robustness([0.0, 0.2, 0.5, 1.0], [0.7] * 4) == pytest.approx(0.7)


def test_levels_that_do_not_reach_1_are_a_mean_as_well() -> None:
    assert relative_robustness([0.0, 0.25, 0.5], [1.0, 0.5, 0.0]) == pytest.approx(0.5)


def test_effective_robustness_is_above_what_the_clean_score_predicts() -> None:
    # The baseline, moved up by 0.1, is 0.9, 0.5, 0.3: above it lie 0, 0.2, 0.1, in the mean 0.5 * 0.1 + 0.5 * 0.15.
    ours, theirs = [0.9, 0.7, 0.4], [0.8, 0.4, 0.2]
    assert effective_robustness([0.0, 0.5, 1.0], ours, theirs) == pytest.approx(0.125)
    assert effective_robustness([0.0, 0.5, 1.0], theirs, ours) == pytest.approx(-0.125)


def test_being_better_alike_at_every_level_is_no_robustness() -> None:
    assert effective_robustness([0.0, 0.5, 1.0], [0.9, 0.6, 0.5], [0.7, 0.4, 0.3]) == pytest.approx(0.0)


def test_of_an_error_less_is_more_robust() -> None:
    assert effective_robustness([0.0, 1.0], [2.0, 3.0], [1.0, 4.0], higher_is_better=False) == pytest.approx(1.0)


@pytest.mark.parametrize("levels", [[0.0], [0.1, 0.5], [0.0, 0.5, 0.5], [0.0, 1.0, 0.5]])
def test_what_is_no_curve_is_refused(levels: list[float]) -> None:
    with pytest.raises(AssertionError):
        relative_robustness(levels, [0.5] * len(levels))


def test_the_clean_score_stands_beside() -> None:
    curve = Robustness("image", "accuracy", (0.0, 1.0), (0.9, 0.5), 0.7, None)
    assert curve.clean == 0.9
