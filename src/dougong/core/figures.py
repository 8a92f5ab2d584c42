"""A measured figure beside what was asked of it.

Here        Figure, and how a list of them looks as Markdown.
Elsewhere   measuring (the scripts in benchmarks/); running them by name (cli/bench.py).
Promise     whether a figure holds follows from its value and what was asked, and cannot be set by hand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Final

from pydantic import computed_field, field_validator

from dougong.core.config import Config

_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {"<=": operator.le, ">=": operator.ge}


class Figure(Config):
    """One row of a benchmark."""

    name: str
    value: float
    unit: str

    asked: str | None = None
    """Such as "<= 1.10" or ">= 3": a comparison and a number in the same unit. None: shown for comparison only."""

    low: float | None = None
    high: float | None = None
    """The interval; what kind it is, the script's first lines say."""

    seeds: int | None = None
    """Runs or repetitions behind it."""

    baseline: float | None = None
    """The same figure of what it is held against, measured in the same run."""

    @field_validator("asked")
    @classmethod
    def _a_comparison(cls, asked: str | None) -> str | None:
        if asked is not None:
            sign, _, number = asked.partition(" ")
            if sign not in _COMPARISONS:
                raise ValueError(f"{asked!r} must begin with one of {', '.join(_COMPARISONS)} and a space.")
            float(number)
        return asked

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's own documentation has it
    @property
    def holds(self) -> bool | None:
        """Whether it is as asked; None where nothing was."""
        if self.asked is None:
            return None
        sign, _, number = self.asked.partition(" ")
        return _COMPARISONS[sign](self.value, float(number))


def as_markdown(figures: Sequence[Figure]) -> str:
    """A table of them."""
    lines = ["| figure | value | asked | holds | interval | runs | baseline |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        holds = {None: "", True: "yes", False: "**no**"}[figure.holds]
        interval = "" if figure.low is None or figure.high is None else f"{figure.low:.4g} to {figure.high:.4g}"
        baseline = "" if figure.baseline is None else f"{figure.baseline:.4g}"
        lines.append(
            f"| {figure.name} | {figure.value:.4g} {figure.unit} | {figure.asked or ''} | {holds} | {interval} "
            f"| {'' if figure.seeds is None else figure.seeds} | {baseline} |"
        )
    return "\n".join(lines) + "\n"
