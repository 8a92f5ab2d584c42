"""What a run would meet, said before it starts.

Here        check_recipe_or_table, CheckResult; `read_recipe_or_table`.
Elsewhere   what a step would take (recipes/profile.py); reading every record (data/check.py); duplicates, leaks and
            pairs that do not fit (data/duplicates.py, data/leak.py, data/alignment.py).
Promise     nothing is trained, and nothing is written but the sheet that was asked for; every record is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dougong.core.config import override, parse
from dougong.core.errors import DataError
from dougong.core.signature import NOTHING, Signature
from dougong.data.alignment import MOST_SIDES, Alignment, find_misaligned, suspicious_rows
from dougong.data.check import TableReport, check_table
from dougong.data.columns import MEDIA, ColumnRole, names_target
from dougong.data.duplicates import Duplicates, find_duplicates
from dougong.data.features import sides_of
from dougong.data.leak import Leak
from dougong.data.preparation import Preparation, fit_preparation
from dougong.data.split import Inseparable
from dougong.data.table import Table
from dougong.recipes.align import fit_sides, open_align_tables, roles_of_sides
from dougong.recipes.alignment import AlignRecipe
from dougong.recipes.build import target_of
from dougong.recipes.decoding import DecodeRecipe
from dougong.recipes.generate import check_spare
from dougong.recipes.generation import GenerateRecipe
from dougong.recipes.known import KNOWN, AnyRecipe, read_any_recipe
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.tables import Tables, open_joined, open_tables
from dougong.watch.sheet import SheetPart, check_sheet, write_sheet


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
    if not _is_table(what):
        return read_any_recipe(what, settings)
    if Path(what).exists():
        recipe = Recipe(name=Path(what).stem, data=DataConfig(train=what, target=target))
        return parse(Recipe, override(recipe.model_dump(mode="json"), settings), where=f"table {what}")
    raise DataError(f"{what!r} is neither a recipe ({', '.join(KNOWN)}) nor a file or folder that exists.")


def _is_table(what: str) -> bool:
    return what not in KNOWN and not what.endswith((".yaml", ".yml"))


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
    seen = _seen_of_pairs(recipe) if isinstance(recipe, AlignRecipe) else _seen(recipe, bare=_is_table(what))
    reports = {
        part: check_table(table, _readable(recipe, seen.preparation, table)) for part, table in seen.parts.items()
    }
    if pictures is not None:
        shown = [SheetPart(part, table, reports[part]) for part, table in seen.parts.items()]
        write_sheet(pictures, what, shown, seen.preparation)
    duplicates = find_duplicates(seen.parts, seen.roles)
    train = seen.parts["train"]
    alignments = find_misaligned(train, seen.roles, unit=seen.unit, seed=recipe.seed)
    num_parameters, warnings = _size(recipe, seen.signature)
    return CheckResult(
        name=what,
        roles=seen.roles,
        reports=reports,
        inputs={name: shape.model_dump() for name, shape in seen.signature.inputs.items()},
        target=seen.signature.target.model_dump() if seen.signature.target != NOTHING else {},
        num_parameters=num_parameters,
        notes=(*seen.notes, *_looked_at(train, seen.roles, duplicates, alignments)),
        warnings=(
            *_warnings(reports, recipe.train.max_bad_share),
            *seen.warnings,
            *warnings,
            *_relations(seen.leaks, duplicates, alignments, allowed=recipe.data.allow_leak),
        ),
        duplicates=duplicates,
        leaks=seen.leaks,
        alignments=alignments,
    )


class _Seen(NamedTuple):
    """What is read of any kind of recipe."""

    parts: dict[str, Table]
    roles: dict[str, ColumnRole]
    unit: str | None
    preparation: Preparation
    """That reads each column by itself."""

    signature: Signature
    """Of what a model would read."""

    leaks: tuple[Leak, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def _seen(recipe: Recipe | GenerateRecipe | DecodeRecipe, *, bare: bool) -> _Seen:
    """`bare`: the recipe is of a table of which nothing was said."""
    # What leaks is told here; only a run refuses it.
    data = recipe.data.model_copy(update={"allow_leak": True})
    decides = isinstance(recipe, Recipe)
    notes: tuple[str, ...] = ()
    if bare and not names_target(open_joined(Path(str(data.train)), data)[0], data.target, data.columns):
        decides = False
        notes = ("no column is named as the target, so what would answer is not looked at: --target names one",)
    parts, tables, warnings = _parts(recipe, data, decides=decides)
    if isinstance(recipe, GenerateRecipe):
        check_spare(recipe, tables)
    preparation = fit_preparation(tables.train, tables.roles, target_of(data, tables), recipe.data.preparation)
    return _Seen(
        parts,
        tables.roles,
        tables.unit,
        preparation,
        preparation.signature(),
        tables.leaks,
        (*tables.notes, *notes),
        warnings,
    )


def _parts(
    recipe: Recipe | GenerateRecipe | DecodeRecipe, data: DataConfig, *, decides: bool
) -> tuple[dict[str, Table], Tables, tuple[str, ...]]:
    """The tables by part; where nothing can be held out of one, it is the only part, and why is said."""
    try:
        tables = open_tables(data, seed=recipe.seed, decides=decides)
    except Inseparable as error:
        whole = open_tables(data.model_copy(update={"validation": data.train}), seed=recipe.seed, decides=decides)
        leaks = tuple(leak for leak in whole.leaks if "validation" not in (leak.left, leak.right))
        found = {"train": whole.train} | ({} if data.test is None else {"test": whole.test})
        return found, whole._replace(leaks=leaks, notes=()), (str(error),)
    found = {"train": tables.train, "validation": tables.validation}
    return found | ({} if tables.test_is_validation else {"test": tables.test}), tables, ()


def _seen_of_pairs(recipe: AlignRecipe) -> _Seen:
    """The same of a recipe that draws modalities together: each column of each side."""
    tables = open_align_tables(recipe.data.model_copy(update={"allow_leak": True}), seed=recipe.seed)
    sides = fit_sides(recipe.data, tables.train)
    parts = {"train": tables.train, "validation": tables.validation}
    if not tables.test_is_validation:
        parts["test"] = tables.test
    return _Seen(
        parts,
        roles_of_sides(recipe.data, tables.train),
        None,
        sides.reading(recipe.data.sides),
        sides.signature(),
        tables.leaks,
        tables.notes,
    )


def _readable(recipe: AnyRecipe, preparation: Preparation, table: Table) -> Preparation:
    """Of pairs a part may lack a column that is learnt from alone; whatever else a part lacks was refused."""
    return preparation.only(table.schema.names) if isinstance(recipe, AlignRecipe) else preparation


def _size(recipe: AnyRecipe, signature: Signature) -> tuple[int | None, list[str]]:
    """Parameters of the model, where there would be one; and what it would leave out."""
    if "volume" in {shape.kind for shape in signature.inputs.values()}:
        return None, ["volumes are read, but have no encoder yet: a run leaves them out"]
    if isinstance(recipe, Recipe) and signature.target == NOTHING:
        return None, []
    network = recipe.model.build(signature)
    return sum(parameter.numel() for parameter in network.parameters()), []


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
    leaks: Sequence[Leak], duplicates: Sequence[Duplicates], alignments: Sequence[Alignment], *, allowed: bool
) -> list[str]:
    """What is wrong between records, parts and modalities."""
    would = "is allowed by data.allow_leak" if allowed else "a run would refuse this"
    warnings = [f"{leak.line()}: {would}" for leak in leaks]
    for found in duplicates:
        refused = any(leak.column == found.column for leak in leaks)
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


def _looked_at(
    train: Table, roles: dict[str, ColumnRole], duplicates: Sequence[Duplicates], alignments: Sequence[Alignment]
) -> list[str]:
    """Where not everything was looked at."""
    notes = []
    if alignments and alignments[0].num_rows < train.num_rows:
        seen = alignments[0].num_rows
        notes.append(f"whether modalities belong together was judged from {seen} of {train.num_rows} training records")
    num_sides = len(sides_of(roles))
    if num_sides > MOST_SIDES:
        notes.append(f"{MOST_SIDES} of {num_sides} modalities were compared with each other, the first ones")
    for found in duplicates:
        if found.num_compared < 0.9 * found.num_media:
            notes.append(
                f"{found.column}: near duplicates were looked for among {found.num_compared} of {found.num_media} media"
            )
    return notes


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
