"""What a run would meet, said before it starts.

Here        check_recipe_or_table, CheckResult; `read_recipe_or_table`.
Elsewhere   what a step would take (recipes/profile.py); reading every record (data/check.py); duplicates, leaks and
            pairs that do not fit (data/duplicates.py, data/leak.py, data/alignment.py).
Promise     nothing is trained, and nothing is written but the sheet that was asked for; every record is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.core.config import override, parse
from dougong.core.errors import DataError
from dougong.data.alignment import MOST_SIDES, Alignment, find_misaligned, suspicious_rows
from dougong.data.batch import BadRecord
from dougong.data.check import LISTED, TableReport, check_table
from dougong.data.columns import ColumnRole
from dougong.data.duplicates import Duplicates, find_duplicates
from dougong.data.features import sides_of
from dougong.data.leak import MEDIA, Leak
from dougong.data.pairs import PairLoader
from dougong.data.preparation import Preparation, fit_preparation
from dougong.data.table import Table
from dougong.recipes.align import fit_sides, open_align_tables, roles_of_sides
from dougong.recipes.alignment import AlignDataConfig, AlignRecipe
from dougong.recipes.build import target_of
from dougong.recipes.generate import check_spare
from dougong.recipes.generation import GenerateRecipe
from dougong.recipes.known import KNOWN, AnyRecipe, read_any_recipe
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.tables import Tables, open_tables
from dougong.watch.sheet import SheetPart, check_sheet, write_sheet

CHECKED_AT_ONCE: Final = 256


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
    duplicates: tuple[Duplicates, ...] = ()
    leaks: tuple[Leak, ...] = ()
    alignments: tuple[Alignment, ...] = ()

    @property
    def suspicious_rows(self) -> dict[int, tuple[str, ...]]:
        """Training rows that do not fit, the most suspicious first, with the modalities that say so."""
        return suspicious_rows(self.alignments)

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
                    **_quality_as_json(report),
                }
                for part, report in self.reports.items()
            },
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "duplicates": [found.as_json() for found in self.duplicates],
            "leaks": [leak._asdict() for leak in self.leaks],
            "alignments": [found.as_json() for found in self.alignments],
            "suspicious_rows": [{"row": row, "pairs": names} for row, names in self.suspicious_rows.items()],
        }


def read_recipe_or_table(what: str, *, target: str | None = None, settings: Sequence[str] = ()) -> AnyRecipe:
    """What a recipe's name or file stands for; for a table's path, the recipe that would be trained on it.

    Raises:
        DougongError: it is neither.
    """
    if what in KNOWN or what.endswith((".yaml", ".yml")):
        return read_any_recipe(what, settings)
    if Path(what).exists():
        recipe = Recipe(name=Path(what).stem, data=DataConfig(train=what, target=target))
        return parse(Recipe, override(recipe.model_dump(mode="json"), settings), where=f"table {what}")
    raise DataError(f"{what!r} is neither a recipe ({', '.join(KNOWN)}) nor a file or folder that exists.")


def check_recipe_or_table(
    what: str, *, target: str | None = None, settings: Sequence[str] = (), pictures: Path | None = None
) -> CheckResult:
    """Read what a recipe's name or file, or a table's path, stands for; `pictures` is where the worst media are shown.

    Raises:
        DougongError: it can be neither read nor run.
    """
    if pictures is not None:
        check_sheet(pictures)
    recipe = read_recipe_or_table(what, target=target, settings=settings)
    if isinstance(recipe, AlignRecipe):
        return _check_alignment(what, recipe)
    # What leaks is told here; only a run refuses it.
    data = recipe.data.model_copy(update={"allow_leak": True})
    tables = open_tables(data, seed=recipe.seed, decides=isinstance(recipe, Recipe))
    if isinstance(recipe, GenerateRecipe):
        check_spare(recipe, tables)
    found = target_of(data, tables)
    preparation = fit_preparation(tables.train, tables.roles, found, recipe.data.preparation)
    parts = {"train": tables.train, "validation": tables.validation}
    if not tables.test_is_validation:
        parts["test"] = tables.test
    reports = {part: check_table(table, preparation) for part, table in parts.items()}
    if pictures is not None:
        write_sheet(pictures, what, [SheetPart(part, parts[part], reports[part]) for part in parts], preparation)
    signature = preparation.signature()
    warnings = list(_warnings(reports, recipe.train.max_bad_share))
    num_parameters: int | None = None
    if "volume" not in {shape.kind for shape in signature.inputs.values()}:
        network = recipe.model.build(signature)
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
    else:
        warnings.append("volumes are read, but have no encoder yet: a run leaves them out")
    duplicates = find_duplicates(parts, tables.roles)
    alignments = find_misaligned(tables.train, tables.roles, unit=tables.unit, seed=recipe.seed)
    warnings += _relations(recipe.data, tables, duplicates, alignments)
    return CheckResult(
        name=what,
        roles=tables.roles,
        reports=reports,
        inputs={name: shape.model_dump() for name, shape in signature.inputs.items()},
        target=found.model_dump(),
        num_parameters=num_parameters,
        notes=(*tables.notes, *_looked_at(tables, duplicates, alignments)),
        warnings=tuple(warnings),
        duplicates=duplicates,
        leaks=tables.leaks,
        alignments=alignments,
    )


def _quality_as_json(report: TableReport) -> dict[str, Any]:
    return {
        "quality": {
            name: {
                figure.name: {
                    "median": figure.median,
                    "worst_5_percent": figure.worst,
                    "side": figure.side,
                    "worst_rows": [{"row": row, "value": value} for row, value in figure.rows],
                }
                for figure in figures
            }
            for name, figures in report.quality.items()
        },
        "text_troubles": {
            name: {trouble.name: {"records": trouble.num_records, "first_rows": list(trouble.rows)} for trouble in own}
            for name, own in report.troubles.items()
        },
    }


def _relations(
    data: DataConfig, tables: Tables, duplicates: Sequence[Duplicates], alignments: Sequence[Alignment]
) -> list[str]:
    """What is wrong between records, parts and modalities."""
    warnings = _leaking(data, tables.leaks)
    for found in duplicates:
        refused = any(leak.column == found.column for leak in tables.leaks)
        if found.kind in MEDIA and found.num_exact_across and not refused:
            warnings.append(f"{found.column}: {found.num_exact_across} {found.kind} media are in more than one part")
        if found.kind in MEDIA and found.num_near_across:
            warnings.append(
                f"{found.column}: {found.num_near_across} groups of nearly the same {found.kind} media "
                f"({found.num_near_rows_across} records) are in more than one part"
            )
    for pair in alignments:
        if pair.shift or pair.num_flagged:
            warnings.append(f"{pair.left} and {pair.right}: {pair.verdict}")
    return warnings


def _leaking(data: DataConfig | AlignDataConfig, leaks: Sequence[Leak]) -> list[str]:
    would = "is allowed by data.allow_leak" if data.allow_leak else "a run would refuse this"
    return [f"{leak.line()}: {would}" for leak in leaks]


def _looked_at(tables: Tables, duplicates: Sequence[Duplicates], alignments: Sequence[Alignment]) -> list[str]:
    """Where not everything was looked at."""
    notes = []
    if alignments and alignments[0].num_rows < tables.train.num_rows:
        seen, there = alignments[0].num_rows, tables.train.num_rows
        notes.append(f"whether modalities belong together was judged from {seen} of {there} training records")
    num_sides = len(sides_of(tables.roles))
    if num_sides > MOST_SIDES:
        notes.append(f"{MOST_SIDES} of {num_sides} modalities were compared with each other, the first ones")
    for found in duplicates:
        if found.num_compared < 0.9 * found.num_media:
            notes.append(
                f"{found.column}: near duplicates were looked for among {found.num_compared} of {found.num_media} media"
            )
    return notes


def _check_alignment(what: str, recipe: AlignRecipe) -> CheckResult:
    """The same of a recipe that draws modalities together."""
    data = recipe.data.model_copy(update={"allow_leak": True})
    tables = open_align_tables(data, seed=recipe.seed)
    preparation = fit_sides(recipe.data, tables.train)
    network = recipe.model.build(preparation.signature())
    parts = {"train": tables.train, "validation": tables.validation}
    if not tables.test_is_validation:
        parts["test"] = tables.test
    reports = {part: _read_all(table, preparation, recipe.data) for part, table in parts.items()}
    return CheckResult(
        name=what,
        roles=roles_of_sides(recipe.data, tables.train),
        reports=reports,
        inputs={name: shape.model_dump() for name, shape in preparation.signature().inputs.items()},
        target={},
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        notes=tables.notes,
        warnings=(*_warnings(reports, recipe.train.max_bad_share), *_leaking(recipe.data, tables.leaks)),
        leaks=tables.leaks,
    )


def _read_all(table: Table, preparation: Preparation, data: AlignDataConfig) -> TableReport:
    """Each column of each side; a record is bad if one of its cells is, and present on a side if one cell is."""
    bad: dict[int, BadRecord] = {}
    present: dict[str, npt.NDArray[np.bool_]] = {}
    num_batches = 0
    for side, columns in data.sides.items():
        present[side] = np.zeros(table.num_rows, np.bool_)
        for column in columns:
            one = PairLoader(table, preparation.only([side]), {side: (column,)}, batch_size=CHECKED_AT_ONCE)
            numbers = np.concatenate([table.numbers_of(chunk) for chunk in range(table.num_chunks)])
            where = {int(number): index for index, number in enumerate(numbers)}
            for batch in one.one_pass():
                num_batches += 1
                for record in batch.bad:
                    bad.setdefault(record.row, record._replace(column=column))
                here = batch.row_B[batch.media[side].present_B]
                present[side][[where[int(row)] for row in here]] = True
    return TableReport(
        num_rows=table.num_rows,
        num_bad=len(bad),
        bad=tuple(bad[row] for row in sorted(bad))[:LISTED],
        num_present={side: int(there.sum()) for side, there in present.items()},
        num_batches=num_batches,
        quality={},
        troubles={},
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
