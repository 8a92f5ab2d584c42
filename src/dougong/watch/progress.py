"""How far a run is, for whoever waits for it.

Here        Progress, a listener: a bar on a terminal, plain lines elsewhere.
Elsewhere   the events (core/events.py); curves (watch/tensorboard.py).
Promise     writes to stderr only, so that a command's output stays its own; what went wrong with records and
            checkpoints is said in full.
"""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from dougong.core.events import (
    CheckpointSkipped,
    Evaluated,
    Event,
    RecordsSetAside,
    RunFinished,
    RunStarted,
    SamplingChanged,
    StepDone,
    StepSkipped,
)

LINE_SECONDS = 10.0
"""Between two plain lines."""

BAR_SECONDS = 0.1
"""Between two drawings of the bar."""

SMOOTHING = 0.05
"""Weight of the newest loss in the one that is shown."""

_ENDS = {"steps": "done", "early": "no more gain", "interrupted": "interrupted, can be resumed"}


class Progress:
    """Shows rate, time left, loss and the last metrics. Leave its `with` block, and the terminal is as before."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._total_steps = 0
        self._first_step = 0
        self._started = self._shown = time.monotonic()
        self._records = 0
        self._loss: float | None = None
        self._metrics = ""
        self._num_bad = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                figures = ", ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
                self._metrics = next((f"{name} {value:.3f}" for name, value in event.metrics.items()), "")
                self._say(f"step {event.step}: {event.split} ({event.condition}): {figures}")
            case SamplingChanged():
                moved = [name for name, rate in event.after.items() if rate != event.before[name]]
                if moved:
                    told = "; ".join(f"{name} {event.reason[name]}" for name in moved)
                    self._say(f"step {event.step}: left out of training records: {told}")
            case StepSkipped():
                self._say(f"step {event.step} is skipped: {event.reason}")
            case CheckpointSkipped():
                self._say(f"{event.path} is damaged and set aside: {event.reason}. An older checkpoint is used.")
            case RecordsSetAside():
                self._set_aside(event)
            case RunFinished():
                self._finish(event)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self, event: RunStarted) -> None:
        self.close()
        self._total_steps, self._first_step = event.total_steps, event.step
        self._started = self._shown = time.monotonic()
        self._records, self._loss, self._metrics, self._num_bad = 0, None, "", 0
        begins = f"goes on after step {event.step}" if event.resumed else "begins"
        self._say(
            f"training {begins}: {event.total_steps} steps, {event.num_parameters:,} parameters, {event.precision}"
        )
        console = Console(file=self._stream)
        if console.is_terminal:
            # Drawn by our own events, not by a thread that would go on after an error.
            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task("", total=event.total_steps, completed=event.step, note="")
            self._bar.start()

    def _step(self, event: StepDone) -> None:
        self._records += event.num_records
        if math.isfinite(event.loss):  # a step that was skipped shows no NaN for ever after
            before = event.loss if self._loss is None else self._loss
            self._loss = before + SMOOTHING * (event.loss - before)
        now = time.monotonic()
        last = event.step == self._total_steps
        if self._bar is not None and (last or now - self._shown >= BAR_SECONDS):
            self._bar.update(self._task, completed=event.step, note=self._note(event.step, now), refresh=True)
            self._shown = now
        elif self._bar is None and (last or now - self._shown >= LINE_SECONDS):
            self._say(f"step {event.step}/{self._total_steps}: {self._note(event.step, now)}")
            self._shown = now

    def _note(self, step: int, now: float) -> str:
        elapsed = max(now - self._started, 1e-9)
        left = elapsed / max(1, step - self._first_step) * (self._total_steps - step)
        parts = [f"{self._records / elapsed:.0f} records/s", f"{_duration(left)} left"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._metrics:
            parts.append(self._metrics)
        return ", ".join(parts)

    def _set_aside(self, event: RecordsSetAside) -> None:
        first = event.first[0] if event.first else None
        # Told when it begins and each time it has doubled: not once per batch.
        if first is not None and (self._num_bad == 0 or event.count >= 2 * self._num_bad):
            self._num_bad = event.count
            self._say(
                f"{event.count} of {event.seen} records set aside so far, the first: row {first['row']}, "
                f"column {first['column']}: {first['reason']}"
            )

    def _finish(self, event: RunFinished) -> None:
        self.close()
        best = "" if event.best_step is None else f", best {event.best_metric:.4f} at step {event.best_step}"
        self._say(f"{_ENDS.get(event.reason, event.reason)}: {event.step} steps in {_duration(event.seconds)}{best}")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    @property
    def _stream(self) -> TextIO:
        return self._file if self._file is not None else sys.stderr


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
