"""Frames between the server and its workers: one JSON document, and the bytes that it speaks of.

Here        pack, unpack, Frames.
Elsewhere   what is said (workers.py asks, worker.py answers).
Promise     whatever arrives, nothing is executed: this is JSON and bytes. A frame is whole or it is not there yet.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, Final

from dougong.core.errors import DougongError

HEAD: Final = struct.Struct("!IQ")
LARGEST_FRAME_BYTES: Final = 4 * 2**30
BYTES_KEY: Final = "\x00bytes"
"""Stands where bytes stood. Callers cannot send it: a cell is a text, a number, or bytes (columns.py)."""


class FrameError(DougongError):
    """What came is no frame: whoever is at the other end is no worker of ours."""


def pack(document: Any) -> bytes:
    """A frame of anything that JSON knows, and bytes."""
    blobs: list[bytes] = []

    def lift(value: Any) -> Any:
        if isinstance(value, bytes | bytearray | memoryview):
            blobs.append(bytes(value))
            return {BYTES_KEY: len(blobs) - 1}
        raise TypeError(f"{type(value).__name__} cannot be sent")

    if isinstance(document, dict):
        text = json.dumps(document, default=lift, separators=(",", ":")).encode("utf-8", "surrogatepass")
    else:
        raise TypeError("a frame is a dict")
    sizes = json.dumps([len(blob) for blob in blobs], separators=(",", ":")).encode()
    body = b"".join((struct.pack("!II", len(text), len(sizes)), text, sizes, *blobs))
    return HEAD.pack(0xD0460069, len(body)) + body


def unpack(body: bytes | memoryview) -> dict[str, Any]:
    """What `pack` was given, from a frame without its head."""
    view = memoryview(body)
    text_bytes, sizes_bytes = struct.unpack_from("!II", view)
    start = 8 + text_bytes
    sizes: list[int] = json.loads(bytes(view[start : start + sizes_bytes]))
    if not sizes:
        found = json.loads(bytes(view[8:start]))
    else:
        blobs, at = [], start + sizes_bytes
        for size in sizes:
            blobs.append(bytes(view[at : at + size]))
            at += size

        def put_back(value: dict[str, Any]) -> Any:
            return blobs[value[BYTES_KEY]] if BYTES_KEY in value else value

        found = json.loads(bytes(view[8:start]), object_hook=put_back)
    assert isinstance(found, dict)
    return found


class Frames:
    """Cuts what arrives in pieces into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The frames that are whole now.

        Raises:
            FrameError: this is no frame.
        """
        self._held += data
        while len(self._held) >= HEAD.size:
            magic, size = HEAD.unpack_from(self._held)
            if magic != 0xD0460069 or size > LARGEST_FRAME_BYTES:
                raise FrameError("a worker sent what is no frame. Start the server again.")
            if len(self._held) < HEAD.size + size:
                return
            body = bytes(memoryview(self._held)[HEAD.size : HEAD.size + size])
            del self._held[: HEAD.size + size]
            yield unpack(body)
