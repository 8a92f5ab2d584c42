"""The whole job on a user's own table, in one call.

Here        fit.
Elsewhere   carrying a recipe out (recipes/run.py); what comes back (bundle/model.py).
Promise     no option is needed but the table, and the target where its name does not tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dougong.bundle.model import Model
from dougong.core.config import parse
from dougong.core.signature import Task
from dougong.data.table import open_table
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe

BATCH_SIZE: Final = 32
FEWEST_STEPS: Final = 600
MOST_STEPS: Final = 20_000
EPOCHS: Final = 20
JUDGED: Final = 30
"""Times at most, over a whole training."""

PATIENCE: Final = 8


def fit(
    table: str | Path,
    target: str | None = None,
    *,
    task: Task | None = None,
    columns: Mapping[str, str] | None = None,
    modalities: Sequence[str] | None = None,
    test: str | Path | None = None,
    unit: str | None = None,
    allow_leak: bool = False,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Model:
    """Train a model on a table (Parquet, CSV, JSONL, or a folder of class folders) and return it.

    Args:
        table: where the training records are; a tenth of them is held out to choose the best checkpoint.
        target: the column to predict; None where it is called target, label, answer, class or y.
        task: `single_label`, `multi_label` or `regression`; None infers it from the target's values.
        columns: roles that differ from the inferred ones, such as `{"code": "ignore", "note": "text"}`.
        modalities: columns to use; None uses all that have a role and an encoder.
        test: records to judge on; None judges on the held-out ones.
        unit: a column whose values must not be on two sides of the split, such as the patient.
        allow_leak: go on although `test` shares a unit or a medium with the table.
        steps: optimizer steps; None: 20 passes, within limits, or until the held-out figure no longer improves.
        seed: the same seed gives the same model.
        out: the run's folder, with its report; None keeps it in a temporary folder that is named in `provenance`.
        quiet: print nothing.

    Raises:
        DougongError: the table, a column or an option cannot be used; the message says what would work.
    """
    values: dict[str, Any] = {
        "name": Path(table).stem or "fit",
        "seed": seed,
        "data": {
            "train": str(table),
            "test": None if test is None else str(test),
            "target": target,
            "task": task,
            "columns": dict(columns or {}),
            "modalities": None if modalities is None else list(modalities),
            "unit": unit,
            "allow_leak": allow_leak,
            "withhold": 0.15,
            "loader": {"group_by": "auto", "batch_size": BATCH_SIZE},
        },
    }
    values["train"] = _training(open_table(table).num_rows, steps)
    recipe = parse(Recipe, values, where="fit")
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="dougong-")) / "run"
    return run_recipe(recipe, folder, quiet=quiet).model


def _training(num_rows: int, steps: int | None) -> dict[str, Any]:
    """A small table is passed over more often, a large one judged more rarely."""
    an_epoch = max(1, num_rows // BATCH_SIZE)
    patience = None if steps is not None else PATIENCE
    steps = steps or min(max(EPOCHS * an_epoch, FEWEST_STEPS), MOST_STEPS)
    return {"steps": steps, "evaluate_every": max(an_epoch, steps // JUDGED, 1), "patience": patience}
