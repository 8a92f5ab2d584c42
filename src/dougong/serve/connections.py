"""Connections: what is asked most goes the short way, and what says nothing, or says it too slowly, is ended.

Here        protocol: uvicorn's own, with a limit on what may be unfinished, and a way around ASGI.
Elsewhere   the short way (direct.py); everything else that is asked (app.py).
Promise     whoever opens connections and never finishes a request holds each for a limited time, and no more than a
            limited number; everybody else is served meanwhile. Answers on a connection come in the order of requests,
            whichever way these went. Nothing is set going for a request but what answers it: one clock serves a
            connection, and looks seldom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dougong.serve.direct import Direct, goes_directly
from dougong.serve.settings import Limits

if TYPE_CHECKING:
    from dougong.serve.app import App

LARGEST_HEAD: Final = 64 * 2**10
"""Bytes of a request before its body."""

KEPT_SECONDS: Final = 75.0
"""How long a connection may be silent between two requests."""

BUSY: Final = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def protocol(limits: Limits, app: App) -> type[asyncio.Protocol]:
    """The class of a connection."""

    class Connection(HttpToolsProtocol):
        refused = False
        _begun: float | None = None
        """When the request began that has not come wholly yet; None: there is none."""

        _quiet_since: float | None = None
        """When the last answer went out, where nothing has come since."""

        _head_bytes = 0
        _has_head = False
        _check: asyncio.TimerHandle | None = None
        _check_at = 0.0
        _direct: Direct | None = None
        """The request that goes the short way, until its body is whole."""

        _asked: Direct | None = None
        """The same from then on, until it is answered: requests behind it may have come already."""

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= limits.connections:
                self.refused = True
                transport.write(BUSY)
                transport.close()
                return
            super().connection_made(transport)
            self._begin()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._check is not None:
                self._check.cancel()
            if self.refused:
                return
            super().connection_lost(exc)
            if self._asked is not None:
                self._asked.gone()

        def data_received(self, data: bytes) -> None:
            if self.refused:
                return
            if self._begun is None:
                self._begin()
            begun = self._begun
            super().data_received(data)
            # Not of a request that began in these very bytes, behind the end of another.
            if self._begun is begun and not self._has_head:
                self._head_bytes += len(data)
                if self._head_bytes > LARGEST_HEAD:
                    self._end()

        def on_message_begin(self) -> None:
            if self._begun is None:  # its first bytes came with the last ones of the request before
                self._begin()
            # Of what uvicorn makes here, the short way needs the two alone.
            self.url = b""
            self.headers = []
            self.expect_100_continue = False

        def on_headers_complete(self) -> None:
            self._has_head = True
            parser = self.parser
            if not self.flow.write_paused and (self.cycle is None or self.cycle.response_complete):
                headers: Mapping[bytes, bytes] = dict(self.headers)
                if (
                    goes_directly(app, parser.get_method(), self.url, headers)
                    and parser.get_http_version() == "1.1"
                    and parser.should_keep_alive()
                    and not parser.should_upgrade()
                ):
                    self._direct = Direct(app, self, self.transport, self.url, headers)
                    self.cycle = self._direct  # type: ignore[assignment]  # it has what is asked of one
                    return
            url, headers_read, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers.extend(headers_read)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._direct is not None:
                self._direct.body += body  # no more than its head said, which is little
            else:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._begun = None
            direct, self._direct = self._direct, None
            if direct is None:
                super().on_message_complete()
            else:
                self._asked = direct
                direct.begin(self.client[0] if self.client else "local")

        def on_response_complete(self) -> None:
            # As uvicorn's, but for the timer that it sets after each answer.
            self.server_state.total_requests += 1
            self._asked = None
            if self.transport.is_closing():
                return
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._quiet_since = self.loop.time()

        def _begin(self) -> None:
            now = self.loop.time()
            self._begun, self._quiet_since = now, None
            self._head_bytes, self._has_head = 0, False
            if self._check is None or self._check_at > now + limits.body_seconds + 0.001:
                self._look_at(now + limits.body_seconds)

        def _look_at(self, when: float) -> None:
            if self._check is not None:
                self._check.cancel()
            self._check, self._check_at = self.loop.call_at(when, self._look), when

        def _look(self) -> None:
            self._check = None
            now = self.loop.time()
            if self._begun is not None:
                until = self._begun + limits.body_seconds
            elif self._quiet_since is not None:
                until = self._quiet_since + KEPT_SECONDS
            else:
                until = now + KEPT_SECONDS  # what it has asked is being answered
            if until - now > 0.001:
                self._look_at(until)
            else:
                self._end()

        def _end(self) -> None:
            if self.transport is None or self.transport.is_closing():
                return
            unfinished = self._begun is not None and self._has_head and self.cycle is not None
            if unfinished and not self.cycle.response_started:
                self.transport.write(SLOW)
            self.transport.close()

    return Connection
