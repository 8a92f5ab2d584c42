"""A wire with delay between two network namespaces, made of two TUN devices and a process that carries packets.

Here        Wire: a device in each namespace, and a thread that hands over what one sends to the other, later.
Elsewhere   namespaces, and who speaks over the wire (hierarchical.py).
Promise     a packet arrives no earlier than its delay after it was sent, and no faster than the rate lets it; order is
            kept; what waits is limited as a network card's queue is, and beyond it packets are lost.

This kernel has no netem, which is what would be used elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from typing import Final

MTU: Final = 9000
QUEUE_BYTES: Final = 8 * 2**20
"""Of one direction, at most."""

_TUNSETIFF: Final = 0x400454CA
_TUN_WITHOUT_HEADER: Final = 0x1001
_NETWORK: Final = 0x40000000


def _open_in(namespace: str, device: str) -> int:
    """A new TUN device of a namespace, seen from here."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    other = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(other, _NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
        try:
            opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(opened, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
        finally:
            libc.setns(own, _NETWORK)
    finally:
        os.close(own)
        os.close(other)
    return opened


class Wire:
    """Between two namespaces, while open."""

    def __init__(self, ends: dict[str, str], *, bits_per_second: float, delay_seconds: float) -> None:
        """`ends`: namespace to the name of its device.

        Raises:
            OSError: TUN devices are not permitted here.
        """
        self._bits_per_second, self._delay_seconds = bits_per_second, delay_seconds
        self._opened: list[int] = []
        try:
            for namespace, device in ends.items():
                self._opened.append(_open_in(namespace, device))
        except OSError:
            for opened in self._opened:
                os.close(opened)
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cut it."""
        self._ended.set()
        self._thread.join()
        for opened in self._opened:
            os.close(opened)

    def _carry(self) -> None:
        first, second = self._opened
        other = {first: second, second: first}
        waiting: dict[int, deque[tuple[float, bytes]]] = {first: deque(), second: deque()}
        held, free_at = dict.fromkeys(other, 0), dict.fromkeys(other, 0.0)
        while not self._ended.is_set():
            now = time.monotonic()
            due = [queue[0][0] for queue in waiting.values() if queue]
            until = max(0.0, min(due) - now) if due else 0.1
            ready, _, _ = select.select(self._opened, [], [], until)
            now = time.monotonic()
            for end in ready:
                for _ in range(64):  # then the other direction has its turn
                    try:
                        packet = os.read(end, MTU + 64)
                    except BlockingIOError:
                        break
                    if held[end] + len(packet) > QUEUE_BYTES:
                        continue
                    free_at[end] = max(now, free_at[end]) + 8 * len(packet) / self._bits_per_second
                    waiting[end].append((free_at[end] + self._delay_seconds, packet))
                    held[end] += len(packet)
            for end, queue in waiting.items():
                while queue and queue[0][0] <= now:
                    _, packet = queue.popleft()
                    held[end] -= len(packet)
                    # A card that is full (EAGAIN) or not up yet (EIO) loses it, as a real one does.
                    with contextlib.suppress(OSError):
                        os.write(other[end], packet)
