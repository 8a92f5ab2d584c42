"""Which requests run together, and when: the policy alone, without a clock, a thread or a socket.

Here        Batcher (admit, poll, done, learn, cancel, retry), BatcherConfig, Ticket, Refusal, Poll, Ran.
Elsewhere   how long batches take (service_time.py); how long to wait (hindsight.py); carrying it out (engine.py).
Promise     a request leaves exactly once: in a batch, refused, expired or cancelled. One that cannot be answered in
            time is refused when it comes, not when it is late. No client's backlog delays another client's next request
            by more than one batch, and nobody waits for ever behind a higher priority.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

from pydantic import field_validator, model_validator

from dougong.core.config import Config
from dougong.serve.hindsight import Hindsight
from dougong.serve.service_time import ServiceTime, Shape

HEAD_START: Final = 2.0
"""What each step of priority is worth, in objectives: a request is served as if it had come so much earlier."""

MARGIN: Final = 0.2
"""Of a full batch: how much earlier than the objective an answer must be foretold while others wait, beside twice the
usual error of the forecast. Under too much load a queue is always as long as it may be; filled to the brim, whatever
goes a little slower than foretold makes everybody behind it late (simulated: two thirds of the answers in time, where
this leaves 96 to 100 of 100)."""

MOST_SCANNED: Final = 8
"""How many batches' worth of the queue is looked through for records that go well together."""

MOST_CLIENTS: Final = 10_000

REMEMBERED: Final = 1.01
"""How much more each arrival counts than the one before, where it is asked which shape is common."""

HEAVIEST: Final = 1e9
MOST_SHAPES_MET: Final = 1_000


class BatcherConfig(Config):
    """What is agreed with the callers."""

    slo_seconds: float = 0.05
    """Requests are to be answered within this, from their arrival. What cannot be is refused."""

    timeout_seconds: float = 2.0
    """A request that waits longer than this is given up, however it came to be late."""

    max_batch: int = 64
    """Records that the model takes at once."""

    max_queue: int = 2048
    """Requests that wait at most."""

    fixed_wait_seconds: float | None = None
    """Wait always so long for a batch to fill, as other servers do. None: by the load."""

    refuse_late: bool = True
    """Refuse what cannot be answered in time. Without it, only a full queue refuses."""

    @field_validator("slo_seconds", "timeout_seconds", "max_batch", "max_queue")
    @classmethod
    def _above_zero(cls, value: float) -> float:
        if not value > 0:
            raise ValueError(f"{value} must be above 0. Use for example slo_seconds 0.05, max_batch 64.")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> BatcherConfig:
        if self.timeout_seconds < self.slo_seconds:
            raise ValueError(
                f"timeout_seconds {self.timeout_seconds:g} is below slo_seconds {self.slo_seconds:g}: requests would "
                "be given up while they are still in time. Use a timeout of a few objectives."
            )
        return self


class Ticket:
    """One record's place in the queue."""

    __slots__ = ("alone", "arrival", "client", "deadline", "due", "instead_of", "key", "payload", "shape", "state")

    def __init__(self, payload: Any, shape: Shape, client: str, arrival: float, due: float, deadline: float) -> None:
        self.payload = payload
        self.shape = shape
        self.client = client
        self.arrival = arrival
        self.due = due
        """When it should be answered: the objective."""
        self.deadline = deadline
        """When it is given up."""
        self.key: tuple[float, int] = (0.0, 0)
        self.alone = False
        """Whether it may have cost a worker its life, and so shares a batch with nobody."""
        self.instead_of: Ticket | None = None
        """Whose place it took in a full queue: that caller is to be told."""
        self.state: Literal["waiting", "running", "gone"] = "waiting"


class Refusal(NamedTuple):
    """Why a request was not taken, and when to come again."""

    reason: Literal["full", "late"]
    retry_after_seconds: float


class Poll(NamedTuple):
    """What to do now."""

    batch: tuple[Ticket, ...]
    """To be run at once; empty: nothing yet."""

    expired: tuple[Ticket, ...]
    """Given up: their callers are told."""

    wake_at: float | None
    """When to poll again even if nothing happens. None: not before something does."""


class Ran(NamedTuple):
    """A batch that has come back."""

    counts: dict[Shape, int]
    seconds: float


