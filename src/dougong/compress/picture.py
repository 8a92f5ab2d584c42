"""What was measured of the candidates, as a picture.

Here        `draw_points`: time against the task's figure, as SVG.
Elsewhere   the points (candidate.py); the table on a terminal (cli/show.py).
Promise     the same points give the same bytes; a name stays text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from dougong.compress.candidate import Point
from dougong.compress.outcome import Outcome

INK, FAINT, ACCENT = "#24292f", "#8b949e", "#b3261e"


def draw_points(outcome: Outcome, metric: str) -> str:
    """Those that learnt, each as large as its bytes; the front is a line, the chosen one red, the teacher a square."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    judged = [point for point in outcome.points if point.metric is not None]
    front = outcome.front()
    line = [(point.latency_seconds * 1000, point.metric) for point in front if point.metric is not None]
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color=FAINT, lw=1)
    largest = max([point.size_bytes for point in (outcome.teacher, *judged)])
    for point in judged:
        chosen = outcome.chosen is not None and point.candidate == outcome.chosen.candidate
        _dot(axes, point, largest, ACCENT if chosen else INK, "o")
    _dot(axes, outcome.teacher, largest, FAINT, "s")
    axes.annotate(
        "teacher",
        (outcome.teacher.latency_seconds * 1000, outcome.teacher.metric),
        xytext=(6, 6),
        textcoords="offset points",
    )
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds of an answer")
    axes.set_ylabel(metric.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "dougong", "svg.fonttype": "none", "text.parse_math": False}):
        made = io.StringIO()
        figure.savefig(made, format="svg", metadata={"Date": None})
    return made.getvalue()


def _dot(axes: matplotlib.axes.Axes, point: Point, largest: int, colour: str, marker: str) -> None:
    assert point.metric is not None
    area = 30 + 170 * point.size_bytes / largest
    axes.scatter([point.latency_seconds * 1000], [point.metric], s=area, color=colour, marker=marker, alpha=0.8, lw=0)


def as_rows(points: Sequence[Point]) -> list[dict[str, object]]:
    """The points as JSON holds them, each with what it is in words; without what only going on needs."""
    own = {"drafted_within", "step_seconds"}
    return [{"what": point.candidate.in_words(), **point.model_dump(mode="json", exclude=own)} for point in points]
