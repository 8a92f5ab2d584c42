"""A server of this process for tests: on a loopback port, on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dougong.core.config import parse
from dougong.serve.backend import Outcome
from dougong.serve.models import Wanted
from dougong.serve.server import Running
from dougong.serve.settings import ServeConfig
from dougong.serve.workers import Workers


class Slow:
    """A backend that answers after a while, and says what it was asked; a record with `remark` "poison" makes it
    fail."""

    def __init__(self, seconds: float = 0.002, name: str = "slow") -> None:
        self.seconds = seconds
        self.name = name
        self.batches: list[int] = []

    def warm(self) -> None:
        return

    def answer(self, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        self.batches.append(len(records))
        time.sleep(self.seconds)
        if any(record.get("remark") == "poison" for record in records):
            raise ValueError("poison, and what else the record holds")
        answer = {"answer": self.name, "confidence": 1.0, "probabilities": {}, "gate": {}}
        return [Outcome(200, json.dumps({**answer, "said": record.get("remark")}).encode()) for record in records]

    def explain(self, record: Mapping[str, Any]) -> Outcome:
        return self.answer([record])[0]

    def quality(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        return {}

    def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
        yield from ("a ", "red ", "circle")

    def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
        if "heat" in options:
            return Outcome(422, b'{"error":"no setting is called heat"}')
        return Outcome(200, b"\x89PNG of " + text.encode() + b" %d" % options.get("seed", 0))


class Server:
    """What a test holds."""

    def __init__(self, running: Running, loop: asyncio.AbstractEventLoop) -> None:
        self.running = running
        self.url = running.url
        self.port = int(running.url.rsplit(":", 1)[1])
        self.loop = loop

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, the body (from JSON where it is), headers by lower-case name."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            given = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                given.setdefault("content-type", "application/json")
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            content = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            if found.get("content-type", "").startswith("application/json"):
                return answer.status, json.loads(content), found
            return answer.status, content, found
        finally:
            connection.close()

    def do(self, coroutine: Any) -> Any:
        """On the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def serving(
    wanted: Sequence[Wanted], *, workers: Callable[[Wanted], Workers] | None = None, **settings: Any
) -> Iterator[Server]:
    """Serve until the end of the block."""
    config = parse(ServeConfig, {"port": 0, "log_requests": False, **settings}, where="test")
    started: list[Server] = []
    failed: list[BaseException] = []
    ready, ended = threading.Event(), threading.Event()

    async def run() -> None:
        async with Running.start(config, wanted, workers=workers, signals=False) as running:
            started.append(Server(running, asyncio.get_running_loop()))
            ready.set()
            while not ended.is_set():
                await asyncio.sleep(0.01)

    def in_thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=in_thread)
    thread.start()
    try:
        ready.wait(120)
        if failed:
            raise failed[0]
        yield started[0]
    finally:
        ended.set()
        thread.join(60)
    if failed:
        raise failed[0]
