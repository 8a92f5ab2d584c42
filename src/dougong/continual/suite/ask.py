"""Asks one version a suite's checks: a score of each record.

Here        `ask`, Asked, Scored, Timed.
Elsewhere   the checks (suite.py); comparing two versions (gate.py).
Promise     every record has a score, also one that a version could not read: it is wrong. The same version gives the
            same scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dougong.bundle.model import Prediction
from dougong.continual.suite.suite import (
    Change,
    DirectionCheck,
    InvarianceCheck,
    MetricCheck,
    MinimumCheck,
    Slice,
    Suite,
)
from dougong.continual.taught import Taught
from dougong.core.errors import ConfigError
from dougong.data.corruption import Corruption, check_corruptions, parse_corruption
from dougong.data.modality.medium import media_key
from dougong.data.table import Table, cells_of, open_table, table_of_rows
from dougong.engine.evaluate import Evaluation

Floats = npt.NDArray[np.float64]


class Scored(NamedTuple):
    """One check, or one slice of it. Shapes: N records."""

    check: str
    kind: str
    slice: str
    """"" for all records."""

    condition: str
    row_N: npt.NDArray[np.int64]
    score_N: Floats
    """1 right and 0 wrong; of several labels the share that is right; of a number, minus the error."""

    unit_N: npt.NDArray[np.int64] | None
    tolerance: float
    least: float | None
    """A score below which a version is refused by itself."""

    @property
    def name(self) -> str:
        return " / ".join(part for part in (self.check, self.slice) if part)


class Asked(NamedTuple):
    """What one version did."""

    scored: tuple[Scored, ...]
    records: dict[str, dict[int, str]]
    """By check, what it answered each record; for showing what changed."""


def ask(
    taught: Taught, suite: Suite, folder: Path, *, announce: Callable[[str, int, int], None] | None = None
) -> Asked:
    """Scores of all checks but those of time and memory.

    Raises:
        ConfigError: a check names a modality, task, column or label that is not there.
    """
    tables = {name: open_table(folder / dataset.table) for name, dataset in suite.data.items()}
    _check(taught, suite, tables)
    scored: list[Scored] = []
    records: dict[str, dict[int, str]] = {}
    for number, check in enumerate(suite.checks):
        if announce is not None:
            announce(check.name, number, len(suite.checks))
        table, unit = tables[check.data], suite.data[check.data].unit
        tolerance = suite.tolerance if check.tolerance is None else check.tolerance
        unit_N = None if unit is None else _units(table, unit)
        if isinstance(check, MetricCheck):
            right_N, said = _right(taught, table, check, suite.seed)
            records[check.name] = said
            rows = np.arange(table.num_rows)
            asked = Scored(check.name, "metric", "", check.condition, rows, right_N, unit_N, tolerance, check.least)
            scored.append(asked)
            for part in check.slices:
                chosen = _rows_of(table, part)
                some = None if unit_N is None else unit_N[chosen]
                allowed = tolerance if part.tolerance is None else part.tolerance
                scored.append(
                    asked._replace(
                        slice=str(part),
                        row_N=rows[chosen],
                        score_N=right_N[chosen],
                        unit_N=some,
                        tolerance=allowed,
                        least=None,
                    )
                )
        elif isinstance(check, InvarianceCheck | DirectionCheck | MinimumCheck):
            passed_N, said, least, condition = _behaves(taught, table, check, suite.seed)
            records[check.name] = said
            rows = np.arange(table.num_rows)
            scored.append(Scored(check.name, check.kind, "", condition, rows, passed_N, unit_N, tolerance, least))
    return Asked(tuple(scored), records)


def _check(taught: Taught, suite: Suite, tables: dict[str, Table]) -> None:
    modalities = list(taught.model.preparation.modalities)
    for check in suite.checks:
        table = tables[check.data]
        if check.task is not None:
            taught.task(check.task)
        if isinstance(check, MetricCheck):
            strange = [name for name in check.without if name not in modalities]
            if strange:
                raise ConfigError(f"check {check.name!r}: {strange[0]!r} is no modality. Use {', '.join(modalities)}.")
            check_corruptions(check.corruptions, taught.model.preparation.modalities)
            columns = [part.column for part in check.slices]
        elif isinstance(check, InvarianceCheck | DirectionCheck):
            columns = [] if check.change.column is None else [check.change.column]
            labels = _target(taught, check.task).labels
            if isinstance(check, DirectionCheck) and labels and check.label not in labels:
                raise ConfigError(f"check {check.name!r}: {check.label!r} is no label. Use one of {', '.join(labels)}.")
            if check.change.corrupt is not None:
                check_corruptions([parse_corruption(check.change.corrupt)], taught.model.preparation.modalities)
        else:
            columns = []
        if isinstance(check, MetricCheck | MinimumCheck) and _target(taught, check.task).name not in table.schema.names:
            raise ConfigError(f"check {check.name!r}: its table has no column {_target(taught, check.task).name!r}.")
        strange = [name for name in columns if name not in table.schema.names]
        if strange:
            known = ", ".join(table.schema.names)
            raise ConfigError(f"check {check.name!r}: {strange[0]!r} is no column. Its table has {known}.")


def _target(taught: Taught, task: str | None) -> Any:
    return taught.model.preparation.target if task is None else taught.task(task).target


def _right(taught: Taught, table: Table, check: MetricCheck, seed: int) -> tuple[Floats, dict[int, str]]:
    names = [name for name in taught.model.preparation.modalities if name not in check.without]
    evaluation = _evaluate(
        taught, table, check.task, keep=names if check.without else None, corruptions=check.corruptions, seed=seed
    )
    target = _target(taught, check.task)
    score_N = np.zeros(table.num_rows)
    if target.task == "regression":
        # What cannot be read is as wrong as an answer that says the mean, twice over.
        score_N[:] = -2.0 * abs(target.scale)
    said: dict[int, str] = {}
    assert evaluation.target_B is not None or not len(evaluation.row_B)
    for place, row in enumerate(evaluation.row_B.tolist()):
        found, known = evaluation.prediction_B[place], evaluation.target_B[place]  # type: ignore[index]
        if target.task == "single_label":
            score_N[row] = float(found == known)
            said[row] = target.labels[int(found)]
        elif target.task == "multi_label":
            score_N[row] = float(np.mean(found == known))
            said[row] = ", ".join(label for label, mark in zip(target.labels, found, strict=True) if mark)
        else:
            score_N[row] = -abs(float(found) - float(known))
            said[row] = f"{float(found):.6g}"
    return score_N, said


def _evaluate(
    taught: Taught,
    table: Table,
    task: str | None,
    *,
    keep: Sequence[str] | None,
    corruptions: Sequence[Corruption],
    seed: int,
) -> Evaluation:
    if task is None:
        return taught.model.evaluate(table, keep=keep, corruptions=corruptions, seed=seed)
    return taught.evaluate(table, task, keep=keep, corruptions=corruptions, seed=seed)


def _behaves(
    taught: Taught, table: Table, check: InvarianceCheck | DirectionCheck | MinimumCheck, seed: int
) -> tuple[Floats, dict[int, str], float, str]:
    as_they_are = _answers(taught, table, check.task, None, seed)
    if isinstance(check, MinimumCheck):
        target = _target(taught, check.task)
        wanted = cells_of(table.column(target.name))
        passed_N = np.array([float(_same(a.answer, w)) for a, w in zip(as_they_are, wanted, strict=True)])
        return passed_N, {a.row: str(a.answer) for a in as_they_are}, check.least, "minimum"
    changed = _answers(taught, table, check.task, check.change, seed)
    if isinstance(check, InvarianceCheck):
        passed_N = np.array(
            [float(a.error is None and a.answer == c.answer) for a, c in zip(as_they_are, changed, strict=True)]
        )
        return (
            passed_N,
            {c.row: f"{a.answer} -> {c.answer}" for a, c in zip(as_they_are, changed, strict=True)},
            (1.0 - check.most_changed),
            "invariance",
        )
    moved = [
        (_value(c, check.label) - _value(a, check.label)) if a.error is None and c.error is None else np.nan
        for a, c in zip(as_they_are, changed, strict=True)
    ]
    tests: dict[str, Callable[[float], bool]] = {
        "up": lambda by: by > check.by,
        "down": lambda by: by < -check.by,
        "not up": lambda by: by <= check.by,
        "not down": lambda by: by >= -check.by,
    }
    passed_N = np.array([float(bool(tests[check.moves](by))) for by in moved])
    return (
        passed_N,
        {a.row: f"{by:+.4f}" for a, by in zip(as_they_are, moved, strict=True)},
        1.0 - check.most_wrong,
        (f"{check.label or 'answer'} {check.moves}"),
    )


def _value(answer: Prediction, label: str | None) -> float:
    return float(answer.answer) if label is None else answer.probabilities.get(label, 0.0)  # type: ignore[arg-type]


def _same(answer: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return sorted(map(str, wanted)) == sorted(map(str, answer or ()))
    if isinstance(answer, float) and isinstance(wanted, int | float):
        return abs(answer - wanted) <= 0.05 * max(1.0, abs(wanted))
    return str(answer) == str(wanted)


def _answers(taught: Taught, table: Table, task: str | None, change: Change | None, seed: int) -> list[Prediction]:
    """What is answered, with its probabilities, after a change of the records."""
    rows = pa.concat_tables([table.read(chunk, table.schema.names) for chunk in range(table.num_chunks)]).to_pylist()
    if change is not None and change.corrupt is not None:
        return _spoilt(taught, table, task, parse_corruption(change.corrupt), seed)
    if change is not None and change.column is not None:
        rows = [{**row, change.column: _changed(row[change.column], change)} for row in rows]
    if task is None:
        return taught.model.predict(rows, folder=table.folder)
    return list(taught.predict(rows, task, folder=table.folder))


def _spoilt(taught: Taught, table: Table, task: str | None, corruption: Corruption, seed: int) -> list[Prediction]:
    evaluation = _evaluate(taught, table, task, keep=None, corruptions=[corruption], seed=seed)
    target = _target(taught, task)
    found = {row: Prediction(row=row, answer=None, error="could not be read") for row in range(table.num_rows)}
    for place, row in enumerate(evaluation.row_B.tolist()):
        said = evaluation.prediction_B[place]
        chances = (
            {}
            if evaluation.probability_BC is None
            else dict(zip(target.labels, map(float, evaluation.probability_BC[place]), strict=True))
        )
        if target.task == "single_label":
            answer: Any = target.labels[int(said)]
        elif target.task == "multi_label":
            answer = [label for label, mark in zip(target.labels, said, strict=True) if mark]
        else:
            answer = float(said)
        found[row] = Prediction(row=row, answer=answer, probabilities=chances)
    return [found[row] for row in range(table.num_rows)]


def _changed(cell: Any, change: Change) -> Any:
    if change.put is not None:
        return change.put
    if not isinstance(cell, str):
        return cell
    # All at once, so that what one puts in another does not take out again.
    pattern = re.compile("|".join(re.escape(each) for each in sorted(change.replace, key=len, reverse=True)))
    return pattern.sub(lambda found: change.replace[found[0]], cell)


def _rows_of(table: Table, part: Slice) -> npt.NDArray[np.int64]:
    cells = cells_of(table.column(part.column))
    return np.array([row for row, cell in enumerate(cells) if part.holds(cell)], np.int64)


def _units(table: Table, column: str) -> npt.NDArray[np.int64]:
    if column not in table.schema.names:
        raise ConfigError(f"unit {column!r} is no column. The table has {', '.join(table.schema.names)}.")
    place: dict[Any, int] = {}
    keys = [media_key(cell) for cell in cells_of(table.column(column))]
    return np.array([place.setdefault(key, len(place)) for key in keys], np.int64)


def rows_for(table: Table, count: int) -> Table:
    """The first records of a table, again and again where it has fewer."""
    rows = table.first(0, count, table.schema.names)
    while rows.num_rows < count:
        rows = pa.concat_tables([rows, rows]).slice(0, count)
    return table_of_rows(rows, table.folder)
