"""May this version replace the one in production?

Here        `gate`, Verdict, Comparison.
Elsewhere   scores of each version (ask.py); tests (statistics.py); time and memory (performance.py); carrying a verdict
            out (cli/).
Promise     a version that is as good is refused with a chance below the suite's alpha, over all comparisons together; a
            refusal names slice, size and records; what could not have been seen is said, not passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dougong.continual.suite.ask import Asked, Scored, ask, rows_for
from dougong.continual.suite.performance import answer, compare_seconds, peak_bytes, weight_bytes
from dougong.continual.suite.statistics import Loss, detectable_loss, holm, loss_beyond
from dougong.continual.suite.suite import LatencyCheck, MemoryCheck, Suite
from dougong.continual.taught import Taught
from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text
from dougong.data.table import open_table

SHOWN: Final = 20
"""Records that a refusal names."""

Announce = Callable[[str, int, int], None]


class Comparison(NamedTuple):
    """One check or slice, beside production."""

    name: str
    kind: str
    condition: str
    num_records: int
    before: float | None
    """The mean score of the version in production; None without one."""

    after: float
    loss: float
    low: float
    high: float
    p: float
    """After correction for all comparisons."""

    detectable: float
    """The smallest loss that would have been caught with the suite's power."""

    refused: bool
    reason: str
    """Of a refusal."""

    changed: tuple[tuple[int, str, str], ...]
    """Records that were right and are not: row, before, after."""

    num_changed: int

    def as_json(self) -> dict[str, Any]:
        found = self._asdict()
        # JSON knows no infinity.
        return found | {"detectable": None if not np.isfinite(self.detectable) else self.detectable}


class Verdict(NamedTuple):
    """What the gate says."""

    suite: str
    passed: bool
    comparisons: tuple[Comparison, ...]
    against: str | None

    @property
    def refusals(self) -> list[Comparison]:
        return [one for one in self.comparisons if one.refused]

    def in_words(self) -> str:
        """One line."""
        if self.passed:
            return f"passed: {len(self.comparisons)} comparisons, no loss that is beyond chance and tolerance"
        first = self.refusals[0]
        rows = ", ".join(str(row) for row, _, _ in first.changed[:5])
        more = f" (and {len(self.refusals) - 1} more)" if len(self.refusals) > 1 else ""
        return f"refused: {first.name}: {first.reason}{f'; records {rows}' if rows else ''}{more}"

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "passed": self.passed,
            "against": self.against,
            "in_words": self.in_words(),
            "comparisons": [one.as_json() for one in self.comparisons],
        }


def gate(
    candidate: Taught,
    production: Taught | None,
    suite: Suite,
    folder: Path,
    *,
    against: str | None = None,
    announce: Announce | None = None,
) -> Verdict:
    """Ask both versions all checks, and hold them against each other; without production, only what must hold anyway.

    Raises:
        ConfigError: a check names what a version does not have.
    """
    after = ask(candidate, suite, folder, announce=announce)
    before = None if production is None else ask(production, suite, folder, announce=announce)
    compared = compare(after, before, suite)
    compared += _timed(candidate, production, suite, folder)
    return Verdict(suite.name, not any(one.refused for one in compared), tuple(compared), against)


def compare(after: Asked, before: Asked | None, suite: Suite) -> list[Comparison]:
    """Scores against scores, with Holm's correction over all of them."""
    number = len(after.scored)
    losses: list[Loss | None] = []
    for place, new in enumerate(after.scored):
        old = None if before is None else before.scored[place]
        if old is None:
            losses.append(None)
        else:
            seed = suite.seed + place
            losses.append(loss_beyond(old.score_N, new.score_N, new.tolerance, unit_N=new.unit_N, seed=seed))
    adjusted = iter(holm([found.p for found in losses if found is not None]))
    compared: list[Comparison] = []
    for place, (new, found) in enumerate(zip(after.scored, losses, strict=True)):
        mean = float(new.score_N.mean()) if len(new.score_N) else 0.0
        below = new.least is not None and len(new.score_N) > 0 and mean < new.least - 1e-12
        reason = f"{mean:.4f} is below {new.least:g}, which the suite asks for" if below else ""
        if found is None:
            compared.append(_alone(new, mean, below, reason))
            continue
        assert before is not None
        old = before.scored[place]
        p = next(adjusted)
        lost = p < suite.alpha and found.mean > 0
        if lost:
            reason = (
                f"{float(old.score_N.mean()):.4f} was and {mean:.4f} is, a loss of {found.mean:.4f} "
                f"(95 % {found.low:.4f} to {found.high:.4f}, p = {p:.2g} after correction for {number}), "
                f"beyond the tolerance of {new.tolerance:g}"
            )
        worse = (new.score_N < old.score_N).nonzero()[0]
        said_old, said_new = before.records.get(new.check, {}), after.records.get(new.check, {})
        changed = tuple(
            (row, said_old.get(row, "nothing"), said_new.get(row, "nothing"))
            for row in new.row_N[worse[:SHOWN]].tolist()
        )
        compared.append(
            Comparison(
                name=new.name,
                kind=new.kind,
                condition=new.condition,
                num_records=len(new.score_N),
                before=float(old.score_N.mean()) if len(old.score_N) else 0.0,
                after=mean,
                loss=found.mean,
                low=found.low,
                high=found.high,
                p=p,
                detectable=seen_from(old, new, suite, number),
                refused=lost or below,
                reason=reason,
                changed=changed,
                num_changed=len(worse),
            )
        )
    return compared


