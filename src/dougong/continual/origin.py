"""By what a part or a version was made.

Here        `program`: Dougong's version, and the commit where it runs from a checkout.
Elsewhere   who writes it down (learn.py, registry/versions.py).
Promise     it never fails: what cannot be found out is left out.
"""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def program() -> str:
    """Such as "dougong 0.1.0 at 1a2b3c4"."""
    try:
        name = f"dougong {version('dougong')}"
    except PackageNotFoundError:
        name = "dougong"
    return f"{name}{_commit()}"


def _commit() -> str:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" at {done.stdout.strip()}" if done.returncode == 0 and done.stdout.strip() else ""
