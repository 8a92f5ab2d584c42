"""Tables joined from the command line, all in the same way.

Here        join_files.
Elsewhere   joining (data/join.py); a recipe's own data.join, where each table may find its records in another way.
Promise     what is written says how it came to be: the report stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.data.join import JoinConfig, write_joined


def join_files(
    base: Path,
    others: Sequence[Path],
    out: Path,
    *,
    key: str | None = None,
    time: str | None = None,
    tolerance: float | None = None,
    offset: str = "0",
    unmatched: str = "keep",
    duplicates: str = "refuse",
    prefix: bool = False,
) -> dict[str, Any]:
    """Write the records of `base` with the columns of `others`; the report, and its `lines` for people.

    `key` and `time` name a column, or two as `BASE=OTHER`.

    Raises:
        DougongError: an option makes no sense, or the tables do not fit together.
    """
    base_key, _, other_key = (key or "").rpartition("=")
    base_time, _, other_time = (time or "").rpartition("=")
    joins = []
    for other in others:
        values: dict[str, Any] = {
            "table": str(other),
            "key": other_key or None,
            "base_key": base_key or None,
            "time": other_time or None,
            "base_time": base_time or None,
            "tolerance": tolerance,
            "offset": offset if offset == "estimate" else _number(offset),
            "unmatched": unmatched,
            "duplicates": duplicates,
            "prefix": f"{other.stem}_" if prefix else "",
        }
        joins.append(parse(JoinConfig, values, where="join"))
    report = write_joined(base, joins, out)
    lines: list[str] = report.pop("lines")
    for name, found in report["unreadable"].items():
        lines.append(f"{name}: {found['count']} media could not be read; the first {found['first']}")
    if report["dropped"]:
        lines.append(f"{report['dropped']} records were dropped")
    lines.append(f"{report['rows']} records: {out}")
    return {**report, "lines": lines}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--offset {text!r} is no number. Give one, or 'estimate'.") from None
