"""Figures that are shares of a number of tries.

Here        `wilson`, `share`.
Elsewhere   figures of times (paired.py); options and the written result (harness.py).
Promise     the interval is Wilson's at 95 %, which holds near 0 and 1 too, where a share of few tries lies.
"""

from __future__ import annotations

import math

from dougong.core.figures import Figure

DEVIATIONS = 1.96


def wilson(hits: int, number: int) -> tuple[float, float]:
    """(low, high); of no tries, all is possible."""
    if not number:
        return 0.0, 1.0
    z, part = DEVIATIONS, hits / number
    middle = (part + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(part * (1 - part) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(name: str, hits: int, number: int, asked: str | None = None) -> Figure:
    """So many of so many, with the interval."""
    low, high = wilson(hits, number)
    return Figure(name=name, value=hits / max(1, number), unit="", asked=asked, low=low, high=high, seeds=number)
