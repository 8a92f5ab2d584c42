"""Gives each layer its bits: no more than the budget has, where they matter most.

Here        QuantiseConfig, `quantise` (all of it), `choose` (the integer program), `round_layers`.
Elsewhere   what rounding does to answers (sensitivity.py); how long a layer takes at each choice (latency.py); kernels
            that really compute so (engines/); writing it down (export.py).
Promise     the plan found is the best that its scores know within the budget, not one step from it; a budget that no
            plan meets is refused with the nearest that one does, and with what binds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn

from dougong.compress.bits import Range, Rounded, to_eight, to_four
from dougong.compress.needs import needed
from dougong.compress.parts import Layer
from dougong.compress.plan import Choice, Plan, weight_bits, weight_bytes
from dougong.compress.sensitivity import (
    Candidate,
    Method,
    Scores,
    Seen,
    by_fisher,
    by_output,
    by_trace,
    candidate,
    observe,
    rows_of,
)
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Task
from dougong.core.sizes import bytes_as_text
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

SCORED_AT_ONCE: Final = 8
Costs = dict[str, dict[Choice, float]]
Announce = Callable[[str, int, int], None]


class QuantiseConfig(Config):
    """How bits are chosen, and how weights are rounded to them."""

    method: Method = "fisher"
    """fisher: one pass scores all layers. trace: likewise, by how much weights and inputs move and not where to, as
    HAWQ does. output: one pass for each layer and choice; slower, a little surer."""

    error_correction: bool = True
    """At 4 bits, let the weights that are still to be rounded make good what rounding did (GPTQ)."""

    seed: int = Field(default=0, ge=0)
    """Of the labels that the model draws for its scores."""


class Budget(NamedTuple):
    """What a plan may take; None: no matter."""

    weight_bytes: float | None = None
    """Of the layers that have a choice, scales included."""

    seconds: float | None = None
    """Of a batch."""


class Quantised(NamedTuple):
    """A plan, and all that an engine needs to carry it out."""

    plan: Plan
    weights: dict[str, Rounded]
    """Of the layers with 8 or 4 bits of weights."""

    ranges: dict[str, Range]
    """Of the inputs of those whose activations have 8."""


class Calibrated(NamedTuple):
    """What was learnt from calibration records."""

    seen: dict[str, Seen]
    scores: Scores


def calibrate(
    network: Sandwich,
    layers: Mapping[str, Layer],
    batches: Sequence[Batch],
    task: Task,
    config: QuantiseConfig,
    announce: Announce | None = None,
) -> Calibrated:
    """Look at what layers are given, and at what each choice of each would do to the answers."""
    say = announce or _silent
    say("inputs of layers", 0, 2)
    network.eval()
    seen = observe(network, linear_of(layers), batches)
    layers = shown_of(layers, seen)
    say("scores of choices", 1, 2)
    candidates = {name: _candidates(layer, seen.get(name)) for name, layer in layers.items()}
    # All layers' outputs at all choices are held at once: of few records at a time.
    few = SCORED_AT_ONCE
    starts = [(batch, start) for batch in batches for start in range(0, batch.num_records, few)]
    batches = [rows_of(batch, torch.arange(start, min(start + few, batch.num_records))) for batch, start in starts]
    if config.method == "fisher":
        scores = by_fisher(network, candidates, batches, task, config.seed)
    elif config.method == "trace":
        scores = by_trace(network, candidates, batches, task, config.seed)
    else:
        scores = by_output(network, candidates, batches, task)
    say("scores of choices", 2, 2)
    return Calibrated(seen, scores)


def linear_of(layers: Mapping[str, Layer]) -> list[str]:
    """Those whose inputs can be rounded, by name."""
    return [name for name, layer in layers.items() if isinstance(layer.module, nn.Linear)]


def shown_of(layers: Mapping[str, Layer], seen: Mapping[str, Seen]) -> dict[str, Layer]:
    """The layers as calibration records know them: what these do not reach (a modality that all of them lack, what
    completes one where none is missing) has fewer choices."""
    linear = frozenset(linear_of(layers))
    return {name: layer._replace(shown=name in seen or name not in linear) for name, layer in layers.items()}


def _candidates(layer: Layer, seen: Seen | None) -> dict[Choice, Candidate]:
    rounded = {8: to_eight(layer.module.weight), 4: to_four(layer.module.weight), 16: None}
    return {choice: candidate(choice, rounded[weight_bits(choice)], seen) for choice in layer.choices}


def round_layers(
    layers: Mapping[str, Layer], plan: Plan, seen: Mapping[str, Seen] | None = None, *, correct: bool = True
) -> Quantised:
    """Round the layers as the plan says. Without `seen`, weights alone are rounded, each to the nearest.

    Raises:
        ConfigError: the plan names no layer of this model, gives one what it cannot have, or needs what was not seen.
    """
    check_plan(layers, plan, seen)
    weights: dict[str, Rounded] = {}
    ranges: dict[str, Range] = {}
    for name, choice in plan.layers.items():
        found = None if seen is None else seen.get(name)
        if choice.endswith("a8"):
            assert found is not None
            ranges[name] = found.range
        weight = layers[name].module.weight.detach()
        if weight_bits(choice) == 8:
            weights[name] = to_eight(weight)
        elif weight_bits(choice) == 4:
            weights[name] = to_four(weight, found.hessian_DD if found is not None and correct else None)
    return Quantised(plan, weights, ranges)


def check_plan(layers: Mapping[str, Layer], plan: Plan, seen: Mapping[str, Seen] | None) -> None:
    """
    Raises:
        ConfigError: the plan names no layer of this model, gives one what it cannot have, or needs what was not seen.
    """
    for name, choice in plan.layers.items():
        if name not in layers:
            raise ConfigError(f"the plan names {name!r}, which is no layer of this model with a choice of bits.")
        if choice.endswith("a8") and isinstance(layers[name].module, nn.Embedding):
            some = ", ".join(layers[name].choices)
            raise ConfigError(f"the plan gives {name!r} {choice}: a look-up has {some} to choose from.")
        if choice.endswith("a8") and name not in (seen or {}):
            raise ConfigError(
                f"{choice} rounds what {name!r} is given, which no record has shown. Give records with --data that "
                f"reach it, or {name!r} another choice."
            )


def bytes_of(layers: Mapping[str, Layer]) -> Costs:
    """What each layer's weights take at each choice."""
    return {
        name: {choice: float(weight_bytes(*_sides(layer), choice)) for choice in layer.choices}
        for name, layer in layers.items()
    }


