"""One who means a server no good, in a process of their own.

Here        `python serve_attacker.py URL CONNECTIONS SECONDS`: opens connections that say nothing, heads and bodies
            that never end, sockets half closed; then says how many it holds, and sends ten bombs a second (pictures
            that claim to be huge or swell when unpacked, bodies that do, too many words); at the end, says what became
            of those, as JSON.
Elsewhere   what it costs everybody else (serve.py).
Promise     it asks nobody but the server at URL, which is one of ours on this machine's loopback, and ends by itself.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import sys
import zlib
from typing import Final

from serve_asking import as_json

from dougong.serve.event_loop import run_fast
from dougong.serve.loadtest import Asker, run_load

HEAD: Final = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
STARTS: Final = (
    b"",
    b"POST /v1/pre",
    HEAD + b"content-length: 900\r\n\r\n{",
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
)
BOMBS_A_SECOND: Final = 10.0


def bombs() -> list[tuple[bytes, str, str]]:
    """Body, type and further header lines of what is small and claims, or becomes, much."""

    def png(width: int, height: int, content: bytes) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")

    zeros = zlib.compress(b"\0" * 20_000_000, 9)
    pictures = [png(60_000, 60_000, zeros), png(100_000, 8_000, zeros)]
    found = [(as_json({"photo": each}), "application/json", "") for each in pictures]
    found.append(
        (gzip.compress(b'{"remark": "' + b"a" * 20_000_000 + b'"}'), "application/json", "content-encoding: gzip\r\n")
    )
    found.append((b'{"remark": "' + b"a" * 100_000 + b'"}', "application/json", ""))
    return found


async def attack(url: str, idle: int, seconds: float) -> None:
    host, port = url.removeprefix("http://").split(":")
    held = []
    for place in range(idle):
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            break  # this machine gives no more of them
        writer.write(STARTS[place % len(STARTS)])
        if place % 8 == 3 and writer.can_write_eof():
            writer.write_eof()
        held.append(writer)
    print(len(held), flush=True)
    bomber = Asker(url, most=8)
    frames = [bomber.frame("/v1/predict", body, kind, more) for body, kind, more in bombs()]
    try:
        found = await run_load(bomber, frames, BOMBS_A_SECOND, seconds, 1.0, 2)
        print(json.dumps(found.statuses), flush=True)
    finally:
        bomber.close()
        for writer in held:
            writer.close()


if __name__ == "__main__":
    run_fast(attack(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
