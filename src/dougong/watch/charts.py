"""Charts as SVG that stands inside a page.

Here        line_chart, bar_chart, share_chart, part_chart, timeline_chart, area_chart, and `key`, the sample of a line
            or colour for a legend in the page.
Elsewhere   what is drawn, and the pages with the colours' values (watch/report.py, watch/profile.py, and the .html
            beside each).
Promise     the same figures give the same bytes; text stays text and is never read as a formula or as markup; every
            colour is a variable of the page, so that one chart is right on light and on dark ground.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLOURS: Final = 8
WIDTH: Final = 3.5
"""Inches; narrow enough for a phone to show the text at its size."""

WIDE: Final = 9.0
"""The same of what has a hundred pieces beside each other, and little text."""

ROW: Final = 0.36
"""Inches that a bar and its name take."""

LONGEST: Final = 34
"""Characters of a name in a chart; the table beside it has the whole name."""

# matplotlib knows no variables: it draws in colours that stand for them, and `_to_page` puts the variables in.
_INK, _SOFT, _LINE, _ON = "#010101", "#020202", "#030303", "#040404"
_SERIES: Final = tuple(f"#05050{place}" for place in range(NUM_COLOURS))
_VARIABLES: Final = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    _ON: "var(--on)",
    **{colour: f"var(--c{place})" for place, colour in enumerate(_SERIES)},
}
_DASHES: Final = ((), (5.0, 2.0), (1.5, 1.5), (7.0, 2.0, 1.5, 2.0))
_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK: Final = "http://www.w3.org/1999/xlink"


class Line(NamedTuple):
    """A curve; `place` is its number in the legend."""

    x: Sequence[float]
    y: Sequence[float]
    place: int = 0


class Band(NamedTuple):
    """What a curve sums up: the lowest and the highest at each x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Layer(NamedTuple):
    """One of what is stacked; several may have the colour of one number in the legend."""

    y: Sequence[float]
    place: int
    strength: float = 1.0
    """Of its colour."""


class Bar(NamedTuple):
    """One figure; `text` is the figure as people read it."""

    name: str
    value: float
    text: str


def line_chart(
    name: str, label: str, lines: Sequence[Line], *, band: Band | None = None, across: str = "step"
) -> Markup:
    """Curves over steps. `name` tells the charts of a page apart; `label` says in words what is seen; `across` is what
    they are over, where not steps: then of any numbers."""

    def draw(axes: Axes) -> None:
        if band is not None:
            axes.fill_between(band.x, band.low, band.high, color=_SERIES[0], alpha=0.18, linewidth=0)
        for line in lines:
            dashes = _DASHES[line.place % len(_DASHES)]
            axes.plot(
                line.x,
                line.y,
                color=_SERIES[line.place % NUM_COLOURS],
                linewidth=1.5,
                linestyle=(0, dashes) if dashes else "solid",
                marker="o" if len(line.x) <= 40 else "",
                markersize=3,
            )
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=across == "step"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(visible=True, axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)

    return _draw(name, label, 2.2, draw)


def bar_chart(name: str, label: str, bars: Sequence[Bar], *, low: float, high: float) -> Markup:
    """A bar for each figure, each with its name and its value written over it."""

    def draw(axes: Axes) -> None:
        _rows(axes, [(bar.name, bar.text) for bar in bars])
        for place, bar in enumerate(bars):
            axes.barh(place + 0.18, high - low, left=low, height=0.26, color=_LINE, linewidth=0)
            axes.barh(place + 0.18, bar.value, height=0.26, color=_SERIES[0], linewidth=0)
        axes.set_xlim(low, high)

    return _draw(name, label, ROW * len(bars) + 0.1, draw)


def share_chart(name: str, label: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """For each row, how a whole is shared out."""

    def draw(axes: Axes) -> None:
        _rows(axes, [(row, "") for row, _ in rows])
        for place, (_, shares) in enumerate(rows):
            left = 0.0
            for part, share in enumerate(shares):
                axes.barh(place + 0.18, share, left=left, height=0.4, color=_SERIES[part % NUM_COLOURS], linewidth=0)
                if share >= 0.12:  # narrower, and the number would not fit
                    text = f"{share:.0%}".replace("%", " %")
                    axes.text(left + share / 2, place + 0.19, text, color=_ON, ha="center", va="center", fontsize=7)
                left += share
        axes.set_xlim(0, 1)

    return _draw(name, label, ROW * 1.25 * len(rows) + 0.1, draw)


def part_chart(name: str, label: str, rows: Sequence[tuple[str, str, Sequence[tuple[float, int]]]]) -> Markup:
    """For each row its name, a text, and amounts one after the other, each in the colour of its number in the legend;
    all rows on one scale."""

    def draw(axes: Axes) -> None:
        _rows(axes, [(row, text) for row, text, _ in rows])
        most = max((sum(amount for amount, _ in amounts) for _, _, amounts in rows), default=0.0) or 1.0
        for place, (_, _, amounts) in enumerate(rows):
            axes.barh(place + 0.18, most, height=0.26, color=_LINE, linewidth=0)
            left = 0.0
            for amount, colour in amounts:
                bar = _SERIES[colour % NUM_COLOURS]
                axes.barh(place + 0.18, amount, left=left, height=0.26, color=bar, linewidth=0)
                left += amount
        axes.set_xlim(0, most)

    return _draw(name, label, ROW * len(rows) + 0.1, draw)


def area_chart(
    name: str,
    label: str,
    x: Sequence[float],
    layers: Sequence[Layer],
    *,
    across: str,
    up: str,
    stretches: Sequence[tuple[float, float, str]] = (),
    mark: tuple[float, float, str] | None = None,
) -> Markup:
    """Layers on each other. `across` and `up` name the axes; `stretches` of x have a name each, written over them;
    `mark` is a point with a text."""

    def draw(axes: Axes) -> None:
        low = [0.0] * len(x)
        for layer in layers:
            high = [below + own for below, own in zip(low, layer.y, strict=True)]
            colour = _SERIES[layer.place % NUM_COLOURS]
            axes.fill_between(x, low, high, color=colour, alpha=layer.strength, linewidth=0)
            axes.plot(x, high, color=_ON, linewidth=0.35)
            low = high
        axes.plot(x, low, color=_INK, linewidth=0.9)
        top, width = max(low, default=1.0) or 1.0, x[-1] - x[0] or 1.0
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(0, top * 1.16)
        for start, end, text in stretches:
            axes.axvline(start, ymax=0.97, color=_SOFT, linewidth=0.6, linestyle=(0, (2.0, 2.0)))
            if end - start >= 0.012 * len(text) * width:  # narrower, and it would lie on its neighbour
                axes.text((start + end) / 2, top * 1.1, text, color=_SOFT, ha="center", va="center")
            elif end == x[-1]:
                axes.text(start, top * 1.1, f"{text} → ", color=_SOFT, ha="right", va="center")
        if mark is not None:
            at, height, text = mark
            axes.plot([at], [height], marker="o", markersize=4, color=_INK, clip_on=False)
            left = at > x[0] + width / 2
            axes.annotate(
                text,
                (at, height),
                xytext=(-6 if left else 6, 3),
                textcoords="offset points",
                color=_INK,
                ha="right" if left else "left",
                va="bottom",
                fontweight="bold",
            )
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)

    return _draw(name, label, 3.6, draw, WIDE)


