"""What is known of a training so far, for whoever judges it.

Here        History: fed with events, from a run's file or while it is trained; Failure.
Elsewhere   the events (core/events.py, engine/flow/); judging (rules.py, baselines.py).
Promise     the same events in the same order give the same history, live or from a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from dougong.core.events import Event

SMOOTHED: Final = 5
"""Steps whose mean stands for the loss at one."""


class Failure(NamedTuple):
    """An error that ended the training."""

    place: str
    """The module whose forward was going on, where it is known."""

    absent: tuple[str, ...]
    """Inputs that some record lacked."""

    message: str


@dataclass
class History:
    """Of one run."""

    total_steps: int | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    flows: list[Mapping[str, Any]] = field(default_factory=list)
    judged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    skipped: list[Mapping[str, Any]] = field(default_factory=list)
    examined: Mapping[str, Any] | None = None
    """Of the first records, whether inputs belong to their targets."""

    failure: Failure | None = None

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> History:
        """From a run's file."""
        history = cls()
        for event in events:
            history.add(event)
        return history

    def add(self, event: Mapping[str, Any] | Event) -> None:
        """One more event."""
        # As it is: `asdict` would copy all that a measured step tells, which takes a fifth of measuring it.
        told = {"kind": event.kind, **vars(event)} if isinstance(event, Event) else event
        kind = told["kind"]
        if kind == "RunStarted":
            self.total_steps = told["total_steps"]
        elif kind == "StepDone":
            self.steps.append(told["step"])
            self.losses.append(told["loss"])
            self.gradient_norms.append(told["grad_norm"])
            self.learning_rates.append(told["learning_rate"])
        elif kind == "FlowMeasured":
            self.flows.append(told)
        elif kind == "Evaluated":
            self.judged.append((told["step"], told["metrics"]))
        elif kind == "Examined":
            self.examined = told
        elif kind == "StepSkipped":
            self.skipped.append(told)

    @property
    def step(self) -> int:
        return self.steps[-1] if self.steps else (self.flows[-1]["step"] if self.flows else 0)

    @property
    def progress(self) -> float | None:
        """Share of the run that is done; None where its length is not known."""
        return None if not self.total_steps else self.step / self.total_steps

    def loss_about(self, place: int) -> float | None:
        """The mean of some losses that end at this place of the list; None where one is not finite."""
        if place < 0:
            place += len(self.losses)
        some = self.losses[max(0, place - SMOOTHED + 1) : place + 1]
        return math.fsum(some) / len(some) if some and all(map(math.isfinite, some)) else None

    @property
    def first_loss(self) -> float | None:
        return next((loss for loss in self.losses if math.isfinite(loss)), None)
