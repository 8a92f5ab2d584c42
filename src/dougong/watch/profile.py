"""A step's memory and time as one page.

Here        `write_page`, `check_folder`; `composition`, `during` and `cost_in_words`, which a terminal shows too.
Elsewhere   what was counted and measured (recipes/profile.py); drawing (watch/charts.py); how the page looks
            (watch/profile.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text. What is
            drawn at one moment adds up to what was there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dougong.core.errors import ConfigError
from dougong.core.files import write_atomic
from dougong.core.sizes import bytes_as_text
from dougong.watch import charts
from dougong.watch.pages import page_template

PAGE: Final = "profile.html"

MOST_ROWS: Final = 28
"""Parts that have a bar of their own."""

SEEN: Final = 0.002
"""Share of the peak from which on a part can be seen in the picture."""

UNITS: Final = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

SAYS: Final = {
    "parameters": ("parameters", "what is learnt"),
    "optimizer": ("optimizer state", "what the optimizer remembers of earlier gradients"),
    "gradients": ("gradients", "of parameters; they come in the backward and go before the next step"),
    "activations": ("activations", "what a part has made in the forward and its backward will need"),
    "passed back": ("passed back", "gradients on their way from one part to the part before it"),
    "temporary": ("temporary", "made and gone within one part, made anew there, or of use to the optimizer alone"),
}
"""What the page calls each kind, and what it is."""

# Those that are there whatever the model does share one colour, and so do those that come and go.
_FIXED: Final = {"parameters": (5, 1.0), "optimizer": (5, 0.7), "gradients": (5, 0.4)}
_PASSING: Final = {"passed back": (4, 0.85), "temporary": (4, 0.45)}
_FREE: Final = (0, 2, 3, 1, 6, 7)


class _Colour(NamedTuple):
    place: int
    strength: float


def check_folder(folder: Path) -> None:
    """
    Raises:
        ConfigError: it cannot be a folder.
    """
    taken = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), None)
    if taken is not None:
        raise ConfigError(f"--out {folder}: {taken} is a file, and the page needs a folder. Name another.")


def write_page(folder: Path, told: Mapping[str, Any]) -> Path:
    """Write PAGE there, from what `ProfileResult.as_json` tells."""
    page = page_template("profile.html", size=bytes_as_text, duration=seconds_as_text).render(
        told=told,
        during=during(told),
        composition=composition(told),
        course=_course(told),
        legend=_legend(told),
        bars=_bars(told),
        offered=[_change(change, told) for change in told["offered"]],
        measured=[_change(change, told) for change in told["measured"]],
    )
    write_atomic(folder / PAGE, page.encode("utf-8", "replace"))
    return folder / PAGE


def during(told: Mapping[str, Any]) -> str:
    """Where the step was when it held most."""
    phase, part = told["peak_during"]["phase"], told["peak_during"]["part"]
    if part is None:
        return "at the step's beginning" if phase == "begin" else "in the optimizer's step"
    return f"in the {phase} of {'' if part.startswith('block') else 'the '}{part}"


def cost_in_words(change: Mapping[str, Any], step_seconds: float) -> str:
    """What a change adds to a step; whether that can be told from chance at all."""
    seconds = change["added_seconds"]
    told = f"{'-' if seconds < 0 else '+'}{seconds_as_text(abs(seconds))} a step ({seconds / step_seconds:+.0%})"
    if change["low_seconds"] < 0 < change["high_seconds"]:
        return f"no time that stands out of the noise: {told}"
    return told


class Share(NamedTuple):
    """Of the most that is held."""

    name: str
    about: str
    bytes: int
    share: float


def composition(told: Mapping[str, Any]) -> list[Share]:
    """What the most is made of, the largest first; activations by whose they are."""
    found = {SAYS[kind]: size for kind, size in told["at_peak"].items() if kind != "activations"}
    name, about = SAYS["activations"]
    for group, part in zip(_groups(told), told["parts"], strict=True):
        key = (f"{name}: {group}", about)
        found[key] = found.get(key, 0) + part["bytes_at_peak"]
    rows = [Share(*key, size, size / told["peak_bytes"]) for key, size in found.items() if size]
    return sorted(rows, key=lambda row: -row.bytes)


def seconds_as_text(seconds: float) -> str:
    """In seconds or thousandths."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# What is shown ---------------------------------------------------------------------------------------------------


def _groups(told: Mapping[str, Any]) -> list[str]:
    """To which of the legend's names the activations of each part belong."""
    has_own = any(part["modality"] for part in told["parts"])
    found = []
    for part in told["parts"]:
        if part["modality"]:
            found.append(part["modality"])
        elif part["name"].startswith("block"):
            found.append("shared blocks" if has_own else "blocks")
        else:
            found.append(f"{part['name']} and loss" if part["name"] == "head" else part["name"])
    return found


def _colours(told: Mapping[str, Any]) -> dict[str, _Colour]:
    """Of each group that holds anything."""
    groups = _groups(told)
    holding = [group for group, part in zip(groups, told["parts"], strict=True) if part["most_bytes"]]
    return {
        group: _Colour(_FREE[place % len(_FREE)], 0.9 if place < len(_FREE) else 0.5)
        for place, group in enumerate(dict.fromkeys(holding))
    }


