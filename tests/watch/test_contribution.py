import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dougong
from dougong.bundle.model import Model
from dougong.watch.contribution import StudyConfig, calibration_error, interactions, of_records, study

Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(colour_run: Path) -> Model:
    return dougong.load(colour_run / "bundle")


@pytest.fixture(scope="module")
def unseen(records: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "unseen.parquet"
    pq.write_table(pa.Table.from_pylist(records(40, seed=5, missing=0.1)), path)
    return path


def by_orders(value: dict[int, float], num: int) -> list[float]:
    """Shapley values by their definition: what each adds, on average over all orders."""
    found = [0.0] * num
    orders = list(itertools.permutations(range(num)))
    for order in orders:
        there = 0
        for player in order:
            found[player] += (value[there | 1 << player] - value[there]) / len(orders)
            there |= 1 << player
    return found


def test_records_values_are_those_of_all_orders_and_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(6, 4, generator=generator) for _ in range(8)]

    found = of_records(outputs, "single_label")

    for record in range(6):
        target = int(outputs[-1][record].argmax())
        sure = {k: float(outputs[k][record].double().softmax(0)[target]) for k in range(8)}
        assert found.value_BM[record].tolist() == pytest.approx(by_orders(sure, 3), abs=1e-12)
        assert found.value_BM[record].sum() == pytest.approx(sure[7] - sure[0], abs=1e-12)


def test_a_model_that_adds_up_has_no_interactions_and_an_and_has() -> None:
    adds = np.array([0.0, 1.0, 2.0, 3.0])
    both = np.array([0.0, 0.0, 0.0, 1.0])
    either = np.array([0.0, 1.0, 1.0, 1.0])

    assert interactions(adds, 2)[0, 1] == 0.0
    assert interactions(both, 2)[0, 1] == 1.0  # synergy
    assert interactions(either, 2)[0, 1] == -1.0  # redundancy


def test_calibration_error_is_what_confidence_is_wrong_by() -> None:
    sure = np.array([0.9] * 10 + [0.6] * 10)
    right = np.array([True] * 9 + [False] + [True] * 3 + [False] * 7)

    assert calibration_error(sure, right) == pytest.approx(0.5 * 0.0 + 0.5 * 0.3)
    assert calibration_error(np.array([]), np.array([], bool)) == 0.0


def test_a_study_of_a_bundle_adds_up_and_agrees_with_judging(model: Model, unseen: Path) -> None:
    found = study(model, unseen, StudyConfig(num_records=40, num_permutations=2))

    assert sum(found.value.values()) == pytest.approx(found.with_all - found.with_none)
    assert found.record_value_BM.sum(axis=1) == pytest.approx(found.record_all_B - found.record_none_B)
    judged = model.evaluate(unseen, keep=("clip", "remark", "table")).metrics["accuracy"]
    assert found.without["photo"] == pytest.approx(judged, abs=1e-6)
    assert set(found.spoilt) == {"photo", "clip", "remark", "table"}
    assert sum(found.gate.values()) == pytest.approx(1.0, abs=0.05)  # less where a record has nothing
    assert len(found.patterns) == 15
    assert all(0 <= one.calibration_error <= 1 and math.isfinite(one.confidence) for one in found.patterns)