def timeline_chart(
    name: str,
    label: str,
    rows: Sequence[tuple[str, Sequence[tuple[float, float, int]]]],
    *,
    across: str = "milliseconds",
) -> Markup:
    """For each row, spans from when to when, each in the colour of its number in the legend; `across` is what they are
    measured in."""

    def draw(axes: Axes) -> None:
        for place, (_, spans) in enumerate(rows):
            for start, end, colour in spans:
                axes.barh(place, end - start, left=start, height=0.8, color=_SERIES[colour % NUM_COLOURS], linewidth=0)
        axes.set_yticks(range(len(rows)), [printable(row) for row, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max((end for _, spans in rows for _, end, _ in spans), default=1.0))
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)

    return _draw(name, label, 0.55 + 0.3 * len(rows), draw, WIDE)


def key(place: int, *, line: bool, strength: float = 1.0) -> Markup:
    """What a legend shows before a name: as the curve or the segment of this number is drawn."""
    colour = f"var(--c{place % NUM_COLOURS})"
    if not line:
        inner = f'<rect width="12" height="12" y="1" rx="2" fill="{colour}" fill-opacity="{strength:g}"/>'
        return Markup(f'<svg class="key" width="12" height="14" aria-hidden="true">{inner}</svg>')  # noqa: S704, ours
    dashes = " ".join(str(1.5 * dash) for dash in _DASHES[place % len(_DASHES)])
    inner = f'<path d="M0 7h30" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
    return Markup(f'<svg class="key" width="30" height="14" aria-hidden="true">{inner}</svg>')  # noqa: S704, ours


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` on one line and no longer than that; what no font can draw becomes a replacement mark."""
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _rows(axes: Axes, names: Sequence[tuple[str, str]]) -> None:
    """Room for one bar under each pair of texts."""
    across = axes.get_yaxis_transform()
    for place, (name, text) in enumerate(names):
        axes.text(0, place - 0.07, printable(name), transform=across, color=_INK, ha="left", va="bottom")
        axes.text(1, place - 0.07, text, transform=across, color=_INK, ha="right", va="bottom", fontweight="bold")
    axes.set_ylim(len(names) - 0.55, -0.55)
    axes.set_axis_off()


def _draw(name: str, label: str, height: float, draw: Callable[[Axes], None], width: float = WIDTH) -> Markup:
    settings: Any = {  # matplotlib's types want each key as a literal
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a label such as "$5 or $6" is no formula
        "font.size": 8,
        "font.family": "DejaVu Sans",  # wider than what a page shows, so that text never outgrows its room
        "axes.facecolor": "none",
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _SOFT,
        "xtick.labelcolor": _SOFT,
        "ytick.labelcolor": _SOFT,
        "text.color": _SOFT,  # the number that an axis is to be multiplied by
    }
    content = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The font at hand only measures the text; the reader's own fonts draw it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        draw(figure.add_subplot())
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _to_page(content.getvalue(), name, label)


def _to_page(svg: str, name: str, label: str) -> Markup:
    """A file's SVG as an element of a page: no header, no style for the whole page, ids that are this chart's own."""
    root = ElementTree.fromstring(svg)  # noqa: S314, written by matplotlib just now
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        link = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if link is not None:
            element.set("href", f"#{name}-{link.removeprefix('#')}")
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                element.set("id", f"{name}-{value}")
            elif attribute == "clip-path":
                element.set("clip-path", value.replace("#", f"#{name}-"))
            elif attribute == "style":
                element.set("style", _style(value))
            elif attribute == "d":
                element.set("d", " ".join(value.split()))
        if element.tag != "text":
            element.text = None
        element.tail = None
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib = {"class": "chart", "role": "img", "aria-label": label, **root.attrib}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704, escaped by ElementTree


def _style(style: str) -> str:
    kept = [part for part in style.split(";") if not part.strip().startswith("font-family")]
    return re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), ";".join(kept))
