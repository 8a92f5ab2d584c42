"""Bundles made smaller and faster (claim 10).

Here        the parts, by name: student (a quarter of the parameters, students.py), path (all steps together, at batch 1
            and 16, beside other quantisers, compress_path.py), joint (one search against one step after the other,
            compress_joint.py), memory (what compressing takes, compress_memory.py).
Elsewhere   bits by layer, predicted times (quantise.py); options and the written result (harness.py).
Promise     a part alone measures what it measures among the others. What was measured of these sources is kept, so
            that a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from harness import Kept, run

from dougong.core.figures import Figure


def _student(quick: bool, kept: Kept) -> Iterator[Figure]:
    import students

    return students.measure(quick, kept)


def _path(quick: bool, kept: Kept) -> Iterator[Figure]:
    import compress_path

    return compress_path.measure(quick, kept)


def _joint(quick: bool, kept: Kept) -> Iterator[Figure]:
    import compress_joint

    return compress_joint.measure(quick, kept)


def _memory(quick: bool, kept: Kept) -> Iterator[Figure]:
    import compress_memory

    return compress_memory.measure(quick, kept)


# A part is imported where it is measured: what another part does is no reason to measure this one again.
PARTS: Final[dict[str, Callable[[bool, Kept], Iterator[Figure]]]] = {
    "student": _student,
    "path": _path,
    "joint": _joint,
    "memory": _memory,
}


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    kept = Kept("compress")
    for name in parts:
        yield from PARTS[name](quick, kept)


if __name__ == "__main__":
    run("compress", "Compression that executes: what stays of accuracy, size and time.", measure, parts=tuple(PARTS))
