"""Runs as they lie in folders, read while they grow.

Here        Runs (all below a folder), Reader (one run's events, read on from where it stopped), `thinned`.
Elsewhere   what is shown of them (watch/summary.py, watch/dashboard.py); the events (core/events.py).
Promise     a run is only read, and never held in memory whole: of each step four numbers stay, of what was measured
            from within the last few. No path leads out of the folder that was named. A line that is still being
            written is read the next time.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dougong.core.errors import RunError
from dougong.core.files import inside
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

EVENTS: Final = "events.jsonl"
MOST_RUNS: Final = 200
DEPTH: Final = 3
ENDED: Final = {"steps": "finished", "early": "stopped early: nothing was gained", "interrupted": "interrupted"}
"""By the reason that the run's last event gives (engine/trainer.py)."""

KEPT_FLOWS: Final = 24
KEPT_OTHERS: Final = 400
POINTS: Final = 400
END_BYTES: Final = 256
STEP_TELLS: Final = ("step", "loss", "grad_norm", "learning_rate", "seconds")
FLOW: Final = b'{"kind": "FlowMeasured"'
"""How such an event's line begins (core/events.py)."""


class Reader:
    """One run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        """Of several who ask at once, one reads."""

        self._forget()

    def _forget(self) -> None:
        self.steps = array("q")
        self.losses = array("d")
        self.gradient_norms = array("d")
        self.rates = array("d")
        self.others: list[dict[str, Any]] = []
        self.total_steps: int | None = None
        self.finished: str | None = None
        self.seconds = 0.0
        self.num_flows = 0
        self.offset = 0
        """Bytes that are read: whoever keeps something of a run knows by it whether there is more."""

        self._end = b""
        """The last of these bytes. Are they others now, the file was written anew."""

        self._flows: list[tuple[int, int]] = []
        """Where in the file each of those that are kept lies, and how long it is."""

        self._parsed: dict[int, dict[str, Any]] = {}
        self._found: tuple[int, list[Finding]] | None = None

    def read(self) -> bool:
        """Read what is new; whether there was anything. A file that has become shorter is read anew."""
        with self._lock:
            return self._read()

    def _read(self) -> bool:
        path = self.folder / EVENTS
        try:
            size = path.stat().st_size
        except OSError:
            return False
        if size == self.offset:
            return False
        with path.open("rb") as file:
            file.seek(max(0, self.offset - len(self._end)))
            if file.read(len(self._end)) != self._end:
                self._forget()  # resumed: steps after the checkpoint are trained again
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if line.startswith(FLOW):
                    self._take_flow(len(line))
                else:
                    self._take(line)
                self.offset += len(line)
                self._end = line[-END_BYTES:]
        return True

    def _take_flow(self, length: int) -> None:
        """The first ones say how it began, the last ones how it goes. Of a large network each is long: what is not
        shown is not parsed."""
        self._flows.append((self.offset, length))
        self.num_flows += 1
        if len(self._flows) > KEPT_FLOWS:
            gone, _ = self._flows.pop(KEPT_FLOWS // 2)
            self._parsed.pop(gone, None)

    @property
    def flows(self) -> list[dict[str, Any]]:
        """What was measured from within, of the steps that are kept."""
        with self._lock:
            missing = [each for each in self._flows if each[0] not in self._parsed]
            if missing:
                with (self.folder / EVENTS).open("rb") as file:
                    for offset, length in missing:
                        file.seek(offset)
                        # Else written anew since it was read: the next reading will see to it.
                        with contextlib.suppress(ValueError):
                            self._parsed[offset] = json.loads(file.read(length))
            return [self._parsed[offset] for offset, _ in self._flows if offset in self._parsed]

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["kind"]
            told = [event[name] for name in STEP_TELLS] if kind == "StepDone" else []
        except (ValueError, TypeError, KeyError):
            return  # nothing that a training wrote: the rest can still be read
        if kind == "StepDone":
            step, loss, gradient_norm, rate, seconds = told
            self.steps.append(step)
            self.losses.append(loss)
            self.gradient_norms.append(gradient_norm)
            self.rates.append(rate)
            self.seconds += seconds
            self.finished = None
        else:
            if kind == "RunStarted":
                self.total_steps = event["total_steps"]
            elif kind == "RunFinished":
                self.finished = event["reason"]
            self.others.append(event)
            if len(self.others) > KEPT_OTHERS:
                del self.others[KEPT_OTHERS // 2]

    def findings(self) -> list[Finding]:
        """What is wrong so far; judged anew only when more was read."""
        with self._lock:
            if self._found is not None and self._found[0] == self.offset:
                return self._found[1]
            offset, history = self.offset, History(total_steps=self.total_steps)
            history.steps, history.losses = self.steps.tolist(), self.losses.tolist()
            history.gradient_norms, history.learning_rates = self.gradient_norms.tolist(), self.rates.tolist()
            for event in (*self.others, *self.flows):
                history.add(event)
        # Outside the lock: it takes long, and whoever asks for the rest meanwhile is not to wait for it.
        found = [finding for finding in diagnose(history) if finding.confidence >= SURE]
        with self._lock:
            self._found = (offset, found)
        return found

    def told(self) -> dict[str, Any]:
        """In a line of a list."""
        with self._lock:
            judged = _judged(self.others)
            last = len(self.steps) - 1
            return {
                "step": self.steps[last] if last >= 0 else 0,
                "total_steps": self.total_steps,
                "loss": _number(self.losses[last]) if last >= 0 else None,
                "state": ENDED.get(self.finished, self.finished) if self.finished else "going on",
                "seconds": round(self.seconds, 1),
                "metrics": {name: _number(value) for name, value in judged[-1]["metrics"].items()} if judged else {},
            }

    def curves(self, points: int = POINTS) -> dict[str, Any]:
        """Losses, gradient norms and learning rates, thinned, and all that was judged."""
        with self._lock:  # an array that is being copied cannot grow: the thread that reads on would fail
            steps, others = self.steps[:], [*self.others]
            series = {"loss": self.losses[:], "gradient norm": self.gradient_norms[:], "learning rate": self.rates[:]}
        judged: dict[str, list[list[float | None]]] = {}
        for event in _judged(others):
            for name, value in event["metrics"].items():
                judged.setdefault(f"{event['condition']}: {name}", []).append([event["step"], _number(value)])
        return {**{name: thinned(steps, values, points) for name, values in series.items()}, "judged": judged}


class Runs:
    """All runs below a folder, or one."""

    def __init__(self, root: Path) -> None:
        """Raises: RunError: there is no such folder."""
        if not root.is_dir():
            raise RunError(f"{root} is no folder. Name a run's, or one that holds runs.")
        self.root = root.resolve()
        self._readers: dict[str, Reader] = {}

    def names(self) -> list[str]:
        """Of every run, by its path below the folder; `.` where it is one itself."""
        found = sorted(path.parent.relative_to(self.root).as_posix() for path in self._files())
        return found[:MOST_RUNS]

    def _files(self) -> Iterator[Path]:
        for depth in range(DEPTH + 1):
            yield from self.root.glob("/".join(["*"] * depth + [EVENTS]))

    def get(self, name: str) -> Reader:
        """A run, read up to now.

        Raises:
            RunError: there is none of that name.
        """
        folder = self.root if name == "." else inside(self.root, name)
        if folder is None or not (folder / EVENTS).is_file():
            raise RunError(f"{name!r} is no run in {self.root}.")
        reader = self._readers.setdefault(name, Reader(folder))
        reader.read()
        return reader


def thinned(steps: Sequence[int], values: Sequence[float], points: int) -> list[list[float | None]]:
    """At most so many [step, mean, lowest, highest]: a peak stays to be seen, however long the run."""
    number = min(points, len(steps))
    if not number:
        return []
    told = np.array(values, dtype=np.float64)
    real = np.isfinite(told)
    ends = np.arange(1, number + 1) * len(steps) // number
    starts = np.concatenate([[0], ends[:-1]])
    count = np.add.reduceat(real, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(real, told, 0.0), starts)
    lowest = np.minimum.reduceat(np.where(real, told, np.inf), starts)
    highest = np.maximum.reduceat(np.where(real, told, -np.inf), starts)
    found: list[list[float | None]] = []
    for place in range(number):
        step = float(steps[int(ends[place]) - 1])
        if count[place]:
            mean = float(total[place] / count[place])
            found.append([step, mean, float(lowest[place]), float(highest[place])])
        else:
            found.append([step, None, None, None])
    return found


def _judged(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == "Evaluated"]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
