"""What is wrong with a run, from its folder.

Here        `diagnose_run`, Diagnosis.
Elsewhere   judging (rules.py); trying what would mend it (recipes/try_fix.py); the command (cli/).
Promise     nothing is trained, and nothing in the folder is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dougong.core.errors import RunError
from dougong.core.events import Event, read_events
from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

EVENTS = "events.jsonl"


class Diagnosis(NamedTuple):
    """Of one run."""

    run: Path
    findings: list[Finding]
    """With a confidence of at least SURE."""

    num_steps: int
    num_measured: int
    """Steps that were measured from within; with none, only the curves could be judged."""

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "steps": self.num_steps,
            "measured": self.num_measured,
            "findings": [
                {
                    **finding._asdict(),
                    "title": CATALOGUE[finding.cause].title,
                    "remedy": CATALOGUE[finding.cause].remedy,
                    "settings": list(CATALOGUE[finding.cause].settings),
                }
                for finding in self.findings
            ],
        }


def diagnose_run(folder: Path, examined: Event | None = None) -> Diagnosis:
    """Judge what a run has announced so far; it may still be going on. `examined` is what its records say besides
    (examine.py).

    Raises:
        RunError: the folder holds no events.
    """
    path = folder / EVENTS
    if not path.is_file():
        raise RunError(f"{folder} holds no {EVENTS}: name the folder of a run, or one that diagnose.hook.watch wrote.")
    history = History.of(read_events(path))
    if examined is not None:
        history.add(examined)
    found = [finding for finding in diagnose(history) if finding.confidence >= SURE]
    return Diagnosis(folder, found, len(history.losses), len(history.flows))
