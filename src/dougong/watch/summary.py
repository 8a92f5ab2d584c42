"""All that is known of a run from within, as one page.

Here        `summarise`: curves, gradient flow, contribution, diagnosis and pipeline of a run as plain values;
            `write_summary`, the page of them.
Elsewhere   reading a run (watch/runs.py); the same, live, of many runs (watch/dashboard.py); the report of how good a
            model is (watch/report.py); how the page looks (watch/summary.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dougong.core.errors import RunError
from dougong.core.files import write_atomic
from dougong.watch import charts
from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.gradient_flow import balance, last_with, picture, ranges, ranked
from dougong.watch.pages import page_template
from dougong.watch.runs import EVENTS, Reader


def summarise(run: Path, counted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run's events say, and what was counted of its model (contribution.as_json), if that was asked for.

    Raises:
        RunError: the folder holds no run.
    """
    folder = run if (run / EVENTS).is_file() else run.parent
    if not (folder / EVENTS).is_file():
        raise RunError(f"{run} holds no {EVENTS}: name a run's folder, or a bundle with --record.")
    reader = Reader(folder)
    reader.read()
    return summary_of(reader, folder.name, counted)


def summary_of(reader: Reader, name: str, counted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same of one that is being read."""
    flows = reader.flows
    flow = flows[-1] if flows else None
    return {
        "name": name,
        "run": reader.told(),
        "curves": reader.curves(),
        "findings": [
            {
                **finding._asdict(),
                "title": CATALOGUE[finding.cause].title,
                "symptom": CATALOGUE[finding.cause].symptom,
                "remedy": CATALOGUE[finding.cause].remedy,
            }
            for finding in reader.findings()
        ],
        "flow": None
        if flow is None
        else {
            "step": flow["step"],
            "measured": reader.num_flows,
            "picture": picture(flow),
            "ranked": ranked(flow),
            "gate": flow["gate"],
            "attention": [call for call in flow["attention"] if "entropy" in call],
            "probes": flow["probes"],
            "inputs": flow["inputs"],
        },
        "conflicts": last_with(flows, "conflicts"),
        "ranges": _ranges(flows),
        "pairs": _pairs(reader),
        "noise": next((event for event in reversed(reader.others) if event["kind"] == "NoiseMeasured"), None),
        "balance": balance(flows),
        "gates": [{"step": each["step"], **each["gate"]} for each in flows if each["gate"]],
        "contribution": counted,
        "over_time": [
            {"step": e["step"], "all": e["with_all"], "none": e["with_none"], "without": e["without"]}
            for e in reader.others
            if e["kind"] == "SamplingChanged"
        ],
    }


def _ranges(flows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How large numbers are, of the last step in which they were counted."""
    counted = last_with(flows, "exponents")
    return None if counted is None else {"step": counted["step"], "rows": ranges(counted)}


def _pairs(reader: Reader) -> dict[str, Any] | None:
    """What the first records said by themselves (engine/examine.py)."""
    told = next((event for event in reader.others if event["kind"] == "Examined"), None)
    if told is None or not told["pairs"]:
        return None
    first = next(iter(told["pairs"].values()))
    shifts = sorted(int(key.removeprefix("at ")) for key in first if key.startswith("at "))
    inputs = [
        {"name": name, "at": [each[f"at {shift}"] for shift in shifts], "chance": each["chance"]}
        for name, each in told["pairs"].items()
    ]
    return {"rows": told["rows"], "shifts": shifts, "inputs": inputs}


def write_summary(path: Path, told: Mapping[str, Any]) -> Path:
    """Write the page of what `summarise` told."""
    page = summary_template().render(**filled(told), whole=True)
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def filled(told: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template takes, but whether it is a whole page."""
    return {
        "told": told,
        "charts": drawn(told),
        "range_charts": drawn_ranges(told),
        "sides": [] if told["ranges"] is None else sides_told(told),
    }


def summary_template() -> jinja2.Template:
    """Of this page; its inner part is the dashboard's."""
    return page_template("summary.html", figure=_figure)


def drawn(told: Mapping[str, Any]) -> dict[str, Any]:
    """The charts, by name; those of which there is something."""
    found = {}
    for name in ("loss", "gradient norm", "learning rate"):
        points = [point for point in told["curves"][name] if point[1] is not None]
        if len(points) > 1:
            steps = [point[0] for point in points]
            band = charts.Band(steps, [point[2] for point in points], [point[3] for point in points])
            label = f"{name} over {steps[-1]} steps, from {points[0][1]:.3g} to {points[-1][1]:.3g}"
            line = charts.Line(steps, [point[1] for point in points])
            found[name] = charts.line_chart(name.replace(" ", "-"), label, [line], band=band)
    judged = {name: points for name, points in told["curves"]["judged"].items() if points}
    for place, (name, points) in enumerate(judged.items()):
        kept = [(step, value) for step, value in points if value is not None]
        if kept:
            line = charts.Line([step for step, _ in kept], [value for _, value in kept])
            label = f"{name}, judged, from {kept[0][1]:.3g} to {kept[-1][1]:.3g}"
            found[f"judged {name}"] = charts.line_chart(f"judged{place}", label, [line])
    if any(len(points) > 1 for points in told["balance"].values()):
        lines = [
            charts.Line([step for step, _ in points], [value for _, value in points], place)
            for place, points in enumerate(told["balance"].values())
        ]
        label = "How far a step moves each modality's weights, as a share of themselves"
        found["balance"] = charts.line_chart("balance", label, lines)
    return found


def drawn_ranges(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of activations, gradients and weights: how their numbers' exponents are spread, a line for each modality."""
    if told["ranges"] is None:
        return {}
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in told["ranges"]["rows"]:
        by.setdefault(row["what"], []).append(row)
    sides = sides_told(told)
    found = {}
    for what, rows in by.items():
        lines = [
            charts.Line(
                [row["lowest"] + place for place in range(len(row["shares"]))], row["shares"], sides.index(row["side"])
            )
            for row in rows
        ]
        label = f"Share of {what} by exponent of 2, for {', '.join(row['side'] for row in rows)}"
        found[what] = charts.line_chart(f"range-{what}", label, lines, across="exponent of 2")
    return found


def sides_told(told: Mapping[str, Any]) -> list[str]:
    """Modalities, and what they share, in the order of the legend of `drawn_ranges`."""
    return list(dict.fromkeys(row["side"] for row in told["ranges"]["rows"]))


def _figure(value: float) -> str:
    return f"{value:.3g}"
