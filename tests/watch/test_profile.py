"""Holds watch/profile.py to its promise: one page, nothing outside it, and what is drawn adds up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dougong.watch.profile import MOST_ROWS, cost_in_words, during, write_page

HOSTILE = '<script>alert(1)</script>" onload="x'
MIB = 2**20


def told(num_blocks: int = 2) -> dict[str, Any]:
    """What recipes/profile.py tells of a step."""
    names = [("embedding", ""), ("embedding", HOSTILE), *((f"block {place}", "") for place in range(num_blocks))]
    names.append(("head", ""))
    parts = [
        {
            "name": name,
            "modality": modality,
            "kind": "Block",
            "bytes_at_peak": 0 if place == 0 else MIB,
            "most_bytes": 100 if place == 0 else MIB,
            "forward_seconds": 0.001,
            "backward_seconds": 0.002,
        }
        for place, (name, modality) in enumerate(names)
    ]
    activations = (len(parts) - 1) * MIB
    change = {
        "settings": ["memory.recompute=blocks", "memory.activations=null"],
        "about": "Made anew.",
        "peak_bytes": 2 * MIB,
        "saved_bytes": activations,
        "added_seconds": 0.003,
        "low_seconds": 0.002,
        "high_seconds": 0.004,
    }
    other = {**change, "settings": ["train.precision=bf16"], "added_seconds": 2.5, "low_seconds": -1.0}
    return {
        "recipe": HOSTILE,
        "records": 1234,
        "micro_batches": 2,
        "modalities": {HOSTILE: 1234},
        "precision": "fp32",
        "peak_bytes": activations + 2 * MIB,
        "peak_seconds": 0.004,
        "peak_during": {"phase": "backward", "part": "block 0"},
        "at_peak": {
            "parameters": MIB,
            "optimizer": MIB,
            "gradients": 0,
            "activations": activations,
            "passed back": 0,
            "temporary": 0,
        },
        "parts": parts,
        "begin_seconds": 0.0,
        "optimizer_seconds": 0.005,
        "step_seconds": 0.01,
        "turns": 7,
        "offered": [change],
        "measured": [change, other],
        "course": {
            "seconds": [0.0, 0.004, 0.010],
            "visits": [
                {"seconds": 0.0, "phase": "begin", "part": None},
                {"seconds": 0.001, "phase": "forward", "part": 0},
                {"seconds": 0.004, "phase": "backward", "part": 0},
                {"seconds": 0.0099, "phase": "optimizer", "part": None},
            ],
            "series": [
                {"kind": "parameters", "part": None, "bytes": [MIB] * 3},
                {"kind": "optimizer", "part": None, "bytes": [MIB] * 3},
                *({"kind": "activations", "part": place, "bytes": [0, MIB, 0]} for place in range(1, len(parts))),
                {"kind": "temporary", "part": None, "bytes": [0, 0, 0]},
            ],
        },
        "notes": [HOSTILE],
    }


def attributes_of(page: str) -> set[str]:
    """As a browser would find them."""
    found: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.update(name for name, _ in attrs)

    Reader().feed(page)
    return found


def page_of(tmp_path: Path, what: dict[str, Any]) -> str:
    path = write_page(tmp_path / "page", what)
    assert path == tmp_path / "page" / "profile.html"
    return path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, told())

    assert "<script" not in page
    assert not any(name.startswith("on") for name in attributes_of(page))
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", page))
    assert all(value.startswith("#") for value in re.findall(r"\b(?:src|href)=\"([^\"]*)\"", page))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page).replace("http-equiv", "")
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    page = re.sub(r"\s+", " ", page_of(tmp_path, told()))

    for words in (
        "One training step of 1,234 records in 2 micro-batches, products in fp32",
        '<b>6 MiB</b> <span class="hint">in the backward of block 0</span>',
        "67 % of the most",
        "<b>10 ms</b>",
        "<code>--set memory.recompute=blocks</code><code>--set memory.activations=null</code>",
        "4 MiB (67 % of the peak)",
        "+3 ms a step (+30%)",
        "no time that stands out of the noise: +2.5 s a step (+25000%)",
        "Memory over a training step of 10 milliseconds, at most 6 MiB",
        "most: 6 MiB",
        "optimizer →",  # too narrow for its name
        "activations: shared blocks",
        '<th scope="row">activations: shared blocks</th><td class="n">2 MiB</td> <td class="n">33.3 %</td>',
        "block 1, Block",
        "1 ms + 2 ms",
    ):
        assert words in page, words
    assert "activations: embedding" not in page  # nothing of it can be seen


def test_without_a_change_that_saves_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, {**told(), "offered": [], "measured": []})
    assert "No setting that was tried lowers the peak by a hundredth or more." in page
    assert "<details>" not in page


def test_many_blocks_are_added_up_beyond_what_can_be_read(tmp_path: Path) -> None:
    page = page_of(tmp_path, told(num_blocks=60))
    # 63 parts, of which all hold alike but the first.
    assert f"all others ({63 - MOST_ROWS})" in page
    assert f"{63 - MOST_ROWS} ms + {2 * (63 - MOST_ROWS)} ms" in page


@pytest.mark.parametrize(
    ("phase", "part", "words"),
    [
        ("forward", "head", "in the forward of the head"),
        ("backward", "block 3 (image)", "in the backward of block 3 (image)"),
        ("optimizer", None, "in the optimizer's step"),
        ("begin", None, "at the step's beginning"),
    ],
)
def test_where_most_is_held_is_said_in_words(phase: str, part: str | None, words: str) -> None:
    assert during({"peak_during": {"phase": phase, "part": part}}) == words


def test_what_makes_a_step_faster_has_a_cost_below_zero() -> None:
    change = {"added_seconds": -0.002, "low_seconds": -0.003, "high_seconds": -0.001}
    assert cost_in_words(change, 0.01) == "-2 ms a step (-20%)"
