"""The shortest way from a request's bytes to a model and back: no ASGI, no task, no timer of its own.

Here        Direct, goes_directly.
Elsewhere   what is done with a request (app.py), of which this carries out the same steps; the connection that it came
            by (connections.py), which hands everything else to ASGI.
Promise     an answer is the same, whichever way it went: statuses, headers, limits, counts and the log's line. Whoever
            goes away while waiting leaves the queue at once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from dougong.serve.app import App, Question, Reply, Request
from dougong.serve.backend import Outcome
from dougong.serve.engine import Refused

if TYPE_CHECKING:
    import asyncio

    from dougong.serve.batcher import Ticket

LARGEST_BODY: Final = 2**16
"""Bytes: so much of a body is held before it is known whose it is. Longer ones are read by ASGI, which waits."""

_PREDICT: Final = b"/v1/predict"
_INFER: Final = re.compile(rb"/v2/models/([A-Za-z0-9._-]+)(?:/versions/([A-Za-z0-9._-]+))?/infer")


class Exchanges(Protocol):
    """What a request needs of its connection."""

    def on_response_complete(self) -> None:
        """It is answered: the next one may be."""


def goes_directly(app: App, method: bytes, url: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request with this head is one of those that are answered here: a short question to a model whose
    answer comes whole. All others go by ASGI."""
    length = headers.get(b"content-length", b"")
    if (
        method != b"POST"
        or not length.isdigit()
        or len(length) > 5
        or int(length) > min(LARGEST_BODY, app.config.limits.body_bytes)
        or b"transfer-encoding" in headers
        or b"expect" in headers
        or b"content-encoding" in headers
        or b"text/event-stream" in headers.get(b"accept", b"")
        or not app.direct
    ):
        return False
    if url == _PREDICT:
        return True
    path, _, query = url.partition(b"?")
    if b"explain" in query or b"%" in query:  # which may spell it
        return False
    return path == _PREDICT or _INFER.fullmatch(path) is not None


class Direct:
    """One request. To uvicorn's connection it stands where a cycle of request and response stands."""

    __slots__ = (
        "_app",
        "_connection",
        "_headers",
        "_id",
        "_left",
        "_outcomes",
        "_question",
        "_request",
        "_started",
        "_tickets",
        "_transport",
        "_url",
        "body",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        app: App,
        connection: Exchanges,
        transport: asyncio.Transport,
        url: bytes,
        headers: Mapping[bytes, bytes],
    ) -> None:
        self.body = b""
        self.disconnected = self.response_complete = self.response_started = False
        self.keep_alive = self.more_body = True
        self.message_event = _NOTHING
        self._app = app
        self._connection = connection
        self._transport = transport
        self._url = url
        self._headers = headers
        self._question: Question | None = None
        self._request: Request | None = None
        self._tickets: list[Ticket] = []
        self._outcomes: list[Any] = []
        self._left = 0
        self._id = ""
        self._started = 0.0

    def begin(self, address: str) -> None:
        """The body is whole."""
        app, headers = self._app, self._headers
        self._started = app.began()
        self._id = app.request_id(headers)
        try:
            if self._url == _PREDICT:
                request = self._request = Request("POST", "/v1/predict", b"", address, headers, self._id)
                request.route, model = "/v1/predict", None
            else:
                path, _, query = self._url.partition(b"?")
                request = self._request = Request("POST", path.decode(), query, address, headers, self._id)
                found = _INFER.fullmatch(path)
                request.route = "/v1/predict" if found is None else "/v2/models/infer"
                model = None if found is None else (found[1].decode(), None if found[2] is None else found[2].decode())
            app.admit(request)
            question = self._question = app.question(request, self.body, model)
            self.body = b""
            self._submit(question, request.caller.name)
        except Exception as error:
            self._refuse(error)

    def gone(self) -> None:
        """The caller has left: nobody waits any more."""
        self.disconnected = True
        if not self.response_complete:
            self.response_complete = True
            self._give_up()
            self._app.ended(self._request, self._id, 499, self._started)
            self._let_go()

    def _submit(self, question: Question, client: str) -> None:
        version, records = question.version, question.records
        self._left = len(records)
        self._outcomes = [None] * self._left
        for place, record in enumerate(records):
            self._tickets.append(
                version.engine.submit(
                    record,
                    version.columns.shape(record),
                    client=client,
                    priority=question.priority,
                    within_seconds=question.within_seconds,
                    then=functools.partial(self._answered, place),
                )
            )

    def _answered(self, place: int, outcome: Outcome | Refused) -> None:
        if self.response_complete:
            return
        if isinstance(outcome, Refused):  # one of them cannot be answered; then none is
            self._refuse(outcome)
            return
        self._outcomes[place] = outcome
        self._left -= 1
        if self._left:
            return
        question, app = self._question, self._app
        assert question is not None
        try:
            shadow = app.models.shadow(question.version)
            reply = question.reply(question.version, self._outcomes)
        except Exception as error:
            self._refuse(error)
            return
        if shadow is not None:
            app.ask_shadow(shadow, question.records, self._outcomes)
        self._send(reply)

    def _refuse(self, error: Exception) -> None:
        self._give_up()
        self._send(self._app.refusal(error, self._id))

    def _give_up(self) -> None:
        if self._question is not None:
            for ticket in self._tickets:
                self._question.version.engine.give_up(ticket)

    def _send(self, reply: Reply) -> None:
        app, status = self._app, reply.status
        self.response_started = self.response_complete = True
        app.ended(self._request, self._id, status, self._started)
        closes = app.draining or not self.keep_alive
        plain = not reply.headers and not closes and not app.config.cors_origins
        if plain:
            head = b"%sx-request-id: %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (
                STATUS_LINE[status],
                self._id.encode(),
                reply.content_type,
                len(reply.body),
            )
        else:
            lines = app.headers_of(reply, self._id, self._headers)
            if closes and not app.draining:
                lines.append((b"connection", b"close"))
            head = STATUS_LINE[status] + b"".join([b"%s: %s\r\n" % line for line in lines]) + b"\r\n"
        self._transport.write(head + reply.body)
        self._let_go()
        if closes:
            self._transport.close()
        self._connection.on_response_complete()

    def _let_go(self) -> None:
        """The connection knows this until its next request, which may be long: not what was asked, too."""
        self._question = None
        self._tickets, self._outcomes, self._headers = [], [], {}


class _Nothing:
    def set(self) -> None:
        """Nobody waits for more of this body: it is whole."""


_NOTHING: Final = _Nothing()