class Batcher:
    """The queue of one model. Every method is told the time, in seconds from any origin.

    Requests are ordered by virtual deadlines: as in virtual clock and earliest deadline first (Zhang 1990; Liu and
    Layland 1973), a client's requests count as having come no faster than its fair share of what can be served.
    """

    def __init__(self, config: BatcherConfig, service: ServiceTime | None = None, *, replicas: int = 1) -> None:
        self.config = config
        self.service = service or ServiceTime()
        self.replicas = replicas
        self.hindsight = Hindsight()
        self._queue: list[tuple[float, int, Ticket]] = []
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._number = itertools.count()
        self._virtual: dict[str, float] = {}
        self._waiting_of: dict[str, int] = {}
        self._running: dict[int, tuple[float, float, dict[Shape, int]]] = {}
        self._held_since: float | None = None
        self._last_arrival = 0.0
        self._largest = config.max_batch
        self._unit_seconds = 0.0
        self._full_seconds = 0.0
        self._met: dict[Shape, float] = {Shape(): 0.0}
        self._weight = 1.0
        self._settle()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def largest(self) -> int:
        """Records in a batch that still leaves time to wait for the one before it."""
        return self._largest

    def admit(
        self,
        now: float,
        payload: Any,
        *,
        shape: Shape = Shape(),  # noqa: B008, a named tuple does not change
        client: str = "",
        priority: int = 0,
        within_seconds: float | None = None,
    ) -> Ticket | Refusal:
        """Take a request, or say why not. `within_seconds` is what its caller allows, where it says so; nobody waits
        longer than the timeout. Where the queue is full, the last request of the client that has most waiting gives its
        place to one that has fewer."""
        config = self.config
        waiting = len(self._queue)
        crowding = self._crowding(client) if waiting >= config.max_queue else None
        if waiting >= config.max_queue and crowding is None:
            return Refusal("full", self._seconds_until_free(now) + waiting * self._unit_seconds)
        if within_seconds is None:
            due, deadline = now + config.slo_seconds, now + config.timeout_seconds
        else:
            due = deadline = now + min(within_seconds, config.timeout_seconds)
        start = max(now, self._virtual.get(client, 0.0))
        order = start + (due - now) - priority * HEAD_START * config.slo_seconds
        ahead = waiting if not waiting or order >= self._queue[-1][0] else bisect_left(self._queue, (order,))
        # Whoever finds nobody before him is tried, whatever is foretold: else a wrong forecast would never be mended.
        # A caller's own limit is meant.
        busy = waiting or len(self._running) >= self.replicas
        if (config.refuse_late and busy) or within_seconds is not None:
            foretold = self._foretold_seconds(now, ahead, shape)
            if busy:
                foretold += MARGIN * self._full_seconds + self.service.deviation * foretold
            late = now + foretold - due
            if late > 0:
                return Refusal("late", late)
        number = next(self._number)
        ticket = Ticket(payload, shape, client, now, due, deadline)
        ticket.key = (order, number)
        if crowding is not None:
            ticket.instead_of = next(each for _, _, each in reversed(self._queue) if each.client == crowding)
            self._remove(ticket.instead_of)
            waiting -= 1
            ahead = bisect_left(self._queue, (order,))
        if ahead == waiting:
            self._queue.append((order, number, ticket))
        else:
            insort(self._queue, (order, number, ticket))
        heapq.heappush(self._deadlines, (deadline, number, ticket))
        own = self._waiting_of.get(client, 0)
        self._waiting_of[client] = own + 1
        # Of the capacity it has an equal share among all clients that have something waiting.
        self._virtual[client] = start + self._unit_seconds * len(self._waiting_of)
        if len(self._virtual) > MOST_CLIENTS:
            self._virtual = {name: until for name, until in self._virtual.items() if until > now}
        self._last_arrival = now
        self._weight *= REMEMBERED
        self._met[shape] = self._met.get(shape, 0.0) + self._weight
        if self._weight > HEAVIEST or len(self._met) > MOST_SHAPES_MET:
            self._forget_rare()
        self.hindsight.arrived(now)
        return ticket

    def poll(self, now: float, num_free: int) -> Poll:
        """What to do now, with so many workers that have nothing to do."""
        expired = self._expire(now)
        if not self._queue:
            self._held_since = None
            return Poll((), expired, self._next_deadline())
        if num_free < 1:
            return Poll((), expired, self._next_deadline())
        chosen, counts = self._compose(now)
        until = self._hold_until(now, chosen, counts)
        if until > now:
            return Poll((), expired, until)
        self._held_since = None
        self._take(chosen)
        self._running[id(chosen[0])] = (now, now + self.service.seconds(counts), counts)
        return Poll(tuple(chosen), expired, None)

    def done(self, now: float, batch: Iterable[Ticket]) -> Ran:
        """A batch has come back. What it was like is for `learn`, once nobody waits for an answer of it: to learn takes
        as long as passing on several."""
        tickets = list(batch)
        started, _, counts = self._running.pop(id(tickets[0]))
        for ticket in tickets:
            ticket.state = "gone"
        self.hindsight.completed(now, len(self._queue))
        return Ran(counts, now - started)

    def learn(self, ran: Ran) -> None:
        """Foretell times by this one, too."""
        self.service.observe(ran.counts, ran.seconds)
        self._settle()

    def cancel(self, ticket: Ticket) -> bool:
        """The caller has gone. False if the request is running or has left already."""
        if ticket.state != "waiting":
            return False
        self._remove(ticket)
        return True

    def retry(self, now: float, batch: Iterable[Ticket]) -> tuple[Ticket, ...]:
        """A worker died of this batch, or beside it. Each is tried once more, alone; those that were alone are
        returned: they have cost a worker each, and are not tried again."""
        tickets = list(batch)
        self.done(now, tickets)  # its time says nothing
        guilty = tuple(ticket for ticket in tickets if ticket.alone)
        for ticket in tickets:
            if ticket.alone:
                continue
            ticket.alone, ticket.state = True, "waiting"
            insort(self._queue, (*ticket.key, ticket))
            heapq.heappush(self._deadlines, (ticket.deadline, ticket.key[1], ticket))
            self._waiting_of[ticket.client] = self._waiting_of.get(ticket.client, 0) + 1
        return guilty

    def drop_all(self) -> tuple[Ticket, ...]:
        """Take out whatever waits: nobody will serve it."""
        tickets = tuple(ticket for _, _, ticket in self._queue)
        self._take(list(tickets))
        for ticket in tickets:
            ticket.state = "gone"
        return tickets

    # What follows is how; nothing of it is for callers.

    def _settle(self) -> None:
        """Anew after each measurement: how large a batch may be, and what a record takes in a full one."""
        limit, shape = self.config.max_batch, self._most_common()
        # Who comes as a full batch starts waits for it, and then for its own.
        allowed = self.config.slo_seconds / (2 * (1 + self.service.deviation))
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.service.seconds({shape: middle}) <= allowed:
                low = middle
            else:
                high = middle - 1
        self._largest = low
        self._full_seconds = self.service.seconds({shape: low})
        self._unit_seconds = self._full_seconds / low / self.replicas

    def _most_common(self) -> Shape:
        """What comes most, of late. One rare record that takes long says nothing of those that others wait behind."""
        return max(self._met, key=self._met.__getitem__)

    def _forget_rare(self) -> None:
        least = max(self._met.values()) / 1e3
        self._met = {shape: met / self._weight for shape, met in self._met.items() if met > least}
        self._weight = 1.0

    def _crowding(self, client: str) -> str | None:
        """The client with most requests waiting, if it would still have no fewer than this one with one more."""
        most = max(self._waiting_of, key=self._waiting_of.__getitem__, default=None)
        if most is None or self._waiting_of[most] <= self._waiting_of.get(client, 0) + 1:
            return None
        return most

    def _seconds_until_free(self, now: float) -> float:
        if len(self._running) < self.replicas:
            return 0.0
        return max(0.0, min(end for _, end, _ in self._running.values()) - now)

    def _foretold_seconds(self, now: float, ahead: int, shape: Shape) -> float:
        """Until the answer, with so many requests ahead."""
        rounds, beside = divmod(ahead, self._largest)
        own = self._full_seconds if rounds else self.service.seconds({shape: beside + 1})
        rounds_each, rest = divmod(rounds, self.replicas)
        wait = self._seconds_until_free(now) + (rounds_each + (rest > 0)) * self._full_seconds
        return (wait + own) * (1 + self.service.deviation)

    def _compose(self, now: float) -> tuple[list[Ticket], dict[Shape, int]]:
        """The batch to run now: from the first in order, with those that go well with it."""
        queue, largest = self._queue, self._largest
        first = queue[0][2]
        if first.alone:
            return [first], {first.shape: 1}
        scanned = queue[: MOST_SCANNED * largest]
        waiting: dict[Shape, list[Ticket]] = {}
        for _, _, ticket in scanned:
            if not ticket.alone:
                waiting.setdefault(ticket.shape, []).append(ticket)
        chosen = waiting.pop(first.shape)[:largest]
        counts = {first.shape: len(chosen)}
        if waiting and len(chosen) < largest:
            self._add_others(chosen, counts, waiting)
        due = min(ticket.due for ticket in chosen)
        # A long batch would make its own first members late: then fewer, the last to come first left out.
        while len(chosen) > 1 and now + self.service.seconds(counts) > due > now + self.service.fixed_seconds:
            half = max(1, len(chosen) // 2)
            fewer: dict[Shape, int] = {}
            for ticket in chosen[:half]:
                fewer[ticket.shape] = fewer.get(ticket.shape, 0) + 1
            if now + self.service.seconds(fewer) > due:
                break  # late anyway: as many as possible together
            chosen, counts = chosen[:half], fewer
        return chosen, counts

    def _add_others(self, chosen: list[Ticket], counts: dict[Shape, int], waiting: dict[Shape, list[Ticket]]) -> None:
        """Fill up with other shapes where one batch is cheaper than two."""
        service, largest = self.service, self._largest
        together = service.seconds(counts)
        for shape in sorted(waiting, key=lambda each: waiting[each][0].key):
            candidates = waiting[shape]
            room = min(largest - len(chosen), len(candidates))
            if room < 1:
                break
            apart = service.seconds({shape: min(len(candidates), largest)}) * room / min(len(candidates), largest)
            mixed = {**counts, shape: room}
            seconds = service.seconds(mixed)
            if seconds - together < apart:
                chosen += candidates[:room]
                counts[shape] = room
                together = seconds

    def _hold_until(self, now: float, chosen: list[Ticket], counts: dict[Shape, int]) -> float:
        """When this batch is to be run, if nothing else comes."""
        if self._held_since is None:
            self._held_since = now
            self.hindsight.offered(now, len(chosen), self.service, counts, self._largest)
        if len(chosen) >= self._largest or chosen[0].alone:
            return now
        if self.config.fixed_wait_seconds is not None:
            return min(ticket.arrival for ticket in chosen) + self.config.fixed_wait_seconds
        wait, gap = self.hindsight.rule
        if not wait:
            return now
        until = min(self._held_since + wait, max(self._held_since, self._last_arrival) + gap)
        due = min(ticket.due for ticket in chosen)
        spare = due - self.service.seconds(counts) * (1 + 2 * self.service.deviation) - now
        return min(until, now + spare)

    def _take(self, chosen: list[Ticket]) -> None:
        taken = len(chosen)
        for ticket in chosen:
            ticket.state = "running"
            self._one_less(ticket.client)
        if all(self._queue[place][2] is ticket for place, ticket in enumerate(chosen)):
            del self._queue[:taken]
        else:
            self._queue = [entry for entry in self._queue if entry[2].state == "waiting"]

    def _remove(self, ticket: Ticket) -> None:
        place = bisect_left(self._queue, (*ticket.key, ticket)) if len(self._queue) > 1 else 0
        assert self._queue[place][2] is ticket
        del self._queue[place]
        ticket.state = "gone"
        self._one_less(ticket.client)

    def _one_less(self, client: str) -> None:
        left = self._waiting_of[client] - 1
        if left:
            self._waiting_of[client] = left
        else:
            del self._waiting_of[client]

    def _expire(self, now: float) -> tuple[Ticket, ...]:
        expired = []
        while self._deadlines and (self._deadlines[0][2].state != "waiting" or self._deadlines[0][0] <= now):
            _, _, ticket = heapq.heappop(self._deadlines)
            if ticket.state == "waiting":
                self._remove(ticket)
                expired.append(ticket)
        return tuple(expired)

    def _next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None
