"""A batcher carried out on a made-up load, in simulated time: what it would have answered, and when.

Here        rehearse, Load (open_load, closed_load), Rehearsed; feasible, the oracle.
Elsewhere   the policy (batcher.py); the same with real workers (engine.py).
Promise     the same load, service and seed give the same figures on every machine: no clock is read.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dougong.serve.batcher import Batcher, Refusal
from dougong.serve.service_time import Shape

Service = Callable[[Mapping[Shape, int]], float]


class Load(NamedTuple):
    """Who asks, and when."""

    arrivals: Sequence[tuple[float, Shape, str, int]]
    """Seconds, shape, client and priority of each request, in order."""

    back_after: Callable[[], float] | None = None
    """Closed: seconds from an answer until the same caller asks again. None: nobody asks again."""

    until: float = float("inf")
    """Closed: when the callers stop."""


class Rehearsed(NamedTuple):
    """What became of each request, in the order in which they left."""

    seconds: list[float]
    """From arrival to answer, of the answered."""

    answered_at: list[float]
    late: int
    """Answered after the objective."""

    refused: int
    expired: int
    batches: list[int]
    by_client: dict[str, list[float]]
    left_at: float
    """When the last answer went out."""

    def quantile(self, share: float) -> float:
        """Of the answered requests' seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def open_load(
    rates: Sequence[tuple[float, float]],
    *,
    seed: int,
    shapes: Mapping[Shape, float] | None = None,
    clients: Mapping[str, float] | None = None,
) -> Load:
    """Poisson arrivals: for each (seconds, requests a second) in turn; shapes and clients by weight."""
    dice = random.Random(seed)  # noqa: S311, no secret
    kinds, names = dict(shapes or {Shape(): 1.0}), dict(clients or {"": 1.0})
    arrivals, at, end = [], 0.0, 0.0
    for seconds, rate in rates:
        at, end = end, end + seconds
        while rate:
            at += dice.expovariate(rate)
            if at >= end:
                break
            shape = dice.choices(list(kinds), list(kinds.values()))[0]
            client = dice.choices(list(names), list(names.values()))[0]
            arrivals.append((at, shape, client, 0))
    return Load(arrivals)


def closed_load(callers: int, *, seconds: float, think: tuple[float, float], seed: int, shape: Shape = Shape()) -> Load:  # noqa: B008
    """Callers that ask again a while after their answer: `think` is the least and most seconds of that."""
    dice = random.Random(seed)  # noqa: S311, no secret
    first = sorted(dice.uniform(0, 0.01) for _ in range(callers))
    arrivals = [(at, shape, f"caller {place}", 0) for place, at in enumerate(first)]
    return Load(arrivals, lambda: dice.uniform(*think), seconds)


def rehearse(batcher: Batcher, load: Load, service: Service, *, noise: float = 0.0, seed: int = 0) -> Rehearsed:
    """Carry it out. A batch takes what `service` says, times a log-normal of this deviation."""
    dice = random.Random(seed)  # noqa: S311, no secret
    number = itertools.count()
    events: list[tuple[float, int, str, Any]] = [(each[0], next(number), "arrival", each) for each in load.arrivals]
    heapq.heapify(events)
    found = Rehearsed([], [], 0, 0, 0, [], {}, 0.0)
    late = refused = expired = free = 0
    free, now, wake = batcher.replicas, 0.0, None
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "arrival":
            _, shape, client, priority = what
            taken = batcher.admit(now, None, shape=shape, client=client, priority=priority)
            if isinstance(taken, Refusal):
                refused += 1
                if load.back_after is not None and now + taken.retry_after_seconds < load.until:
                    again = now + taken.retry_after_seconds + load.back_after()
                    heapq.heappush(events, (again, next(number), "arrival", (again, shape, client, priority)))
        elif kind == "done":
            batcher.learn(batcher.done(now, what))
            free += 1
            for ticket in what:
                late += now > ticket.due
                found.seconds.append(now - ticket.arrival)
                found.answered_at.append(now)
                found.by_client.setdefault(ticket.client, []).append(now - ticket.arrival)
                if load.back_after is not None and now < load.until:
                    again = now + load.back_after()
                    event = (again, ticket.shape, ticket.client, 0)
                    heapq.heappush(events, (again, next(number), "arrival", event))
        elif wake is None or now < wake:
            continue  # this waking was put off
        while True:
            poll = batcher.poll(now, free)
            expired += len(poll.expired)
            if not poll.batch:
                break
            free -= 1
            counts: dict[Shape, int] = {}
            for ticket in poll.batch:
                counts[ticket.shape] = counts.get(ticket.shape, 0) + 1
            found.batches.append(len(poll.batch))
            seconds = service(counts) * (dice.lognormvariate(0, noise) if noise else 1.0)
            heapq.heappush(events, (now + seconds, next(number), "done", poll.batch))
        if poll.wake_at is not None and poll.wake_at != wake:
            heapq.heappush(events, (max(now, poll.wake_at), next(number), "wake", None))
        wake = poll.wake_at
    last = max(found.answered_at, default=0.0)
    return found._replace(late=late, refused=refused, expired=expired, left_at=last)


def feasible(arrivals: Sequence[float], seconds: Callable[[int], float], *, slo: float, max_batch: int) -> int:
    """How many of these requests anybody could answer in time on one worker, who knew them all beforehand.

    Requests of equal worth and equal objective, so that some best schedule runs them in order, each batch of neighbours
    (an exchange of two never makes the later one late); what is left out may be chosen freely. Dynamic programming over
    (requests looked at, requests answered) -> the earliest time at which the worker can be free.
    """
    infinite = float("inf")
    # free[k]: earliest end with k answered among those looked at so far; one row for each of the last requests.
    rows: list[list[float]] = [[0.0]]
    for index, arrival in enumerate(arrivals):
        row = [*rows[index], infinite]
        for size in range(1, min(max_batch, index + 1) + 1):
            oldest = arrivals[index - size + 1]
            took = seconds(size)
            if arrival + took > oldest + slo:
                break  # the first of so many would be late whenever the worker is free
            before = rows[index - size + 1]
            for answered in range(len(before) - 1, -1, -1):
                end = max(before[answered], arrival) + took
                if before[answered] is infinite or end > oldest + slo:
                    continue
                if end < row[answered + size]:
                    row[answered + size] = end
        rows.append(row)
    return max(answered for answered, end in enumerate(rows[-1]) if end is not infinite)
