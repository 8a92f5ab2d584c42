"""Which written results are of the code as it is now.

Here        for each file of benchmarks/results/, the sources that its script reaches and that have come to do something
            else since the commit that it names.
Elsewhere   what a script reaches (harness.py); measuring anew (`dougong bench NAME`, or the command in the result).
Promise     comments, docstrings and layout do not count; everything else does, also where it changes no figure: what is
            called current was measured by this code, what is not may be all the same.

    python benchmarks/current.py            # a line for each result
    python benchmarks/current.py --files    # and what differs
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from harness import RESULTS, ROOT, reached

COMMAND: Final = re.compile(r"- command: `python (benchmarks/\w+\.py)")
COMMIT: Final = re.compile(r"- commit: (\w+)( with changes)?")


class Result(NamedTuple):
    """A written result, and what has become of its sources."""

    path: Path
    commit: str
    had_changes: bool
    differing: list[str]


def results() -> Iterator[Result]:
    """All of them, by name."""
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        command, commit = COMMAND.search(text), COMMIT.search(text)
        if command is None or commit is None:
            continue
        differing = [name for name in _sources(command[1]) if _differs(name, commit[1])]
        yield Result(path, commit[1], bool(commit[2]), differing)


@functools.cache
def _sources(script: str) -> list[str]:
    if not (ROOT / script).is_file():
        return [script]
    return [file.relative_to(ROOT).as_posix() for file in reached(ROOT / script)]


@functools.cache
def _differs(name: str, commit: str) -> bool:
    if name not in _touched(commit):
        return False
    then, now = _git("show", f"{commit}:{name}"), ROOT / name
    if then is None or not now.is_file():
        return True
    return _code(then) != _code(now.read_text(encoding="utf-8"))


@functools.cache
def _touched(commit: str) -> frozenset[str]:
    """Files that are not as they were, by whatever little; all where the commit is not known here."""
    listed = _git("diff", "--name-only", commit, "--", "src", "benchmarks")
    if listed is None:
        return frozenset(file.relative_to(ROOT).as_posix() for file in ROOT.glob("*/**/*.py"))
    return frozenset(listed.splitlines())


def _code(text: str) -> str:
    """What a source does, without what it says."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            # A string that stands alone is a docstring, of what it stands in or after.
            node.body = [each for each in body if not _is_said(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_said(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)  # noqa: S603, S607
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--files", action="store_true", help="name the sources that differ")
    options = parser.parse_args()
    for one in results():
        told = "current" if not one.differing else f"{len(one.differing)} sources differ"
        print(f"{one.path.stem}: {one.commit}{' with changes' if one.had_changes else ''}, {told}")
        for name in one.differing if options.files else ():
            print(f"    {name}")
    sys.exit(0)
