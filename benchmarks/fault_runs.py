"""Trainings with and without a fault, each watched and kept, for diagnose.py to judge as often as rules change.

Here        Ran, `carry_out`, `jobs_of`, `kept_runs`; whether a fault did harm (`killed`), whether a twin learnt; run by
            itself (`fault_runs.py HALF`), it carries out what is not kept yet.
Elsewhere   the faults (fault_operators.py) and trainings (fault_subjects.py); judging them (diagnose.py).
Promise     a run is kept while these files, and all of ours that they load but what judges, stay as they are: so rules
            can be changed without training anew, and an interrupted bench goes on. diagnose.py is not loaded here.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from fault_operators import OPERATORS, Operator
from fault_subjects import OF_TRAINING, RATES, STEPS, SUBJECTS, Job, Settings
from harness import Kept
from torch import nn

from dougong.core.seeds import derive_seed
from dougong.watch.diagnose.hook import Watched

HARM: Final = 0.05
JUDGED_EVERY: Final = 32
BEST: Final = {"sandwich": 0.9, "decoder": 0.7, "convolutions": 0.9, "two towers": 0.9, "waves": 0.9}
CLASSES: Final = {"sandwich": 8, "decoder": 15, "convolutions": 6, "two towers": 6, "waves": 6}
SEEDS: Final = {"training": (0,), "test": (47,)}
"""The test half's has not been run while rules were changed. An earlier one, 31, was: its convolutional network showed
a rule to be wrong, so that it was moved to the training half, and waves took its place."""


class Ran(NamedTuple):
    """One run, and all that was measured in it."""

    accuracy: float
    crashed: bool
    finite: bool
    place: str
    encoders: dict[str, list[str]]
    events: list[dict[str, Any]]
    failure: list[Any] | None


class One(NamedTuple):
    """A fault in a training, with a seed that its healthy twin has too."""

    operator: Operator
    subject: str
    seed: int


def jobs_of(half: str, every: int = 1) -> list[One]:
    """All of a half. The training half knows three of the trainings, and no operator that is unseen.

    Each has a seed of its own, so that healthy twins differ from each other as well.
    """
    subjects = OF_TRAINING if half == "training" else tuple(SUBJECTS)
    operators = [op for op in OPERATORS if half == "test" or not op.unseen][::every]
    return [
        One(operator, subject, 1000 * seed + OPERATORS.index(operator))
        for seed in SEEDS[half]
        for operator in operators
        for subject in operator.subjects
        if subject in subjects
    ]


def learnt(subject: str, twin: Ran) -> bool:
    chance = 1 / CLASSES[subject]
    return twin.accuracy >= chance + 0.75 * (BEST[subject] - chance)


def killed(twin: Ran, spoilt: Ran) -> bool:
    """Whether the fault did harm that a user would mind."""
    return spoilt.crashed or not spoilt.finite or spoilt.accuracy <= twin.accuracy - HARM


def carry_out(subject: str, half: str, seed: int, operator: Operator | None) -> Ran:
    """Train once, watched."""
    random = np.random.default_rng(derive_seed(seed, half, subject))
    settings = Settings.drawn(random)
    settings = settings._replace(learning_rate=settings.learning_rate * RATES[subject][settings.optimizer])
    job = SUBJECTS[subject](derive_seed(seed, half) % 2**31, half, settings)
    place = "" if operator is None else operator.put(job, np.random.default_rng(derive_seed(seed, "place")))
    optimizer = optimizer_of(job)
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
            loss = train_step(job, optimizer, step)
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


def optimizer_of(job: Job) -> torch.optim.Optimizer:
    settings = job.settings
    held: Any = job.held(job.model) if job.held is not None else [p for p in job.model.parameters() if p.requires_grad]
    if job.slow:
        held = [
            {"params": [p for p in held if id(p) not in job.slow]},
            {"params": [p for p in held if id(p) in job.slow], "times": job.slow_factor},
        ]
    if settings.optimizer == "adamw":
        given = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True, **job.changes}
        return torch.optim.AdamW(held, **given)
    given = {"lr": settings.learning_rate, "momentum": 0.9, "weight_decay": settings.weight_decay, **job.changes}
    return torch.optim.SGD(held, **given)


def train_step(job: Job, optimizer: torch.optim.Optimizer, step: int) -> float:
    job.model.train()
    inputs, target = job.batch(step)
    for group in optimizer.param_groups:
        group["lr"] = job.settings.learning_rate * job.factor(step) * group.get("times", 1.0)
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


# Kept ----------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A fault and its twin; no spoilt run where the twin did not learn."""

    one: One
    twin: Ran
    spoilt: Ran | None


def kept_runs(half: str, jobs: Sequence[One], kept: Kept | None) -> Iterator[Pair]:
    """Of each job what is kept, or what is carried out now."""

    def ran(one: One, operator: Operator | None) -> Ran:
        key = f"{one.subject} {half} {one.seed} {'' if operator is None else operator.name}"
        found = kept.get(key) if kept is not None else None
        if found is not None:
            return Ran(**found)
        now = carry_out(one.subject, half, one.seed, operator)
        if kept is not None:
            kept.put(key, now._asdict())
        return now

    for one in jobs:
        twin = ran(one, None)
        yield Pair(one, twin, ran(one, one.operator) if learnt(one.subject, twin) else None)


NAME: Final = "fault_runs"


def _main(half: str, tell: Callable[[str], object] = sys.stderr.write) -> None:
    torch.set_num_threads(1)
    jobs = jobs_of(half)
    for number, pair in enumerate(kept_runs(half, jobs, Kept(NAME))):
        tell(f"{half}, {number + 1} of {len(jobs)}: {pair.one.operator.name} in {pair.one.subject}\n")


if __name__ == "__main__":
    for chosen in itertools.islice(sys.argv, 1, None):
        _main(chosen)
