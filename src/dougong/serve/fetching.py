"""Media that a record names by address, from the hosts that were allowed.

Here        fetch.
Elsewhere   which are allowed (settings.py fetch_from, columns.py).
Promise     only http and https, only the hosts that were named, no redirect, no more bytes than a request may have, and
            never an address of this machine or its own network, whatever a name resolves to.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Collection, Iterator
from typing import Final
from urllib.parse import urlsplit

from dougong.serve.columns import BadRequest

SECONDS: Final = 5.0
"""For one address, from the connection to the last byte, however slowly it drips."""


async def fetch(url: str, allowed: Collection[str], most_bytes: int) -> bytes:
    """The bytes at an address.

    Raises:
        BadRequest: the host is not allowed, does not answer, or sends too much.
    """
    return await asyncio.get_running_loop().run_in_executor(None, _fetch, url, frozenset(allowed), most_bytes)


def _fetch(url: str, allowed: frozenset[str], most_bytes: int) -> bytes:
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise BadRequest("a URL has no usable port") from None
    if parts.scheme not in ("http", "https") or host not in allowed or "@" in parts.netloc:
        raise BadRequest("a URL is of no host that is allowed")
    try:
        address = public_address(host, port)
        # To the address that was looked at, not to the name again: it could resolve to another one by now.
        with contextlib.ExitStack() as opened:
            carried = opened.enter_context(socket.create_connection(address, SECONDS))
            if parts.scheme == "https":
                context = ssl.create_default_context()
                carried = opened.enter_context(
                    context.wrap_socket(carried, server_hostname=host, do_handshake_on_connect=False)
                )
            cut = opened.enter_context(_cut_after(SECONDS, carried))
            if isinstance(carried, ssl.SSLSocket):
                carried.do_handshake()
            connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
            connection.sock = carried
            path = parts.path or "/"
            connection.request("GET", f"{path}?{parts.query}" if parts.query else path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise BadRequest(f"a URL was answered with status {answer.status}")
            content = answer.read(most_bytes + 1)
            if cut.is_set():  # of an answer without a length, nothing else says that this is not all of it
                raise TimeoutError
    except (OSError, ValueError, http.client.HTTPException):  # a path that cannot stand in a request is a ValueError
        raise BadRequest("a URL could not be fetched") from None
    if len(content) > most_bytes:
        raise BadRequest("what is at a URL is too large", 413)
    return content


@contextlib.contextmanager
def _cut_after(seconds: float, connection: socket.socket) -> Iterator[threading.Event]:
    was_cut = threading.Event()

    def cut() -> None:
        was_cut.set()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield was_cut
    finally:
        timer.cancel()


def public_address(host: str, port: int) -> tuple[str, int]:
    """Where a name leads, if it leads out into the world.

    Raises:
        BadRequest: it leads to this machine or its own network.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(each[4][0])) for each in found]
    if not addresses or not all(each.is_global for each in addresses):
        raise BadRequest("a URL leads to no public address")
    return str(addresses[0]), port
