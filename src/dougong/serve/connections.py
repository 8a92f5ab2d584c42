"""Connections that say nothing, or say it too slowly.

Here        protocol: uvicorn's own, with a limit on what may be unfinished.
Elsewhere   bodies that come too slowly (app.py).
Promise     whoever opens connections and never finishes a request's head holds each for a limited time, and no more
            than a limited number; everybody else is served meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dougong.serve.settings import Limits

LARGEST_HEAD: Final = 64 * 2**10
"""Bytes of a request before its body."""

BUSY: Final = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The class of a connection."""

    class Connection(HttpToolsProtocol):
        refused = False
        _begun: float | None = None
        """When the request began that has not come wholly yet; None: there is none."""

        _head_bytes = 0
        _has_head = False
        _check: asyncio.TimerHandle | None = None

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
            if not self.refused:
                super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.refused:
                return
            if self._begun is None:
                self._begin()
            super().data_received(data)
            if self._begun is not None and not self._has_head:
                self._head_bytes += len(data)
                if self._head_bytes > LARGEST_HEAD:
                    self._end()

        def on_headers_complete(self) -> None:
            self._has_head = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._begun = None
            super().on_message_complete()

        def _begin(self) -> None:
            self._begun, self._head_bytes, self._has_head = self.loop.time(), 0, False
            if self._check is None:  # one for a connection, however many requests it has: most end long before
                self._check = self.loop.call_later(limits.body_seconds, self._look)

        def _look(self) -> None:
            self._check = None
            if self._begun is None:
                return
            left = self._begun + limits.body_seconds - self.loop.time()
            if left > 0.001:
                self._check = self.loop.call_later(left, self._look)
            else:
                self._end()

        def _end(self) -> None:
            if self.transport is None or self.transport.is_closing():
                return
            if self._has_head and self.cycle is not None and not self.cycle.response_started:
                self.transport.write(SLOW)
            self.transport.close()

    return Connection
