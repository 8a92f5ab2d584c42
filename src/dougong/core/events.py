"""What happens in a run, announced to whoever listens.

Here        the events, the `Announcer` that passes them on, and the JSON-lines file they are kept in.
Elsewhere   announcing (the engine); listening (watch and the recipes).
Promise     the file holds one whole JSON object a line; after a kill, at most the last line is cut, and reading
            skips it. On resume, lines of steps that are trained again are dropped, so no step stands there twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dougong.core.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened after `step` optimizer steps."""

    step: int
    time: float = field(default_factory=time.time)

    @property
    def kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training begins or goes on."""

    total_steps: int
    precision: str
    num_parameters: int
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_records: int
    epoch: int
    seconds: float
    wait_seconds: float
    """Of `seconds`, how long the step waited for its batch."""


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """A loss or gradient was not finite, for the first time after steps that were; weights stayed as they were."""

    ranks: list[int]
    """On which it began, as far as is known."""

    modality: str
    """Empty where it was not one modality's alone."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class PrecisionSwitched(Event):
    """A group of modules is computed in another number format from now on."""

    group: str
    modality: str
    """Empty where it is no modality's own."""

    before: str
    after: str
    scale_exponent: int
    """Of the power of two by which the loss is multiplied."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The metrics of one split under one condition."""

    split: str
    condition: str
    metrics: dict[str, float]
    num_records: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTimed(Event):
    """What each rank did in one step."""

    ranks: list[list[list[Any]]]
    """By rank, in order: what (work, forward, backward, weights, wait, exchange), from when to when in seconds since
    the step began, and of which stage and micro-batch, where it is of one."""


@dataclass(frozen=True, kw_only=True)
class SamplingChanged(Event):
    """The rates at which modalities are left out of training records, after they were judged anew."""

    before: dict[str, float]
    after: dict[str, float]
    with_all: float
    without: dict[str, float]
    with_none: float
    """The task's first figure with and without each modality (its negative where less is better)."""

    quality: dict[str, float]
    """The mean quality of each modality's media, where it is known."""

    reason: dict[str, str]
    seconds: float
    """What measuring took."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint of this step is whole on the disk; training has gone on meanwhile."""

    path: str
    best: bool
    pause_seconds: float = 0.0
    """How long training stood still for it."""

    wait_seconds: float = 0.0
    """Of these, until the checkpoint before it was on the disk."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSkipped(Event):
    """A damaged checkpoint was passed over."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RecordsSetAside(Event):
    """Records that could not be used, so far."""

    count: int
    seen: int
    first: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """Training ended: `steps`, `early` (no progress), or `interrupted`."""

    reason: str
    best_metric: float | None
    best_step: int | None
    seconds: float


Listener = Callable[[Event], None]


class Announcer:
    """Passes each event to every listener, in the order in which they came."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners: list[Listener] = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


class EventFile:
    """Appends events to a file, a line each."""

    def __init__(self, path: Path, *, resume_at: int | None = None) -> None:
        """Open `path`; with `resume_at`, forget what happened after that step."""
        if resume_at is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_at]
            write_atomic(path, "".join(line + "\n" for line in kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        self._file.write(json.dumps({"kind": event.kind, **vars(event)}, ensure_ascii=False, default=asdict) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, in order, each with its `kind`."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("}\n"):
                yield line.rstrip("\n")
