"""The diagnoser on faults that were put in on purpose (claim 12).

Here        each fault of fault_operators.py in each training of fault_subjects.py that it fits, with its healthy twin
            (the same seed, data and settings); detection, cause, place and time, beside other people's rules on the
            same measurements; and what measuring costs.
Elsewhere   options and the written result (harness.py).
Promise     only faults that did harm count (killed mutants): the twin learnt, and the spoilt one is at least .05 less
            accurate on held-out records, or crashed, or was no longer finite. A twin that did not learn (below chance +
            three quarters of the way to its subject's best) drops its fault. Healthy runs are the twins and as many
            more as it takes to be at least half. Thresholds were set on the training half (`--part training`):
            sandwich and decoder of other sizes, data and seeds. The test half has also two architectures that no rule
            was made on.

A run counts as detected where a finding is at least as sure as .5 at any time; cause and place are those of the surest
finding at the end. A place is right where the found path lies within the true one, or around it at most one level, or
names the same input. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from fault_operators import OPERATORS, Operator
from fault_subjects import OF_TRAINING, RATES, STEPS, SUBJECTS, Job, Settings
from harness import Kept, run
from paired import ratio
from torch import nn

from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.engine.flow import FlowConfig
from dougong.watch.diagnose.baselines import BASELINES
from dougong.watch.diagnose.history import Failure, History
from dougong.watch.diagnose.hook import Watched
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

HARM: Final = 0.05
JUDGED_EVERY: Final = 32
OURS: Final = "ours"


class Ran(NamedTuple):
    """One run, and all that was measured in it."""

    accuracy: float
    crashed: bool
    finite: bool
    place: str
    encoders: dict[str, list[str]]
    events: list[dict[str, Any]]
    failure: list[Any] | None


class Told(NamedTuple):
    """What each diagnoser makes of a run."""

    ran: Ran
    first: dict[str, int | None]
    """By diagnoser, the step after which it first found something."""

    surest: dict[str, Finding | None]
    """By diagnoser, the surest finding at the end."""


def carry_out(subject: str, half: str, seed: int, operator: Operator | None) -> Ran:
    """Train once, watched."""
    random = np.random.default_rng(derive_seed(seed, half, subject))
    settings = Settings.drawn(random)
    settings = settings._replace(learning_rate=settings.learning_rate * RATES[subject][settings.optimizer])
    job = SUBJECTS[subject](derive_seed(seed, half) % 2**31, half, settings)
    place = "" if operator is None else operator.put(job, np.random.default_rng(derive_seed(seed, "place")))
    optimizer = _optimizer(job)
    events: list[dict[str, Any]] = []
    watched = Watched(
        job.model,
        optimizer,
        total_steps=STEPS,
        listener=lambda event: events.append({"kind": event.kind, **asdict(event)}),
    )
    accuracy, crashed, finite = 0.0, False, True
    torch.manual_seed(seed)
    try:
        for step in range(STEPS):
            loss = _step(job, optimizer, step)
            finite = finite and math.isfinite(loss)
            watched.step(loss)
            if (step + 1) % JUDGED_EVERY == 0 or step == 5:
                accuracy = _judge(job)
                watched.judged(accuracy=accuracy)
    except Exception as error:  # what a fault breaks is a finding too
        crashed = True
        watched.failed(error)
    watched.close()
    finite = finite and all(bool(p.isfinite().all()) for p in job.model.parameters())
    failure = watched.history.failure
    kept = [event for event in events if event["kind"] != "StepDone" or event["step"] < 30 or event["step"] % 4 == 0]
    return Ran(accuracy, crashed, finite, place, job.encoders, kept, None if failure is None else list(failure))


def told_of(ran: Ran) -> Told:
    """Play a run back; every diagnoser is asked whenever something was measured, and every tenth step."""
    history = History()
    rules: dict[str, Callable[[History], Iterable[Finding]]] = {OURS: diagnose, **BASELINES}
    first: dict[str, int | None] = dict.fromkeys(rules)
    for number, event in enumerate(ran.events):
        history.add(event)
        last = number + 1 == len(ran.events)
        if last and ran.failure is not None:
            history.failure = Failure(ran.failure[0], tuple(ran.failure[1]), ran.failure[2])
        asked = event["kind"] in ("FlowMeasured", "Evaluated") or history.step % 12 == 0 or last
        for name, rule in rules.items():
            if asked and first[name] is None and _sure(rule(history)) is not None:
                first[name] = max(1, history.step)
    return Told(ran, first, {name: _sure(rule(history)) for name, rule in rules.items()})


def _sure(findings: Iterable[Finding]) -> Finding | None:
    found = [finding for finding in findings if finding.confidence >= SURE]
    return max(found, key=lambda finding: finding.confidence) if found else None


def _optimizer(job: Job) -> torch.optim.Optimizer:
    settings = job.settings
    held = job.held(job.model) if job.held is not None else [p for p in job.model.parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        given = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True, **job.changes}
        return torch.optim.AdamW(held, **given)
    given = {"lr": settings.learning_rate, "momentum": 0.9, "weight_decay": settings.weight_decay, **job.changes}
    return torch.optim.SGD(held, **given)


def _step(job: Job, optimizer: torch.optim.Optimizer, step: int) -> float:
    job.model.train()
    inputs, target = job.batch(step)
    for group in optimizer.param_groups:
        group["lr"] = job.settings.learning_rate * job.factor(step)
    if job.clears:
        optimizer.zero_grad()
    loss = job.loss_of(job.scores(job.model, inputs), target)
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
    if job.after_backward is not None:
        job.after_backward(job.model)
    if job.settings.clip is not None:
        nn.utils.clip_grad_norm_(job.model.parameters(), job.settings.clip)
    optimizer.step()
    if job.after_step is not None:
        job.after_step(job.model)
    return float(loss.detach())


def _judge(job: Job) -> float:
    job.model.train(not job.judges_in_eval)
    with torch.no_grad():
        inputs, target = job.held_out()
        right = job.scores(job.model, inputs).argmax(dim=-1) == target
    job.model.train()
    return float(right.float().mean())


# Counting ------------------------------------------------------------------------------------------------------------

BEST: Final = {"sandwich": 0.9, "decoder": 0.7, "convolutions": 0.9, "two towers": 0.9}
CLASSES: Final = {"sandwich": 8, "decoder": 15, "convolutions": 6, "two towers": 6}


def learnt(subject: str, accuracy: float) -> bool:
    chance = 1 / CLASSES[subject]
    return accuracy >= chance + 0.75 * (BEST[subject] - chance)


def killed(twin: Ran, spoilt: Ran) -> bool:
    return spoilt.crashed or not spoilt.finite or spoilt.accuracy <= twin.accuracy - HARM


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


class Counted(NamedTuple):
    """Runs of one half: each fault that did harm, and each healthy run."""

    faults: list[tuple[Operator, str, Told]]
    healthy: list[tuple[str, Told]]
    num_harmless: int
    num_twins_dropped: int


def count(half: str, seeds: Sequence[int], operators: Sequence[Operator], kept: Kept | None) -> Counted:
    subjects = OF_TRAINING if half == "training" else tuple(SUBJECTS)
    faults: list[tuple[Operator, str, Told]] = []
    healthy: dict[tuple[str, int], Told] = {}
    harmless = dropped = 0
    jobs = [(op, s, seed) for op in operators for s in op.subjects if s in subjects for seed in seeds]
    for number, (operator, subject, seed) in enumerate(jobs):
        # Each fault has a seed of its own, so that healthy twins differ from each other as well.
        own = 1000 * seed + OPERATORS.index(operator)
        twin = _kept(kept, subject, half, own, None)
        if not learnt(subject, twin.accuracy):
            dropped += 1
            continue
        healthy[subject, own] = told_of(twin)
        spoilt = _kept(kept, subject, half, own, operator)
        if killed(twin, spoilt):
            faults.append((operator, subject, told_of(spoilt)))
        else:
            harmless += 1
        print(f"{number + 1} of {len(jobs)}: {operator.name} in {subject}", file=sys.stderr)
    return Counted(faults, [(subject, ran) for (subject, _), ran in healthy.items()], harmless, dropped)


def _kept(kept: Kept | None, subject: str, half: str, seed: int, operator: Operator | None) -> Ran:
    key = f"{subject} {half} {seed} {'' if operator is None else operator.name}"
    found = kept.get(key) if kept is not None else None
    if found is None:
        ran = carry_out(subject, half, seed, operator)
        if kept is not None:
            kept.put(key, ran._asdict())
        return ran
    return Ran(**found)


def wilson(hits: int, number: int) -> tuple[float, float]:
    if not number:
        return 0.0, 1.0
    z, share = 1.96, hits / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(name: str, hits: int, number: int, asked: str | None = None) -> Figure:
    low, high = wilson(hits, number)
    return Figure(name=name, value=hits / max(1, number), unit="", asked=asked, low=low, high=high, seeds=number)


def figures(half: str, counted: Counted) -> Iterator[Figure]:
    for name in (OURS, *BASELINES):
        mine = name == OURS
        num, alarmed = len(counted.faults), len(counted.healthy)
        first = [told.first[name] for _, _, told in counted.faults]
        hits, wrong = (
            sum(step is not None for step in first),
            sum(t.first[name] is not None for _, t in counted.healthy),
        )
        f1 = 2 * hits / max(1, hits + wrong + num)
        asked = ">= 0.95" if mine else None
        yield Figure(name=f"{half}, {name}: detection F1", value=f1, unit="", asked=asked, seeds=num + alarmed)
        yield _share(f"{half}, {name}: faults found", hits, num)
        yield _share(f"{half}, {name}: false alarms", wrong, alarmed, "<= 0.02" if mine else None)
        cause = sum(cause_right(op, told.surest[name]) for op, _, told in counted.faults)
        yield _share(f"{half}, {name}: cause first", cause, num, ">= 0.85" if mine else None)
        place = sum(place_right(told.surest[name], told.ran) for _, _, told in counted.faults)
        yield _share(f"{half}, {name}: place first", place, num, ">= 0.90" if mine else None)
        steps = [step for step in first if step is not None]
        if steps:
            yield Figure(
                name=f"{half}, {name}: median share of training until found",
                value=median(steps) / STEPS,
                unit="",
                asked="<= 0.05" if mine else None,
                seeds=len(steps),
            )
    several = [(op, told) for op, _, told in counted.faults if op.multimodal]
    found = sum(told.first[OURS] is not None for _, told in several)
    yield _share(f"{half}, ours, multimodal faults: found", found, len(several))
    right = sum(cause_right(op, told.surest[OURS]) for op, told in several)
    yield _share(f"{half}, ours, multimodal faults: cause first", right, len(several))
    for subject in SUBJECTS:
        of = [(op, told) for op, own, told in counted.faults if own == subject]
        if of:
            found = sum(told.first[OURS] is not None for _, told in of)
            yield _share(f"{half}, ours, {subject}: found", found, len(of))
            right = sum(cause_right(op, told.surest[OURS]) for op, told in of)
            yield _share(f"{half}, ours, {subject}: cause first", right, len(of))
    did_harm = {op.name for op, _, _ in counted.faults}
    asked = ">= 60" if half == "test" else None
    yield Figure(name=f"{half}: operators that did harm somewhere", value=len(did_harm), unit="", asked=asked)
    yield Figure(name=f"{half}: faults that did no harm", value=counted.num_harmless, unit="")
    yield Figure(name=f"{half}: twins that did not learn", value=counted.num_twins_dropped, unit="")
    share = len(counted.healthy) / max(1, len(counted.healthy) + len(counted.faults))
    yield Figure(name=f"{half}: share of healthy runs", value=share, unit="", asked=">= 0.5")


def cause_right(operator: Operator, found: Finding | None) -> bool:
    return found is not None and found.cause == operator.cause


def overhead(quick: bool) -> Iterator[Figure]:
    """A step with measuring over one without, far into a run; turns interleaved."""
    torch.set_num_threads(1)
    with_it: list[float] = []
    without: list[float] = []
    steps = 120 if quick else FlowConfig().probe_every
    for turn in range(2 if quick else 5):
        for watching in (turn % 2 == 0, turn % 2 == 1):
            settings = Settings(1e-3, 32, 0.01, 0.0, 1.0, "adamw", "constant", 0.0)
            job = SUBJECTS["sandwich"](turn, "test", settings)
            optimizer = _optimizer(job)
            watched = Watched(job.model, optimizer) if watching else None
            if watched is not None:
                watched.meter.steps = 2**20  # past the first steps, which are measured more often
            for step in range(3):
                _step(job, optimizer, step)
            started = time.perf_counter()
            for step in range(steps):
                loss = _step(job, optimizer, step)
                if watched is not None:
                    watched.step(loss)
            (with_it if watching else without).append((time.perf_counter() - started) / steps)
            if watched is not None:
                watched.close()
    yield ratio("a step with measuring over one without", with_it, without, "<= 1.02")


PARTS: Final = ("training", "test", "overhead")


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for part in parts:
        if part == "overhead":
            yield from overhead(quick)
            continue
        operators = OPERATORS[:: 8 if quick else 1]
        seeds = (0,) if part == "training" else (10,)
        counted = count(part, seeds, operators, None if quick else Kept("diagnose"))
        yield from figures(part, counted)
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
