"""How fast a version is and what it holds, with how much this machine wavers.

Here        `compare_seconds`, `measure`, Performance, `remember`, `remembered`, `trend_picture`.
Elsewhere   whether it is too much (gate.py).
Promise     two versions are timed in turns, so that a machine that grows slow meanwhile slows both; a difference
            smaller than the machine's own wavering is none; bytes are counted, not sampled.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dougong.continual.lock import locked
from dougong.continual.taught import Taught
from dougong.core.config import Config, parse
from dougong.core.errors import ConfigError, RunError
from dougong.data.table import Table
from dougong.engine.memory.account import Alive, num_bytes
from dougong.objectives.decision import decision_probabilities

RESAMPLES = 2000


class Performance(Config):
    """Of one version on one kind of machine."""

    version: str
    machine: str
    when: str
    batch_size: int
    latency_seconds: float
    """Median of a batch, records decoded and answered."""

    step_seconds: float
    """Median of a forward and a backward of the same batch."""

    noise: float
    """Half the spread of the middle half of repeats, over the median."""

    peak_bytes: int
    """Most that answering a batch holds at a time, besides the weights."""

    weight_bytes: int
    bundle_bytes: int


class Ratio(NamedTuple):
    """The newer over the older."""

    ratio: float
    low: float
    """What it is at least, by the machine's wavering: the lower end of a 99 % interval of medians resampled."""

    noise: float


def machine() -> str:
    """What kind this is: figures of other kinds are not compared."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def compare_seconds(before: Callable[[], object], after: Callable[[], object], repeats: int, *, seed: int = 0) -> Ratio:
    """Time both in turns, who goes first changing each time."""
    before(), after()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats):
        order = ((0, before), (1, after)) if number % 2 == 0 else ((1, after), (0, before))
        for which, call in order:
            started = time.perf_counter()
            call()
            seconds[which].append(time.perf_counter() - started)
    old_R, new_R = np.array(seconds[0]), np.array(seconds[1])
    random = np.random.default_rng(seed)
    drawn = random.integers(repeats, size=(RESAMPLES, repeats))
    # Pairs are drawn together: what slows both at a moment slows neither over the other.
    ratio_S = np.median(new_R[drawn], axis=1) / np.median(old_R[drawn], axis=1)
    low = float(np.quantile(ratio_S, 0.005))
    return Ratio(float(np.median(new_R) / np.median(old_R)), low, _noise(old_R))


def _noise(seconds: np.ndarray[Any, Any]) -> float:
    quarter, median, three = np.quantile(seconds, (0.25, 0.5, 0.75))
    return float((three - quarter) / 2 / median)


def peak_bytes(taught: Taught, rows: Table, task: str | None) -> int:
    """Most that answering these records holds at a time, besides the weights."""
    answer(taught, rows, task)
    with Alive(()) as alive:
        answer(taught, rows, task)
    return alive.peak


def answer(taught: Taught, rows: Table, task: str | None) -> object:
    """All of the records in one batch."""
    if task is None:
        return taught.model.predict(rows, batch_size=rows.num_rows)
    return taught.predict(rows, task, batch_size=rows.num_rows)


def weight_bytes(taught: Taught) -> int:
    """Of the base and all that tasks add."""
    return num_bytes([*taught.base.parameters(), *taught.elastic.parameters()])


def measure(taught: Taught, rows: Table, version: str, bundle: Path, *, repeats: int = 15) -> Performance:
    """One version by itself, on the bundle's own task."""
    answer(taught, rows, None)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        answer(taught, rows, None)
        seconds.append(time.perf_counter() - started)
    return Performance(
        version=version,
        machine=machine(),
        when=datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        batch_size=rows.num_rows,
        latency_seconds=float(np.median(seconds)),
        step_seconds=_step_seconds(taught, rows, max(3, repeats // 3)),
        noise=_noise(np.array(seconds)),
        peak_bytes=peak_bytes(taught, rows, None),
        weight_bytes=weight_bytes(taught),
        bundle_bytes=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
    )


def _step_seconds(taught: Taught, rows: Table, repeats: int) -> float:
    from dougong.data.collate import Collator, Request
    from dougong.engine.batches import to_tensors

    preparation = taught.model.preparation
    held = rows.read(0, rows.schema.names)
    cells = {
        column: held.column(column).to_pylist() if column in held.column_names else [None] * held.num_rows
        for column in preparation.columns
    }
    arrays = Collator(preparation, rows.folder, seed=0)(Request(np.arange(held.num_rows), cells, (0, 0)))
    batch = to_tensors(arrays)
    trained = list(taught.base.parameters())
    seconds = []
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            said = decision_probabilities(taught.base(batch).output_BC, preparation.target.task)
            said.square().sum().backward()  # type: ignore[no-untyped-call]
            seconds.append(time.perf_counter() - started)
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return float(np.median(seconds[1:]))


def remember(file: Path, found: Performance) -> None:
    """Add a line to a file of baselines."""
    with locked(file.with_name(f".{file.name}.lock"), what=str(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(found.model_dump_json() + "\n")
            opened.flush()
            os.fsync(opened.fileno())


def remembered(file: Path) -> list[Performance]:
    """
    Raises:
        RunError: it is no such file.
    """
    if not file.exists():
        return []
    found = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            found.append(parse(Performance, json.loads(line), where=file.name))
        except (ValueError, ConfigError):
            if number == len(lines) - 1:
                break  # a process was killed while it wrote
            raise RunError(f"{file}: line {number + 1} is no baseline. Remove that line.") from None
    return found


def trend_picture(found: Sequence[Performance], out: Path) -> Path:
    """Latency, step and memory by version on this kind of machine, its noise as bars; a .png or .svg."""
    from matplotlib.figure import Figure

    here = [one for one in found if one.machine == machine()] or list(found)
    if not here:
        raise ConfigError("there is no baseline to draw yet. dougong regress BUNDLE --baselines FILE adds one.")
    figure = Figure(figsize=(max(5.0, 0.6 * len(here) + 3), 6.0), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    place = np.arange(len(here))
    for axis, (label, values) in zip(
        axes,
        (
            ("latency, ms", [1e3 * one.latency_seconds for one in here]),
            ("step, ms", [1e3 * one.step_seconds for one in here]),
            ("peak, MiB", [one.peak_bytes / 2**20 for one in here]),
        ),
        strict=True,
    ):
        bars = [value * one.noise for value, one in zip(values, here, strict=True)] if "ms" in label else None
        axis.errorbar(place, values, yerr=bars, marker="o", capsize=3)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xticks(place, [one.version for one in here], rotation=45, ha="right")
    axes[0].set_title(here[-1].machine, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out)
    except ValueError as error:
        raise ConfigError(f"{out} cannot be drawn ({str(error).splitlines()[0]}). Name a .png or .svg file.") from None
    return out
