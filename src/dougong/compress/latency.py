"""How long a batch takes, measured; and how long it will take under a plan, predicted.

Here        Timing, `interleaved` (several runs measured in turn); LayerTimes, `predict_seconds`.
Elsewhere   times of single layers, as an engine tells them (engines/).
Promise     what is compared is measured in turn, in an order drawn anew each time, after warming up; a figure is a
            median. A prediction is a sum of measured times, so that a solver may use it layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from dougong.compress.plan import Choice, Plan

WARM: Final = 3
TURNS: Final = 21


class Timing(NamedTuple):
    """Seconds of one run."""

    median: float
    low: float
    high: float
    """The quartiles."""

    seconds: tuple[float, ...]
    """By turn."""

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(float(middle), float(low), float(high), tuple(seconds))


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, warm: int = WARM, turns: int = TURNS, seed: int = 0
) -> dict[str, Timing]:
    """Each run's time, by name: in every turn each runs once, in an order drawn anew."""
    names = list(runs)
    for name in names:
        for _ in range(warm):
            runs[name]()
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for place in random.permutation(len(names)):
            started = time.perf_counter()
            runs[names[place]]()
            found[names[place]].append(time.perf_counter() - started)
    return {name: Timing.of(seconds) for name, seconds in found.items()}


class LayerTimes(NamedTuple):
    """What was measured of a model at one size of batch."""

    seconds: dict[str, dict[Choice, float]]
    """Of each layer at each choice, rounding its inputs included."""

    rest: float
    """All that no choice changes."""

    def total(self, plan: Plan) -> float:
        """A batch's seconds under a plan."""
        return self.rest + sum(self.seconds[name][choice] for name, choice in plan.layers.items())


def fit_layer_times(
    profiles: Mapping[Choice, Mapping[str, float]], measured: Mapping[Choice, float], plans: Mapping[Choice, Plan]
) -> LayerTimes:
    """Times of layers, from one profile for each uniform plan.

    A profile says how long each layer took where the engine counted, and counting takes time itself: each plan's
    layers are scaled so that the differences between plans are those of the measured runs, and what is left is `rest`.
    """
    names = list(next(iter(plans.values())).layers)
    base: Choice = "w16a16"
    seconds: dict[str, dict[Choice, float]] = {name: {} for name in names}
    sums = {choice: sum(profile.get(name, 0.0) for name in names) for choice, profile in profiles.items()}
    rest = max(0.0, measured[base] - sums[base])
    for choice, profile in profiles.items():
        scale = max(0.0, measured[choice] - rest) / max(sums[choice], 1e-12)
        for name in names:
            seconds[name].setdefault(plans[choice].layers[name], profile.get(name, 0.0) * scale)
    return LayerTimes(seconds, rest)
