"""What a writer wrote, beside the truth, as one page.

Here        write_gallery: the figures, curves, captions and pictures of a run's folder as report.html.
Elsewhere   what the folder holds (recipes/generate.py, recipes/decode.py); drawing curves (watch/charts.py); a page
            about decisions (watch/report.py); how this page looks (watch/gallery.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup; no file outside the run's folder is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dougong.core.config import from_yaml
from dougong.core.errors import RunError
from dougong.core.events import read_events
from dougong.core.files import write_atomic
from dougong.watch import charts
from dougong.watch.cards import Media
from dougong.watch.pages import page_template
from dougong.watch.report import REPORT

STRETCHES = 120
"""Of the training loss, whose means are drawn."""


def write_gallery(run: Path) -> Path:
    """Write `report.html` into the folder of a writer's run, from what lies there.

    Raises:
        RunError: the folder holds no judged run of a writer, or a file of it is damaged.
    """
    evaluation = _read(run / "evaluation.json")
    if not isinstance(evaluation, dict) or not {"data", "directions"} <= evaluation.keys():
        raise RunError(f"{run / 'evaluation.json'} is of no writer. Finish the run with --resume: it writes it anew.")
    yaml = (run / "run.yaml").read_text(encoding="utf-8") if (run / "run.yaml").is_file() else ""
    settings = from_yaml(yaml, where="run.yaml") if yaml else {}
    events = read_events(run / "events.jsonl") if (run / "events.jsonl").is_file() else []
    samples = _read(run / "gallery" / "samples.json")
    media = Media(run)
    page = _template().render(
        name=settings.get("name") or run.resolve().name,
        about=settings.get("about") or "",
        data=evaluation["data"],
        by="direction" if settings.get("kind") == "generate" else "condition",
        directions=evaluation["directions"],
        metrics=list(dict.fromkeys(name for found in evaluation["directions"].values() for name in found["metrics"])),
        curves=_curves(events),
        samples=[_shown(sample, media) for sample in samples],
        yaml=yaml,
    )
    write_atomic(run / REPORT, page.encode("utf-8", "replace"))
    return run / REPORT


def _read(path: Path) -> Any:
    if not path.is_file():
        raise RunError(f"{path} is not there: nothing to report. Finish the run with --resume.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}). Finish the run with --resume: it writes it anew.") from None


def _template() -> jinja2.Template:
    return page_template("gallery.html")


def _shown(sample: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """One record: texts as they are, pictures as data: URIs."""
    shown: dict[str, Any] = {key: str(sample[key]) for key in ("row", "label", "caption", "written") if key in sample}
    for key in ("picture", "coded", "drawn"):
        if key in sample:
            shown[key] = media.take(str(sample[key]), "image")
    return shown


def _curves(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    drawn: list[tuple[str, Any]] = []
    steps = [event for event in events if event["kind"] == "StepDone" and math.isfinite(event["loss"])]
    if steps:
        parts = [steps[p * len(steps) // STRETCHES : (p + 1) * len(steps) // STRETCHES] for p in range(STRETCHES)]
        parts = [part for part in parts if part]
        means = [sum(event["loss"] for event in part) / len(part) for part in parts]
        label = f"Training loss over {len(steps)} steps, from {means[0]:.3g} to {means[-1]:.3g}"
        line = charts.Line([part[-1]["step"] for part in parts], means)
        drawn.append(("training loss", charts.line_chart("loss", label, [line])))
    judged = [event for event in events if event["kind"] == "Evaluated"]
    directions = list(dict.fromkeys(event["condition"] for event in judged))
    for metric in dict.fromkeys(name for event in judged for name in event["metrics"]):
        lines = []
        for place, direction in enumerate(directions):
            points = [(e["step"], e["metrics"].get(metric)) for e in judged if e["condition"] == direction]
            kept = [(at, value) for at, value in points if value is not None and math.isfinite(value)]
            lines.append(charts.Line([at for at, _ in kept], [value for _, value in kept], place))
        label = f"{metric.replace('_', ' ')} of validation over steps, for {', '.join(directions)}"
        chart = charts.line_chart(f"curve{len(drawn)}", label, [line for line in lines if line.x])
        drawn.append((f"validation: {metric.replace('_', ' ')}", chart))
    return {"charts": drawn, "directions": directions}