def seen_from(old: Scored, new: Scored, suite: Suite, tests: int) -> float:
    """The smallest loss of this slice that the gate catches with the suite's power; before a loss, both are alike."""
    loss_N = old.score_N - new.score_N
    if not len(loss_N):
        return float("inf")
    binary = bool(np.isin(old.score_N, (0.0, 1.0)).all() and np.isin(new.score_N, (0.0, 1.0)).all())
    number = len(loss_N)
    # What two equal versions differ by: as many lost as won.
    churn = 2.0 * float(min((loss_N > 0).mean(), (loss_N < 0).mean()))
    spread = None
    if not binary or new.unit_N is not None:
        units = np.arange(number) if new.unit_N is None else np.unique(new.unit_N, return_inverse=True)[1]
        sum_U = np.bincount(units, weights=loss_N - loss_N.mean())
        spread = float(np.sqrt((sum_U**2).sum() / number))
        if binary:
            spread = max(spread, float(np.sqrt(churn)))
    return detectable_loss(
        number, churn, new.tolerance, alpha=suite.alpha, tests=tests, power=suite.power, spread=spread
    )


def _alone(new: Scored, mean: float, below: bool, reason: str) -> Comparison:
    return Comparison(
        new.name,
        new.kind,
        new.condition,
        len(new.score_N),
        None,
        mean,
        0.0,
        0.0,
        0.0,
        1.0,
        float("inf"),
        below,
        reason,
        (),
        0,
    )


def _timed(candidate: Taught, production: Taught | None, suite: Suite, folder: Path) -> list[Comparison]:
    """Time and bytes; without production there is nothing that they could be held against."""
    found: list[Comparison] = []
    for check in suite.checks:
        if not isinstance(check, LatencyCheck | MemoryCheck) or production is None:
            continue
        rows = rows_for(open_table(folder / suite.data[check.data].table), check.batch_size)
        task = check.task
        reason = ""
        if isinstance(check, LatencyCheck):
            ratio = compare_seconds(
                lambda rows=rows, task=task: answer(production, rows, task),  # type: ignore[misc]
                lambda rows=rows, task=task: answer(candidate, rows, task),  # type: ignore[misc]
                check.repeats,
                seed=suite.seed,
            )
            refused = ratio.low > check.most_ratio
            if refused:
                reason = (
                    f"a batch of {check.batch_size} takes {ratio.ratio:.2f} times as long (at least {ratio.low:.2f} by "
                    f"this machine's wavering), and {check.most_ratio:g} is allowed"
                )
            found.append(
                _ratio(check.name, "latency", ratio.ratio, ratio.low, refused, reason, check.most_ratio, ratio.noise)
            )
            continue
        for what, old, new in (
            ("peak", peak_bytes(production, rows, task), peak_bytes(candidate, rows, task)),
            ("weights", weight_bytes(production), weight_bytes(candidate)),
        ):
            times = new / max(1, old)
            refused = times > check.most_ratio
            if refused:
                reason = f"{what}: {bytes_as_text(new)} where {bytes_as_text(old)} was, {times:.2f} times as much"
            found.append(
                _ratio(f"{check.name} / {what}", "memory", times, times, refused, reason, check.most_ratio, 0.0)
            )
    return found


def _ratio(
    name: str, kind: str, ratio: float, low: float, refused: bool, reason: str, most: float, noise: float
) -> Comparison:
    # The smallest that is seen: what is allowed, and what the machine wavers by besides.
    seen = most * (1 + 3 * noise) - 1
    return Comparison(
        name, kind, "beside production", 0, 1.0, ratio, ratio - 1, low - 1, ratio - 1, 1.0, seen, refused, reason, (), 0
    )


def check_override(reason: str | None) -> str | None:
    """A refusal is overridden with a reason or not at all.

    Raises:
        ConfigError: it says nothing.
    """
    if reason is not None and len(reason.split()) < 3:
        raise ConfigError(
            f"--override {reason!r} is no reason: it is recorded for good. Say in three words or more why."
        )
    return reason
