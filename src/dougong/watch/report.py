"""A run as one page.

Here        write_report: the figures, curves and records of a run's folder as report.html.
Elsewhere   what the folder holds (recipes/run.py, recipes/samples.py); drawing (watch/charts.py); the records
            (watch/cards.py); how the page looks (watch/report.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup; a part whose figures are not there is left out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from dougong.core.config import from_yaml
from dougong.core.errors import RunError
from dougong.core.events import read_events
from dougong.core.files import write_atomic
from dougong.core.signature import Target
from dougong.engine.metrics import primary_metric
from dougong.watch import charts
from dougong.watch.cards import Media, read_cards
from dougong.watch.pages import page_template

REPORT: Final = "report.html"

MOST_LABELS: Final = 30
"""Up to which a confusion matrix can be read."""

MOST_CONFUSED: Final = 10
"""Pairs that are listed where it cannot."""

MOST_SET_ASIDE: Final = 50
"""Records that are listed of each origin."""

MOST_SWITCHES: Final = 40
"""Of number formats, that are listed."""

MOST_SAID: Final = 8
"""Stretches of one format that are said in words."""

MOST_POINTS: Final = 240
"""Of a curve over every step."""

SMOOTHED_SHARE: Final = 0.02
"""Of all steps, over how many the loss is averaged."""

_NOT_FIGURES: Final = ("name", "parameters", "seconds")
_ENDS: Final = {
    "steps": "all steps were taken",
    "early": "stopped early: no more gain on the validation records",
    "interrupted": "interrupted",
}


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, from what lies there.

    Raises:
        RunError: the folder holds no judged run, or a file of it is damaged.
    """
    evaluation = _read_evaluation(run)
    settings_file, events_file, samples_file = run / "run.yaml", run / "events.jsonl", run / "samples.json"
    yaml = settings_file.read_text(encoding="utf-8") if settings_file.is_file() else ""
    settings = from_yaml(yaml, where=str(settings_file)) if yaml else {}
    events = read_events(events_file) if events_file.is_file() else []
    samples = _read_json(samples_file) if samples_file.is_file() else []
    target = Target.model_validate(evaluation["target"])

    media = Media(run)
    groups = read_cards(samples, target.task, media)
    page = _template().render(
        name=settings.get("name") or run.resolve().name,
        about=settings.get("about") or "",
        target=target,
        headline=_headline(evaluation, target),
        warnings=_warnings(evaluation),
        notes=evaluation["data"].get("notes") or [],
        data=evaluation["data"],
        comparison=_comparison(evaluation),
        curves=_curves(events),
        ranks=_ranks(events),
        formats=_formats(events),
        conditions=_conditions(evaluation, target),
        gate=_gate(evaluation),
        confusions=_confusions(evaluation, target),
        time=_time(events, evaluation),
        set_aside=_set_aside(events, evaluation),
        groups=groups,
        num_left_out=media.num_left_out,
        yaml=yaml,
    )
    # A lone surrogate, which JSON can hold, has no bytes in UTF-8.
    write_atomic(run / REPORT, page.encode("utf-8", "replace"))
    return run / REPORT


def _read_evaluation(run: Path) -> dict[str, Any]:
    path = run / "evaluation.json"
    if not path.is_file():
        raise RunError(
            f"{run} has no evaluation.json, so there are no figures to report. "
            "Name the folder of a finished run, or finish this one with --resume."
        )
    evaluation = _read_json(path)
    if not isinstance(evaluation, dict) or not {"target", "data", "conditions"} <= evaluation.keys():
        raise RunError(
            f"{path} holds no target, data and conditions, so there are no figures to report. "
            "Finish the run with --resume: it writes the file anew."
        )
    return evaluation


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is not JSON ({error}). Finish the run with --resume: it writes the file anew."
        ) from None


def _template() -> jinja2.Template:
    return page_template("report.html", figure=figure, words=_words, duration=_duration)


# What is shown ---------------------------------------------------------------------------------------------------


def _headline(evaluation: Mapping[str, Any], target: Target) -> list[dict[str, Any]]:
    metric = primary_metric(target.task)
    return [
        {
            "condition": name,
            "metric": metric.name,
            "value": found["metrics"].get(metric.name),
            "num_records": found["num_records"],
            "split": found["split"],
        }
        for name, found in evaluation["conditions"].items()
    ]


