"""What a search came to.

Here        Outcome, with the points that no other one beats; BudgetError, where none keeps to the budget; `loss_of` and
            `best_first`, by which points that learnt are held against each other.
Elsewhere   finding them (search.py); drawing them (picture.py).
Promise     a point that has not learnt is never on the front, and comes after all that have.
"""

from __future__ import annotations

from typing import NamedTuple

from dougong.compress.candidate import Point
from dougong.core.errors import DougongError


class Outcome(NamedTuple):
    """What a search came to."""

    teacher: Point
    points: tuple[Point, ...]
    """All that were measured."""

    chosen: Point | None
    closest: tuple[Point, ...]
    """Where none was chosen."""

    binds: tuple[str, ...]
    """What the closest ones do not keep to."""

    def front(self) -> tuple[Point, ...]:
        """Points that learnt and that no other one beats in time, size and loss together; the fastest first."""
        judged = [point for point in (self.teacher, *self.points) if point.loss is not None]
        best = [point for point in judged if not any(_beats(other, point) for other in judged)]
        return tuple(sorted(best, key=lambda point: point.latency_seconds))


class BudgetError(DougongError):
    """No candidate keeps to the budget; the closest points are in it."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def _beats(one: Point, other: Point) -> bool:
    a = (one.latency_seconds, one.size_bytes, one.loss or 0.0)
    b = (other.latency_seconds, other.size_bytes, other.loss or 0.0)
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def loss_of(point: Point) -> float:
    return float("inf") if point.loss is None else point.loss


def best_first(point: Point) -> tuple[float, float, str]:
    return loss_of(point), point.latency_seconds, point.candidate.key
