"""Ctrl-C as a wish, not as a blow.

Here        `interruptible`.
Elsewhere   what is done about it (engine/trainer.py).
Promise     the first SIGINT is noted and harms nothing; a second one stops at once, as ever.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    wanted: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note SIGINT inside; outside the main thread, where Python has no signals, nothing is noted."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def note(number: int, frame: FrameType | None) -> None:
        interruption.wanted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
