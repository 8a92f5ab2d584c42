"""One loaded model at work: requests in, batches to workers, answers out.

Here        Engine, Asked; what may become of a request: Answered by its Outcome, or Refused.
Elsewhere   the policy (batcher.py); the workers (workers.py); which model a request is for (models.py).
Promise     each request is answered exactly once, by this version of the model and no other; while workers live, none
            waits longer than its timeout; with nothing to do, nothing runs: there is no clock that ticks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from time import monotonic  # the loop's own clock may count whole milliseconds (uvloop's does)
from typing import Any, Final, Literal, NamedTuple

from dougong.core.errors import DougongError, RunError
from dougong.serve.backend import Outcome
from dougong.serve.batcher import Batcher, BatcherConfig, Refusal, Ticket
from dougong.serve.service_time import ServiceTime, Shape
from dougong.serve.workers import Died, Worker, Workers

RESTART_SECONDS: Final = (0.0, 0.2, 1.0, 3.0)
"""Before a worker is replaced: at once, and later where one dies after the other."""

_GONE: Final[Mapping[str, Any]] = {}
"""In place of a record that has left: its place in the queue of deadlines outlives it, its media must not."""

_log = logging.getLogger("dougong.serve")


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(
        self, reason: Literal["full", "late", "expired", "closed", "died"], retry_after_seconds: float = 1.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class BatchDone(NamedTuple):
    """What a batch was like, for whoever counts."""

    size: int
    waited_seconds: list[float]
    seconds: float
    outcomes: list[Outcome]
    shapes: dict[Shape, int]
    quality: Mapping[str, float]


Then = Callable[["Outcome | Refused"], None]


class _Job:
    __slots__ = ("future", "record", "then")

    def __init__(self, record: Mapping[str, Any], future: asyncio.Future[Outcome] | None, then: Then | None) -> None:
        self.record = record
        self.future = future
        self.then = then

    def tell(self, found: Outcome | Refused) -> None:
        """Whoever waits; and let go of the record."""
        self.record = _GONE
        then, self.then = self.then, None
        if then is not None:
            try:
                then(found)
            except Exception as error:  # the others of its batch are still to be told
                _log.error("an answer could not be passed on: %s", type(error).__name__)
            return
        future = self.future
        assert future is not None
        if future.done():
            return
        if isinstance(found, Refused):
            future.set_exception(found)
            future.exception()  # looked at: where nobody waits for it, that is no mistake
        else:
            future.set_result(found)


class Engine:
    """A model's queue and its workers, on the running event loop."""

    def __init__(
        self,
        workers: Workers,
        config: BatcherConfig,
        *,
        replicas: int = 1,
        heard: Callable[[BatchDone], None] | None = None,
        patience_seconds: float | None = None,
    ) -> None:
        """A worker that has a batch for longer than `patience_seconds` hangs, and is killed. None: by the timeout."""
        self._patience = max(10.0, 4 * config.timeout_seconds) if patience_seconds is None else patience_seconds
        self.batcher = Batcher(config, ServiceTime(), replicas=replicas)
        self._workers = workers
        self._replicas = replicas
        self._heard = heard
        self._free: deque[Worker] = deque()
        self._borrowers: deque[asyncio.Future[Worker]] = deque()
        self._lent = False
        """Whether the last worker went to a borrower: the next one is for a batch."""

        self._alive = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._pumping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        """Nothing more is taken; what was taken is still answered, if need be by workers started anew."""

        self._closed = False
        self._deaths = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._outstanding = 0

    @property
    def ready(self) -> bool:
        """Whether at least one worker is warm."""
        return self._alive > 0 and not self._closing

    @property
    def outstanding(self) -> int:
        """Requests that are waiting or running."""
        return self._outstanding

    @property
    def pids(self) -> list[int]:
        """Of the workers that have nothing to do now."""
        return [worker.pid for worker in self._free if worker.pid is not None]

    async def start(self) -> None:
        """Load the model and have every replica warm.

        Raises:
            DougongError: it cannot be loaded, or a worker ends before it has answered anything.
        """
        await self._workers.load()
        try:
            started = await asyncio.gather(*(self._workers.start() for _ in range(self._replicas)))
        except Died:
            raise RunError("a worker ended while it was made ready: see above what it said.") from None
        self._free.extend(started)
        self._alive += len(started)
        self._kick()

    def submit(
        self,
        record: Mapping[str, Any],
        shape: Shape,
        *,
        client: str = "",
        priority: int = 0,
        within_seconds: float | None = None,
        then: Then | None = None,
    ) -> Ticket:
        """Take a record. `then` is called with what became of it, or, without one, `outcome` is awaited.

        Raises:
            Refused: it cannot be answered in time, or the queue is full.
        """
        if self._closing:
            raise Refused("closed")
        taken = self.batcher.admit(
            monotonic(),
            _Job(record, self._loop.create_future() if then is None else None, then),
            shape=shape,
            client=client,
            priority=priority,
            within_seconds=within_seconds,
        )
        if isinstance(taken, Refusal):
            raise Refused(taken.reason, taken.retry_after_seconds)
        self._outstanding += 1
        self._idle.clear()
        if taken.instead_of is not None:
            self._fail(taken.instead_of, Refused("full"))
            taken.instead_of = None
        self._kick()
        if not self._free:  # whoever has the workers may never give them back
            self._look_by(taken.deadline)
        return taken

    async def outcome(self, ticket: Ticket) -> Outcome:
        """What became of it. Whoever is cancelled while waiting takes the request out of the queue.

        Raises:
            Refused: it expired, or nobody is left to answer it.
        """
        future: asyncio.Future[Outcome] = ticket.payload.future
        try:
            return await future
        except asyncio.CancelledError:
            self.give_up(ticket)
            raise

    def give_up(self, ticket: Ticket) -> None:
        """Nobody waits for this any more: take it out of the queue, if it is still there."""
        if self.batcher.cancel(ticket):
            ticket.payload.record, ticket.payload.then = _GONE, None
            if ticket.payload.future is not None:
                ticket.payload.future.cancel()
            self._left(1)

    async def explain(self, record: Mapping[str, Any]) -> Outcome:
        """One record, alone, with what the model looked at.

        Raises:
            Refused: no worker can be had.
        """
        async with self._borrowed() as worker:
            return (await worker.ask("explain", [record])).outcomes[0]

    async def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
        """A picture of what a text says; of a model that draws.

        Raises:
            Refused: no worker can be had.
        """
        async with self._borrowed() as worker:
            return (await worker.ask("draw", [{"text": text}], options)).outcomes[0]

    async def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncGenerator[str]:
        """Words as they are written; the worker is this caller's until the end.

        Raises:
            Refused: no worker can be had.
            DougongError: the record or an option cannot be used.
        """
        async with self._borrowed() as worker:
            async for piece in worker.write(record, options):
                yield piece

    async def drain(self, seconds: float) -> bool:
        """Take nothing more, and wait until all is answered; False if that took longer."""
        self._closing = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the workers. Whoever still waits is told."""
        self._closing = self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for borrower in self._borrowers:
            if not borrower.done():
                borrower.set_exception(Refused("closed"))
        for ticket in self.batcher.drop_all():
            self._fail(ticket, Refused("closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._free:
            worker.end()
        self._free.clear()
        await self._workers.close()

    @contextlib.asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[Worker]:
        if self._closing or not self._alive:
            raise Refused("closed")
        if len(self.batcher) + len(self._borrowers) >= self.batcher.config.max_queue:
            raise Refused("full")
        self._outstanding += 1
        self._idle.clear()
        try:
            worker = await self._borrow()
            healthy = died = False
            try:
                yield worker
                healthy = True
            except Died:
                died = True
                raise Refused("died") from None
            except DougongError:
                healthy = True
                raise
            finally:
                if not died:
                    self._deaths = 0
                if healthy:
                    self._free.append(worker)
                    self._kick()
                else:  # it may still be writing: nobody else may read that
                    worker.end()
                    self._lost()
        finally:
            self._left(1)

    async def _borrow(self) -> Worker:
        """The next worker that is free, in turn with batches."""
        borrower: asyncio.Future[Worker] = self._loop.create_future()
        self._borrowers.append(borrower)
        self._kick()
        try:
            async with asyncio.timeout(self.batcher.config.timeout_seconds):
                return await borrower
        except BaseException as error:
            if borrower.done() and not borrower.cancelled() and borrower.exception() is None:
                self._free.append(borrower.result())  # it came in the very moment in which waiting ended
                self._kick()
            else:
                with contextlib.suppress(ValueError):
                    self._borrowers.remove(borrower)
            if isinstance(error, TimeoutError):
                raise Refused("expired") from None
            raise

    def _lend(self) -> None:
        while self._borrowers and self._free:
            borrower = self._borrowers.popleft()
            if not borrower.done():
                borrower.set_result(self._free.popleft())
                self._lent = True
                return

    def _kick(self) -> None:
        if not self._pumping and self._free:
            # Not at once: who else came in the same moment is to be in the same batch.
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = monotonic()
        while True:
            if not self._lent or not len(self.batcher):
                self._lend()
            poll = self.batcher.poll(now, len(self._free))
            for ticket in poll.expired:
                self._fail(ticket, Refused("expired"))
            if not poll.batch:
                break
            self._lent = False
            worker = self._free.popleft()
            task = self._loop.create_task(self._run(worker, poll.batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._borrowers and self._free:  # what is left waits for others to come
            self._lend()
        if poll.wake_at is not None:
            self._look_by(poll.wake_at)

    def _look_by(self, when: float) -> None:
        """At the latest then, whatever happens until then."""
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_later(max(0.0, when - monotonic()), self._pump)

    async def _run(self, worker: Worker, batch: tuple[Ticket, ...]) -> None:
        started = monotonic()
        try:
            async with asyncio.timeout(self._patience):
                answers = await worker.ask("batch", [ticket.payload.record for ticket in batch])
        except asyncio.CancelledError:  # this engine is being closed
            for ticket in batch:
                self._fail(ticket, Refused("closed"))
            raise
        except Exception as error:
            if not isinstance(error, Died):
                what = "hangs" if isinstance(error, TimeoutError) else f"cannot be asked ({type(error).__name__})"
                _log.error("a worker %s and is killed", what, extra={"pid": worker.pid})
                worker.kill()
            self._died(batch)
            return
        now = monotonic()
        ran = self.batcher.done(now, batch)
        self._free.append(worker)
        self._deaths = 0
        # Before the answers go out: the next batch need not wait for that.
        if len(self.batcher) or self._borrowers:
            self._pump()
        shapes: dict[Shape, int] = {}
        for ticket, outcome in zip(batch, answers.outcomes, strict=True):
            shapes[ticket.shape] = shapes.get(ticket.shape, 0) + 1
            ticket.payload.tell(outcome)
        self._left(len(batch))
        self.batcher.learn(ran)
        if self._heard is not None:
            waited = [started - ticket.arrival for ticket in batch]
            self._heard(BatchDone(len(batch), waited, now - started, answers.outcomes, shapes, answers.quality))

    def _died(self, batch: tuple[Ticket, ...]) -> None:
        now = monotonic()
        for ticket in self.batcher.retry(now, batch):
            self._fail(ticket, Refused("died"))
        self._lost()
        self._pump()  # also where nobody is free: those that are tried again have their deadlines, too

    def _lost(self) -> None:
        self._alive -= 1
        if self._closed:
            return
        task = self._loop.create_task(self._replace())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self) -> None:
        while not self._closed:
            await asyncio.sleep(RESTART_SECONDS[min(self._deaths, len(RESTART_SECONDS) - 1)])
            self._deaths += 1
            try:
                worker = await self._workers.start()
            except (Died, DougongError) as error:
                _log.error("a worker could not be started again: %s", error or "it died")
                continue
            self._free.append(worker)
            self._alive += 1
            self._pump()
            return

    def _fail(self, ticket: Ticket, error: Refused) -> None:
        ticket.state = "gone"
        ticket.payload.tell(error)
        self._left(1)

    def _left(self, number: int) -> None:
        self._outstanding -= number
        if not self._outstanding:
            self._idle.set()
