"""What the server writes down: one JSON object a line.

Here        start_logging, RequestLog.
Elsewhere   what happens (app.py, engine.py, models.py).
Promise     nothing of what records hold or answers say is written, nor a key; a line break in a name makes no new line.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
from typing import Any, Final, TextIO

FLUSH_SECONDS: Final = 0.2
PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName", "color_message"}


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        said.update({key: value for key, value in vars(record).items() if key not in PLAIN})
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def start_logging(out: TextIO | None = None) -> None:
    """Have the server's own messages, and uvicorn's, written as JSON lines to stderr."""
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(_AsJson())
    for name in ("dougong.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class RequestLog:
    """A line for each request, written a few times a second while there are any."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._lines: list[str] = []
        self._due: asyncio.TimerHandle | None = None

    def note(self, request_id: str, route: str, status: int, seconds: float, now: float, more: dict[str, Any]) -> None:
        """A request was answered. `more` is the caller's name, model and version."""
        said = {"time": _time(now), "request": request_id, "route": route, "status": status}
        self._lines.append(json.dumps({**said, "milliseconds": round(1e3 * seconds, 3), **more}))
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what is held."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        lines, self._lines = self._lines, []
        if lines:
            try:
                self._out.write("\n".join(lines) + "\n")
                self._out.flush()
            except (OSError, ValueError):
                return  # nobody reads it any more: that must not end the service


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
