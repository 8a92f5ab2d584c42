"""Signals and lists of features go the whole way: table, training, bundle, report."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import dougong
from dougong.core.config import parse
from dougong.recipes.check import check_recipe_or_table
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe


def pulses(path: Path, num_rows: int = 120) -> Path:
    """The label is slow or fast; it shows in the wave and in one of six features, where they are there."""
    random = np.random.default_rng(0)
    fast_R = random.integers(0, 2, num_rows)
    waves, features = [], []
    for row, fast in enumerate(fast_R):
        length = int(random.integers(200, 400))
        wave_T = np.sin(np.arange(length) * (0.8 if fast else 0.1) + random.uniform(0, 6))
        waves.append(None if row % 5 == 1 else wave_T.tolist())
        features.append(None if row % 5 == 2 else [*random.normal(size=5), 2.0 * fast + random.normal(0, 0.1)])
    labels = np.where(fast_R, "fast", "slow").tolist()
    pq.write_table(pa.table({"wave": waves, "features": features, "label": labels}), path)
    return path


def test_signals_are_learnt_from_kept_and_shown(tmp_path: Path) -> None:
    table = pulses(tmp_path / "pulses.parquet")
    values = {
        "name": "pulses",
        "data": {"train": str(table), "loader": {"batch_size": 32}},
        "model": {"width": 32, "encoders": {"wave": {"kind": "signal", "form": "spectrum", "window": 64}}},
        "train": {"steps": 60, "precision": "fp32", "optimizer": {"learning_rate": 3e-3}},
    }

    result = run_recipe(parse(Recipe, values, where="test"), tmp_path / "run", quiet=True)

    assert result.evaluations["all"].metrics["accuracy"] > 0.9
    assert result.notes == tuple(note for note in result.notes if "left out" not in note)
    record = {"features": [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]}
    (answer,) = result.model.predict([record])
    assert (answer.answer, answer.absent) == ("fast", ("wave",))
    assert dougong.load(tmp_path / "run" / "bundle").predict([record]) == [answer]
    shown = [sample["inputs"]["wave"] for sample in json.loads((tmp_path / "run" / "samples.json").read_text())]
    assert any(len(given["points"]) > 100 for given in shown if not given["absent"])
    assert "<polyline" in (tmp_path / "run" / "report.html").read_text()


def test_a_check_counts_the_parameters_of_a_model_of_signals(tmp_path: Path) -> None:
    found = check_recipe_or_table(str(pulses(tmp_path / "pulses.parquet")))

    assert found.num_parameters is not None
    assert not any("encoder" in warning for warning in found.warnings)
