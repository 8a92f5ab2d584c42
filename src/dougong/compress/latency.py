"""How long a batch will take under a plan, predicted from what was measured.

Here        LayerTimes, `fit_layer_times`.
Elsewhere   measuring (clock.py); times of single layers, as an engine tells them (engines/).
Promise     a prediction is a sum of measured times, so that a solver may use it layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dougong.compress.plan import Choice, Plan


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
