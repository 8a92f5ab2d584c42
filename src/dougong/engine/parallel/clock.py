"""What a rank did when, in one step.

Here        Clock, Spent.
Elsewhere   who tells it (pipeline.py, layout.py); who draws it (watch/report.py).
Promise     two readings of a clock for each thing done, and nothing sent.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

Doing = Literal["work", "forward", "backward", "weights", "wait", "exchange"]
"""work: all of a step that is not a pipeline's. weights: the half of a backward that only weights need. wait: for
another stage. exchange: of gradients."""


class Spent(NamedTuple):
    """One thing, in seconds since the step began."""

    doing: Doing
    start: float
    end: float
    stage: int | None = None
    batch: int | None = None


class Clock:
    """Of one rank's last step."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.spent: list[Spent] = []

    def begin(self) -> None:
        """A step begins; what was spent before is forgotten."""
        self._began = time.perf_counter()
        self.spent = []

    def now(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._began

    def note(self, doing: Doing, start: float, stage: int | None = None, batch: int | None = None) -> float:
        """Something has ended just now; returns when."""
        end = self.now()
        self.spent.append(Spent(doing, start, end, stage, batch))
        return end
