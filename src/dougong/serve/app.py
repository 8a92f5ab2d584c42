"""The HTTP interface: what each address does, as a plain ASGI application.

Here        App, with what its addresses have in common: Request, Question, Reply, Status.
Elsewhere   the two addresses that are asked most, without ASGI (direct.py); requests' bodies (v1.py, v2.py); models
            (models.py); callers (access.py); the process around it (server.py).
Promise     every request is answered with a status that says whose turn it is: 4xx the caller's, 429 and 503 later,
            504 too late, and 500 only where the model failed on that record. No body is read beyond its limit, and
            nothing of it is logged.

Written against ASGI itself: a framework's routing and validation take longer than all of the work on a request here
(docs/adr/0019-asgi-by-hand.md).
"""

from __future__ import annotations

import asyncio
import importlib.resources
import itertools
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

from dougong.core.config import parse
from dougong.core.errors import ConfigError, DougongError, RunError
from dougong.serve.access import Access, Caller, key_of
from dougong.serve.backend import Outcome
from dougong.serve.batcher import Ticket
from dougong.serve.columns import CHARACTERS_A_TOKEN, BadRequest, Fetch
from dougong.serve.engine import Refused
from dougong.serve.fetching import fetch
from dougong.serve.logs import RequestLog
from dougong.serve.metrics import Metrics
from dougong.serve.models import Models, Traffic, Unknown, Version
from dougong.serve.openapi import VERSION, describe
from dougong.serve.settings import ServeConfig
from dougong.serve.v1 import answers_json, load_json, read_form, read_json
from dougong.serve.v2 import from_outcomes, metadata, read_request, write_response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_MICROSECONDS: Final = 10**12
"""That a caller's own limit counts for: whole numbers in JSON may have any length."""

REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
PRIORITIES: Final = {b"low": -1, b"normal": 0, b"high": 1, b"": 0}
STATUS_OF: Final = {"full": 429, "late": 429, "expired": 504, "closed": 503, "died": 503}
WHY: Final = {
    "full": "too many requests are waiting",
    "late": "this cannot be answered in time at the present load",
    "expired": "this was not answered in time",
    "closed": "this model is about to end",
    "died": "the worker that had this request died, twice",
}
_MODEL: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(infer|ready|config|stats))?")
_REPOSITORY: Final = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_TRAFFIC: Final = re.compile(r"/v1/models/([^/]+)/traffic")

_log = logging.getLogger("dougong.serve")


