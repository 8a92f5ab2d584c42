"""What a run would meet, said before it starts.

Here        check_recipe_or_table, CheckResult.
Elsewhere   reading every record (data/check.py).
Promise     nothing is trained and nothing is written; every record is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dougong.core.errors import DataError
from dougong.data.check import TableReport, check_table
from dougong.data.columns import ColumnRole
from dougong.data.preparation import fit_preparation
from dougong.data.target import infer_target
from dougong.recipes.known import KNOWN, AnyRecipe, read_any_recipe
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.tables import open_tables


class CheckResult(NamedTuple):
    """What was found."""

    name: str
    roles: dict[str, ColumnRole]
    reports: dict[str, TableReport]
    """By part: train, validation, test."""
    inputs: dict[str, Any]
    """What a model would read, by modality."""
    target: dict[str, Any]
    num_parameters: int | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "columns": {name: found._asdict() for name, found in self.roles.items()},
            "inputs": self.inputs,
            "target": self.target,
            "parameters": self.num_parameters,
            "tables": {
                part: {
                    "rows": report.num_rows,
                    "bad": report.num_bad,
                    "present": report.num_present,
                    "first_bad": [record._asdict() for record in report.bad],
                }
                for part, report in self.reports.items()
            },
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def check_recipe_or_table(what: str, *, target: str | None = None, settings: Sequence[str] = ()) -> CheckResult:
    """Read what a recipe's name or file, or a table's path, stands for.

    Raises:
        DougongError: it can be neither read nor run.
    """
    if what in KNOWN or what.endswith((".yaml", ".yml")):
        recipe: AnyRecipe = read_any_recipe(what, settings)
    elif Path(what).exists():
        recipe = Recipe(name=Path(what).stem, data=DataConfig(train=what, target=target))
    else:
        raise DataError(f"{what!r} is neither a recipe ({', '.join(KNOWN)}) nor a file or folder that exists.")
    tables = open_tables(recipe.data, seed=recipe.seed)
    found = infer_target(tables.train.column(tables.target), tables.target, recipe.data.task)
    preparation = fit_preparation(tables.train, tables.roles, found, recipe.data.preparation)
    parts = {"train": tables.train, "validation": tables.validation}
    if not tables.test_is_validation:
        parts["test"] = tables.test
    reports = {part: check_table(table, preparation) for part, table in parts.items()}
    signature = preparation.signature()
    warnings = list(_warnings(reports, recipe.train.max_bad_share))
    num_parameters: int | None = None
    if {shape.kind for shape in signature.inputs.values()} <= {"text", "image", "audio", "table"}:
        network = recipe.model.build(signature)
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
    else:
        warnings.append("signals and volumes are read, but have no encoder yet: a run leaves them out")
    return CheckResult(
        name=what,
        roles=tables.roles,
        reports=reports,
        inputs={name: shape.model_dump() for name, shape in signature.inputs.items()},
        target=found.model_dump(),
        num_parameters=num_parameters,
        notes=tables.notes,
        warnings=tuple(warnings),
    )


def _warnings(reports: dict[str, TableReport], most: float) -> list[str]:
    warnings = []
    for part, report in reports.items():
        if report.num_bad > most * report.num_rows:
            share = report.num_bad / report.num_rows
            warnings.append(f"{part}: {share:.1%} of the records are bad, over train.max_bad_share: a run would refuse")
        for name, present in report.num_present.items():
            if present == 0:
                warnings.append(f"{part}: no record has {name}")
    return warnings
