"""What a version must still do, as data that is kept under version control.

Here        Suite and its kinds of check; `read_suite`, `write_suite`.
Elsewhere   carrying it out (ask.py); comparing two versions (gate.py); writing one from a run (begin.py).
Promise     a suite is plain YAML, its tables lie beside it, and nothing in it is ever executed; a check that cannot be
            carried out is refused before any is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from dougong.core.config import Config, from_yaml, parse, to_yaml
from dougong.core.errors import ConfigError
from dougong.core.files import inside, write_atomic
from dougong.data.corruption import Corruption, parse_corruption

FORMAT: Final = "dougong-suite"


class Dataset(Config):
    """A table of records with the target in it."""

    table: str
    """Its path, from the suite's folder."""

    unit: str | None = None
    """A column: records of one unit (a picture, a patient) are alike, and are drawn together."""


class Slice(Config):
    """Some of a table's records."""

    column: str
    value: str | float | bool | None = None
    """What its cell is; None: the cell is empty."""

    low: float | None = None
    high: float | None = None
    """Instead of a value: from `low` to below `high`."""

    tolerance: float | None = Field(default=None, ge=0)
    """A loss that is not worth stopping for here. None: the check's."""

    @model_validator(mode="after")
    def _one_way(self) -> Slice:
        if self.value is not None and (self.low is not None or self.high is not None):
            raise ValueError(f"slice {self.column} has a value and a range. Give one of them.")
        return self

    def __str__(self) -> str:
        if self.low is None and self.high is None:
            return f"{self.column} = {self.value}"
        return f"{self.column} {'' if self.low is None else f'from {self.low:g} '}" + (
            "" if self.high is None else f"below {self.high:g}"
        )

    def holds(self, cell: Any) -> bool:
        """Whether a record with this cell is in it."""
        if self.low is not None or self.high is not None:
            if isinstance(cell, bool) or not isinstance(cell, int | float):
                return False
            return (self.low is None or cell >= self.low) and (self.high is None or cell < self.high)
        return cell == self.value or (cell is not None and self.value is not None and str(cell) == str(self.value))


class Change(Config):
    """How a record is changed for a check of behaviour."""

    column: str | None = None
    replace: dict[str, str] = {}
    """In the column's text: each of these by the other."""

    put: str | float | None = None
    """Into the column, whatever was there."""

    corrupt: str | None = None
    """Instead: MODALITY=LEVEL or MODALITY:KIND=LEVEL, as dougong evaluate has it."""

    @model_validator(mode="after")
    def _one_change(self) -> Change:
        given = [bool(self.replace), self.put is not None, self.corrupt is not None]
        if sum(given) != 1 or (self.column is None) == (self.corrupt is None):
            raise ValueError("a change is one of: column with replace, column with put, or corrupt.")
        if self.corrupt is not None:
            _corruption(self.corrupt)
        return self


class _Check(Config):
    name: str
    data: str
    """A table's name in `data`."""

    task: str | None = None
    """Of a bundle that was taught: which of its tasks. None: what it was made for."""

    tolerance: float | None = Field(default=None, ge=0)
    """A loss that is not worth stopping for, in the score's units. None: the suite's."""


class MetricCheck(_Check):
    """How many records are right, of all and of each slice: held against the version in production."""

    kind: Literal["metric"] = "metric"
    slices: tuple[Slice, ...] = ()
    without: tuple[str, ...] = ()
    """Modalities that are withheld."""

    corrupt: tuple[str, ...] = ()
    """What is spoilt, as MODALITY=LEVEL or MODALITY:KIND=LEVEL."""

    least: float | None = None
    """Below this score of all records a version is refused, whatever production does."""

    @field_validator("corrupt")
    @classmethod
    def _corruptions(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for text in given:
            _corruption(text)
        return given

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        return tuple(parse_corruption(text) for text in self.corrupt)

    @property
    def condition(self) -> str:
        without = [f"without {name}" for name in self.without]
        return ", ".join([*without, *self.corrupt]) or "all"


class InvarianceCheck(_Check):
    """The answer must not change with what does not matter."""

    kind: Literal["invariance"] = "invariance"
    change: Change
    most_changed: float = Field(default=0.05, ge=0, le=1)
    """Share of answers that may change."""


class DirectionCheck(_Check):
    """What a change must do to the answer: a label's probability, or the number, goes up or down, or does not."""

    kind: Literal["direction"] = "direction"
    change: Change
    label: str | None = None
    """Whose probability; None for a number."""

    moves: Literal["up", "down", "not up", "not down"]
    by: float = Field(default=0.0, ge=0)
    """Less than this is no move."""

    most_wrong: float = Field(default=0.05, ge=0, le=1)
    """Share of records that may move otherwise."""


class MinimumCheck(_Check):
    """Simple records that any version worth its name answers rightly; the table has the answers."""

    kind: Literal["minimum"] = "minimum"
    least: float = Field(default=1.0, ge=0, le=1)
    """Share of them that must be right."""


class LatencyCheck(_Check):
    """How long a batch takes, beside production on the same machine at the same time."""

    kind: Literal["latency"] = "latency"
    batch_size: int = Field(default=16, gt=0)
    repeats: int = Field(default=15, ge=5)
    most_ratio: float = Field(default=1.25, gt=1)
    """Slower than production by more, beyond the machine's own noise, is refused."""


class MemoryCheck(_Check):
    """Bytes that a batch needs at most, besides the weights, and those of the weights."""

    kind: Literal["memory"] = "memory"
    batch_size: int = Field(default=16, gt=0)
    most_ratio: float = Field(default=1.1, gt=1)


Check = Annotated[
    MetricCheck | InvarianceCheck | DirectionCheck | MinimumCheck | LatencyCheck | MemoryCheck,
    Field(discriminator="kind"),
]


class Suite(Config):
    """A file of checks."""

    format: Literal["dougong-suite"] = "dougong-suite"
    name: str
    data: dict[str, Dataset]
    checks: tuple[Check, ...]

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that a version that is as good as production is refused, over all comparisons together."""

    tolerance: float = Field(default=0.02, ge=0)
    """A loss that is not worth stopping for: another seed alone moves a figure by about as much."""

    power: float = Field(default=0.99, gt=0.5, lt=1)
    """Chance with which a loss must be caught to count as one that the gate can see."""

    seed: int = 0

    @model_validator(mode="after")
    def _known_tables(self) -> Suite:
        for check in self.checks:
            if check.data not in self.data:
                raise ValueError(f"check {check.name!r} reads {check.data!r}, and data has {', '.join(self.data)}.")
        names = [check.name for check in self.checks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two checks are called {twice[0]!r}: reports could not tell them apart.")
        return self


def read_suite(path: Path) -> Suite:
    """
    Raises:
        ConfigError: there is none, a setting is refused, or a table lies outside of the suite's folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a suite ({error.__class__.__name__}). Write one by dougong regress --init RUN."
        ) from None
    suite = parse(Suite, from_yaml(text, where=path.name), where=path.name)
    for name, dataset in suite.data.items():
        place = inside(path.parent, dataset.table)
        if place is None or not place.exists():
            raise ConfigError(f"{path.name}: data.{name}.table {dataset.table!r} is not in the suite's folder.")
    return suite


def write_suite(path: Path, suite: Suite) -> None:
    """Write a suite for people to read and change."""
    write_atomic(path, to_yaml(suite))


def _corruption(text: str) -> Corruption:
    try:
        return parse_corruption(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