class Status(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class QueryError(Exception):
    """A query that cannot be read."""


class Reply:
    """An answer that is ready."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        content_type: bytes = b"application/json",
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers


class Request:
    """What is known of a request before its body is read."""

    __slots__ = ("address", "caller", "headers", "id", "method", "model", "path", "query", "route", "version")

    def __init__(
        self, method: str, path: str, query: bytes, address: str, headers: Mapping[bytes, bytes], request_id: str
    ) -> None:
        """Raises:
        QueryError: the query has more fields than anybody needs."""
        self.method = method
        self.path = path
        self.query: Mapping[str, list[str]] = {}
        if query:
            try:
                self.query = parse_qs(query.decode("latin-1"), max_num_fields=32)
            except ValueError:
                raise QueryError from None
        self.headers = headers
        self.id = request_id
        self.address = address
        self.caller = Caller(address, admin=False)
        self.route = "other"
        self.model = ""
        self.version = ""

    def asked(self, name: str) -> str | None:
        """A parameter of the query."""
        values = self.query.get(name)
        return values[0] if values else None


class Question(NamedTuple):
    """A request to a model, read and found good."""

    version: Version
    named: bool
    """Whether the caller asked for this version: then no other answers."""

    records: list[dict[str, Any]]
    many: bool
    within_seconds: float | None
    """What the caller allows, where it says so."""

    priority: int
    reply: Callable[[Version, list[Outcome]], Reply]
    """The answer, once every record has its outcome."""


OPTIONS: Final = ("temperature", "top_p", "top_k", "seed", "guidance")
"""Of writing and drawing; the last of drawing alone."""

WHOLE_OPTIONS: Final = ("seed", "top_k")


class App:
    """An ASGI application."""

    def __init__(
        self,
        config: ServeConfig,
        models: Models,
        metrics: Metrics,
        *,
        log: RequestLog | None = None,
        spans: Callable[[str, Mapping[str, str]], Any] | None = None,
        changed_elsewhere: str | None = None,
    ) -> None:
        """`changed_elsewhere` says where to change what is served, if it cannot be done by a request."""
        self.config = config
        self.models = models
        self.metrics = metrics
        self.draining = False
        """Whether SIGTERM has come: still answered, but no longer ready, and connections are given back."""

        self.last_request = 0.0
        """When the last one came, by `time.monotonic`."""

        self.in_flight = 0
        self.direct = spans is None and not config.fetch_from
        """Whether questions may go the short way: where nothing has to be waited for between reading and asking."""

        self._changed_elsewhere = changed_elsewhere
        self._access = Access(config.keys)
        self._log = log
        self._spans = spans
        self._prefix = secrets.token_hex(4)
        self._number = itertools.count()
        self._background: set[asyncio.Task[None]] = set()
        metrics.watch(models)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        started = self.began()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self.request_id(headers)
        client = scope.get("client")
        address = client[0] if client else "local"
        request = None
        status = 500
        try:
            try:
                request = Request(
                    scope["method"], scope["path"], scope.get("query_string", b""), address, headers, request_id
                )
                reply = await self._reply(request, receive, send)
            except Exception as error:
                reply = self.refusal(error, request_id)
            if reply is None:
                status = 200
                return
            status = reply.status
            await self._send(reply, request_id, headers, send)
        except asyncio.CancelledError:
            status = 499  # the caller has gone
            raise
        finally:
            self.ended(request, request_id, status, started)

    def began(self) -> float:
        """A request has come; when, by `time.monotonic`."""
        self.last_request = now = time.monotonic()
        self.in_flight += 1
        return now

    def ended(self, request: Request | None, request_id: str, status: int, started: float) -> None:
        """It was answered, or its caller has gone."""
        self.in_flight -= 1
        seconds = time.monotonic() - started
        self.metrics.request(request.route if request is not None else "other", status, seconds)
        if self._log is not None and request is not None:
            who = (request.caller.name, request.model, request.version)
            self._log.note(request_id, request.route, status, seconds, time.time(), who)

    def request_id(self, headers: Mapping[bytes, bytes]) -> str:
        """As the caller gave it, where that is good for one; else our own."""
        given = headers.get(b"x-request-id")
        if given is not None and REQUEST_ID.fullmatch(given):
            return given.decode()
        return f"{self._prefix}-{next(self._number):x}"

    def refusal(self, error: Exception, request_id: str) -> Reply:
        """What is answered in place of what was asked for."""
        if isinstance(error, Status):
            return _refusal(error)
        if isinstance(error, BadRequest):
            return _refusal(Status(error.status, error.reason))
        if isinstance(error, Refused):
            self.metrics.refused(error.reason)
            return _refusal(Status(STATUS_OF[error.reason], WHY[error.reason], error.retry_after_seconds))
        if isinstance(error, Unknown):
            return _refusal(Status(404, str(error)))
        if isinstance(error, QueryError):
            return _refusal(Status(400, "the query cannot be read"))
        # Not its message: it may quote what was sent.
        _log.error(
            "failed", extra={"request": request_id, "error": type(error).__name__}, exc_info=_without_text(error)
        )
        return _refusal(Status(500, "this failed here; the log has it under this request's id"))

    async def _send(self, reply: Reply, request_id: str, headers: Mapping[bytes, bytes], send: Send) -> None:
        own = self.headers_of(reply, request_id, headers)
        await send({"type": "http.response.start", "status": reply.status, "headers": own})
        await send({"type": "http.response.body", "body": reply.body})

    def headers_of(self, reply: Reply, request_id: str, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What an answer to a request with these headers is sent with."""
        own = [(b"x-request-id", request_id.encode()), *reply.headers]
        if reply.status != 204:
            own += [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body))]
        if self.draining:
            own.append((b"connection", b"close"))
        if self.config.cors_origins:
            own += self._cors(headers)
        return own

    async def _reply(self, request: Request, receive: Receive, send: Send) -> Reply | None:
        """The answer; None where it has been sent already."""
        method, path = request.method, request.path
        if path == "/v1/predict":
            request.route = path
            if method == "OPTIONS":
                return self._preflight(request)
            _only(method, "POST")
            self.admit(request)
            return await self._predict(request, receive, send)
        if path == "/v1/draw":
            request.route = path
            _only(method, "POST")
            self.admit(request)
            return await self._draw(request, receive)
        found = _MODEL.fullmatch(path)
        if found is not None:
            return await self._model(request, found, receive)
        if path in ("/v2/health/live", "/v2/health/ready"):
            request.route = path
            _only(method, "GET")
            good = path.endswith("live") or (self.models.ready and not self.draining)
            return Reply(b'{"ready":true}' if good else b'{"ready":false}', 200 if good else 503)
        return await self._rest(request, receive)

    async def _rest(self, request: Request, receive: Receive) -> Reply:
        """What is asked for seldom."""
        method, path = request.method, request.path
        pages = {"/": "page.html", "/docs": "page.html"}
        if path in pages:
            request.route = "/"
            _only(method, "GET")
            return Reply(_page(pages[path]), 200, b"text/html; charset=utf-8", _PAGE_HEADERS)
        if path == "/metrics":
            request.route = path
            _only(method, "GET")
            self.admit(request)
            return Reply(self.metrics.page(), 200, b"text/plain; version=0.0.4; charset=utf-8")
        if path == "/openapi.json":
            request.route = path
            _only(method, "GET")
            return _json(describe(self.models, keys=not self._access.open))
        if path in ("/v2", "/v2/"):
            request.route = "/v2"
            _only(method, "GET")
            self.admit(request)
            extensions = ["binary_tensor_data", "model_repository"]
            return _json({"name": "dougong", "version": VERSION, "extensions": extensions})
        if path == "/v1/models":
            request.route = path
            _only(method, "GET")
            self.admit(request)
            return _json({"models": [self._about(name) for name in self.models.names]})
        if path == "/v2/repository/index":
            request.route = path
            _only(method, "POST")
            self.admit(request)
            return _json(self.models.index())
        found = _REPOSITORY.fullmatch(path)
        if found is not None:
            request.route = f"/v2/repository/{found[2]}"
            _only(method, "POST")
            return await self._change(request, found[1], found[2] == "load", receive)
        found = _TRAFFIC.fullmatch(path)
        if found is not None:
            request.route = "/v1/traffic"
            return await self._traffic(request, found[1], receive)
        raise Status(404, "there is nothing at this address; /openapi.json lists what is")

    async def _predict(self, request: Request, receive: Receive, send: Send) -> Reply | None:
        question = self.question(request, await self._body(receive, request.headers))
        if b"text/event-stream" in request.headers.get(b"accept", b""):
            await self._stream(request, question, receive, send)
            return None
        if request.asked("explain") in ("true", "1"):
            if question.many:
                raise BadRequest("explain is for one record")
            version = question.version
            (record,) = await self._fetched(question.records, question.within_seconds)
            return question.reply(version, [await version.engine.explain(record)])
        return await self._answered(question, request, receive)

    async def _answered(self, question: Question, request: Request, receive: Receive) -> Reply:
        version, outcomes = await self.answer(
            question.version,
            question.records,
            question.within_seconds,
            request.caller.name,
            named=question.named,
            priority=question.priority,
            request_id=request.id,
            receive=receive,
        )
        return question.reply(version, outcomes)

    def question(self, request: Request, body: bytes, model: tuple[str, str | None] | None = None) -> Question:
        """What a body asks; `model` is the name and version in the address, where it is of the Open Inference Protocol.

        Raises:
            Status, BadRequest, Unknown: it cannot be asked.
        """
        headers = request.headers
        if model is not None:
            return self._inference(request, body, *model)
        version = self.models.choose(request.asked("model"), request.asked("version"))
        request.model, request.version = version.name, version.version
        content_type = headers.get(b"content-type", b"")
        if content_type[:16].lower() == b"application/json":
            asked = read_json(body, version.columns)
        elif content_type[:19].lower() == b"multipart/form-data":
            asked = read_form(body, content_type.decode("latin-1"), version.columns)
        else:
            raise Status(415, "send application/json or multipart/form-data")
        within, priority = _urgency(headers)

        def reply(version: Version, outcomes: list[Outcome]) -> Reply:
            status, answer = answers_json(version.name, version.version, asked, outcomes)
            return Reply(answer, status)

        named = request.asked("version") is not None
        return Question(version, named, asked.records, asked.many, within, priority, reply)

    async def answer(
        self,
        version: Version,
        records: list[dict[str, Any]],
        within: float | None,
        client: str,
        *,
        named: bool,
        priority: int = 0,
        request_id: str = "",
        receive: Receive | None = None,
    ) -> tuple[Version, list[Outcome]]:
        """Of all records, by one version: that which was chosen, or, if it was not `named` by the caller, its follower
        where it ends while media are fetched.

        Raises:
            Refused: one of them cannot be answered; then none is.
            BadRequest: a URL cannot be fetched.
        """
        if self.config.fetch_from:
            began = time.monotonic()
            records = await self._fetched(records, within)
            if within is not None:
                within = max(0.001, within - (time.monotonic() - began))
            if not version.engine.ready and not named:
                version = self.models.choose(version.name, None)
        engine, shadow = version.engine, self.models.shadow(version)
        span = None if self._spans is None else self._spans("infer", {"model": version.name, "request": request_id})
        tickets: list[Ticket] = []
        try:
            for record in records:
                shape = version.columns.shape(record)
                tickets.append(engine.submit(record, shape, client=client, priority=priority, within_seconds=within))
            if receive is not None and len(engine.batcher) > 2 * engine.batcher.largest:
                outcomes = await self._unless_gone(version, tickets, receive)
            else:
                outcomes = [await engine.outcome(ticket) for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                engine.give_up(ticket)
            raise
        finally:
            if span is not None:
                span.end()
        if shadow is not None:
            self.ask_shadow(shadow, records, outcomes)
        return version, outcomes

    async def _unless_gone(self, version: Version, tickets: list[Ticket], receive: Receive) -> list[Outcome]:
        """Wait, and stop waiting where the caller goes away meanwhile. Watching costs, so it is for long queues."""

        async def wait() -> list[Outcome]:
            return [await version.engine.outcome(ticket) for ticket in tickets]

        loop = asyncio.get_running_loop()
        waiting, watching = loop.create_task(wait()), loop.create_task(_gone(receive))
        try:
            await asyncio.wait((waiting, watching), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                raise Status(499, "the caller has gone")
            return waiting.result()
        finally:
            watching.cancel()
            waiting.cancel()

    def ask_shadow(self, shadow: Version, records: list[dict[str, Any]], outcomes: list[Outcome]) -> None:
        """A copy of what was asked goes to a version whose answers are only compared."""

        async def ask() -> None:
            for record, outcome in zip(records, outcomes, strict=True):
                try:
                    # Of one priority lower: whoever waits for an answer goes first.
                    ticket = shadow.engine.submit(record, shadow.columns.shape(record), client="shadow", priority=-1)
                    found = await shadow.engine.outcome(ticket)
                except Refused:
                    continue
                alike = found.status == outcome.status and (
                    found.status != 200 or json.loads(found.body)["answer"] == json.loads(outcome.body)["answer"]
                )
                self.metrics.shadow(shadow, alike)

        task = asyncio.get_running_loop().create_task(ask())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _fetched(self, records: list[dict[str, Any]], within: float | None) -> list[dict[str, Any]]:
        """Records with the media that they name by address: all together no more than a body may hold, and within the
        time that their answer has."""
        if not any(isinstance(cell, Fetch) for record in records for cell in record.values()):
            return records
        left, most_seconds = self.config.limits.body_bytes, self.config.batching.timeout_seconds
        found: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(most_seconds if within is None else min(within, most_seconds)):
                for record in records:
                    cells = dict(record)
                    for name, cell in record.items():
                        if isinstance(cell, Fetch):
                            content = await fetch(cell.url, self.config.fetch_from, left)
                            left -= len(content)
                            cells[name] = {"bytes": content, "path": None}
                    found.append(cells)
        except TimeoutError:
            raise Refused("expired") from None
        return found

    async def _stream(self, request: Request, question: Question, receive: Receive, send: Send) -> None:
        """Words as server-sent events: `{"text": ...}` for each piece, then `event: done`. Whoever goes away gives the
        worker back with the next piece."""
        version = question.version
        if version.signature is not None:
            raise Status(415, "this model decides and writes no words: ask it without Accept: text/event-stream")
        if question.many:
            raise BadRequest("words are streamed about one record at a time")
        options: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "seed"):
            text = request.asked(name)
            if text is not None:
                options[name] = plain_number(name, text)
        (record,) = await self._fetched(question.records, question.within_seconds)
        pieces = version.engine.write(record, options)
        try:
            first = await anext(pieces, None)  # before the status: what cannot be read is still refused as such
        except RunError as error:
            raise Status(500, str(error)) from None
        except DougongError as error:
            raise BadRequest(str(error)) from None
        start = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-request-id", request.id.encode()),
        ]
        leaving = asyncio.get_running_loop().create_task(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": start})
            if first is not None:
                await send({"type": "http.response.body", "body": _event({"text": first}), "more_body": True})
            async for body in _events(pieces):
                if leaving.done():
                    raise Status(499, "the caller has gone")
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()
            await pieces.aclose()

    async def _draw(self, request: Request, receive: Receive) -> Reply:
        """A picture as a PNG file, of {"text": ...} with options of sampling and `seed` beside it."""
        values = load_json(await self._body(receive, request.headers))
        if not isinstance(values, dict) or not isinstance(values.get("text"), str):
            raise BadRequest('give an object like {"text": "a red circle", "seed": 3}')
        text = values.pop("text")
        if len(text) > self.config.limits.tokens * CHARACTERS_A_TOKEN:
            raise BadRequest(f"text: longer than {self.config.limits.tokens} tokens", 413)
        version = self.models.choose(request.asked("model"), request.asked("version"))
        request.model, request.version = version.name, version.version
        outcome = await version.engine.draw(text, drawing_options(values))
        kind = b"image/png" if outcome.status == 200 else b"application/json"
        return Reply(outcome.body, outcome.status, kind)

    async def _model(self, request: Request, found: re.Match[str], receive: Receive) -> Reply:
        name, version_name, what = found[1], found[2], found[3]
        request.route = f"/v2/models/{what or 'metadata'}"
        if what == "infer":
            _only(request.method, "POST")
            self.admit(request)
            return await self._infer(request, name, version_name, receive)
        _only(request.method, "GET")
        self.admit(request)
        version = self.models.choose(name, version_name)
        if what == "ready":
            good = version.engine.ready and not self.draining
            return Reply(b'{"ready":true}' if good else b'{"ready":false}', 200 if good else 503)
        if what == "config":
            return _json({"name": name, "platform": "dougong", "max_batch_size": self.config.batching.max_batch})
        if what == "stats":
            raise Status(404, "statistics are at /metrics")
        return _json(metadata(name, list(self.models.versions(name)), version.columns, version.signature))

    async def _infer(self, request: Request, name: str, version_name: str | None, receive: Receive) -> Reply:
        body = await self._body(receive, request.headers)
        return await self._answered(self.question(request, body, (name, version_name)), request, receive)

    def _inference(self, request: Request, body: bytes, name: str, version_name: str | None) -> Question:
        headers = request.headers
        version = self.models.choose(name, version_name)
        request.model, request.version = version.name, version.version
        length = headers.get(b"inference-header-content-length")
        if length is not None and not (length.isdigit() and len(length) < 12):
            raise BadRequest("Inference-Header-Content-Length is no number", 400)
        inference = read_request(body, None if length is None else int(length), version.columns)
        within, priority = _urgency(headers)
        microseconds = inference.parameters.get("timeout")  # as Triton's clients give it
        if within is None and type(microseconds) is int and microseconds > 0:
            within = min(microseconds, MOST_MICROSECONDS) / 1e6

        def reply(version: Version, outcomes: list[Outcome]) -> Reply:
            outputs = from_outcomes(outcomes, version.signature)
            answer, json_bytes = write_response(inference, version.name, version.version, outputs)
            if json_bytes is None:
                return Reply(answer)
            more = ((b"inference-header-content-length", b"%d" % json_bytes),)
            return Reply(answer, 200, b"application/octet-stream", more)

        return Question(version, version_name is not None, inference.records, True, within, priority, reply)

    async def _change(self, request: Request, name: str, load: bool, receive: Receive) -> Reply:
        self._admit_change(request)
        body = await self._body(receive, request.headers)
        values = load_json(body) if body.strip() else {}
        parameters = values.get("parameters", {}) if isinstance(values, dict) else None
        if not isinstance(parameters, dict):
            raise BadRequest("give an object with 'parameters'", 400)
        version = parameters.get("version")
        if version is not None and not isinstance(version, str):
            raise BadRequest("parameters.version is no text", 400)
        if load:
            await self.load(name, version or "1", take_over=parameters.get("take_over", True) is not False)
        else:
            await self.unload(name, version)
        return _json({})

    async def load(self, name: str, version: str, *, take_over: bool) -> None:
        """Serve a bundle of the models' folder.

        Raises:
            BadRequest: there is none that can be served.
        """
        try:
            await self.models.load(self.models.found(name, version), take_over=take_over)
        except DougongError as error:
            raise BadRequest(str(error), 400) from None

    async def unload(self, name: str, version: str | None) -> None:
        """Serve it no longer.

        Raises:
            BadRequest: requests still go there.
            Unknown: it is not served.
        """
        try:
            await self.models.unload(name, version)
        except DougongError as error:
            raise BadRequest(str(error), 400) from None

    async def _traffic(self, request: Request, name: str, receive: Receive) -> Reply:
        if request.method == "GET":
            self.admit(request)
            return _json(self.models.traffic(name).model_dump())
        _only(request.method, "PUT", "GET")
        self._admit_change(request)
        values = load_json(await self._body(receive, request.headers))
        if not isinstance(values, dict):
            raise BadRequest('give an object like {"weights": {"1": 0.9, "2": 0.1}}', 400)
        try:
            self.models.direct(name, parse(Traffic, values, where="traffic"))
        except ConfigError as error:
            raise BadRequest(str(error), 400) from None
        return _json(self.models.traffic(name).model_dump())

    def _about(self, name: str) -> dict[str, Any]:
        versions = self.models.versions(name)
        some = next(iter(versions.values()))
        return {
            "name": name,
            "versions": {key: {"ready": each.engine.ready} for key, each in versions.items()},
            "traffic": self.models.traffic(name).model_dump(),
            "writes": some.signature is None,
            "columns": [{"name": each.name, "kind": each.kind} for each in some.columns.by_name.values()],
        }

    def admit(self, request: Request, *, admin: bool = False) -> None:
        """Let in whoever may ask this, now.

        Raises:
            Status: the key is missing or unknown, may not, or has asked too often.
        """
        headers = request.headers
        key = key_of(headers.get(b"authorization"), headers.get(b"x-api-key"))
        request.caller = self.admit_plain(key, request.address)
        if admin and (not request.caller.admin or self._from_another_page(headers)):
            raise Status(403, "this key may not change what is served")

    def _admit_change(self, request: Request) -> None:
        self.admit(request, admin=True)
        if self._changed_elsewhere is not None:
            raise Status(405, self._changed_elsewhere)

    def admit_plain(self, key: bytes | None, address: str) -> Caller:
        """Let in whoever may ask, now.

        Raises:
            Status: the key is missing or unknown, or has asked too often.
        """
        caller = self._access.caller(key, address)
        if caller is None:
            raise Status(401, "this needs a key: Authorization: Bearer KEY")
        wait = self._access.wait_seconds(caller, time.monotonic())
        if wait > 0:
            raise Status(429, "this key has asked too often", wait)
        return caller

    def _from_another_page(self, headers: Mapping[bytes, bytes]) -> bool:
        origin = headers.get(b"origin")
        return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        most = self.config.limits.body_bytes
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > most):
            raise Status(413, f"the body is over {most} bytes")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Status(415, "bodies are read as they are: leave Content-Encoding out")
        message = await receive()  # what comes too slowly is ended by its connection
        if message["type"] == "http.disconnect":
            raise Status(499, "the caller has gone")
        pieces: list[bytes] = [message.get("body", b"")]
        total = len(pieces[0])
        while message.get("more_body") and total <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Status(499, "the caller has gone")
            pieces.append(message.get("body", b""))
            total += len(pieces[-1])
        if total > most:
            raise Status(413, f"the body is over {most} bytes")
        return b"".join(pieces)

    def _preflight(self, request: Request) -> Reply:
        if not self._cors(request.headers):
            raise Status(405, "use POST")
        more = (
            (b"access-control-allow-methods", b"POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
        )
        return Reply(b"", 204, headers=more)

    def _cors(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin not in self.config.cors_origins:
            return []
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]


_PAGE_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        b"media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def _page(name: str) -> bytes:
    return importlib.resources.files("dougong.serve").joinpath(name).read_bytes()


def _only(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise Status(405, f"use {' or '.join(allowed)}")


def _json(value: Any) -> Reply:
    return Reply(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))


def _refusal(error: Status) -> Reply:
    body = json.dumps({"error": error.reason}, ensure_ascii=False).encode("utf-8", "replace")
    more: tuple[tuple[bytes, bytes], ...] = ()
    if error.status in (429, 503, 504):
        more = ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds or 1.0))),)
    if error.status == 401:
        more = ((b"www-authenticate", b"Bearer"),)
    return Reply(body, error.status, headers=more)


