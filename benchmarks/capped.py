"""A process that may have so much memory and no more.

Here        `capped`, `cap_folder`.
Elsewhere   what is run in it (offload.py).
Promise     the limit is the kernel's (a memory control group): what the process maps and what the system keeps of its
            files count, and a process that needs more is killed. Only processes started here are put under it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dougong.core.errors import DougongError

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cap_folder(cap_bytes: int) -> Iterator[Path]:
    """A control group with this limit, gone afterwards.

    Raises:
        DougongError: this user may not make one.
    """
    first = _ROOT / "memory"
    parent, limit = (first, "memory.limit_in_bytes") if first.is_dir() else (_ROOT, "memory.max")
    folder = parent / f"dougong-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(cap_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise DougongError(
            f"a memory limit needs a control group, and {folder} cannot be made ({error.strerror}). Run it as a user "
            "who may write there."
        ) from None
    try:
        yield folder
    finally:
        folder.rmdir()


def capped(command: Sequence[str], group: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command under the limit of this group, with these variables; None: without a limit."""
    enter = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    if group is not None:
        command = [sys.executable, "-c", enter, str(group / "cgroup.procs"), *command]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603, our own
