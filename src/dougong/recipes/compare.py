"""The sandwich beside its baselines, trained alike.

Here        run_demo, compare, Comparison.
Elsewhere   one run (recipes/run.py); the interval of a gain (recipes/interval.py).
Promise     every row has the same records, steps, batches, augmentation and optimizer, and is judged on the same
            test records; the gain's interval resamples whole pictures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.files import write_json
from dougong.data.modality.medium import unit_key
from dougong.data.table import cells_of
from dougong.engine.evaluate import Evaluation
from dougong.model.sandwich import SandwichConfig
from dougong.recipes.interval import Gain, paired_gain
from dougong.recipes.known import read_recipe
from dougong.recipes.losses import ObjectiveConfig
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import RunResult, judged_views, run_recipe, write_evaluation
from dougong.recipes.tables import Tables, open_tables
from dougong.watch.report import write_report

OF_THE_BRIDGE: Final = ("completion", "gate_quality", "gate_temperature")
TAUGHT_OF_THE_BRIDGE: Final = ("completion_weight", "gate_weight")
"""Settings of the model and the objective that late fusion has nothing for."""


class Row(NamedTuple):
    """One model of a comparison."""

    name: str
    figures: dict[str, float]
    """Accuracy by condition."""
    parameters: int
    seconds: float


class Comparison(NamedTuple):
    """What was compared."""

    rows: tuple[Row, ...]
    gains: dict[str, Gain]
    """Of the sandwich over late concatenation, by condition."""
    num_records: int
    run: RunResult
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [row._asdict() for row in self.rows],
            "gains": {name: gain._asdict() for name, gain in self.gains.items()},
            "test_records": self.num_records,
            "seconds": round(self.seconds, 1),
            **self.run.as_json(),
        }


def run_demo(folder: Path, settings: Sequence[str] = (), *, quiet: bool = False) -> Comparison:
    """The main job on easy-VQA: baselines, sandwich, bundle, report.

    Raises:
        RunError: the folder holds a run already.
    """
    return compare(read_recipe("vqa-demo", settings), folder, quiet=quiet)


def compare(recipe: Recipe, folder: Path, *, quiet: bool = False) -> Comparison:
    """Train the recipe's sandwich and its baselines."""
    started = time.perf_counter()
    tables = open_tables(recipe.data, seed=recipe.seed)
    rows = [_majority(tables, recipe)]
    results: dict[str, RunResult] = {}
    for name, altered in _arrangements(recipe):
        inner = folder if name == "sandwich" else folder / "baselines" / name.replace(" ", "-")
        results[name] = run_recipe(altered, inner, quiet=quiet, tables=tables)
        figures = {condition: found.metrics["accuracy"] for condition, found in results[name].evaluations.items()}
        rows.append(Row(name, figures, results[name].num_parameters, results[name].train_seconds))
    ours, theirs = results["sandwich"], results["late concat"]
    units = _units(tables)
    gains = {
        condition: _gain(ours.evaluations[condition], theirs.evaluations[condition], units)
        for condition in ours.evaluations
    }
    comparison = Comparison(tuple(rows), gains, tables.test.num_rows, ours, time.perf_counter() - started)
    _write(comparison, recipe)
    return comparison


def _arrangements(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The same recipe with the parts put together otherwise; the sandwich last, since its folder holds the others."""
    conditions = recipe.data.conditions
    if not conditions:
        raise ConfigError(
            "this compares what is asked in several ways, and data.conditions are none. Name two or more."
        )
    shared = set.intersection(*(set(keep) for keep in conditions.values()))
    asked = tuple(sorted({name for keep in conditions.values() for name in keep} - shared))
    return [
        ("question only", _altered(recipe, modalities=asked, fusion="late")),
        ("image only", _altered(recipe, modalities=tuple(sorted(shared)), fusion="late")),
        ("late concat", _altered(recipe, modalities=recipe.data.modalities, fusion="late")),
        ("sandwich", recipe),
    ]


def _altered(recipe: Recipe, *, modalities: tuple[str, ...] | None, fusion: str) -> Recipe:
    values = recipe.model_dump(mode="json")
    values["data"]["modalities"] = modalities
    values["model"]["fusion"] = fusion
    if fusion == "late":
        # Nothing meets before the head: there is no gate, and nowhere to stand in.
        model, objective = SandwichConfig().model_dump(mode="json"), ObjectiveConfig().model_dump(mode="json")
        values["model"] |= {name: model[name] for name in OF_THE_BRIDGE}
        values["objective"] |= {name: objective[name] for name in TAUGHT_OF_THE_BRIDGE}
        if values["model"]["decide"] == "gated":
            values["model"]["decide"] = "mean"
    if modalities is not None:
        values["model"]["encoders"] = {
            name: encoder for name, encoder in values["model"]["encoders"].items() if name in modalities
        }
        faster = values["train"]["optimizer"]["multipliers"]
        values["train"]["optimizer"]["multipliers"] = {name: faster[name] for name in faster if name in modalities}
        values["model"]["align"] = values["model"]["align"] if set(values["model"]["align"]) <= set(modalities) else []
    return parse(Recipe, values, where=f"recipe {recipe.name}")


def _majority(tables: Tables, recipe: Recipe) -> Row:
    """Always the commonest training answer."""
    assert tables.target is not None  # a recipe that decides has one
    best, _ = Counter(tables.train.column(tables.target).to_pylist()).most_common(1)[0]
    accuracy = float(np.mean([answer == best for answer in tables.test.column(tables.target).to_pylist()]))
    return Row("majority", dict.fromkeys(recipe.data.conditions, accuracy), 0, 0.0)


def _units(tables: Tables) -> list[Any]:
    """What each test record shares with others, by the column that the split went by."""
    if tables.unit is None or tables.unit not in tables.test.schema.names:
        return list(range(tables.test.num_rows))
    keys = [unit_key(cell) for cell in cells_of(tables.test.column(tables.unit))]
    return [("alone", row) if key is None else key for row, key in enumerate(keys)]


def _gain(ours: Evaluation, theirs: Evaluation, units: list[Any]) -> Gain:
    right_ours, right_theirs = _right_by_row(ours), _right_by_row(theirs)
    rows = sorted(right_ours.keys() & right_theirs.keys())
    return paired_gain(
        np.array([right_ours[row] for row in rows]),
        np.array([right_theirs[row] for row in rows]),
        [units[row] for row in rows],
    )


def _right_by_row(found: Evaluation) -> dict[int, bool]:
    right_B: npt.NDArray[np.bool_] = found.prediction_B == found.target_B
    return dict(zip(found.row_B.tolist(), right_B.tolist(), strict=True))


def _write(comparison: Comparison, recipe: Recipe) -> None:
    """The comparison beside the run, and in its report."""
    rows = [
        {
            "name": row.name,
            **{condition: round(figure, 4) for condition, figure in row.figures.items()},
            "parameters": row.parameters,
            "seconds": round(row.seconds, 1),
        }
        for row in comparison.rows
    ]
    more = {
        "comparison": rows,
        "gains": [
            {"text": f"sandwich over late concat, {condition}", **gain._asdict()}
            for condition, gain in comparison.gains.items()
        ],
    }
    write_evaluation(comparison.run, judged_views(recipe, comparison.run.model.preparation), more)
    write_json(comparison.run.folder / "comparison.json", comparison.as_json())
    write_report(comparison.run.folder)
