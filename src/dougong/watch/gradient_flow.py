"""How gradients flow through a network, drawn on it, and in ranked lists in place of walls of curves.

Here        `picture` (columns of boxes, one for each block), `ranked` (modules at both ends of each figure), `balance`
            of modalities over the run; `ranges` of exponents; `last_with`, which finds what is not measured each time.
Elsewhere   measuring (engine/flow/); what is wrong (watch/diagnose/); the pages (watch/summary.py,
            watch/dashboard.py).
Promise     every figure is one that was measured, of the step that is named; nothing is drawn of what was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

SHOWN: Final = 8
"""Modules at each end of a list."""

SHARED: Final = "shared"
"""As engine/flow/places.py says it, which would load torch."""


def picture(flow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The network as columns: one for each modality's own blocks, and one for what they share; from input to output.

    A box has its modules' update over weight (`ratio`), gradient for each weight, and `tone`, the decades by which the
    ratio is away from the network's median, from -2 to 2.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for place in flow["places"]:
        groups.setdefault((place["modality"] or SHARED, block_of(place["name"])), []).append(place)
    ratios = {key: _ratio(places) for key, places in groups.items()}
    known = [ratio for ratio in ratios.values() if ratio > 0]
    middle = median(known) if known else 1.0
    columns: dict[str, list[dict[str, Any]]] = {}
    for (modality, block), places in groups.items():
        ratio = ratios[modality, block]
        count = sum(place["count"] for place in places)
        gradient = math.sqrt(sum(place["gradient"] ** 2 for place in places) / max(1, count))
        columns.setdefault(modality, []).append(
            {
                "name": block,
                "ratio": ratio,
                "gradient": gradient,
                "count": count,
                "tone": max(-2.0, min(2.0, math.log10(ratio / middle))) if ratio > 0 else -2.0,
                "still": ratio == 0.0,
                "trained": any(place["trained"] for place in places),
            }
        )
    own = [name for name in columns if name != SHARED]
    return [{"name": name, "boxes": columns[name]} for name in (*own, *([SHARED] if SHARED in columns else []))]


def block_of(name: str) -> str:
    """The block that a module belongs to: its path up to the first number, or its first part."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return parts[0]


def _ratio(places: Sequence[Mapping[str, Any]]) -> float:
    weight = math.sqrt(sum(place["weight"] ** 2 for place in places))
    return math.sqrt(sum(place["update"] ** 2 for place in places)) / weight if weight > 0 else 0.0


def ranked(flow: Mapping[str, Any], most: int = SHOWN) -> dict[str, list[dict[str, Any]]]:
    """Modules at the ends of each figure: the largest and smallest update over weight, the largest gradient, the most
    dead units, the most and least even attention."""
    moved = [
        {"name": p["name"], "value": p["update"] / p["weight"]}
        for p in flow["places"]
        if p["weight"] > 0 and p["dims"] > 1 and p["trained"]
    ]
    steep = [{"name": p["name"], "value": p["gradient"]} for p in flow["places"]]
    dead = [{"name": n, "value": told["dead"]} for n, told in flow["activations"].items() if told.get("dead", 0.0) > 0]
    large = [{"name": n, "value": told["largest"]} for n, told in flow["activations"].items() if "largest" in told]
    even = [{"name": c["place"], "value": c["entropy"]} for c in flow["attention"] if "entropy" in c]

    def ends(found: list[dict[str, Any]], *, largest: bool) -> list[dict[str, Any]]:
        return sorted(found, key=lambda each: each["value"], reverse=largest)[:most]

    return {
        "moved most": ends(moved, largest=True),
        "moved least": ends(moved, largest=False),
        "largest gradients": ends(steep, largest=True),
        "largest activations": ends(large, largest=True),
        "dead units": ends(dead, largest=True),
        "most even attention": ends(even, largest=True),
        "sharpest attention": ends(even, largest=False),
    }


def balance(flows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Each modality's update over weight at each measured step."""
    found: dict[str, list[tuple[int, float]]] = {}
    for flow in flows:
        by: dict[str, list[Mapping[str, Any]]] = {}
        for place in flow["places"]:
            if place["modality"]:
                by.setdefault(place["modality"], []).append(place)
        for name, places in by.items():
            found.setdefault(name, []).append((flow["step"], _ratio(places)))
    return found


def last_with(flows: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    """The last measured step that has this: some of them are asked for more than others."""
    return next((flow for flow in reversed(flows) if flow.get(key)), None)


FP16: Final = (-24, 16)
"""Exponents from the smallest number that fp16 holds to the first that it does not."""


def ranges(flow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of activations, gradients and weights, by modality: shares of the numbers other than 0 by exponent (`shares`,
    from `lowest`), the middle exponent, and the shares that are 0 (`zeros`) and that fp16 has no number for
    (`lost`)."""
    told = []
    for what, sides in flow["exponents"].items():
        for side, one in sides.items():
            number = sum(one["counts"])
            if not number:
                continue
            middle, seen = one["lowest"], 0
            for place, count in enumerate(one["counts"]):
                seen += count
                if 2 * seen >= number:
                    middle = one["lowest"] + place
                    break
            held = sum(c for place, c in enumerate(one["counts"]) if FP16[0] <= one["lowest"] + place < FP16[1])
            told.append(
                {
                    "what": what,
                    "side": side,
                    "lowest": one["lowest"],
                    "shares": [count / number for count in one["counts"]],
                    "middle": middle,
                    "zeros": one["zeros"] / (number + one["zeros"] + one["not_finite"]),
                    "lost": 1 - held / number,
                }
            )
    return told