def _urgency(headers: Mapping[bytes, bytes]) -> tuple[float | None, int]:
    """What a caller allows, in seconds, and its priority."""
    text = headers.get(b"x-deadline-ms")
    within = None
    if text is not None:
        if not text.isdigit() or not 0 < len(text) < 10 or int(text) == 0:
            raise BadRequest("X-Deadline-Ms is no number of milliseconds above 0", 400)
        within = int(text) / 1e3
    priority = PRIORITIES.get(headers.get(b"x-priority", b"").lower())
    if priority is None:
        raise BadRequest("X-Priority is none of low, normal, high", 400)
    return within, priority


def plain_number(name: str, text: str) -> float | int:
    """An option of writing, as text.

    Raises:
        BadRequest: it is no number.
    """
    try:
        return _number(name, int(text) if name in WHOLE_OPTIONS else float(text), 400)
    except ValueError:
        raise BadRequest(f"{name} is no number", 400) from None


def drawing_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of drawing, as JSON has them; what they may be beyond numbers the model says.

    Raises:
        BadRequest: one is unknown, or no number.
    """
    for name in values:
        if name not in OPTIONS:
            raise BadRequest(f"{name!r:.80} is no option. Use some of {', '.join(OPTIONS)}", 422)
    found: dict[str, Any] = {}
    for name, value in values.items():
        found[name] = None if name == "top_k" and value is None else _number(name, value, 422)
    return found


def _number(name: str, value: Any, status: int) -> float | int:
    wanted = "whole number" if name in WHOLE_OPTIONS else "number"
    if type(value) is not int and (type(value) is not float or name in WHOLE_OPTIONS):
        raise BadRequest(f"{name} is no {wanted}", status)
    if not -(2**63) <= value < 2**63:  # also what is no number at all
        raise BadRequest(f"{name} is too large, or not finite", status)
    number: float | int = value
    return number


def _event(value: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


async def _gone(receive: Receive) -> None:
    """Until the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _events(pieces: AsyncIterator[str]) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield _event({"text": piece})
        yield _event({}, "done")
    except (Refused, DougongError) as error:
        yield _event({"error": str(error)}, "error")


def _without_text(error: Exception) -> Any:
    """The trace of an error whose text is left out."""
    return type(error), type(error)("(not logged)") if _takes_text(error) else None, error.__traceback__


def _takes_text(error: Exception) -> bool:
    try:
        type(error)("(not logged)")
    except Exception:
        return False
    return True
