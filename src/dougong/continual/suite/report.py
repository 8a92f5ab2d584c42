"""A verdict for machines and people.

Here        `as_junit`, `as_markdown`.
Elsewhere   the verdict (gate.py).
Promise     whatever a record holds, the XML stays well-formed and the table a table.
"""

from __future__ import annotations

import math
import re
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from dougong.continual.suite.gate import Comparison, Verdict

_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(verdict: Verdict) -> str:
    """JUnit XML: a test case for each comparison, a failure for each refusal."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    failures = len(verdict.refusals)
    lines.append(
        f"<testsuite name={_attribute(verdict.suite)} tests={_attribute(len(verdict.comparisons))} "
        f"failures={_attribute(failures)} errors={_attribute(0)}>"
    )
    for one in verdict.comparisons:
        lines.append(
            f"  <testcase classname={_attribute(f'{verdict.suite}.{one.kind}')} name={_attribute(_name(one))}>"
        )
        if one.refused:
            rows = "\n".join(f"record {row}: {before} -> {after}" for row, before, after in one.changed)
            lines.append(f"    <failure message={_attribute(one.reason)}>{_text(rows)}</failure>")
        lines.append(f"    <system-out>{_text(_figures(one))}</system-out>")
        lines.append("  </testcase>")
    lines.append("</testsuite>")
    return "\n".join(lines) + "\n"


def as_markdown(verdict: Verdict) -> str:
    """A page for a pull request: the verdict, what was refused, and all comparisons."""
    against = f"against {verdict.against}" if verdict.against else "by itself: nothing is in production"
    lines = [
        f"# {verdict.suite}: {'passed' if verdict.passed else 'REFUSED'}",
        "",
        f"{verdict.in_words()} ({against})",
        "",
    ]
    for one in verdict.refusals:
        lines += [f"## {_cell(_name(one))}", "", one.reason, ""]
        if one.changed:
            lines += ["| record | before | after |", "|---|---|---|"]
            lines += [f"| {row} | {_cell(before)} | {_cell(after)} |" for row, before, after in one.changed]
            if one.num_changed > len(one.changed):
                lines.append(f"\nand {one.num_changed - len(one.changed)} more.")
            lines.append("")
    lines += [
        "| check | condition | records | before | after | loss (95 %) | p | loss that would be seen | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in verdict.comparisons:
        before = "" if one.before is None else f"{one.before:.4f}"
        seen = "none" if not math.isfinite(one.detectable) or one.detectable > 1 else f"{one.detectable:.3f}"
        lines.append(
            f"| {_cell(one.name)} | {_cell(one.condition)} | {one.num_records} | {before} | {one.after:.4f} "
            f"| {one.loss:+.4f} ({one.low:+.4f} to {one.high:+.4f}) | {one.p:.3g} | {seen} "
            f"| {'**refused**' if one.refused else ''} |"
        )
    return "\n".join(lines) + "\n"


def _name(one: Comparison) -> str:
    return one.name if one.condition in ("all", "") else f"{one.name} [{one.condition}]"


def _figures(one: Comparison) -> str:
    before = "" if one.before is None else f"before {one.before:.6f}, "
    return f"{one.num_records} records, {before}after {one.after:.6f}, loss {one.loss:.6f}, p {one.p:.4g}"


def _attribute(value: object) -> str:
    return quoteattr(_NOT_XML.sub("?", str(value)))


def _text(value: str) -> str:
    return escape(_NOT_XML.sub("?", value))


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())[:120]
