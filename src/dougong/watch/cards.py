"""Sample records as a page shows them.

Here        read_cards: samples.json and the files it names, each record as plain values for the template; `relative`,
            `heat`, `strip` and `shaded_tokens`, by which any map is laid over what it is of.
Elsewhere   choosing and explaining the records (recipes/samples.py); the page (watch/report.html).
Promise     nothing outside the run's folder is read; pictures and sounds stay below a stated size together, and what
            is left out is said.
"""

from __future__ import annotations

import ast
import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dougong.core.files import inside

MOST_MEDIA: Final = 9_000_000
"""Characters that pictures and sounds may take in the page; the rest of a page stays well below a megabyte."""

MOST_VALUES: Final = 40
"""Columns of a record that are shown."""

MOST_CHARACTERS: Final = 2_000
"""Of one text."""

MOST_SLICES: Final = 200
"""Of a sound's attention."""

FAINTEST: Final = 0.02
"""Attention below this share of the strongest is not drawn."""

_SPECIAL: Final = ("[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<|endoftext|>")
_WORD_STARTS: Final = ("Ġ", "▁")
"""How byte-level and sentence-piece tokenizers write the space before a word."""

_HEADS: Final = ((b"\x89PNG\r\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "audio/wav"))


class Media:
    """Gives files as data: URIs until the room for them is used up."""

    def __init__(self, run: Path, room: int = MOST_MEDIA) -> None:
        self._run = run
        self._room = room
        self.num_left_out = 0

    def take(self, file: str, kind: str) -> dict[str, str]:
        """`src`, or `why` there is none; `kind` is image or audio."""
        path = inside(self._run, file)
        if path is None:
            return {"why": "not shown: its path leads out of the run's folder"}
        if not path.is_file():
            return {"why": f"not shown: {file} is not in the run's folder"}
        size = 4 * math.ceil(path.stat().st_size / 3)
        if size > self._room:
            self.num_left_out += 1
            return {"why": "left out, to keep this page small"}
        content = path.read_bytes()
        mime = next((mime for head, mime in _HEADS if content.startswith(head)), "")
        if not mime.startswith(kind):
            return {"why": f"not shown: {file} holds no {kind} that a page can show"}
        self._room -= size
        return {"src": f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"}


def read_cards(samples: Sequence[Mapping[str, Any]], task: str, media: Media) -> dict[str, list[dict[str, Any]]]:
    """The records by condition, in the order in which they come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("condition", "")), []).append(_card(sample, task, media))
    return groups


def _card(sample: Mapping[str, Any], task: str, media: Media) -> dict[str, Any]:
    attention = sample.get("attention") or {}
    target, prediction = str(sample.get("target")), str(sample.get("prediction"))
    verdict, manner = _verdict(target, prediction, task)
    likely = sample.get("probabilities") or {}
    gate = sample.get("gate") or {}
    return {
        "row": sample.get("row"),
        "inputs": [
            _input(name, given, attention.get(name), media, f"record {sample.get('row')}")
            for name, given in (sample.get("inputs") or {}).items()
        ],
        "target": _labels(target) if task == "multi_label" else target,
        "prediction": _labels(prediction) if task == "multi_label" else prediction,
        "verdict": verdict,
        "manner": manner,
        "probabilities": [
            (label, _share(share), task == "single_label" and label == target) for label, share in likely.items()
        ],
        "gate": [(name, _share(share)) for name, share in gate.items()],
    }


def _input(
    name: str, given: Mapping[str, Any], looked: Mapping[str, Any] | None, media: Media, of: str
) -> dict[str, Any]:
    kind = str(given.get("kind"))
    shown: dict[str, Any] = {"name": name, "kind": kind, "absent": bool(given.get("absent")), "from": None}
    if shown["absent"]:
        return shown | {"completed": bool(given.get("completed"))}
    weights = relative(looked["weights"]) if looked else []
    if looked and weights:
        shown["from"] = looked.get("from")
    if kind == "text":
        shown["text"] = _cut(str(given.get("text")))
        tokens = looked.get("tokens", []) if looked else []
        shown["tokens"] = shaded_tokens(tokens, weights) if tokens and len(tokens) == len(weights) else []
    elif kind == "table":
        values = given.get("values") or {}
        # Attention to some of the columns only cannot be told apart by column: it is not shown then.
        shades = weights if len(weights) == len(values) else [None] * len(values)
        rows = [
            (column, _cut(str(value)), shade) for (column, value), shade in zip(values.items(), shades, strict=True)
        ]
        shown.update(values=rows[:MOST_VALUES], num_more=max(0, len(rows) - MOST_VALUES))
    elif kind == "image":
        shown.update(media.take(str(given.get("file")), "image"), alt=f"{name} of {of}")
        shown["heat"] = heat(looked["grid"], weights) if looked and looked.get("grid") else None
    elif kind == "audio":
        shown.update(media.take(str(given.get("file")), "audio"), alt=f"{name} of {of}")
        seconds = looked.get("seconds") if looked else None
        shown["strip"] = strip(weights)
        shown["seconds"] = "" if seconds is None else f"{float(seconds):.1f} s"
    elif kind == "signal":
        shown.update(line=_line(given.get("points") or []), strip=strip(weights), alt=f"{name} of {of}")
    return shown


def _verdict(target: str, prediction: str, task: str) -> tuple[str, str]:
    """In words, and in what manner to show them: right, wrong, or neither."""
    if task == "regression":
        try:
            return f"off by {abs(float(prediction) - float(target)):.3g}", "neither"
        except ValueError:
            return "no number to hold it against", "neither"
    if task == "multi_label":
        wanted, given = set(_list(target)), set(_list(prediction))
        if wanted == given:
            return "right", "right"
        return f"{len(wanted & given)} of {len(wanted)} labels found, {len(given - wanted)} too many", "wrong"
    return ("right", "right") if target == prediction else ("wrong", "wrong")


def _list(text: str) -> list[str]:
    """The labels of a list that was written as Python writes it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(label) for label in value] if isinstance(value, (list, tuple)) else [text]


def _labels(text: str) -> str:
    return ", ".join(_list(text)) or "no label"


def relative(weights: Sequence[float]) -> list[float]:
    """Each as a share of the strongest: only where a model looked more is of interest here, not how much it looked."""
    strongest = max((float(weight) for weight in weights), default=0.0)
    if not (math.isfinite(strongest) and strongest > 0):
        return []
    return [_share(float(weight) / strongest) for weight in weights]


def _share(value: float) -> float:
    return min(1.0, max(0.0, float(value))) if math.isfinite(value) else 0.0


def shaded_tokens(tokens: Sequence[str], weights: Sequence[float]) -> list[dict[str, Any]]:
    marked = any(token.startswith(_WORD_STARTS) for token in tokens)
    shown: list[dict[str, Any]] = []
    for token, weight in zip(tokens, weights, strict=True):
        if marked:
            glued = not token.startswith(_WORD_STARTS)
            text = token.lstrip("".join(_WORD_STARTS))
        else:
            glued = token.startswith("##")
            text = token.removeprefix("##")
        special = token in _SPECIAL
        shown.append({"text": text, "weight": weight, "glued": glued and not special, "special": special})
    return shown


def heat(grid: Sequence[int], weights: Sequence[float]) -> dict[str, Any] | None:
    """The squares to lay over a picture."""
    num_rows, num_columns = int(grid[0]), int(grid[1])
    if not weights or num_rows * num_columns != len(weights):
        return None
    cells = [
        (place % num_columns, place // num_columns, weight)
        for place, weight in enumerate(weights)
        if weight >= FAINTEST
    ]
    column, row, _ = max(cells, key=lambda cell: cell[2])
    return {
        "rows": num_rows,
        "columns": num_columns,
        "cells": cells,
        "label": f"attention, strongest at row {row + 1} of {num_rows}, column {column + 1} of {num_columns}",
    }


def strip(weights: Sequence[float]) -> list[float]:
    """At most so many slices of time, each as strong as its strongest moment."""
    if not weights:
        return []
    number = min(len(weights), MOST_SLICES)
    edges = [place * len(weights) // number for place in range(number + 1)]
    return [max(weights[start:end]) for start, end in itertools.pairwise(edges)]


def _line(points: Sequence[float]) -> str:
    """A course through a box of 100 by 30, as SVG writes its points."""
    finite = [float(point) for point in points if math.isfinite(float(point))]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    across, up = 100 / max(1, len(finite) - 1), 28 / max(high - low, 1e-9)
    return " ".join(f"{place * across:.2f},{29 - (point - low) * up:.2f}" for place, point in enumerate(finite))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text):,} characters)"
