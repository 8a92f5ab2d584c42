"""How long calls take on this machine, held against each other.

Here        `interleaved`, Timed.
Elsewhere   predicting what has not been measured (latency.py).
Promise     calls take turns in an order drawn anew, so that whatever else the machine does meets all of them; what is
            compared is the ratio within a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Timed(NamedTuple):
    """Seconds of one call, by turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, (0.25, 0.75)).tolist()
        return low, high

    def times_as_fast_as(self, other: Timed) -> float:
        """The median of the turns' ratios."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, turns: int = 21, warm: int = 1, seed: int = 0
) -> dict[str, Timed]:
    """Time each call `turns` times, after so many that are not counted."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    random = np.random.default_rng(seed)
    for call in calls.values():
        for _ in range(warm):
            call()
    for _ in range(turns):
        for place in random.permutation(len(names)):
            started = time.perf_counter()
            calls[names[place]]()
            found[names[place]].append(time.perf_counter() - started)
    return {name: Timed(tuple(seconds)) for name, seconds in found.items()}
