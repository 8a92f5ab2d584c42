"""The diagnoser on faults that were put in on purpose (claim 12).

Here        each fault of fault_operators.py in each training of fault_subjects.py that it fits, with its healthy twin
            (the same seed, data and settings); detection, cause, place and time, beside other people's rules on the
            same measurements; and what measuring costs.
Elsewhere   carrying the trainings out, and keeping them (fault_runs.py); options and the written result (harness.py).
Promise     only faults that did harm count (killed mutants): the twin learnt, and the spoilt one is at least .05 less
            accurate on held-out records, or crashed, or was no longer finite. A twin that did not learn (below chance +
            three quarters of the way to its subject's best) drops its fault. Healthy runs are the twins, one for each
            fault, each with settings drawn anew, so that they are at least half. Thresholds were set on the training
            half (`--part training`): sandwich, decoder and convolutions of other data and seeds. The test half also
            has two architectures that no rule was made on, and operators that the training half has not: they
            have rows of their own.

A run counts as detected where a finding is at least as sure as .5 at any time; cause and place are those of the surest
finding at the end. A place is right where the found path lies within the true one, or around it at most one level, or
names the same input. Intervals are Wilson's at 95 %. A part takes some ten minutes of one core; its trainings are kept,
so it can be stopped, and judged again after a change of rules without training anew.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Final, NamedTuple

import torch
from fault_operators import Operator
from fault_runs import NAME, Pair, Ran, jobs_of, kept_runs, killed, optimizer_of, train_step
from fault_subjects import STEPS, SUBJECTS, Settings
from harness import Kept, run
from paired import ratio
from shares import share

from dougong.core.figures import Figure
from dougong.engine.flow.meter import FlowConfig
from dougong.watch.diagnose.baselines import BASELINES
from dougong.watch.diagnose.history import Failure, History
from dougong.watch.diagnose.hook import Watched
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

OURS: Final = "ours"
PARTS: Final = ("training", "test", "overhead")
QUICK_EVERY: Final = 12


class Told(NamedTuple):
    """What each diagnoser makes of a run."""

    ran: Ran
    first: dict[str, int | None]
    """By diagnoser, the step after which it first found something."""

    surest: dict[str, Finding | None]
    """By diagnoser, the surest finding at the end."""


def told_of(ran: Ran) -> Told:
    """Play a run back; every diagnoser is asked whenever something was measured, and every twelfth step."""
    history = History()
    rules: dict[str, Callable[[History], Iterable[Finding]]] = {OURS: diagnose, **BASELINES}
    first: dict[str, int | None] = dict.fromkeys(rules)
    for number, event in enumerate(ran.events):
        history.add(event)
        last = number + 1 == len(ran.events)
        if last and ran.failure is not None:
            history.failure = Failure(ran.failure[0], tuple(ran.failure[1]), ran.failure[2])
        asked = event["kind"] in ("FlowMeasured", "Examined", "Evaluated") or history.step % 12 == 0 or last
        for name, rule in rules.items():
            if asked and first[name] is None and _sure(rule(history)) is not None:
                first[name] = max(1, history.step)
    return Told(ran, first, {name: _sure(rule(history)) for name, rule in rules.items()})


def _sure(findings: Iterable[Finding]) -> Finding | None:
    found = [finding for finding in findings if finding.confidence >= SURE]
    return max(found, key=lambda finding: finding.confidence) if found else None


def place_right(finding: Finding | None, ran: Ran) -> bool:
    """Whether the place lies within the true one or one level around it; or is of the same input. A fault that is
    everywhere has no place to be missed."""
    if finding is None:
        return False
    found, wanted = finding.place, ran.place
    if wanted == "" or found == wanted:
        return True
    if wanted == "(all)":
        return found == "optimizer"
    for path in ran.encoders.get(wanted, []):
        if found == path or found.startswith(f"{path}.") or path.startswith(f"{found}."):
            return True
    around = wanted.startswith(f"{found}.") and wanted.count(".") - found.count(".") <= 1
    return found.startswith(f"{wanted}.") or around


def cause_right(operator: Operator, found: Finding | None) -> bool:
    return found is not None and found.cause == operator.cause


class Fault(NamedTuple):
    operator: Operator
    subject: str
    told: Told


class Counted(NamedTuple):
    """Runs of one half: each fault that did harm, and each healthy run."""

    faults: list[Fault]
    healthy: list[tuple[str, Told]]
    num_harmless: int
    num_twins_dropped: int


def count(pairs: Iterable[Pair]) -> Counted:
    """Judge all runs of a half."""
    faults: list[Fault] = []
    healthy: list[tuple[str, Told]] = []
    harmless = dropped = 0
    for (operator, subject, _), twin, spoilt in pairs:
        if spoilt is None:
            dropped += 1
            continue
        healthy.append((subject, told_of(twin)))
        if killed(twin, spoilt):
            faults.append(Fault(operator, subject, told_of(spoilt)))
        else:
            harmless += 1
    return Counted(faults, healthy, harmless, dropped)


def carried_out(half: str, quick: bool) -> Iterator[Pair]:
    """The trainings of a half, in a process of their own: what is kept must not hang on what judges."""
    if quick:
        return kept_runs(half, jobs_of(half, QUICK_EVERY), None)
    subprocess.run([sys.executable, __file__.replace("diagnose.py", f"{NAME}.py"), half], check=True)  # noqa: S603
    return kept_runs(half, jobs_of(half), Kept(NAME))


def figures(half: str, counted: Counted) -> Iterator[Figure]:
    for name in (OURS, *BASELINES):
        yield from _of_rules(f"{half}, {name}", name, counted, full=name == OURS)
    unseen = counted._replace(faults=[fault for fault in counted.faults if fault.operator.unseen])
    if unseen.faults:
        for name in (OURS, *BASELINES):
            yield from _of_rules(f"{half}, unseen operators alone, {name}", name, unseen, full=name == OURS)
    several = [fault for fault in counted.faults if fault.operator.multimodal]
    yield from _of_some(f"{half}, ours, multimodal faults", several)
    for subject in SUBJECTS:
        yield from _of_some(f"{half}, ours, {subject}", [fault for fault in counted.faults if fault.subject == subject])
        alarms = [told.first[OURS] is not None for of, told in counted.healthy if of == subject]
        if alarms:
            yield share(f"{half}, ours, {subject}: false alarms", sum(alarms), len(alarms))
    for operator in dict.fromkeys(fault.operator for fault in several):
        yield from _of_some(f"{half}, ours, {operator.name}", [f for f in several if f.operator is operator])
    did_harm = {fault.operator.name for fault in counted.faults}
    asked = ">= 60" if half == "test" else None
    yield Figure(name=f"{half}: operators that did harm somewhere", value=len(did_harm), unit="", asked=asked)
    yield Figure(name=f"{half}: faults that did no harm", value=counted.num_harmless, unit="")
    yield Figure(name=f"{half}: twins that did not learn", value=counted.num_twins_dropped, unit="")
    part = len(counted.healthy) / max(1, len(counted.healthy) + len(counted.faults))
    yield Figure(name=f"{half}: share of healthy runs", value=part, unit="", asked=">= 0.5")


def _of_rules(title: str, name: str, counted: Counted, *, full: bool) -> Iterator[Figure]:
    num, alarmed = len(counted.faults), len(counted.healthy)
    first = [fault.told.first[name] for fault in counted.faults]
    hits = sum(step is not None for step in first)
    wrong = sum(told.first[name] is not None for _, told in counted.healthy)
    f1 = 2 * hits / max(1, hits + wrong + num)
    yield Figure(
        name=f"{title}: detection F1", value=f1, unit="", asked=">= 0.95" if full else None, seeds=num + alarmed
    )
    yield share(f"{title}: faults found", hits, num)
    yield share(f"{title}: false alarms", wrong, alarmed, "<= 0.02" if full else None)
    cause = sum(cause_right(fault.operator, fault.told.surest[name]) for fault in counted.faults)
    yield share(f"{title}: cause first", cause, num, ">= 0.85" if full else None)
    place = sum(place_right(fault.told.surest[name], fault.told.ran) for fault in counted.faults)
    yield share(f"{title}: place first", place, num, ">= 0.90" if full else None)
    steps = [step for step in first if step is not None]
    if steps:
        yield Figure(
            name=f"{title}: median share of training until found",
            value=median(steps) / STEPS,
            unit="",
            asked="<= 0.05" if full else None,
            seeds=len(steps),
        )


def _of_some(title: str, faults: Sequence[Fault]) -> Iterator[Figure]:
    if not faults:
        return
    yield share(f"{title}: found", sum(fault.told.first[OURS] is not None for fault in faults), len(faults))
    right = sum(cause_right(fault.operator, fault.told.surest[OURS]) for fault in faults)
    yield share(f"{title}: cause first", right, len(faults))


def overhead(quick: bool) -> Iterator[Figure]:
    """A step with measuring over one without, far into a run.

    Turns change with each step that is measured, so that what else the machine does falls on both alike; and both are
    of one model, since where one comes to lie in memory changes its times by more. Of a machine with nothing else to
    do.
    """
    with_it: list[float] = []
    without: list[float] = []
    settings = Settings(1e-3, 32, 0.01, 0.0, 1.0, "adamw", "constant", 0.0)
    every, probe_every = FlowConfig().every, FlowConfig().probe_every
    for turn in range(2 if quick else 9):
        job = SUBJECTS["sandwich"](turn, "test", settings)
        optimizer = optimizer_of(job)
        for step in range(3):
            train_step(job, optimizer, step)
        seconds = {True: 0.0, False: 0.0}
        for begun in range(0, every if quick else probe_every, every):
            for watching in (True, False) if begun // every % 2 == turn % 2 else (False, True):
                # Past the first steps, which are measured more often.
                watched = Watched(job.model, optimizer, steps=2**20 * probe_every + begun) if watching else None
                started = time.perf_counter()
                for step in range(every):
                    loss = train_step(job, optimizer, begun + step)
                    if watched is not None:
                        watched.step(loss)
                seconds[watching] += time.perf_counter() - started
                if watched is not None:
                    watched.close()
        with_it.append(seconds[True])
        without.append(seconds[False])
    yield ratio("a step with measuring over one without", with_it, without, "<= 1.02")


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for part in parts:
        if part == "overhead":
            yield from overhead(quick)
            continue
        counted = count(carried_out(part, quick))
        yield from figures(part, counted)
        _tell(counted)


def _tell(counted: Counted) -> None:
    for operator, subject, told in counted.faults:
        found = told.surest[OURS]
        if not cause_right(operator, found) or not place_right(found, told.ran):
            wanted = f"{operator.name} in {subject} ({operator.cause}, {told.ran.place})"
            print(f"  not so: {wanted}: {found}", file=sys.stderr)
    for subject, told in counted.healthy:
        if told.first[OURS] is not None:
            print(f"  false alarm in {subject} after {told.first[OURS]}: {told.surest[OURS]}", file=sys.stderr)


if __name__ == "__main__":
    run(
        "diagnose",
        "The diagnoser on faults put in on purpose, beside other people's rules (synthetic).",
        measure,
        parts=PARTS,
    )
