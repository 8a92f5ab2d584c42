"""Other people's rules, over the same measurements, to be held against ours.

Here        BASELINES: loss alone, gradient norm alone, AutoTrainer's five rules, DeepDiagnosis's eight.
Elsewhere   ours (rules.py); the comparison (benchmarks/diagnose.py).
Promise     each sees what its paper measures and no more, with its paper's thresholds where it states them. What a
            paper measures of layers is taken of the modules that hold weights. Causes are named as in our catalogue,
            where a paper's symptom means one; a place is named where the paper names one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, Final

from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.rules import Finding


def loss_alone(history: History) -> Iterator[Finding]:
    """What one sees on a curve: it is not finite, it has grown, it stands still."""
    first, now = history.first_loss, history.loss_about(-1)
    if any(not math.isfinite(loss) for loss in history.losses):
        yield Finding("learning rate too high", "optimizer", 0.9, "the loss is not finite", history.step)
    elif first is not None and now is not None and len(history.losses) >= 10:
        if now > 1.5 * first:
            yield Finding("learning rate too high", "optimizer", 0.7, "the loss has grown", history.step)
        elif (history.progress or 0) > 0.5 and now > 0.95 * first:
            yield Finding("learning rate too low", "optimizer", 0.6, "the loss stands still", history.step)


def gradient_norm_alone(history: History) -> Iterator[Finding]:
    """Too long, gone, or not finite."""
    norms = [flow["facts"].get("gradient_norm", 0.0) for flow in history.flows]
    if not norms:
        return
    if not math.isfinite(norms[-1]) or norms[-1] > 100 * max(median(norms[:20]), 1e-12) or norms[-1] > 1e3:
        yield Finding("exploding", "(all)", 0.8, f"the gradient's norm is {norms[-1]:.3g}", history.step)
    elif norms[-1] < 1e-6:
        yield Finding("vanishing", "(all)", 0.8, f"the gradient's norm is {norms[-1]:.3g}", history.step)


ACCURACY: Final = 0.6
"""AutoTrainer's Theta: a run that is righter than this is left alone."""


def autotrainer(history: History) -> Iterator[Finding]:
    """Zhang et al. 2021 (ICSE, arXiv:2012.00305... AutoTrainer): vanishing and exploding gradients, dying ReLU,
    oscillating loss, slow convergence; thresholds of its published code (beta_1 1e-3, beta_2 1e-4, beta_3 70, gamma
    0.7, eta 0.2, zeta 0.03, delta 0.01, Theta 0.6)."""
    if not history.flows:
        return
    flow = history.flows[-1]
    rights = [f["output"]["right"] for f in history.flows if "right" in f["output"]]
    if rights and rights[-1] > ACCURACY:
        return
    places = [p for p in flow["places"] if p["dims"] > 1]
    means = [p["gradient"] / math.sqrt(max(1, p["count"])) for p in places]
    if any(not math.isfinite(p["gradient"]) or p["gradient"] > 70 for p in places):
        largest = max(places, key=lambda p: p["gradient"] if math.isfinite(p["gradient"]) else math.inf)
        yield Finding("exploding", str(largest["name"]), 0.8, "a gradient is above 70", flow["step"])
    elif len(means) > 1 and means[0] < 1e-4 and means[0] < 1e-3 * max(means[-1], 1e-30):
        yield Finding(
            "vanishing", str(places[0]["name"]), 0.8, "the first gradient is below 1e-3 of the last", flow["step"]
        )
    for name, told in flow["activations"].items():
        if told.get("dead", 0.0) >= 0.7:
            yield Finding("dead units", name.partition(":")[0], 0.8, f"{told['dead']:.0%} are dead", flow["step"])
    if len(rights) >= 4:
        turns = sum(
            (b - a) * (c - b) < 0 and min(abs(b - a), abs(c - b)) > 0.03
            for a, b, c in zip(rights, rights[1:], rights[2:], strict=False)
        )
        if turns / (len(rights) - 2) > 0.5 and turns > 1:
            yield Finding("learning rate too high", "optimizer", 0.6, "accuracy swings", flow["step"])
        if (history.progress or 0.0) > 0.3 and max(rights) - rights[0] < 0.01:
            yield Finding("learning rate too low", "optimizer", 0.6, "accuracy stands still", flow["step"])


def deep_diagnosis(history: History) -> Iterator[Finding]:
    """Wardat et al. 2022 (ICSE, arXiv:2112.04075, DeepDiagnosis): numerical errors, exploding tensors, weights that do
    not change, saturated activations, dead nodes, activations out of range, a loss that does not fall, gradients that
    vanish; its decision tree takes the first that applies."""
    if not history.flows:
        return
    flow = history.flows[-1]
    if flow["first_not_finite"] is not None or any(not math.isfinite(loss) for loss in history.losses[-3:]):
        found: Mapping[str, Any] = flow["first_not_finite"] or {"module": "loss"}
        yield Finding("overflow", found["module"], 0.9, "a numerical error", flow["step"])
        return
    for place in flow["places"]:
        if place["weight"] > 1e4:
            yield Finding("exploding", place["name"], 0.8, "an exploding tensor", flow["step"])
            return
    if len(history.flows) >= 2:
        for place, before in zip(flow["places"], history.flows[-2]["places"], strict=True):
            if place["dims"] > 1 and place["update"] == 0.0 and before["update"] == 0.0:
                yield Finding("frozen", place["name"], 0.7, "weights do not change", flow["step"])
                return
    for name, told in flow["activations"].items():
        if told.get("saturated", 0.0) > 0.95:
            yield Finding("saturated units", name.partition(":")[0], 0.8, "a saturated activation", flow["step"])
            return
        if told.get("dead", 0.0) > 0.7:
            yield Finding("dead units", name.partition(":")[0], 0.8, "dead nodes", flow["step"])
            return
    for term in flow["loss_terms"]:
        if term.get("rows_sum_to_one"):
            yield Finding("softmax twice", "loss", 0.8, "an activation is out of the loss's range", flow["step"])
            return
    gradients = [p for p in flow["places"] if p["dims"] > 1]
    if gradients and gradients[0]["gradient"] / math.sqrt(gradients[0]["count"]) < 1e-7:
        yield Finding("vanishing", str(gradients[0]["name"]), 0.8, "a gradient is below 1e-7", flow["step"])
        return
    first, now = history.first_loss, history.loss_about(-1)
    if first is not None and now is not None and len(history.losses) >= 32 and now >= first:
        yield Finding("learning rate too high", "optimizer", 0.6, "the loss does not fall", flow["step"])


BASELINES: Final[dict[str, Callable[[History], Iterator[Finding]]]] = {
    "loss alone": loss_alone,
    "gradient norm alone": gradient_norm_alone,
    "AutoTrainer's rules": autotrainer,
    "DeepDiagnosis's rules": deep_diagnosis,
}
