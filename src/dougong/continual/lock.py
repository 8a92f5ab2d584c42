"""One process at a time.

Here        `locked`.
Elsewhere   what is changed meanwhile (continual/tasks.py, continual/registry/).
Promise     the lock of a process that is killed is free at once; nothing is left to be cleaned up by hand.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dougong.core.errors import RunError

PATIENCE_SECONDS = 120.0


@contextlib.contextmanager
def locked(file: Path, *, what: str) -> Iterator[None]:
    """Hold `file`, made where it is not there. SQLite's own lock, which every system lets go with its process.

    Raises:
        RunError: another process holds it for two minutes, or no file can be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(file, timeout=PATIENCE_SECONDS, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
    except (sqlite3.Error, OSError) as error:
        raise RunError(
            f"{what} cannot be changed now ({error}): another process may be at it, or {file.parent} cannot be "
            "written. Try again when it is done."
        ) from None
    try:
        yield
    finally:
        connection.close()
