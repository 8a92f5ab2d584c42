"""From what was measured to what is wrong.

Here        Finding, `diagnose`: every rule over a history, the surest finding first; the rules, each of one cause.
Elsewhere   what each cause means (catalogue.py); measuring (engine/flow/); other people's rules (baselines.py);
            how often these are right (benchmarks/diagnose.py).
Promise     every finding names the figures that it rests on. Thresholds stand here, each beside its reason; they were
            set on the bench's training half and by what a healthy run can show, never on its test half. A history of
            which little was measured gives fewer findings, and no other ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any, Final, NamedTuple

from dougong.watch.diagnose.history import History

WINDOW: Final = 8
"""Steps that must agree where a single one may be chance."""

SURE: Final = 0.5
"""Confidence from which on a finding is told without being asked for more."""

TURNS: Final = 6
"""Measured steps after which a modality that none of them had is said to be in no record."""

NORMS: Final = ("LayerNorm", "BatchNorm1d", "BatchNorm2d", "RMSNorm", "GroupNorm")


class Finding(NamedTuple):
    """One thing that is wrong."""

    cause: str
    """As in the catalogue."""

    place: str
    """A module's path, an input's name, or `optimizer`, `loss`, `targets`."""

    confidence: float
    evidence: str
    step: int
    """After which it could be told."""


def diagnose(history: History) -> list[Finding]:
    """What is wrong, the surest first; of one cause the surest place alone.

    A finding that another explains (nothing is learnt, since all is frozen) comes after it.
    """
    found: dict[str, Finding] = {}
    for rule in RULES:
        for finding in rule(history):
            known = found.get(finding.cause)
            if known is None or finding.confidence > known.confidence:
                found[finding.cause] = finding
    sure = {cause for cause, finding in found.items() if finding.confidence >= SURE}
    followed = {cause for cause in sure if sure & set(EXPLAINED.get(cause, ()))}
    for cause in followed:
        # What only others explain that are explained themselves stays: else a circle would leave nothing.
        if (sure - followed) & set(EXPLAINED[cause]):
            found[cause] = found[cause]._replace(confidence=min(found[cause].confidence, 0.3))
    return sorted(found.values(), key=lambda finding: -finding.confidence)


# What is read of a history -------------------------------------------------------------------------------------------


def _last(history: History) -> Mapping[str, Any] | None:
    return history.flows[-1] if history.flows else None


def _first(history: History) -> Mapping[str, Any] | None:
    return history.flows[0] if history.flows and history.flows[0]["step"] <= 2 else None


def _weights(flow: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Places with matrices that are trained."""
    return [p for p in flow["places"] if p["dims"] > 1 and p["trained"] and p["held"]]


