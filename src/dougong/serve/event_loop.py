"""The fastest event loop that is installed.

Here        run_fast.
Elsewhere   what runs in it: serving (server.py), asking (loadtest.py).
Promise     the same with and without uvloop, but for the time that it takes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in uvloop where that can be had."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    if sys.platform == "win32":
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
