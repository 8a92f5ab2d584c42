"""Bundles made smaller and faster (claim 10).

Here        the parts, by name: student (a quarter of the parameters, benchmarks/students.py).
Elsewhere   options and the written result (harness.py).
Promise     a part alone measures what it measures among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import students
from harness import run

from dougong.core.figures import Figure

PARTS: Final[dict[str, Callable[[bool], Iterator[Figure]]]] = {"student": students.measure}


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    for name in parts:
        yield from PARTS[name](quick)


if __name__ == "__main__":
    run("compress", "Compression that executes: what stays of accuracy, size and time.", measure, parts=tuple(PARTS))