def _course(told: Mapping[str, Any]) -> Any:
    course = told["course"]
    unit, power = next((each for each in UNITS if told["peak_bytes"] >= each[1]), UNITS[-1])
    groups, colours = _groups(told), _colours(told)
    layers = []
    for series in course["series"]:
        if any(series["bytes"]):
            kind = series["kind"]
            fixed = {**_FIXED, **_PASSING}.get(kind)
            place, strength = fixed or colours[groups[series["part"]]]
            layers.append(charts.Layer([size / power for size in series["bytes"]], place, strength))
    milliseconds = [1e3 * second for second in course["seconds"]]
    visits = [*course["visits"], {"seconds": course["seconds"][-1], "phase": "end"}]
    stretches, start = [], 0.0
    for visit, following in itertools.pairwise(visits):
        if following["phase"] != visit["phase"]:
            stretches.append((start, 1e3 * following["seconds"], visit["phase"] if visit["phase"] != "begin" else ""))
            start = 1e3 * following["seconds"]
    peak = told["peak_bytes"]
    return charts.area_chart(
        "course",
        f"Memory over a training step of {milliseconds[-1]:.3g} milliseconds, at most {bytes_as_text(peak)}",
        milliseconds,
        layers,
        across="milliseconds",
        up=unit,
        stretches=stretches,
        mark=(1e3 * told["peak_seconds"], peak / power, f"most: {bytes_as_text(peak)}"),
    )


def _legend(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the top of the picture to its ground."""
    seen = {
        group
        for group, part in zip(_groups(told), told["parts"], strict=True)
        if part["most_bytes"] >= SEEN * told["peak_bytes"]
    }
    activations = [
        {"name": f"activations: {group}", "place": colour.place, "strength": colour.strength}
        for group, colour in _colours(told).items()
        if group in seen
    ]
    fixed = [
        {"name": SAYS[kind][0], "place": place, "strength": strength} for kind, (place, strength) in _FIXED.items()
    ]
    passing = [
        {"name": SAYS[kind][0], "place": place, "strength": strength} for kind, (place, strength) in _PASSING.items()
    ]
    return [*fixed, *activations, *passing][::-1]


def _bars(told: Mapping[str, Any]) -> list[tuple[str, list[str], Any]]:
    """Titles, legends and charts: time by part, and activations by part."""
    shown, others = _shown(told["parts"], told["peak_bytes"], told["step_seconds"])
    colours, groups = _colours(told), dict(zip(map(_label, told["parts"]), _groups(told), strict=True))
    times = [(_label(part), part["forward_seconds"], part["backward_seconds"]) for part in shown]
    if others:
        times.append(
            (
                f"all others ({len(others)})",
                sum(p["forward_seconds"] for p in others),
                sum(p["backward_seconds"] for p in others),
            )
        )
    rows = [
        (name, f"{seconds_as_text(forward)} + {seconds_as_text(backward)}", [(forward, 0), (backward, 1)])
        for name, forward, backward in times
    ]
    rows.append(("optimizer", seconds_as_text(told["optimizer_seconds"]), [(told["optimizer_seconds"], 2)]))
    sizes: list[tuple[str, str, list[tuple[float, int]]]] = []
    for part in shown:
        colour = colours.get(groups[_label(part)], _Colour(0, 1.0)).place
        sizes.append((_label(part), bytes_as_text(part["bytes_at_peak"]), [(part["bytes_at_peak"], colour)]))
    if others:
        rest = sum(part["bytes_at_peak"] for part in others)
        sizes.append((f"all others ({len(others)})", bytes_as_text(rest), [(rest, 5)]))
    said = ", ".join(f"{name} {text}" for name, text, _ in rows)
    held = ", ".join(f"{name} {text}" for name, text, _ in sizes)
    return [
        ("Time by part", ["forward", "backward", "optimizer"], charts.part_chart("time", f"Time: {said}", rows)),
        ("Activations by part, when most is held", [], charts.part_chart("held", f"Activations: {held}", sizes)),
    ]


def _shown(
    parts: Sequence[Mapping[str, Any]], peak_bytes: int, step_seconds: float
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Those with a row of their own, in their order, and the others; what the batch never met is in neither."""
    met = [part for part in parts if part["most_bytes"] or part["forward_seconds"]]

    def weight(part: Mapping[str, Any]) -> float:
        seconds: float = part["forward_seconds"] + part["backward_seconds"]
        size: float = part["bytes_at_peak"]
        return seconds / step_seconds + size / peak_bytes

    large = sorted(range(len(met)), key=lambda place: -weight(met[place]))[:MOST_ROWS]
    if len(met) <= MOST_ROWS + 1:
        large = list(range(len(met)))
    return [met[place] for place in sorted(large)], [met[place] for place in range(len(met)) if place not in large]


def _label(part: Mapping[str, Any]) -> str:
    if part["modality"]:
        return f"{part['name']} ({part['modality']})"
    return f"{part['name']}, {part['kind']}" if part["name"].startswith("block") else str(part["name"])


def _change(change: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "settings": change["settings"],
        "about": change["about"],
        "saved": bytes_as_text(change["saved_bytes"]),
        "share": change["saved_bytes"] / told["peak_bytes"],
        "peak": bytes_as_text(change["peak_bytes"]),
        "cost": cost_in_words(change, told["step_seconds"]),
    }
