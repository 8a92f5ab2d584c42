"""What every finished run tells a program.

Here        `result_as_json`; `write_words`, the figures of a run that writes, for its report.
Elsewhere   the results of each kind of run (run.py, align.py, generate.py).
Promise     the same keys for every kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dougong.core.files import write_json
from dougong.recipes.tables import Tables


class Judged(Protocol):
    """Some figures."""

    @property
    def metrics(self) -> dict[str, float]: ...


class JudgedRecords(Judged, Protocol):
    """The same, and of how many records."""

    @property
    def num_records(self) -> int: ...
    @property
    def bad(self) -> Sequence[Any]: ...


class Finished(Protocol):
    """A run's folder, its cost and its figures."""

    @property
    def folder(self) -> Path: ...
    @property
    def evaluations(self) -> Mapping[str, Judged]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def train_seconds(self) -> float: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def result_as_json(result: Finished) -> dict[str, Any]:
    """Where everything is, and the figures by condition."""
    return {
        "run": str(result.folder),
        "bundle": str(result.folder / "bundle"),
        "report": str(result.folder / "report.html"),
        "parameters": result.num_parameters,
        "seconds": round(result.train_seconds, 1),
        "figures": {name: found.metrics for name, found in result.evaluations.items()},
        "notes": list(result.notes),
    }


class FinishedWriting(Finished, Protocol):
    """A run that learnt to write."""

    @property
    def tables(self) -> Tables: ...
    @property
    def evaluations(self) -> Mapping[str, JudgedRecords]: ...


def write_words(result: FinishedWriting) -> None:
    """evaluation.json, which the page of what was written reads (watch/gallery.py)."""
    write_json(
        result.folder / "evaluation.json",
        {
            "data": {
                "name": result.tables.train.path.name,
                "rows": {part: getattr(result.tables, part).num_rows for part in ("train", "validation", "test")},
                "notes": list(result.notes),
            },
            "directions": {
                name: {"metrics": found.metrics, "num_records": found.num_records, "set_aside": len(found.bad)}
                for name, found in result.evaluations.items()
            },
            "parameters": result.num_parameters,
            "seconds": round(result.train_seconds, 1),
        },
    )
