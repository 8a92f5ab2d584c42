"""What the server writes down: one JSON object a line.

Here        start_logging, RequestLog.
Elsewhere   what happens (app.py, engine.py, models.py).
Promise     nothing of what records hold or answers say is written, nor a key; a line break in a name makes no new line.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
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

    def note(
        self, request_id: str, route: str, status: int, seconds: float, now: float, who: tuple[str, str, str]
    ) -> None:
        """A request was answered. `who` is the caller's name, model and version."""
        # By hand, and the parts that come again kept: it is done at every request.
        self._lines.append(
            f'{{"time": "{_second(int(now))}.{int(now % 1 * 1e3):03d}+00:00", "request": {_quoted(request_id)}, '
            f'"route": "{route}", "status": {status}, "milliseconds": {1e3 * seconds:.3f}, {_who(who)}}}'
        )
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


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")


@functools.lru_cache(maxsize=256)
def _who(who: tuple[str, str, str]) -> str:
    return json.dumps(dict(zip(("caller", "model", "version"), who, strict=True)))[1:-1]


def _quoted(text: str) -> str:
    plain = text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return f'"{text}"' if plain else json.dumps(text)


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
