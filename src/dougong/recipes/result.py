"""What every finished run tells a program.

Here        `result_as_json`.
Elsewhere   the results of each kind of run (run.py, align.py, generate.py).
Promise     the same keys for every kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Judged(Protocol):
    """Some figures."""

    @property
    def metrics(self) -> dict[str, float]: ...


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
