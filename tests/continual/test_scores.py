import pytest

from dougong.continual.scores import scores_of
from dougong.core.errors import ConfigError

# After task 0: 90 on it, 20 and 30 on the others not yet learnt; and so on.
MATRIX = [[90.0, 20.0, 30.0], [80.0, 85.0, 40.0], [70.0, 80.0, 95.0]]


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    found = scores_of(MATRIX, before_T=[10.0, 12.0, 15.0])

    assert found.acc == pytest.approx((70 + 80 + 95) / 3)
    assert found.bwt == pytest.approx(((70 - 90) + (80 - 85)) / 2)  # -12.5
    assert found.fwt == pytest.approx(((20 - 12) + (40 - 15)) / 2)
    assert found.forgetting == pytest.approx(((90 - 70) + (85 - 80)) / 2)  # 12.5
    assert found.retention == pytest.approx((70 / 90 + 80 / 85) / 2)


def test_forgetting_is_from_the_best_moment_and_bwt_from_the_first() -> None:
    found = scores_of([[50.0, 0.0, 0.0], [90.0, 60.0, 0.0], [70.0, 80.0, 80.0]])

    assert found.forgetting == pytest.approx(((90 - 70) + (60 - 80)) / 2)  # 0.0
    assert found.bwt == pytest.approx(((70 - 50) + (80 - 60)) / 2)
    assert found.fwt is None


def test_one_task_has_nothing_to_forget() -> None:
    assert scores_of([[70.0]]) == (70.0, None, None, None, None)


def test_what_is_no_square_is_refused() -> None:
    for matrix in ([], [[1.0, 2.0]], [[1.0], [2.0, 3.0]]):
        with pytest.raises(ConfigError, match="scores need a square"):
            scores_of(matrix)
    with pytest.raises(ConfigError, match="2 scores from before learning stand beside 3 tasks"):
        scores_of(MATRIX, before_T=[1.0, 2.0])