def _inputs(flow: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {name: told for name, told in flow["inputs"].items() if not name.startswith("judged ")}


def _ran(flow: Mapping[str, Any], name: str) -> bool:
    return name in flow["activations"]


# The optimizer -------------------------------------------------------------------------------------------------------


def _held(history: History) -> Iterator[Finding]:
    flow = _first(history) or _last(history)
    if flow is None:
        return
    places = flow["places"]
    total = sum(p["count"] for p in places) or 1
    frozen = [p for p in places if not p["trained"] and p["count"] > 0]
    missing = [p for p in places if p["trained"] and not p["held"]]
    adapters = [p for p in places if _is_adapter(p["name"])]
    if missing:
        largest = max(missing, key=lambda p: p["count"])
        of_adapter = all(_is_adapter(p["name"]) for p in missing)
        cause = "adapter not in the optimizer" if of_adapter else "not in the optimizer"
        place = _whole(missing, places)
        evidence = f"{len(missing)} of {len(places)} modules with weights, like {largest['name']}, are in no group"
        yield Finding(cause, place, 0.97, evidence, flow["step"])
    # A frozen base under trained adapters is meant.
    share = sum(p["count"] for p in frozen) / total
    if frozen and not adapters:
        evidence = f"{len(frozen)} of {len(places)} modules, {share:.0%} of the weights, have requires_grad=False"
        yield Finding("frozen", _whole(frozen, places), 0.9, evidence, flow["step"])


def _is_adapter(name: str) -> bool:
    return any(word in name.lower() for word in ("lora", "adapter"))


def _whole(some: list[Mapping[str, Any]], places: list[Mapping[str, Any]]) -> str:
    """The longest path that all of some have in common; the whole network where it is all of it."""
    if len(some) == len(places):
        return "(all)"
    parts = [str(p["name"]).split(".") for p in some]
    same: list[str] = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        same.append(each[0])
    return ".".join(same) if same else str(max(some, key=lambda p: p["count"])["name"])


def _gradient(history: History) -> Iterator[Finding]:
    flow = _last(history)
    if flow is None or not flow["facts"].get("gradient_norm", 0.0) > 0:
        return
    for one in history.flows[-3:]:
        fresh = one["facts"].get("gradient_is_fresh")
        if fresh is not None and fresh < -0.9:
            evidence = f"the optimizer is given this step's gradient with its sign turned (cosine {fresh:.2f})"
            yield Finding("goes uphill", "optimizer", 0.96, evidence, one["step"])
            break
        if fresh is not None and fresh < 0.98:  # clipping alone leaves the angle, rounding 0.9999
            evidence = f"the optimizer's gradient has a cosine of {fresh:.2f} with the one of this step's loss"
            yield Finding("gradients not cleared", "optimizer", 0.95, evidence, one["step"])
            break
    steps = [one["facts"]["downhill"] for one in history.flows[:3] if "downhill" in one["facts"]]
    # Adam's first step has the gradient's own signs. Momentum may later go up a little now and then.
    if steps and steps[0] < -0.02:
        evidence = f"the first step went along the gradient (cosine of descent {steps[0]:.2f})"
        yield Finding("goes uphill", "optimizer", 0.95, evidence, history.flows[0]["step"])


def _cut(history: History) -> Iterator[Finding]:
    """Modules that run, are trained and get no gradient at all, in every measured step."""
    if not history.flows or not history.flows[-1]["facts"].get("gradient_norm", 0.0) > 0:
        return
    flows = history.flows[:3]
    silent = []
    for place in range(len(flows[0]["places"])):
        told = [flow["places"][place] for flow in flows]
        ran = all(_ran(flow, told[0]["name"]) for flow in flows)
        if ran and all(p["trained"] and p["held"] and p["gradient"] == 0.0 and p["without_gradient"] for p in told):
            silent.append(told[0])
    if silent:
        name = _whole(silent, flows[0]["places"])
        evidence = f"{len(silent)} modules like {silent[-1]['name']} run in the forward and get no gradient"
        yield Finding("gradient cut", name, 0.93, evidence, flows[-1]["step"])


def _settings(history: History) -> Iterator[Finding]:
    flow = _last(history)
    if flow is None:
        return
    told, step = flow["optimizer"], history.flows[0]["step"]
    decay = told.get("weight_decay", 0.0)
    if decay >= 0.9:
        yield Finding("weight decay too high", "optimizer", 0.9, f"weight_decay is {decay:g}", step)
    if told.get("maximize"):
        yield Finding("goes uphill", "optimizer", 0.97, "maximize is True", step)
    for name, most in (("beta1", 0.985), ("momentum", 0.985)):
        if told.get(name, 0.0) > most:
            yield Finding("optimizer memory", "optimizer", 0.85, f"{name} is {told[name]:g}", step)
    if "beta2" in told and told["beta2"] < 0.5:
        yield Finding("optimizer memory", "optimizer", 0.7, f"beta2 is {told['beta2']:g}", step)
    if told.get("eps", 0.0) > 1e-3:
        yield Finding("optimizer memory", "optimizer", 0.85, f"eps is {told['eps']:g}", step)
    most = max(history.learning_rates or [told.get("lr", 0.0)])
    for one in history.flows:
        early = history.total_steps is None or one["step"] < 0.6 * history.total_steps
        now = one["optimizer"].get("lr", 0.0)
        if early and one["step"] >= 2 and 0 <= now < 0.02 * most and not _warming(history):
            evidence = f"the learning rate is {now:.2g} after {one['step']} steps, and was {most:.2g}"
            yield Finding("schedule", "optimizer", 0.85, evidence, one["step"])
            break


def _rate(history: History) -> Iterator[Finding]:
    """By how much of themselves weights are moved, and whether the loss stands it."""
    first, now = history.first_loss, history.loss_about(-1)
    # Momentum may overshoot for a few steps in a run that is healthy: all of a window must have grown.
    late = history.losses[-WINDOW:]
    grown = first is not None and len(history.losses) > WINDOW and min(late) > 1.6 * abs(first) + 0.1
    lost = any(not math.isfinite(loss) for loss in history.losses[-3:])
    # The first steps too: what a far too long one has killed is moved no more.
    for flow in (*history.flows[:3], *history.flows[3:][-2:]):
        moved = [p["update"] / p["weight"] for p in _weights(flow) if p["weight"] > 0 and p["gradient"] > 0]
        if not moved:
            continue
        ratio, step = median(moved), flow["step"]
        evidence = f"a step moves the middle matrix by {ratio:.2g} of itself"
        # Healthy runs of Adam lie between 1e-4 and 5e-2 (the usual rule of thumb: about 1e-3).
        if ratio > 0.35:
            yield Finding("learning rate too high", "optimizer", 0.8 if ratio > 0.6 or grown else 0.6, evidence, step)
        elif ratio > 0.06 and (grown or lost):
            yield Finding("learning rate too high", "optimizer", 0.75, f"{evidence}, and the loss has grown", step)
        # Near the end of a schedule steps are short, and should be.
        full = flow["optimizer"].get("lr", 0.0) >= 0.3 * max(history.learning_rates, default=0.0)
        # What has learnt has small gradients, and is moved little by plain gradient descent.
        waits = first is None or now is None or now > 0.7 * abs(first)
        if full and waits and ratio < 6e-5 and flow["step"] >= 2 and not _warming(history):
            yield Finding("learning rate too low", "optimizer", 0.75 if ratio > 0 else 0.5, evidence, step)
    short = max(_at_full_rate(history), default=1.0)
    stands = first is not None and now is not None and (history.progress or 0.0) > 0.6 and now > 0.85 * abs(first)
    if stands and short < 1e-3:
        evidence = f"no step moves the middle matrix by more than {short:.2g} of itself, and the loss stands"
        yield Finding("learning rate too low", "optimizer", 0.65, evidence, history.step)
    if grown and first is not None and now is not None:
        evidence = f"the loss was {first:.3g} and is {now:.3g}"
        yield Finding("learning rate too high", "optimizer", 0.55, evidence, history.step)


def _at_full_rate(history: History) -> Iterator[float]:
    """By how much of itself each step moves the middle matrix, where no schedule keeps it short."""
    most = max(history.learning_rates, default=0.0)
    for flow in history.flows[1:]:
        ratios = [p["update"] / p["weight"] for p in _weights(flow) if p["weight"] > 0 and p["gradient"] > 0]
        if ratios and flow["optimizer"].get("lr", 0.0) >= 0.3 * most:
            yield median(ratios)


def _warming(history: History) -> bool:
    rates = history.learning_rates or [one["optimizer"].get("lr", 0.0) for one in history.flows]
    return len(rates) >= 2 and rates[-1] > 1.02 * rates[0] and (history.progress or 0.0) < 0.3


# Initialisation, activations, norms ----------------------------------------------------------------------------------


def _beginning(history: History) -> Iterator[Finding]:
    flow = _first(history)
    if flow is None or flow["step"] != 1:
        return
    for p in flow["places"]:
        # A base that is frozen or an adapter that begins at 0 is meant to be as it is.
        if p["dims"] < 2 or p["count"] < 16 or p["kind"] in NORMS or _is_adapter(p["name"]):
            continue
        size = p["weight"] / math.sqrt(p["count"])
        gain = p["spread"] * math.sqrt(p["fan_in"])
        if p["spread"] <= 1e-6 * size and (p["weight"] > 0 or p["gradient"] == 0.0 or _large(p, flow)):
            evidence = f"all weights of {p['name']} begin at one value"
            yield Finding("initialisation constant", p["name"], 0.9, evidence, 1)
        elif p["kind"] not in ("Embedding", "several") and gain > 9:
            yield Finding("initialisation too large", p["name"], min(0.9, 0.75 + gain / 300), _gained(p, gain), 1)
        elif p["kind"] not in ("Embedding", "several") and 0 < gain < 0.035:
            yield Finding("initialisation too small", p["name"], 0.8, _gained(p, gain), 1)


def _large(p: Mapping[str, Any], flow: Mapping[str, Any]) -> bool:
    """Whether it is a fair part of the network: what is small may well be meant to begin at 0."""
    return bool(p["count"] > 0.02 * sum(each["count"] for each in flow["places"]))


def _gained(p: Mapping[str, Any], gain: float) -> str:
    return f"{p['name']} begins with weights of {gain:.2g} over the square root of its inputs"


def _units(history: History) -> Iterator[Finding]:
    for flow in history.flows[-2:]:
        for name, told in flow["activations"].items():
            place = name.partition(":")[0]
            if told.get("dead", 0.0) >= 0.9:
                evidence = f"{told['dead']:.0%} of the units after {name} are 0 for all records"
                yield Finding("dead units", place, 0.88, evidence, flow["step"])
            if told.get("saturated", 0.0) >= 0.85:
                evidence = f"{told['saturated']:.0%} of {name} stand at an end"
                yield Finding("saturated units", place, 0.85, evidence, flow["step"])


def _along(history: History) -> Iterator[Finding]:
    """What becomes of numbers and gradients from the first module to the last."""
    for flow in history.flows[:2]:
        kinds = {p["name"]: p["kind"] for p in flow["places"]}
        spreads = [(n, t) for n, t in flow["activations"].items() if ":" not in n and kinds.get(n) not in NORMS]
        for name, told in spreads:
            if told["largest"] > 2e3 and flow["facts"].get("gradient_norm", 0.0) >= 0:
                evidence = f"{name} makes numbers up to {told['largest']:.2g}"
                yield Finding("exploding", name, 0.7, evidence, flow["step"])
                break
        for name, told in flow["activations"].items():
            if kinds.get(name) in NORMS and flow["step"] <= 2 and not 0.1 < told["spread"] < 8:
                evidence = f"{name} makes a spread of {told['spread']:.2g}"
                yield Finding("norm", name, 0.8, evidence, flow["step"])
        trained = [p for p in _weights(flow) if _ran(flow, p["name"]) and p["kind"] != "Embedding"]
        sized = [(p["name"], p["gradient"] / math.sqrt(p["count"])) for p in trained]
        if len(sized) >= 4 and sized[-1][1] > 0:
            ratio = median(g for _, g in sized[:2]) / max(sized[-1][1], 1e-30)
            if ratio < 1e-5:
                evidence = f"a gradient of {sized[0][0]} is {ratio:.1g} of one of {sized[-1][0]}"
                yield Finding("vanishing", sized[0][0], 0.7, evidence, flow["step"])
            elif ratio > 1e4:
                evidence = f"a gradient of {sized[0][0]} is {ratio:.1g} times one of {sized[-1][0]}"
                yield Finding("exploding", sized[0][0], 0.65, evidence, flow["step"])


def _dropped(history: History) -> Iterator[Finding]:
    flow = _last(history)
    if flow is None:
        return
    for name, share in flow["dropout"].items():
        if share > 0.7:
            yield Finding("dropout too high", name, 0.85, f"{name or 'a dropout'} drops {share:.0%}", flow["step"])


# Attention -----------------------------------------------------------------------------------------------------------


def _attention(history: History) -> Iterator[Finding]:
    flow = _first(history) or _last(history)
    if flow is None:
        return
    step, calls = flow["step"], flow["attention"]
    for call in calls:
        if "softmax_dim" in call:
            if call["softmax_dim"] != -1 and call["num_keys"] > 1:
                evidence = f"{call['place']} takes a softmax over axis {call['softmax_dim']}"
                yield Finding("attention axis", call["place"], 0.95, evidence, step)
            continue
        if not 0.4 < call["scale_ratio"] < 2.5 and call["num_keys"] > 1:
            evidence = f"scores of {call['place']} are {call['scale_ratio']:.2g} times those over sqrt(width)"
            yield Finding("attention scale", call["place"], 0.93, evidence, step)
        if "CrossBlock" in call["holders"] and call["num_queries"] == call["num_keys"] and _differ(calls, call):
            evidence = f"{call['place']} asks {call['num_keys']} tokens, as many as it has itself"
            yield Finding("cross-attention", call["place"], 0.9, evidence, step)
    yield from _unmasked(flow)
    yield from _ahead(flow)


def _differ(calls: Iterable[Mapping[str, Any]], one: Mapping[str, Any]) -> bool:
    """Whether the modalities have different numbers of tokens, so that one's own can be told from the other's."""
    lengths = {c.get("num_queries") for c in calls if "CrossBlock" in c.get("holders", ())}
    return len(lengths) > 1 or any(
        c.get("num_queries") != one["num_queries"] for c in calls if "CrossBlock" in c.get("holders", ())
    )


def _unmasked(flow: Mapping[str, Any]) -> Iterator[Finding]:
    lengths: dict[int, str] = {}
    for name, told in _inputs(flow).items():
        if 0.02 < told.get("masked", 0.0) < 0.98 and "length" in told:
            lengths[int(told["length"])] = name
    for call in flow["attention"]:
        if "softmax_dim" in call or call["num_keys"] not in lengths or call["has_mask"]:
            continue
        evidence = f"{lengths[call['num_keys']]} is padded, and {call['place']} attends to it without a mask"
        yield Finding("padding leak", call["place"], 0.9, evidence, flow["step"])


def _ahead(flow: Mapping[str, Any]) -> Iterator[Finding]:
    own = [call for call in flow["attention"] if "ahead" in call]
    looking = [call for call in own if call["ahead"] > 1e-4]
    next_tokens = flow["targets"].get("next", 0.0) > 0.9 and flow["targets"].get("same", 0.0) < 0.9
    if (
        looking
        and (len(looking) < len(own) or next_tokens)
        and (next_tokens or len(own) - len(looking) >= len(looking))
    ):
        evidence = f"{looking[0]['place']} gives {looking[0]['ahead']:.0%} of its attention to what comes later"
        confidence = 0.95 if next_tokens else 0.4  # beside encoders that see all, a causal one is no sign of a fault
        yield Finding("causal mask", looking[0]["place"], confidence, evidence, flow["step"])


# Inputs --------------------------------------------------------------------------------------------------------------


def _data(history: History) -> Iterator[Finding]:
    for flow in history.flows[:2] + history.flows[-1:]:
        step = flow["step"]
        for name, told in _inputs(flow).items():
            if told.get("not_finite", 0.0) > 0:
                evidence = f"{told['not_finite']:.2%} of {name}'s numbers are not finite"
                yield Finding("not finite in records", name, 0.97, evidence, step)
            if told.get("present", 1.0) == 0.0:
                seen = all(_inputs(one).get(name, {}).get("present", 1.0) == 0.0 for one in history.flows)
                # Batches may take turns in what they have.
                if seen and len(history.flows) >= TURNS:
                    yield Finding("never present", name, 0.9, f"no record has {name}", step)
            if told.get("all_alike", 0.0) == 1.0 and told["rows"] >= 4:
                yield Finding("constant input", name, 0.92, f"all {told['rows']:.0f} rows of {name} are alike", step)
            if told.get("masked", 0.0) > 0.98 or (told.get("kinds_real") == 1.0 and told.get("kinds_hidden", 0.0) > 2):
                evidence = f"{told['masked']:.0%} of {name} is masked, and what is not has one value"
                yield Finding("mask hides", name, 0.9, evidence, step)
            largest, mean, spread = told.get("largest", 0.0), told.get("mean", 0.0), told.get("spread", 1.0)
            if "largest" in told and (largest > 60 or abs(mean) > 8 * max(spread, 0.2) or spread > 12):
                evidence = f"{name} has a mean of {mean:.3g}, a spread of {spread:.3g} and goes up to {largest:.3g}"
                yield Finding("normalisation", name, 0.86, evidence, step)
            elif "largest" in told and 0 < largest < 0.02 and told["rows"] >= 4:
                yield Finding("normalisation", name, 0.7, f"{name} goes up to {largest:.2g} only", step)
        yield from _mismatch(flow)


def _mismatch(flow: Mapping[str, Any]) -> Iterator[Finding]:
    for name, told in _inputs(flow).items():
        other = flow["inputs"].get(f"judged {name}")
        if other is None or "largest" not in told or "largest" not in other:
            continue
        spread = max(told["spread"], other["spread"], 1e-9)
        apart = abs(told["mean"] - other["mean"]) / spread
        ratio = max(told["spread"], 1e-9) / max(other["spread"], 1e-9)
        pitch = abs(told.get("pitch", 0.0) - other.get("pitch", 0.0))
        channels = [key for key in told if key.startswith("channel ") and key in other]
        moved = max((abs(told[key] - other[key]) / spread for key in channels), default=0.0)
        if apart > 0.6 or not 0.55 < ratio < 1.8 or pitch > 0.08 or moved > 0.5:
            evidence = (
                f"{name} in training and judging: mean {told['mean']:.2g} and {other['mean']:.2g}, spread "
                f"{told['spread']:.2g} and {other['spread']:.2g}, pitch {told.get('pitch', 0):.2f} and "
                f"{other.get('pitch', 0):.2f}, channels apart by {moved:.2f}"
            )
            yield Finding("input mismatch", name, 0.87, evidence, flow["step"])


def _repeated(history: History) -> Iterator[Finding]:
    for before, flow in zip(history.flows, history.flows[1:], strict=False):
        if flow["step"] != before["step"] + 1:
            continue  # with steps between, an epoch may have begun anew
        seen = [
            told["seen_before"] for told in _inputs(flow).values() if told.get("rows", 0) >= 4 and "seen_before" in told
        ]
        if seen and min(seen) > 0.6:
            yield Finding("duplicates", "data", 0.88, f"{min(seen):.0%} of a batch was in the one before", flow["step"])
    first = _first(history)
    if first is not None:
        known = [told for told in _inputs(first).values() if told.get("rows", 0) >= 8 and "distinct" in told]
        most = max((told["distinct"] for told in known), default=1.0)
        if most < 0.4:
            yield Finding("duplicates", "data", 0.8, f"{most:.0%} of a batch's rows are distinct", first["step"])


# Whether inputs belong to their targets ------------------------------------------------------------------------------


def _tells(told: Mapping[str, float], shift: int) -> bool:
    """Whether an input tells the targets so far on, beyond chance."""
    return told.get(f"at {shift}", 0.0) > max(0.1, 2.5 * told["chance"])


def _own(history: History, name: str) -> bool:
    told = (history.examined or {}).get("pairs", {}).get(name)
    return told is not None and _tells(told, 0)


def _better_trained(history: History, step: int, accuracy: float) -> bool:
    """Whether targets were told in training, when this was judged, and better. One that has not learnt yet is judged
    low as well; and one that is far less often right than by chance has learnt other targets, not none.

    The mean chance of a right answer is at least exp(-loss), whatever else the loss holds that is not below 0.
    """
    loss = history.loss_about(bisect.bisect_right(history.steps, step) - 1)
    classes = (_last(history) or {}).get("output", {}).get("classes", 0.0)
    if loss is None or loss < 0 or (accuracy * classes < 0.5 and classes > 1):
        return False
    # Smoothed labels leave a loss of about .5 to what has learnt all.
    return math.exp(-loss) > max(0.4, accuracy + 0.05)


def _examined(history: History) -> Iterator[Finding]:
    """What the first records say by themselves; see examine.py."""
    if history.examined is None:
        return
    step = history.examined["step"]
    for name, told in history.examined["pairs"].items():
        shifts = [int(key.removeprefix("at ")) for key in told if key.startswith("at ")]
        shift = max(shifts, key=lambda each: told[f"at {each}"])
        if shift and _tells(told, shift) and told["at 0"] < 0.4 * told[f"at {shift}"]:
            evidence = (
                f"{name} tells the target of the record {abs(shift)} {'before' if shift < 0 else 'after'} it "
                f"(correlation {told[f'at {shift}']:.2f}), and not its own ({told['at 0']:.2f})"
            )
            yield Finding("swapped pairs", name, 0.93, evidence, step)
        judged = [(at, metrics["accuracy"]) for at, metrics in history.judged if at > step and "accuracy" in metrics]
        if told["right"] > 0.9 and judged and judged[-1][1] < 0.75 and _better_trained(history, *judged[-1]):
            evidence = (
                f"{name} alone tells {told['right']:.0%} of the targets to a straight line, in training; where judged, "
                f"{judged[-1][1]:.0%} are right"
            )
            yield Finding("target leak", name, 0.92, evidence, step)
    still = history.examined["still_norms"]
    if still:
        evidence = f"{len(still)} batch norms like {still[0]} have seen batches, and their means are still 0"
        yield Finding("norm statistics", still[0], 0.9, evidence, step)


# Loss and targets ----------------------------------------------------------------------------------------------------


def _loss(history: History) -> Iterator[Finding]:
    flow = _first(history) or _last(history)
    if flow is None:
        return
    step = flow["step"]
    for term in flow["loss_terms"]:
        if term["function"] == "cross_entropy" and term.get("rows_sum_to_one"):
            yield Finding("softmax twice", "loss", 0.97, "cross entropy's input sums to 1 in every row", step)
        if term["label_smoothing"] > 0.5:
            yield Finding("loss terms", "loss", 0.9, f"label_smoothing is {term['label_smoothing']:g}", step)
        if term["ignored"] > 0.95:
            yield Finding("loss terms", "loss", 0.9, f"{term['ignored']:.0%} of the targets are ignored", step)
        if term.get("classes_without_weight", 0.0) > 0:
            evidence = f"{term['classes_without_weight']:.0%} of the classes have a weight of 0"
            yield Finding("loss terms", "loss", 0.9, evidence, step)
        if term["function"] == "mse_loss" and flow["output"].get("classes", 0) > 2:
            yield Finding("loss terms", "loss", 0.6, "a mean square is taken of classes", step)
    terms = [term["value"] for term in flow["loss_terms"] if term["function"] in ("cross_entropy", "nll_loss")]
    negative = [loss for loss in history.losses[:8] if loss < -1e-6]
    if negative and terms and min(terms) >= 0:
        yield Finding(
            "loss sign", "loss", 0.95, f"the loss is {negative[0]:.3g}, and cross entropy is never below 0", step
        )
    elif len(negative) >= 3 and history.losses[-1] < negative[0] and not terms:
        yield Finding("loss sign", "loss", 0.55, f"the loss is {history.losses[-1]:.3g} and falls", step)
    # Of targets that count: where nearly all are ignored, one class is no wonder.
    targets = [f["targets"] for f in history.flows if sum(f["targets"].get("counts") or [0]) >= 8]
    if targets and all(t["distinct"] == 1 for t in targets[:2]) and flow["output"].get("classes", 0) > 1:
        yield Finding("not shuffled", "data", 0.88, "all records of a batch have one class", step)
    if flow["targets"].get("same", 0.0) > 0.9 > flow["targets"].get("next", 0.0):
        yield Finding("target leak", "targets", 0.9, "the targets are the inputs themselves", step)


def _learnt(history: History) -> Iterator[Finding]:
    """What the answer and the loss hang on."""
    probed = [flow for flow in history.flows if flow["probes"]]
    if not probed:
        return
    flow = probed[-1]
    step, probes = flow["step"], flow["probes"]
    moves = {name: told.get("exchange_moves") for name, told in probes.items()}
    alive = [name for name, move in moves.items() if move is not None and move > 0.02]
    for name, move in moves.items():
        if move is not None and move < 1e-4 and (alive or len(moves) == 1):
            evidence = f"the answer moves by {move:.1g} of its spread where {name} is another record's"
            yield Finding("dead modality", name, 0.9 if alive else 0.5, evidence, step)
    for name, told in probes.items():
        order, exchange = told.get("reorder_moves"), moves.get(name)
        if order is not None and exchange is not None and order < 1e-4 < 0.02 < exchange:
            evidence = f"the answer moves by {order:.1g} of its spread where {name}'s tokens are reordered"
            # A bag of words without attention may be meant.
            yield Finding("positions", name, 0.88 if flow["attention"] else 0.6, evidence, step)
    classes = flow["output"].get("classes", 0.0)
    chance = math.log(classes) if classes > 1 else None
    costs = {name: told["exchange_costs"] for name, told in probes.items() if "exchange_costs" in told}
    enough = step >= 60 and (history.progress is None or history.progress > 0.25)
    now = history.loss_about(-1)
    if not enough or not costs or now is None:
        return
    worth = max(costs.values())
    for name, cost in costs.items():
        # Where the loss is low already, what is not needed is not wrong.
        stuck = chance is None or now > 0.2 * chance
        # One that tells of its own records' targets may be learnt late, and belongs to them.
        stuck = stuck and not _own(history, name)
        if abs(cost) < 0.02 * worth and worth > 0.15 and stuck and (moves.get(name) or 0.0) > 0.03:
            evidence = f"exchanged among records, {name} costs {cost:.3f} of loss, and others up to {worth:.2f}"
            yield Finding("swapped pairs", name, 0.72, evidence, step)
    if chance is not None and worth < 0.03 and now > 0.9 * chance and max((m or 0.0) for m in moves.values()) > 0.03:
        evidence = f"the loss is {now:.3g} (chance {chance:.3g}), and exchanging inputs costs {worth:.3f} at most"
        yield Finding("labels", "targets", 0.7, evidence, step)


def _judging(history: History) -> Iterator[Finding]:
    flow = _last(history)
    if flow is not None and flow["facts"].get("judged_training", 0.0) == 1.0:
        yield Finding("judged in training mode", "judging", 0.95, "model.training is True while judging", flow["step"])
    if flow is None or not history.judged:
        return
    step, metrics = history.judged[-1]
    # What was right in training at about that time, not later: it may have learnt a lot since.
    near = [f for f in history.flows if step / 2 <= f["step"] <= step + 1]
    right = [f["output"]["right"] for f in near if "right" in f["output"]]
    accuracy = metrics.get("accuracy")
    classes = flow["output"].get("classes", 0.0)
    if not right or accuracy is None or classes < 2:
        return
    chance = max(1 / classes, max(flow["targets"].get("counts") or [0]) / max(1, flow["targets"].get("number", 1)))
    if median(right) > max(0.5, 2 * chance) and accuracy < max(0.45 * median(right), chance):
        evidence = f"right in training {median(right):.2f}, where judged {accuracy:.2f}"
        yield Finding("judging differs", "targets", 0.75, evidence, step)


# Modalities ----------------------------------------------------------------------------------------------------------


def _gate(history: History) -> Iterator[Finding]:
    flow = _last(history)
    if flow is None or not flow["gate"]:
        return
    means = {name.removeprefix("mean "): mean for name, mean in flow["gate"].items() if name.startswith("mean ")}
    first = history.flows[0]["gate"] or flow["gate"]
    strongest = max(means, key=lambda name: means[name])
    if flow["gate"].get("saturated", 0.0) > 0.97 and len(means) > 1:
        sure = 0.9 if first.get("saturated", 0.0) > 0.9 else 0.4  # what was learnt may well be so
        evidence = f"{strongest} has a weight of {means[strongest]:.3f} in every record"
        yield Finding("gate", "gate", sure, evidence, flow["step"])


def _balance(history: History) -> Iterator[Finding]:
    """Whether the optimizer takes steps of one length with all inputs' parts.

    Steps are compared as an optimizer means them: Adam's by weight, plain gradient descent's by gradient. As a share
    of themselves, large weights are moved a hundred times less than small ones, and nothing is wrong.
    """
    for flow in history.flows[:3]:
        by: dict[str, list[float]] = {}
        adaptive = "beta1" in flow["optimizer"]
        for p in _weights(flow):
            # Parts of a network that names no modalities are told apart by their names.
            group = p["modality"] or str(p["name"]).partition(".")[0]
            # Of a table of words only those are moved that a batch holds.
            if group and p["gradient"] > 0 and not p["kind"].startswith("Embedding"):
                by.setdefault(group, []).append(p["update"] / (math.sqrt(p["count"]) if adaptive else p["gradient"]))
        if len(by) < 2 or flow["step"] < 2:
            continue
        moved = sorted((median(steps), name) for name, steps in by.items())
        (slow, name), (next_slow, other) = moved[:2]
        if next_slow > 0 and slow < 0.03 * next_slow:
            evidence = f"a step of {name} is {slow / next_slow:.1g} as long as one of {other}"
            yield Finding("imbalance", name, 0.86, evidence, flow["step"])


# Numbers -------------------------------------------------------------------------------------------------------------


def _numbers(history: History) -> Iterator[Finding]:
    for flow in history.flows:
        found = flow["first_not_finite"]
        if found is not None and not any(t.get("not_finite", 0.0) for t in _inputs(flow).values()):
            evidence = f"{found['module']} ({found['kind']}) makes numbers that are not finite, records {found['rows']}"
            yield Finding("overflow", found["module"], 0.85, evidence, flow["step"])
        broken = [p["name"] for p in flow["places"] if not math.isfinite(p["gradient"])]
        if broken and math.isfinite(flow["facts"]["loss"]):
            yield Finding("overflow", broken[-1], 0.85, f"the gradient of {broken[-1]} is not finite", flow["step"])
    last = _last(history)
    if last is not None and len(history.flows) >= 2:
        narrow = [p for p in _weights(last) if p["bits"] == 16 and p["gradient"] > 0 and p["weight"] > 0]
        still = [p for p in narrow if p["update"] < 1e-4 * p["weight"]]
        if narrow and len(still) > 0.5 * len(narrow):
            evidence = f"{len(still)} of {len(narrow)} matrices of 16 bits hardly move, with gradients"
            yield Finding("16-bit weights", str(still[0]["name"]), 0.8, evidence, last["step"])
    for one in history.skipped[:1]:
        yield Finding("overflow", one.get("modality") or "loss", 0.6, one["reason"], one["step"])


def _failed(history: History) -> Iterator[Finding]:
    if history.failure is None:
        return
    place, absent, message = history.failure
    if absent:
        evidence = f"a record without {absent[0]}: {message}"
        yield Finding("missing modality", absent[0], 0.93, evidence, history.step)
    else:
        yield Finding("crash", place or "forward", 0.9, message, history.step)


def _stands(history: History) -> Iterator[Finding]:
    first = history.loss_about(2)
    progress = history.progress
    enough = progress > 0.6 if progress is not None else len(history.losses) >= 200
    if not enough or first is None or len(history.losses) < 20:
        return
    # Some are slow to begin, and the first batches may have been easy: a window that is not below them is no chance.
    late = history.losses[-WINDOW:]
    now = math.fsum(late) / len(late) if all(map(math.isfinite, late)) else None
    if now is None or now > 0.97 * first > 0:
        told = "not finite" if now is None else f"{now:.3g}"
        evidence = f"the loss was {first:.3g} and is {told} after {history.step} steps"
        yield Finding("does not learn", "loss", 0.6, evidence, history.step)


RULES: Final[tuple[Callable[[History], Iterable[Finding]], ...]] = (
    _held, _gradient, _cut, _settings, _rate, _beginning, _units, _along, _dropped, _attention, _data, _repeated,
    _examined, _loss, _learnt, _judging, _gate, _balance, _numbers, _failed, _stands,
)  # fmt: skip

EXPLAINED: Final[dict[str, tuple[str, ...]]] = {
    "does not learn": tuple(
        cause
        for cause in (
            "learning rate too high", "learning rate too low", "schedule", "gradients not cleared", "goes uphill",
            "weight decay too high", "optimizer memory", "frozen", "not in the optimizer", "gradient cut",
            "adapter not in the optimizer", "initialisation constant", "initialisation too large",
            "initialisation too small", "dead units", "saturated units", "exploding", "vanishing", "norm",
            "dropout too high", "attention scale", "attention axis", "mask hides", "softmax twice", "loss sign",
            "loss terms", "labels", "not shuffled", "16-bit weights", "overflow", "dead modality", "constant input",
            "swapped pairs", "normalisation", "not finite in records", "never present", "positions", "padding leak",
            "target leak", "norm statistics", "imbalance",
        )
    ),
    "learning rate too low": ("schedule", "frozen", "16-bit weights", "optimizer memory", "dead units", "vanishing"),
    "learning rate too high": (
        "goes uphill", "loss sign", "initialisation too large", "normalisation", "gradients not cleared",
        "weight decay too high", "initialisation constant", "initialisation too small", "input mismatch",
        "optimizer memory",
    ),
    "gradient cut": ("never present", "missing modality", "mask hides", "cross-attention", "gate"),
    "dead modality": ("constant input", "never present", "mask hides", "gate", "not finite in records"),
    "swapped pairs": ("constant input", "gate", "imbalance", "frozen", "not in the optimizer", "gradient cut"),
    "exploding": ("initialisation too large", "normalisation", "learning rate too high"),
    "norm": ("initialisation constant", "initialisation too small", "initialisation too large"),
    "vanishing": (
        "dead units", "saturated units", "initialisation too small", "initialisation constant", "gradient cut",
    ),
    "overflow": ("not finite in records", "normalisation", "initialisation too large", "learning rate too high"),
    "initialisation too small": ("initialisation constant",),
    "dead units": ("initialisation constant", "constant input", "learning rate too high"),
    "imbalance": (
        "initialisation constant", "initialisation too small", "initialisation too large", "dead units", "norm",
        "optimizer memory", "learning rate too low", "learning rate too high",
        "frozen", "not in the optimizer", "gradient cut", "dead modality", "constant input", "never present",
    ),
    # Of the same few records, or of few targets that count, anything tells.
    "target leak": (
        "causal mask", "duplicates", "not shuffled", "loss terms", "input mismatch", "normalisation", "norm statistics",
        "judged in training mode",
    ),
    "judging differs": (
        "input mismatch", "judged in training mode", "target leak", "norm statistics", "duplicates", "not shuffled",
    ),
    "positions": ("mask hides", "constant input", "dead modality"),
    "constant input": ("mask hides",),
}  # fmt: skip
"""Causes that follow from others."""
