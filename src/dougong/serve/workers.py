"""Who carries batches out: processes forked from one that holds the model, or a thread of this process.

Here        Worker (the interface), ProcessWorkers, ThreadWorkers, Died, Words.
Elsewhere   what runs in the process (worker.py); which batch when (engine.py).
Promise     a worker that dies in the middle of a batch is told of at once, and another one is there as soon as a fork
            and one warm batch take. Closing ends every process that was started here, by its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol

from dougong.core.errors import BundleError, RunError
from dougong.serve.backend import Backend, Outcome, answer_batch
from dougong.serve.wire import FrameError, Frames, pack
from dougong.serve.worker import draw

START_SECONDS: Final = 120.0
Records = Sequence[Mapping[str, Any]]


class Died(Exception):
    """The worker ended in the middle of what it was asked."""


class Answers(NamedTuple):
    """What a batch came to."""

    outcomes: list[Outcome]
    seconds: float
    """As the worker measured it, without the way there and back."""

    quality: Mapping[str, float]
    """Of one of the records, now and then: figures of its media's quality."""


class Worker(Protocol):
    """One that can be asked one thing at a time."""

    pid: int | None

    async def ask(self, kind: str, records: Records, options: Mapping[str, Any] | None = None) -> Answers:
        """Answer records: `batch`, or for one `explain`, or `draw` with options.

        Raises:
            Died: the worker is gone.
        """

    def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncIterator[str]:
        """Words as they are written."""

    def end(self) -> None:
        """Let it go."""

    def kill(self) -> None:
        """End it whatever it does."""


class Workers(Protocol):
    """A source of workers that hold one model."""

    async def load(self) -> None:
        """Load the model.

        Raises:
            DougongError: it cannot be loaded.
        """

    async def start(self) -> Worker:
        """One more worker, warm."""

    async def close(self) -> None:
        """End all that is left."""


