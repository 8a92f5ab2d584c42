"""Figures of times that were taken in rounds, and ranks of a script.

Here        `ratio`, `quartiles`, `as_ranks`.
Elsewhere   what a round is (each script); options and the written result (harness.py).
Promise     a ratio is the median of the rounds' ratios, with a bootstrapped 95 % interval; a rank that is started is
            ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dougong.core.figures import Figure

LIMIT_SECONDS: Final = 1800.0


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], asked: str | None) -> Figure:
    """Ours over theirs, round by round."""
    ratios = np.array(ours) / np.array(theirs)
    chosen = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), (0.025, 0.975))
    return Figure(
        name=name,
        value=float(np.median(ratios)),
        unit="x",
        asked=asked,
        low=float(low),
        high=float(high),
        seeds=len(ratios),
    )


def quartiles(name: str, seconds: Sequence[float], baseline: float | None = None) -> Figure:
    """Their median, between the quartiles, in milliseconds; `baseline` too."""
    low, middle, high = np.quantile(np.array(seconds) * 1000, (0.25, 0.5, 0.75))
    return Figure(
        name=f"{name} (quartiles)",
        value=float(middle),
        unit="ms",
        low=float(low),
        high=float(high),
        seeds=len(seconds),
        baseline=baseline,
    )


def as_ranks(
    script: Path, environments: Sequence[Mapping[str, str]], before: Sequence[Sequence[str]] | None = None
) -> Any:
    """What the first of so many processes of `script --as-rank` writes, as JSON, into the file DOUGONG_RESULT.

    `before` are words that go before each one's command.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        world = {name: str(len(environments)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        ranks = []
        for rank, own in enumerate(environments):
            place = {"RANK": str(rank), "OMP_NUM_THREADS": "1", "DOUGONG_RESULT": str(result)}
            command = [*(before[rank] if before else ()), sys.executable, str(script.resolve()), "--as-rank"]
            environment = {**os.environ, **world, **place, **own}
            ranks.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))  # noqa: S603, our own scripts
        try:
            for process in ranks:
                if process.wait(timeout=LIMIT_SECONDS):
                    raise RuntimeError(f"a rank ended with status {process.returncode}: see above")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return json.loads(result.read_text(encoding="utf-8"))
