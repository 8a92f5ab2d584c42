"""Judging a finished model again.

Here        judge: a bundle or a run on a table, with modalities withheld; judge_contribution: what each counts.
Elsewhere   the figures (engine/evaluate.py); the run's own judgement (recipes/run.py).
Promise     without a table, it is the run's own test table, never its training records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dougong.core.config import from_yaml, parse
from dougong.core.errors import ConfigError
from dougong.data.table import Table
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import SETTINGS
from dougong.recipes.tables import open_tables
from dougong.serve.contribution import Contribution, measure_contribution
from dougong.serve.files import load_from


def judge(model: Path, table: Path | None, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Figures by condition: everything, and everything without `missing`.

    Raises:
        ConfigError: there is no table to judge on, or `missing` names no modality.
    """
    loaded = load_from(model)
    names = list(loaded.preparation.modalities)
    strange = [name for name in missing if name not in names]
    if strange:
        raise ConfigError(f"--missing {strange[0]!r} is no modality of this model. Use some of {', '.join(names)}.")
    where: Table | Path = table if table is not None else _own_test_table(model)
    conditions = {"all": tuple(names)}
    if missing:
        kept = tuple(name for name in names if name not in missing)
        conditions[f"without {', '.join(missing)}"] = kept
    figures: dict[str, Any] = {}
    for condition, keep in conditions.items():
        found = loaded.evaluate(where, keep=keep)
        figures[condition] = {
            "metrics": found.metrics,
            "num_records": found.num_records,
            "set_aside": len(found.bad),
            "gate": found.gate,
        }
    return figures


def judge_contribution(model: Path, table: Path | None) -> Contribution:
    """How much each modality counts, on a table.

    Raises:
        ConfigError: there is no table to judge on, or the model has one modality.
    """
    return measure_contribution(load_from(model), table if table is not None else _own_test_table(model))


def _own_test_table(model: Path) -> Table:
    run = model if (model / SETTINGS).exists() else model.parent
    if not (run / SETTINGS).exists():
        raise ConfigError(f"{model} is a bundle without its run: name a table to judge on, with --data.")
    recipe = parse(Recipe, from_yaml((run / SETTINGS).read_text(encoding="utf-8"), where=SETTINGS), where=SETTINGS)
    return open_tables(recipe.data, seed=recipe.seed).test
