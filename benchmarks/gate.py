"""The gate before release: planted regressions that it catches, and equal versions that it lets pass.

Here        40 planted regressions, 100 trainings with another seed (claim 11 of docs/claims.md).
Elsewhere   the gate (src/dougong/continual/suite/); the trainings (bases.py); options and results (harness.py).
Promise     the suite is the one that `dougong regress --init` writes from one training and four more (`--also`), whose
            seeds are used for nothing else; nothing was chosen by what it caught.

Models      the recipe uci-views (three sets of features of handwritten digits) in 400 steps, 101 seeds. The first is in
            production.
Planted     in answers, since a change of weights cannot be sized: ten of one slice, ten with one modality missing,
            ten under one corruption, each in another training's answers. So many more records are answered wrongly
            that the loss from production is what the power analysis says is caught with a chance of .99. Which
            records is drawn. Ten of latency: a version that takes the seen ratio, and 5 % more, as long.
Passed      trainings that differ by their seed alone, each against the first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from bases import uci_views
from harness import Kept, run

from dougong.continual.suite.ask import Asked, Scored, ask, rows_for
from dougong.continual.suite.begin import begin_suite
from dougong.continual.suite.gate import compare, seen_from
from dougong.continual.suite.performance import answer, compare_seconds
from dougong.continual.suite.suite import LatencyCheck, Suite, read_suite
from dougong.continual.taught import open_taught
from dougong.core.figures import Figure
from dougong.data.table import open_table
from dougong.recipes.known import read_recipe
from dougong.recipes.tables import open_tables

TRAININGS: Final = 100
OTHERS: Final = (1001, 1002, 1003, 1004)
EACH: Final = 10
OVER: Final = 1.05
"""Of a planted latency, over what is seen."""


def prepared(quick: bool) -> tuple[Kept, Path, Suite, Asked]:
    """The version in production, its suite, and what it answers."""
    torch.set_num_threads(1)
    kept = Kept("gate")
    production = open_taught(uci_views(0, quick))
    file = kept.folder / f"suite{'-quick' if quick else ''}" / "suite.yaml"
    if not file.exists():
        recipe = read_recipe("uci-views")
        others = [open_taught(uci_views(seed, quick)) for seed in OTHERS]
        test = open_tables(recipe.data, seed=recipe.seed).test
        begin_suite(production, test, file, name="uci-views", also=others)
    suite = read_suite(file)
    return kept, file.parent, suite, ask(production, suite, file.parent)


def asked_of(seed: int, suite: Suite, folder: Path, quick: bool) -> Asked:
    return ask(open_taught(uci_views(seed, quick)), suite, folder)


def measure_retrained(quick: bool) -> Iterator[Figure]:
    kept, folder, suite, production = prepared(quick)
    passed = []
    for seed in range(1, 4 if quick else TRAININGS + 1):
        key = f"passed-{seed}-{quick}"
        found = kept.get(key)
        if found is None:
            compared = compare(asked_of(seed, suite, folder, quick), production, suite)
            found = [one.name for one in compared if one.refused]
            kept.put(key, found)
            if seed % 10 == 0:
                print(f"{seed} trainings are judged", file=sys.stderr)
        passed.append(not found)
        if found:
            print(f"training {seed} is refused: {', '.join(found)}", file=sys.stderr)
    yield Figure(
        name="trainings with another seed that pass",
        value=float(np.mean(passed)),
        unit="",
        asked=">= 0.95",
        seeds=len(passed),
    )


def measure_planted(quick: bool) -> Iterator[Figure]:
    kept, folder, suite, production = prepared(quick)
    each = 2 if quick else EACH
    wanted: dict[str, Callable[[Scored], bool]] = {
        "one slice": lambda one: bool(one.slice) and one.condition == "all",
        "one modality missing": lambda one: one.condition.startswith("without"),
        "one corruption": lambda one: one.kind == "metric" and "=" in one.condition,
    }
    caught: list[bool] = []
    for kind, fits in wanted.items():
        key = f"planted in {kind}-{quick}"
        found = kept.get(key)
        if found is None:
            found = planted_in(kind, fits, production, suite, folder, each, quick)
            kept.put(key, found)
        hits, sizes = [hit for hit, _ in found], [size for _, size in found]
        caught += hits
        yield Figure(
            name=f"planted in {kind}: caught (interval: sizes planted)",
            value=float(np.mean(hits)),
            unit="",
            asked=">= 1",
            low=min(sizes),
            high=max(sizes),
            seeds=len(hits),
        )
    ratios = []
    check = next(one for one in suite.checks if isinstance(one, LatencyCheck))
    version = open_taught(uci_views(0, quick))
    rows = open_table(folder / suite.data[check.data].table)
    few = rows_for(rows, check.batch_size)

    def plain() -> object:
        return answer(version, few, None)

    equal = compare_seconds(plain, plain, check.repeats)
    slower = check.most_ratio * (1 + 3 * equal.noise) * OVER
    for number in range(each):
        found_ratio = compare_seconds(plain, lambda: delayed(plain, slower), check.repeats, seed=number)
        ratios.append(found_ratio.low > check.most_ratio)
        caught.append(ratios[-1])
    yield Figure(
        name=f"planted latency of {slower:.2f} times: caught",
        value=float(np.mean(ratios)),
        unit="",
        asked=">= 1",
        seeds=each,
    )
    yield Figure(
        name="planted regressions caught", value=float(np.mean(caught)), unit="", asked=">= 1", seeds=len(caught)
    )


def planted_in(
    kind: str,
    fits: Callable[[Scored], bool],
    production: Asked,
    suite: Suite,
    folder: Path,
    each: int,
    quick: bool,
) -> list[tuple[bool, float]]:
    """Whether each was caught, and its size; in turn through the places where a loss can be seen at all."""
    places = [place for place, one in enumerate(production.scored) if fits(one)]
    assert places, f"the suite has nothing of {kind}"
    found: list[tuple[bool, float]] = []
    blind: set[int] = set()
    turn = 0
    while len(found) < each:
        assert len(blind) < len(places), f"no loss in {kind} can be seen by this suite"
        place = places[turn % len(places)]
        turn += 1
        if place in blind:
            continue
        number = len(found)
        candidate = asked_of(1 + number, suite, folder, quick)
        planted, size = plant(candidate, production, place, suite, np.random.default_rng(number))
        if planted is None:
            print(f"{kind}: {production.scored[place].name} cannot show any loss, and is left out", file=sys.stderr)
            blind.add(place)
            continue
        found.append((compare(planted, production, suite)[place].refused, size))
    return found


def delayed(call: Callable[[], object], times: float) -> None:
    """As long as so many calls."""
    started = time.perf_counter()
    call()
    ends = started + times * (time.perf_counter() - started)
    while time.perf_counter() < ends:
        pass


def plant(
    candidate: Asked, production: Asked, place: int, suite: Suite, random: np.random.Generator
) -> tuple[Asked | None, float]:
    """So many right answers made wrong that the loss is what can be seen, found step by step as churn grows with it."""
    old, new = production.scored[place], candidate.scored[place]
    score_N: Any = new.score_N.copy()
    order = random.permutation(np.flatnonzero((score_N == 1) & (old.score_N == 1)))
    tests = len(candidate.scored)
    seen = seen_from(old, new, suite, tests)
    for row in [-1, *order.tolist()]:
        if row >= 0:
            score_N[row] = 0
        if float((old.score_N - score_N).mean()) >= seen:
            scored = [*candidate.scored]
            scored[place] = new._replace(score_N=score_N)
            return Asked(tuple(scored), candidate.records), seen
    return None, seen


PARTS: Final = ("planted", "retrained")


def measure(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Figure]:
    if "planted" in parts:
        yield from measure_planted(quick)
    if "retrained" in parts:
        yield from measure_retrained(quick)


if __name__ == "__main__":
    run(
        "gate", "Planted regressions that the gate catches, and equal versions that it lets pass.", measure, parts=PARTS
    )
