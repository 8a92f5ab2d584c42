"""What several commands have in common.

Here        the options Json and Settings; `say` and `tell`, for a person who waits.
Elsewhere   the commands (beside this).
Promise     what is told while one waits goes to stderr: stdout is for the answer.
"""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Option

Json = Annotated[bool, Option("--json", help="Print for programs.")]
Settings = Annotated[
    list[str] | None, Option("--set", help="A setting laid over the recipe, like train.steps=200. May be repeated.")
]


def say(line: str) -> None:
    """One line."""
    print(line, file=sys.stderr, flush=True)


def tell(what: str, done: int, total: int) -> None:
    """How far it is."""
    say(f"{done} of {total}: {what}")
