"""Ours beside other servers, around the same models.

Here        the parts `throughput`, `bundle` and `latency` of serve.py: a simulated device, a perceptron and two trained
            bundles, behind each server in turn.
Elsewhere   what a side runs (serve_sides.py); starting and asking it (serve_asking.py); the easy-VQA student
            (serve_compressed.py).
Promise     each model is behind every side in the same run, one worker of one core, batches of at most 32. A side that
            does not start is named on stderr and has no figures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve_asking import (
    CALLERS,
    PEERS,
    Closed,
    Side,
    closed,
    mixed_bundle,
    mixed_rows,
    numbers_bundle,
    opened,
    side,
    spread,
)

from dougong.core.errors import RunError
from dougong.core.figures import Figure
from dougong.serve.event_loop import run_fast
from dougong.serve.loadtest import quantile

Rows = Sequence[Mapping[str, Any]]


class Subject(NamedTuple):
    """A model that every side serves; requests are numbers where it has no records."""

    name: str
    model: str
    bundle: Path
    rows: Rows = ()


def throughput(quick: bool) -> Iterator[Figure]:
    yield from _each(quick, lambda folder: _models(folder, quick), _throughput_of)


def bundles(quick: bool) -> Iterator[Figure]:
    yield from _each(quick, lambda folder: _bundles(folder, quick), _throughput_of)


def latency(quick: bool) -> Iterator[Figure]:
    yield from _each(quick, lambda folder: [*_models(folder, quick), *_bundles(folder, quick)], _latency_of)


def _each(quick: bool, subjects: Any, figures: Any) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for subject in subjects(folder):
            print(f"  {subject.name} ...", file=sys.stderr)
            yield from figures(subject, folder, quick)


def _models(folder: Path, quick: bool) -> list[Subject]:
    numbers = numbers_bundle(folder)
    return [Subject(model, model, numbers) for model in (("device",) if quick else ("device", "perceptron"))]


def _bundles(folder: Path, quick: bool) -> list[Subject]:
    mixed = Subject("mixed bundle", "bundle", mixed_bundle(folder), mixed_rows())
    if quick:
        return [mixed]
    from serve_compressed import easy_vqa  # trains, where that was not done before

    served, rows = easy_vqa(folder, ("student-int8",), quick)
    return [mixed, Subject("easy-VQA student in int8", "bundle", served["student-int8"], rows)]


def _sides() -> tuple[str, ...]:
    if "PEERS" not in os.environ:
        print("no peers: PEERS=/path/to/python names an environment that has them", file=sys.stderr)
        return "ours", "minimal", "none"
    return "ours", "minimal", "none", *PEERS


def _started(name: str, subject: Subject, folder: Path) -> contextlib.AbstractContextManager[Side]:
    more = [str(subject.bundle)] if name == "ours" or subject.rows else []
    python = os.environ["PEERS"] if name in PEERS else sys.executable
    return side(name, subject.model, *more, folder=folder, python=python)


def _throughput_of(subject: Subject, folder: Path, quick: bool) -> Iterator[Figure]:
    repeats, seconds, rest = (1, 1.0, 1.0) if quick else (3, 8.0, 5.0)
    found: dict[str, list[Closed]] = {}
    idle: dict[str, float] = {}
    for _ in range(repeats):
        for name in _sides():
            try:
                with _started(name, subject, folder) as started:
                    run = run_fast(closed(started, name, CALLERS, seconds, subject.rows))
                    before = started.cpu_seconds()
                    time.sleep(rest)
                    idle[name] = (started.cpu_seconds() - before) / rest
            except RunError as error:
                print(error, file=sys.stderr)
            else:
                found.setdefault(name, []).append(run)
    yield from _throughput_figures(subject.name, found, idle)


def _throughput_figures(subject: str, found: Mapping[str, list[Closed]], idle: Mapping[str, float]) -> Iterator[Figure]:
    rates = {name: statistics.median(each.rate for each in runs) for name, runs in found.items()}
    for name, runs in found.items():
        yield spread(f"{subject}, {name}: answered", [each.rate for each in runs], "1/s")
        for share in (0.5, 0.99):
            tails = [1e3 * quantile(each.seconds, share) for each in runs]
            yield spread(f"{subject}, {name}: p{100 * share:g}", tails, "ms")
        asked = {"asked": "<= 0.15"} if name == "ours" and subject == "device" else {}
        yield spread(f"{subject}, {name}: processor a request", [each.cpu_milliseconds for each in runs], "ms", **asked)
        asked = {"asked": "<= 0.01"} if name == "ours" else {}
        yield Figure(name=f"{subject}, {name}: processor when idle", value=idle[name], unit="cores", **asked)
    ratio = rates["ours"] / rates["minimal"]
    yield Figure(name=f"{subject}: ours, of the minimal batcher", value=ratio, unit="x", asked=">= 0.9")
    if others := [rates[name] for name in PEERS if name in rates]:
        ratio = rates["ours"] / max(others)
        yield Figure(name=f"{subject}: ours, of the best peer", value=ratio, unit="x", asked=">= 1.25")


def _latency_of(subject: Subject, folder: Path, quick: bool) -> Iterator[Figure]:
    """At one rate for all that can take it: four fifths of what callers that wait get from the best peer."""
    repeats, seconds = (1, 1.5) if quick else (3, 10.0)
    most: dict[str, float] = {}
    for name in _sides():
        try:
            with _started(name, subject, folder) as started:
                most[name] = run_fast(closed(started, name, CALLERS, seconds, subject.rows)).rate
        except RunError as error:
            print(error, file=sys.stderr)
    best = max([name for name in most if name in PEERS] or ["minimal"], key=most.__getitem__)
    rate = 0.8 * most[best]
    busy = [name for name in most if name == "ours" or (name != "none" and most[name] >= rate)]
    few: dict[str, list[float]] = {"ours": [], "none": []}
    many: dict[str, list[float]] = {name: [] for name in busy}
    for repeat in range(repeats):
        for name in dict.fromkeys(("ours", "none", *busy)):
            ask = functools.partial(opened, seconds=seconds, slo=1.0, seed=repeat, name=name, rows=subject.rows)
            with _started(name, subject, folder) as started:
                if name in few:
                    few[name].append(1e3 * run_fast(ask(started, 0.2 * most["none"])).quantiles["0.5"])
                if name in many:
                    many[name].append(1e3 * run_fast(ask(started, rate)).quantiles["0.99"])
    alone = statistics.median(few["none"])
    asked: dict[str, Any] = {"baseline": alone, "asked": f"<= {1.15 * alone:.4g}"}
    yield spread(f"{subject.name}, a fifth of no batching's rate: p50, beside no batching", few["ours"], "ms", **asked)
    theirs = statistics.median(many[best])
    at = f"{subject.name}, {rate:.0f} a second (80 % of {best})"
    for name, tails in many.items():
        asked = {"baseline": theirs, "asked": f"<= {theirs:.4g}"} if name == "ours" else {}
        yield spread(f"{at}: p99, {name}", tails, "ms", **asked)
    for name in most:
        if name not in many and name != "none":
            yield Figure(name=f"{at}: too much for {name}, which answers", value=most[name], unit="1/s")