def _sides(layer: Layer) -> tuple[int, int]:
    rows, columns = layer.module.weight.shape
    return rows, columns


def choose(scores: Mapping[str, Mapping[Choice, float]], bytes_: Costs, seconds: Costs | None, budget: Budget) -> Plan:
    """The choices with the least sum of scores within the budget: an integer program, solved exactly (HiGHS).

    `seconds` of each choice as latency.py predicts them: their sum is a batch's, up to what no choice changes, which
    the caller has taken off the budget.

    Raises:
        ConfigError: nothing meets the budget; it says what comes nearest.
    """
    optimize = needed("scipy.optimize", "compress")
    pairs = [(name, choice) for name, of_layer in scores.items() for choice in of_layer]
    cost = np.array([scores[name][choice] for name, choice in pairs])
    # Of equals the larger and simpler one: rounding must have a reason.
    cost = cost + 1e-12 * np.arange(len(pairs)) + 1e-15 * cost.max(initial=0.0)
    rows, limits, what = [], [], []
    if budget.weight_bytes is not None:
        rows.append([bytes_[name][choice] for name, choice in pairs])
        limits.append(budget.weight_bytes)
        what.append("size")
    if budget.seconds is not None:
        assert seconds is not None, "a budget of time needs times"
        rows.append([seconds[name][choice] for name, choice in pairs])
        limits.append(budget.seconds)
        what.append("latency")
    one_each = np.array([[float(name == mine) for mine, _ in pairs] for name in scores])
    if rows:
        scale = np.abs(np.array(limits)).clip(min=1e-12)  # bytes and seconds are too far apart for one tolerance
        limited = [optimize.LinearConstraint(np.array(rows) / scale[:, None], -np.inf, np.array(limits) / scale)]
    else:
        limited = []
    found = optimize.milp(
        cost / max(cost.max(initial=0.0), 1e-12),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), *limited],
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if found.x is None:
        raise ConfigError(_out_of_reach(scores, bytes_, seconds, budget))
    return Plan(layers={name: choice for (name, choice), taken in zip(pairs, found.x, strict=True) if taken > 0.5})


def _out_of_reach(
    scores: Mapping[str, Mapping[Choice, float]], bytes_: Costs, seconds: Costs | None, budget: Budget
) -> str:
    least_bytes = sum(min(bytes_[name][choice] for choice in scores[name]) for name in scores)
    told = []
    if budget.weight_bytes is not None and least_bytes > budget.weight_bytes:
        told.append(
            f"the size binds: weights of {bytes_as_text(budget.weight_bytes)} were asked for, and all of them at their "
            f"fewest bits take {bytes_as_text(least_bytes)}"
        )
    if budget.seconds is not None and seconds is not None:
        least = sum(min(seconds[name][choice] for choice in scores[name]) for name in scores)
        if least > budget.seconds:
            told.append(
                f"the latency binds: layers may take {budget.seconds * 1e3:.3g} ms, and at their fastest choices take "
                f"{least * 1e3:.3g} ms"
            )
    if not told:
        told.append("size and latency bind together: each alone could be met. Ease one of them")
    return (
        f"no choice of bits meets this budget: {'; '.join(told)}. Ask for no less than that, or prune the model first."
    )


def _silent(what: str, done: int, total: int) -> None:
    """For who does not listen."""
