"""Records held out of a table, which share nothing with those that are left.

Here        `belonging`, which records are to stay together; hold_out, HeldOut.
Elsewhere   which records hold the same medium (data/leak.py); the drawing itself (data/split.py); tables that are given
            apart, which are checked for what they share (data/leak.py).
Promise     records of one unit, or with the same content of a column of media, are on one side, whatever its files are
            called. Where too many records would hang together by that, it is said which media may be on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dougong.data.leak import copies
from dougong.data.split import largest_group, split_table, unit_numbers
from dougong.data.table import Table

SHARED: Final = 0.9
"""Distinct ones of a column's media: where there are fewer, records share them."""

MOST_TOGETHER: Final = 0.25
"""Of the records, in a group that is on one side, for the sake of a medium beside the unit."""


class Belonging(NamedTuple):
    """What keeps records of a table on one side."""

    unit: str | None
    """The column whose values are on one side each: what is resampled whole in an interval."""

    named: bool
    """Whether somebody named it: else it is one of those below, and what none of its media keeps together is apart."""

    together: dict[str, npt.NDArray[np.int64]]
    """Of columns of media that records share, which (R,) hold the same; -1: none."""


class HeldOut(NamedTuple):
    """A table in two parts."""

    rest: Table
    aside: Table
    media: tuple[str, ...]
    """Columns by whose content they were told apart."""

    by: str
    """How, in words."""

    notes: tuple[str, ...]
    """Which media may be on both sides, and why."""


def belonging(table: Table, media: Sequence[str], unit: str | None) -> Belonging:
    """Of `media`, columns of media, which are shared. `unit` is a column; None: the first of `media` of which no more
    than SHARED are distinct, or each record by itself."""
    named = unit is not None
    together: dict[str, npt.NDArray[np.int64]] = {}
    for name in media:
        number_R = copies(table, name)
        there = number_R[number_R >= 0]
        distinct = len(np.unique(there))
        if unit is None and distinct < SHARED * len(there):
            unit = name
        if distinct < len(there):
            together[name] = number_R
    return Belonging(unit, named, together)


def hold_out(table: Table, share: float, belongs: Belonging, *, seed: int) -> HeldOut:
    """Put about `share` of the units aside; the same seed splits a table alike.

    Raises:
        ConfigError: the unit is no column.
        Inseparable: there is no second unit.
    """
    unit = belongs.unit
    kept, across = _separable(table, belongs)
    # By its column, a blank that half the records have would be a unit as well.
    column = unit if belongs.named else None
    rest, aside = split_table(table, share, unit=column, seed=seed, together=list(kept.values()))
    by = f"by {unit}" if unit else "by record"
    by += "".join(f", those with the same {name} on one side" for name in kept if name != unit)
    notes = [
        f"{name}: what several records share may be on both sides, since all else that they share would follow it"
        for name in across
    ]
    return HeldOut(rest, aside, tuple(kept), by, tuple(notes))


def _separable(table: Table, belongs: Belonging) -> tuple[dict[str, npt.NDArray[np.int64]], list[str]]:
    """The columns by whose media a split can go, the unit's first; and those by which too many records would hang
    together: pictures that share recordings, and recordings that share pictures."""
    unit, named, together = belongs
    kept: dict[str, npt.NDArray[np.int64]] = {}
    across = []
    groups = [unit_numbers(table, unit)] if unit is not None and named else []
    for name in sorted(together, key=lambda name: name != unit):
        further = [*groups, together[name]]
        if name == unit or largest_group(further) <= max(MOST_TOGETHER * table.num_rows, largest_group(groups)):
            groups, kept[name] = further, together[name]
        else:
            across.append(name)
    return kept, across
