"""Reads every record of a table and says which cannot be used, and how good the others are.

Here        check_table, TableReport.
Elsewhere   what makes a record bad (data/modality/, data/target.py); adding up quality (data/worst.py).
Promise     every record is decoded; the counts are exact, the listing is cut at a stated length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from dougong.data.batch import BadRecord
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation
from dougong.data.table import Table
from dougong.data.worst import FigureSummary, QualityTally, TextTroubles, find_text_troubles

LISTED: Final = 1000


class TableReport(NamedTuple):
    """What a whole reading found."""

    num_rows: int
    num_bad: int
    bad: tuple[BadRecord, ...]
    """The first thousand."""

    num_present: dict[str, int]
    """By modality, of the usable records."""

    num_batches: int

    quality: dict[str, tuple[FigureSummary, ...]]
    """By modality, of the usable records."""

    troubles: dict[str, tuple[TextTroubles, ...]]
    """With the letters of texts, by modality."""


def check_table(
    table: Table, preparation: Preparation, announce: Callable[[int, int], None] | None = None
) -> TableReport:
    """Decode every record. `announce` hears how many rows are done, and of how many."""
    loader = Loader(table, preparation, LoaderConfig(batch_size=256), quality=True)
    tally = QualityTally()
    bad: list[BadRecord] = []
    num_bad = done = batches = 0
    present = dict.fromkeys(preparation.modalities, 0)
    for batch in loader.one_pass():
        num_bad += len(batch.bad)
        bad.extend(batch.bad[: LISTED - len(bad)])
        for name, media in batch.media.items():
            present[name] += int(media.present_B.sum())
        tally.add(batch)
        batches += 1
        done += len(batch.row_B) + len(batch.bad)
        if announce is not None:
            announce(done, table.num_rows)
    return TableReport(
        table.num_rows,
        num_bad,
        tuple(bad),
        present,
        batches,
        tally.summary(preparation),
        find_text_troubles(table, preparation),
    )