class _Channel(asyncio.Protocol):
    """One end of a socket pair: frames in, frames out."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self._frames = Frames()
        self._waiting: asyncio.Future[dict[str, Any]] | None = None
        self._ready: list[dict[str, Any]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # of a socket it is one that writes too

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                if self._waiting is not None and not self._waiting.done():
                    self._waiting.set_result(frame)
                else:
                    self._ready.append(frame)
        except FrameError:
            assert self.transport is not None
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Died())

    def send(self, document: dict[str, Any]) -> None:
        if self.lost.is_set() or self.transport is None:
            raise Died
        self.transport.write(pack(document))

    async def receive(self) -> dict[str, Any]:
        if self._ready:
            return self._ready.pop(0)
        if self.lost.is_set():
            raise Died
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _ProcessWorker:
    def __init__(self, channel: _Channel, pid: int) -> None:
        self._channel = channel
        self.pid: int | None = pid

    async def ask(self, kind: str, records: Records, options: Mapping[str, Any] | None = None) -> Answers:
        self._channel.send({"kind": kind, "records": list(records), "options": dict(options or {})})
        found = await self._channel.receive()
        outcomes, at, bodies = [], 0, found["bodies"]
        for status, size in zip(found["statuses"], found["sizes"], strict=True):
            outcomes.append(Outcome(status, bodies[at : at + size]))
            at += size
        return Answers(outcomes, found["seconds"], found["quality"])

    async def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncIterator[str]:
        self._channel.send({"kind": "write", "records": [record], "options": dict(options)})
        while (found := await self._channel.receive())["kind"] == "words":
            yield found["text"]
        if found["error"] is not None:
            raise RunError(found["error"]) if "status" in found else BundleError(found["error"])

    def end(self) -> None:
        self._channel.close()

    def kill(self) -> None:
        if self.pid is not None and not self._channel.lost.is_set():  # it lives, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._channel.close()


class ProcessWorkers:
    """Forks of one process that has loaded the model."""

    def __init__(self, settings: Mapping[str, Any], *, command: Sequence[str] | None = None) -> None:
        """`settings` say what is loaded (backend.from_bundle); `command` starts another worker than ours."""
        self._settings = dict(settings)
        self._command = list(command or (sys.executable, "-m", "dougong.serve.worker"))
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._channel: _Channel | None = None
        self._workers: list[_Channel] = []
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        async with self._loading:
            if self._channel is not None and not self._channel.lost.is_set():
                return
            await self._load()

    async def _load(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, str(theirs.fileno()), pass_fds=[theirs.fileno()], env=environment
            )
        self._channel = await _connect(ours)
        self._channel.send({"kind": "load", "settings": self._settings})
        try:
            found = await asyncio.wait_for(self._channel.receive(), START_SECONDS)
        except Died:
            raise RunError("the process that loads the model ended by itself: see above what it said.") from None
        except TimeoutError:
            await self.close()
            raise RunError(f"the model was not loaded within {START_SECONDS:g} seconds. Is the machine busy?") from None
        if found["kind"] == "refused":
            raise BundleError(found["error"])

    async def start(self) -> Worker:
        await self.load()  # where the first process was killed too
        assert self._channel is not None
        assert self._channel.transport is not None
        ours, theirs = socket.socketpair()
        with theirs:
            # The transport's own socket: nothing else is being written to it now.
            raw = self._channel.transport.get_extra_info("socket")
            with socket.socket(fileno=os.dup(raw.fileno())) as copy:
                try:
                    socket.send_fds(copy, [pack({"kind": "fork"})], [theirs.fileno()])
                except OSError:
                    ours.close()
                    raise Died from None
        channel = await _connect(ours)
        # Before it is warm: whoever closes all meanwhile ends this one too.
        self._workers = [each for each in self._workers if not each.lost.is_set()] + [channel]
        try:
            found = await asyncio.wait_for(channel.receive(), START_SECONDS)
        except BaseException as error:
            channel.close()
            if isinstance(error, TimeoutError):
                raise Died from None
            raise
        return _ProcessWorker(channel, found["pid"])

    async def close(self) -> None:
        for channel in self._workers:
            channel.close()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGKILL)
                await self._process.wait()
        self._process = self._channel = None


async def _connect(ours: socket.socket) -> _Channel:
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_unix_connection(_Channel, sock=ours)
    return channel


class _ThreadWorker:
    pid: int | None = None

    def __init__(self, backend: Backend, pool: ThreadPoolExecutor) -> None:
        self._backend = backend
        self._pool = pool

    async def ask(self, kind: str, records: Records, options: Mapping[str, Any] | None = None) -> Answers:
        loop = asyncio.get_running_loop()
        started = monotonic()
        if kind == "explain":
            outcomes = [await loop.run_in_executor(self._pool, self._backend.explain, records[0])]
        elif kind == "draw":
            outcomes = [await loop.run_in_executor(self._pool, draw, self._backend, records[0], options or {})]
        else:
            outcomes = await loop.run_in_executor(self._pool, answer_batch, self._backend, records)
        return Answers(outcomes, monotonic() - started, {})

    async def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        pieces = await loop.run_in_executor(self._pool, self._backend.write, record, options)
        while (piece := await loop.run_in_executor(self._pool, next, pieces, None)) is not None:
            yield piece

    def end(self) -> None:
        self._pool.shutdown(wait=False)

    def kill(self) -> None:
        self.end()  # a thread cannot be killed: it is left to itself


class ThreadWorkers:
    """Threads of this process: where it may not start others, as inside a Ray replica."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self._backend: Backend | None = None

    async def load(self) -> None:
        if self._backend is None:
            self._backend = await asyncio.get_running_loop().run_in_executor(None, self._make)

    async def start(self) -> Worker:
        await self.load()
        assert self._backend is not None
        pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        await asyncio.get_running_loop().run_in_executor(pool, self._backend.warm)
        return _ThreadWorker(self._backend, pool)

    async def close(self) -> None:
        return