def _warnings(evaluation: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if any(condition["split"] == "validation" for condition in evaluation["conditions"].values()):
        found.append(
            "These figures are of validation records, which also chose the best weights: "
            "expect somewhat less of new records. Name a test table for figures that you can rely on."
        )
    if any("synthetic" in str(note).lower() for note in evaluation["data"].get("notes") or []):
        found.append("Some of this data is synthetic: the figures say nothing yet about recordings of the real world.")
    return found


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = evaluation.get("comparison") or []
    if not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _NOT_FIGURES))
    best = {column: max((row[column] for row in rows if column in row), default=None) for column in columns}
    return {
        "columns": columns,
        "rows": rows,
        "best": best,
        "gains": [
            {
                "text": gain["text"],
                "value": _points(gain["value"]),
                "low": _points(gain["low"]),
                "high": _points(gain["high"]),
                "sure": gain["low"] > 0 or gain["high"] < 0,
            }
            for gain in evaluation.get("gains") or []
        ],
    }


def _curves(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The charts, the legend of conditions, and how many losses could not be drawn."""
    steps = [event for event in events if event["kind"] == "StepDone"]
    judged = [event for event in events if event["kind"] == "Evaluated"]
    finite = [event for event in steps if math.isfinite(event["loss"])]
    drawn: list[tuple[str, Any]] = []
    if finite:
        drawn.append(("training loss", _loss_chart(finite)))
        line = charts.Line(*_thin([step["step"] for step in steps], [step["learning_rate"] for step in steps]))
        highest = max(step["learning_rate"] for step in steps)
        label = f"Learning rate over {len(steps)} steps, at most {highest:.3g}"
        drawn.append(("learning rate", charts.line_chart("rate", label, [line])))
    conditions = list(dict.fromkeys(event["condition"] for event in judged))
    for split, metric in dict.fromkeys((event["split"], name) for event in judged for name in event["metrics"]):
        of_metric = [event for event in judged if event["split"] == split and metric in event["metrics"]]
        lines: list[charts.Line] = []
        ends: list[str] = []
        for place, condition in enumerate(conditions):
            points = [(e["step"], e["metrics"][metric]) for e in of_metric if e["condition"] == condition]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                lines.append(charts.Line([at for at, _ in points], [value for _, value in points], place))
                ends.append(f"{condition} ends at {figure(points[-1][1], metric)}")
        if lines:
            label = f"{_words(metric)} of {split} over steps: {', '.join(ends)}"
            drawn.append((f"{split}: {_words(metric)}", charts.line_chart(f"curve{len(drawn)}", label, lines)))
    if not drawn:
        return None
    return {"charts": drawn, "conditions": conditions, "num_not_finite": len(steps) - len(finite)}


def _loss_chart(steps: Sequence[Mapping[str, Any]]) -> Any:
    """The smoothed loss, before a band in which every single one lies."""
    weight = 1 / max(1.0, SMOOTHED_SHARE * len(steps))
    smooth: list[float] = []
    for step in steps:
        smooth.append(smooth[-1] + weight * (step["loss"] - smooth[-1]) if smooth else step["loss"])
    places = [step["step"] for step in steps]
    edges = _edges(len(steps), round(1 / SMOOTHED_SHARE))
    band = charts.Band(
        [places[(start + end) // 2] for start, end in edges],
        [min(step["loss"] for step in steps[start:end]) for start, end in edges],
        [max(step["loss"] for step in steps[start:end]) for start, end in edges],
    )
    label = f"Training loss over {len(steps)} steps, smoothed: from {smooth[0]:.3g} to {smooth[-1]:.3g}"
    return charts.line_chart("loss", label, [charts.Line(*_thin(places, smooth))], band=band)


DOING: Final = {
    "forward": "forward",
    "backward": "backward",
    "weights": "backward, weights alone",
    "work": "forward and backward",
    "exchange": "exchange of gradients",
    "wait": "waiting for another stage",
}
"""What ranks do in a step, as the legend has it."""


def _ranks(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last step that was timed on every rank, as a picture; None for one process."""
    timed = [event for event in events if event["kind"] == "StepTimed"]
    if not timed:
        return None
    last = timed[-1]
    met = [doing for doing in DOING if any(spent[0] == doing for rank in last["ranks"] for spent in rank)]
    rows = [
        (
            f"rank {rank}",
            [(1e3 * start, 1e3 * end, met.index(doing)) for doing, start, end, *_ in spent if doing in met],
        )
        for rank, spent in enumerate(last["ranks"])
    ]
    whole = sum(max((end for _, end, _ in spans), default=0.0) for _, spans in rows)
    busy = {
        doing: sum(end - start for _, spans in rows for start, end, place in spans if met[place] == doing) / whole
        for doing in met
    }
    said = ", ".join(f"{DOING[doing]} {share:.0%}" for doing, share in busy.items())
    chart = charts.timeline_chart("ranks", f"What {len(rows)} ranks did in step {last['step']}: {said}", rows)
    return {
        "step": last["step"],
        "charts": [(f"step {last['step']}", chart)],
        "keys": [DOING[doing] for doing in met],
        "said": said,
    }


def _formats(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Groups that changed their number format: a row of stretches for each, and every switch; None where none did."""
    switches = [event for event in events if event["kind"] == "PrecisionSwitched"]
    if not switches:
        return None
    last = max(event["step"] for event in events)
    names = list(dict.fromkeys(name for event in switches for name in (event["before"], event["after"])))
    rows = []
    for group, modality in dict.fromkeys((event["group"], event["modality"]) for event in switches):
        own = [event for event in switches if event["group"] == group]
        edges = [0, *(event["step"] for event in own), last]
        formats = [own[0]["before"], *(event["after"] for event in own)]
        spans = [
            (float(start), float(end), names.index(each))
            for (start, end), each in zip(itertools.pairwise(edges), formats, strict=True)
        ]
        rows.append((f"{group} ({modality})" if modality else group, spans))
    said = "; ".join(
        f"{name} {', '.join(f'{names[place]} from step {start:.0f}' for start, _, place in spans[:MOST_SAID])}"
        for name, spans in rows
    )
    chart = charts.timeline_chart("formats", f"Number formats in {last} steps: {said}", rows, across="step")
    return {"chart": chart, "names": names, "switches": switches[:MOST_SWITCHES], "num_switches": len(switches)}


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    kept = [0, *(end - 1 for _, end in _edges(len(x), MOST_POINTS))] if len(x) > MOST_POINTS else range(len(x))
    return [x[place] for place in kept], [y[place] for place in kept]


def _edges(number: int, most: int) -> list[tuple[int, int]]:
    """`number` things in at most `most` stretches of about the same length."""
    parts = min(number, most)
    return [(part * number // parts, (part + 1) * number // parts) for part in range(parts)]


def _conditions(evaluation: Mapping[str, Any], target: Target) -> dict[str, Any]:
    found = evaluation["conditions"]
    metrics = list(dict.fromkeys(name for condition in found.values() for name in condition["metrics"]))
    first = primary_metric(target.task).name
    metrics.sort(key=lambda name: name != first)  # the one that matters comes first, the others as they were
    drawn: list[tuple[str, Any]] = []
    for place, metric in enumerate(metrics):
        bars = [
            charts.Bar(name, condition["metrics"][metric], figure(condition["metrics"][metric], metric))
            for name, condition in found.items()
            if math.isfinite(condition["metrics"].get(metric, math.nan))
        ]
        if bars:
            values = [bar.value for bar in bars]
            high = 1.0 if target.task != "regression" or metric == "r2" else max(values) or 1.0
            label = f"{_words(metric)}: {', '.join(f'{bar.name} {bar.text}' for bar in bars)}"
            chart = charts.bar_chart(f"bars{place}", label, bars, low=min(0.0, *values), high=max(high, *values))
            drawn.append((f"{_words(metric)}{' (less is better)' if metric in _LESS else ''}", chart))
    return {"charts": drawn, "metrics": metrics, "rows": found}


_LESS: Final = ("rmse", "mae", "loss")


def _gate(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = {name: found["gate"] for name, found in evaluation["conditions"].items() if found.get("gate")}
    if not rows:
        return None
    modalities = list(dict.fromkeys(modality for gate in rows.values() for modality in gate))
    shares = [(name, [gate.get(modality, 0.0) for modality in modalities]) for name, gate in rows.items()]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{m} {_percent(share)}" for m, share in zip(modalities, row, strict=True))
        for name, row in shares
    )
    chart = charts.share_chart("gate", f"Share of each modality in the fused vector. {said}", shares)
    return {"chart": chart, "modalities": modalities, "rows": shares}


def _confusions(evaluation: Mapping[str, Any], target: Target) -> list[dict[str, Any]]:
    """Of each condition the matrix, or with too many labels the pairs that are confused most."""
    found: list[dict[str, Any]] = []
    for name, condition in evaluation["conditions"].items():
        counts = condition.get("confusion")
        if not counts:
            continue
        totals = [sum(row) for row in counts]
        if len(target.labels) <= MOST_LABELS:
            rows = [
                (label, [(count, count / total if total else 0.0) for count in row], total)
                for label, row, total in zip(target.labels, counts, totals, strict=True)
            ]
            found.append({"condition": name, "rows": rows, "pairs": None})
        else:
            pairs = [
                (count, truth, guess)
                for truth, row in enumerate(counts)
                for guess, count in enumerate(row)
                if count and truth != guess
            ]
            pairs.sort(key=lambda pair: -pair[0])
            listed = [
                (target.labels[truth], target.labels[guess], count, totals[truth])
                for count, truth, guess in pairs[:MOST_CONFUSED]
            ]
            found.append({"condition": name, "rows": None, "pairs": listed})
    return found


def _time(events: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What took how long, as names and values."""
    starts = [event for event in events if event["kind"] == "RunStarted"]
    steps = [event for event in events if event["kind"] == "StepDone"]
    ends = [event for event in events if event["kind"] == "RunFinished"]
    found: list[tuple[str, str]] = []
    if steps:
        seconds = sum(step["seconds"] for step in steps)
        waited = sum(step["wait_seconds"] for step in steps)
        records = sum(step["num_records"] for step in steps)
        found += [
            ("training steps", f"{len(steps):,} in {_duration(seconds)}"),
            ("records per second", f"{records / max(seconds, 1e-9):,.0f}"),
            ("share of that spent waiting for records", _percent(waited / max(seconds, 1e-9))),
        ]
    validated = sum(event["seconds"] for event in events if event["kind"] == "Evaluated")
    if validated:
        found.append(("judging in training", _duration(validated)))
    judged = sum(condition.get("seconds") or 0.0 for condition in evaluation["conditions"].values())
    found.append(("judging at the end", _duration(judged)))
    if starts:
        found.append(("precision", starts[-1]["precision"]))
        found.append(("parameters", f"{starts[-1]['num_parameters']:,}"))
    if len(starts) > 1:
        found.append(("resumed", f"{len(starts) - 1} times" if len(starts) > 2 else "once"))
    if ends:
        found.append(("end of training", _ENDS.get(ends[-1]["reason"], str(ends[-1]["reason"]))))
        if ends[-1].get("best_step") is not None:
            found.append(("weights kept", f"of step {ends[-1]['best_step']:,}, the best on the validation records"))
    return found


def _set_aside(events: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From training and from judging: how many records could not be used, and the first of them."""
    last = next((event for event in reversed(list(events)) if event["kind"] == "RecordsSetAside"), None)
    origins = [("training", last or {}), ("judging", evaluation.get("bad") or {})]
    return [
        {
            "origin": origin,
            "count": found["count"],
            "seen": found["seen"],
            "first": (found.get("first") or [])[:MOST_SET_ASIDE],
        }
        for origin, found in origins
        if found.get("count")
    ]


# How figures are written -----------------------------------------------------------------------------------------


def figure(value: float | None, metric: str) -> str:
    """A metric's value as people read it."""
    if value is None or not math.isfinite(value):
        return "–"
    if "accuracy" in metric:
        return _percent(value, places=1)
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"
    return text.replace("-", "−")


def _words(name: str) -> str:
    return {"macro_f1": "macro F1", "micro_f1": "micro F1", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}.get(
        name, name.replace("_", " ")
    )


def _percent(share: float, *, places: int = 0) -> str:
    return f"{100 * share:.{places}f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
