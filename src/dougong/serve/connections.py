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


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The class of a connection."""

    class Connection(HttpToolsProtocol):
        _unfinished: asyncio.TimerHandle | None = None
        _head_bytes = 0
        refused = False

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= limits.connections:
                self.refused = True
                transport.write(BUSY)
                transport.close()
                return
            super().connection_made(transport)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            if not self.refused:
                super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.refused:
                return
            if self._unfinished is None and self.cycle is not None and self.cycle.response_complete:
                self._wait_for_head()  # of another request on the same connection
            super().data_received(data)
            if self._unfinished is not None:
                self._head_bytes += len(data)
                if self._head_bytes > LARGEST_HEAD:
                    self._too_slow()

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def _wait_for_head(self) -> None:
            self._head_bytes = 0
            self._unfinished = self.loop.call_later(limits.body_seconds, self._too_slow)

        def _head_is_there(self) -> None:
            if self._unfinished is not None:
                self._unfinished.cancel()
                self._unfinished = None

        def _too_slow(self) -> None:
            self._head_is_there()
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return Connection
