"""Runs as they lie in folders, read while they grow.

Here        Runs (all below a folder), Reader (one run's events, read on from where it stopped), `thinned`.
Elsewhere   what is shown of them (watch/summary.py, watch/dashboard.py); the events (core/events.py).
Promise     a run is only read, and never held in memory whole: of each step three numbers stay, of what was measured
            from within the last few. No path leads out of the folder that was named. A line that is still being
            written is read the next time.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from dougong.core.errors import RunError
from dougong.core.files import inside
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

EVENTS: Final = "events.jsonl"
MOST_RUNS: Final = 200
DEPTH: Final = 3
KEPT_FLOWS: Final = 24
KEPT_OTHERS: Final = 400
POINTS: Final = 400


class Reader:
    """One run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = array("q")
        self.losses = array("d")
        self.gradient_norms = array("d")
        self.rates = array("d")
        self.flows: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.total_steps: int | None = None
        self.finished: str | None = None
        self.seconds = 0.0
        self.num_flows = 0
        self._offset = 0
        self._found: tuple[int, list[Finding]] | None = None

    def read(self) -> bool:
        """Read what is new; whether there was anything. A file that has become shorter is read anew."""
        path = self.folder / EVENTS
        try:
            size = path.stat().st_size
        except OSError:
            return False
        if size < self._offset:
            self.__init__(self.folder)  # type: ignore[misc]  # resumed: steps after the checkpoint are trained again
        if size == self._offset:
            return False
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"}\n"):
                    break
                self._offset += len(line)
                self._take(json.loads(line))
        return True

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "StepDone":
            self.steps.append(event["step"])
            self.losses.append(event["loss"])
            self.gradient_norms.append(event["grad_norm"])
            self.rates.append(event["learning_rate"])
            self.seconds += event["seconds"]
            self.finished = None
        elif kind == "FlowMeasured":
            self.flows.append(event)
            self.num_flows += 1
            if len(self.flows) > KEPT_FLOWS:  # the first ones say how it began, the last ones how it goes
                del self.flows[KEPT_FLOWS // 2]
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
        if self._found is None or self._found[0] != self._offset:
            history = History(total_steps=self.total_steps)
            history.steps, history.losses = self.steps.tolist(), self.losses.tolist()
            history.gradient_norms, history.learning_rates = self.gradient_norms.tolist(), self.rates.tolist()
            for event in (*self.others, *self.flows):
                history.add(event)
            found = [finding for finding in diagnose(history) if finding.confidence >= SURE]
            self._found = (self._offset, found)
        return self._found[1]

    def judged(self) -> list[dict[str, Any]]:
        return [event for event in self.others if event["kind"] == "Evaluated"]

    def told(self) -> dict[str, Any]:
        """In a line of a list."""
        judged = self.judged()
        last = len(self.steps) - 1
        return {
            "step": self.steps[last] if last >= 0 else 0,
            "total_steps": self.total_steps,
            "loss": _number(self.losses[last]) if last >= 0 else None,
            "state": self.finished or "going on",
            "seconds": round(self.seconds, 1),
            "metrics": judged[-1]["metrics"] if judged else {},
            "findings": len(self.findings()),
        }

    def curves(self, points: int = POINTS) -> dict[str, Any]:
        """Losses, gradient norms and learning rates, thinned, and all that was judged."""
        judged: dict[str, list[list[float | None]]] = {}
        for event in self.judged():
            for name, value in event["metrics"].items():
                judged.setdefault(f"{event['condition']}: {name}", []).append([event["step"], _number(value)])
        return {
            "loss": thinned(self.steps, self.losses, points),
            "gradient norm": thinned(self.steps, self.gradient_norms, points),
            "learning rate": thinned(self.steps, self.rates, points),
            "judged": judged,
        }


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
    found: list[list[float | None]] = []
    for place in range(number):
        start, end = place * len(steps) // number, (place + 1) * len(steps) // number
        some = [value for value in values[start:end] if math.isfinite(value)]
        if some:
            found.append([float(steps[end - 1]), math.fsum(some) / len(some), min(some), max(some)])
        else:
            found.append([float(steps[end - 1]), None, None, None])
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
