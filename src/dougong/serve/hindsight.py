"""Whether waiting a little for more requests would have paid, judged by what really came.

Here        Hindsight: what a batcher tells it, and the rule it gives back.
Elsewhere   obeying the rule (batcher.py); what a batch takes (service_time.py).
Promise     a rule that waits is only given where the last chances show that it would have saved time for all together;
            without any, or where they say little, nobody waits.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from dougong.serve.service_time import ServiceTime, Shape

REMEMBERED: Final = 48
"""Chances that are looked back on."""

JUDGED_EVERY: Final = 12
JUDGED_SECONDS: Final = 0.25
"""Rules are judged after so many new chances, and no more often than this: it takes about a millisecond."""

WAITS: Final = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Longest waits that are considered, in what a batch takes beyond its records: to wait longer than two batches would
cost more than one never pays."""

GAPS: Final = (0.1, 0.25, 1.0)
"""How long nothing may come before the wait ends early, of the longest wait."""

GAIN: Final = 0.02
"""Of all time spent, how much a rule must save before anybody waits by it."""


class Rule(NamedTuple):
    """How to wait: at most so long, and no longer than this after the last arrival."""

    wait_seconds: float
    gap_seconds: float


class _Chance:
    """A moment at which a batch could have been run, and who came soon after."""

    __slots__ = ("arrivals", "at", "behind", "counts", "largest", "number")

    def __init__(self, at: float, number: int, counts: dict[Shape, int], largest: int) -> None:
        self.at = at
        self.number = number
        self.counts = counts
        self.largest = largest
        self.arrivals: list[float] = []
        self.behind = 0.0


class Hindsight:
    """Looks back on the last chances and asks of each rule what it would have cost.

    That is sound where who comes within the next milliseconds does not depend on whether we wait: true of an open load,
    and of callers who wait for their answers, since whoever may come then was answered before. (Batch queues whose wait
    is chosen from a model of arrivals: Deb and Serfozo 1973; Xu et al. 2023. Here no model of arrivals is needed.)
    """

    def __init__(self) -> None:
        self.rule = Rule(0.0, 0.0)
        self._chances: deque[_Chance] = deque(maxlen=REMEMBERED)
        self._open: _Chance | None = None
        self._behind = 0.0
        self._unjudged = 0
        self._judged_at = float("-inf")
        self._service: ServiceTime | None = None

    def offered(self, now: float, number: int, service: ServiceTime, counts: dict[Shape, int], largest: int) -> None:
        """A batch of `number` could be run now."""
        self._close(now)
        self._service = service
        if number < largest:
            self._open = _Chance(now, number, dict(counts), largest)

    def arrived(self, now: float) -> None:
        """Another request came."""
        chance = self._open
        if chance is not None and len(chance.arrivals) < chance.largest:
            chance.arrivals.append(now - chance.at)

    def completed(self, now: float, waiting: int) -> None:
        """A batch came back, and so many were waiting: what a delay of the worker is a delay of."""
        self._behind += 0.1 * (waiting - self._behind)

    def _close(self, now: float) -> None:
        chance, service = self._open, self._service
        self._open = None
        if chance is None or service is None:
            return
        chance.behind = self._behind
        self._chances.append(chance)
        self._unjudged += 1
        if self._unjudged >= JUDGED_EVERY and now - self._judged_at >= JUDGED_SECONDS:
            self._unjudged, self._judged_at = 0, now
            self._judge(service)

    def _judge(self, service: ServiceTime) -> None:
        scale = service.fixed_seconds
        best, best_cost = Rule(0.0, 0.0), (1 - GAIN) * self._cost(Rule(0.0, 0.0), service)
        for wait in WAITS:
            for gap in GAPS:
                rule = Rule(wait * scale, wait * gap * scale)
                cost = self._cost(rule, service)
                if cost < best_cost:
                    best, best_cost = rule, cost
        self.rule = best

    def _cost(self, rule: Rule, service: ServiceTime) -> float:
        """Seconds that all requests together would have spent, summed over the chances.

        Two batches of each chance are followed: the one that the rule would have run, and one of who came too late for
        it; and the delay to who waits behind both.
        """
        total = 0.0
        horizon = service.fixed_seconds
        for chance in self._chances:
            arrivals = [each for each in chance.arrivals if each <= horizon]
            room = chance.largest - chance.number
            joined, last, end = 0, 0.0, min(rule.wait_seconds, rule.gap_seconds)
            for arrival in arrivals:
                if arrival > end or joined == room:
                    break
                joined, last = joined + 1, arrival
                end = min(rule.wait_seconds, arrival + rule.gap_seconds)
            started = last if joined == room else end
            item = service.item_seconds(next(iter(chance.counts)))
            first = started + service.seconds(chance.counts) + joined * item
            total += chance.number * first + joined * first - sum(arrivals[:joined])
            late = len(arrivals) - joined
            if late:
                second = first + service.fixed_seconds + late * item
                total += late * second - sum(arrivals[joined:])
            else:
                second = first
            total += chance.behind * second
        return total
