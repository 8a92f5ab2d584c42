"""What takes longer to work out of a run than who asks should wait.

Here        Behind: a value of each run as it was last worked out, renewed while nobody waits.
Elsewhere   reading runs (watch/runs.py); what is kept so, pages and the number of findings (watch/dashboard.py).
Promise     only the first asking of a run waits, and never does one run's value stand for another's. However often runs
            are asked for, what one worker is given to do is done one after the other: who answers meanwhile shares the
            interpreter with a single thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

from dougong.watch.runs import Reader

Value = TypeVar("Value")


class Behind(Generic[Value]):
    """Who asks for a run that has grown is given what was last known of it, while that is worked out anew behind: of a
    run that goes on there is always more by the time that an answer is seen."""

    def __init__(self, work_out: Callable[[Reader, str], Value], worker: Executor, most: int) -> None:
        """`most`: runs of which a value is kept, those that were renewed last."""
        self._work_out = work_out
        self._worker = worker
        self._most = most
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, Value]] = {}
        self._under_way: set[str] = set()

    def get(self, reader: Reader, run: str) -> Value:
        """The value; the first of a run is waited for."""
        with self._lock:
            known = self._known.get(run)
            if known is not None:
                if known[0] != reader.offset and run not in self._under_way:
                    self._under_way.add(run)
                    self._worker.submit(self._renew, reader, run)
                return known[1]
        return self._renew(reader, run)

    def _renew(self, reader: Reader, run: str) -> Value:
        offset = reader.offset
        try:
            value = self._work_out(reader, run)
            with self._lock:
                self._known.pop(run, None)
                self._known[run] = (offset, value)
                while len(self._known) > self._most:
                    del self._known[next(iter(self._known))]
            return value
        except Exception:
            with self._lock:  # who asks next works it out himself, and is told what is wrong
                self._known.pop(run, None)
            raise
        finally:
            with self._lock:
                self._under_way.discard(run)
