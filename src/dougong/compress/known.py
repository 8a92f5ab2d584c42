"""What a search has measured so far, kept in a file.

Here        Known: the points by candidate, and which of them are offered, fit the budget, or share a shape.
Elsewhere   what a point is (candidate.py); measuring (draft.py, search.py).
Promise     what was put is on the disk before the next thing is measured, so that a search that was killed loses
            nothing that it knew.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dougong.compress.candidate import EAGER, Budget, Candidate, Point
from dougong.core.files import write_json


class Known:
    """Points of one search."""

    def __init__(self, file: Path, budget: Budget, engines: Collection[str]) -> None:
        """`engines` are those that were asked for: torch is measured for comparison in any case."""
        self._file, self._budget, self._engines = file, budget, engines
        self._points: dict[str, Point] = {}
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            self._points = {key: Point.model_validate(values) for key, values in found.items()}

    def __contains__(self, candidate: Candidate) -> bool:
        return candidate.key in self._points

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points.values())

    def of(self, candidate: Candidate) -> Point:
        """As it is known now."""
        return self._points[candidate.key]

    def put(self, point: Point, **values: Any) -> Point:
        """Keep a point, with further values."""
        changed = point.model_copy(update=values)
        self._points[point.candidate.key] = changed
        write_json(self._file, {key: each.model_dump(mode="json") for key, each in self._points.items()})
        return changed

    def put_cost(self, measured: Point, *, draft: bool) -> Point:
        """Keep its size and time; what else is known of it stays."""
        before = self._points.get(measured.candidate.key, measured)
        values = {name: getattr(measured, name) for name in ("size_bytes", "latency_seconds", "speedup")}
        if draft:
            values["drafted_within"] = not self._budget.binds(measured)
        return self.put(before, **values)

    def offered(self) -> tuple[Point, ...]:
        """All that were measured on an engine that was asked for, but for the teacher as it is."""
        return tuple(
            point
            for point in self
            if point.candidate.engine in self._engines
            and not (point.candidate.is_teacher and point.candidate.engine == EAGER)
        )

    def drafted(self) -> list[Point]:
        """Of these, the drafts that kept to the budget."""
        return [point for point in self.offered() if point.drafted_within]

    def step_seconds(self, candidate: Candidate) -> float | None:
        """Of a step of this shape, where one is known."""
        of_shape = (point for point in self if point.candidate.shape_key == candidate.shape_key)
        return next((point.step_seconds for point in of_shape if point.step_seconds is not None), None)

    def fitting(self) -> list[Point]:
        """Of these, what keeps to the budget, as last measured."""
        return [point for point in self.offered() if not self._budget.binds(point)]

    def of_shape(self, candidate: Candidate) -> list[Point]:
        """Candidates of the same shape, with the weights that it learnt, that keep to the budget."""
        fitting = [point for point in self.fitting() if not point.candidate.recovered]
        alike = [point for point in fitting if point.candidate.shape_key == candidate.shape_key]
        return alike or [self.of(candidate)]
