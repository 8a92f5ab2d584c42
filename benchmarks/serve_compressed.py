"""The compressed easy-VQA bundle, asked over HTTP.

Here        the part `compressed` of serve.py: a teacher of pictures and questions as it is, its int8 graphs, and the
            int8 graphs of its student of a quarter of the parameters, each served; p50 and p99 at half of what callers
            that wait get from each.
Elsewhere   the teacher and its student (students.py, compress_path.py), trained once and kept; starting and asking
            servers (serve_asking.py).
Promise     what is served is a folder on the disk, by `dougong serve`'s own workers, with its defaults; requests are
            test records of the collection, picture and question, as JSON. Arrivals are by chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compress_path import CALIBRATION_RECORDS, at_bits, batches, student_for
from harness import Kept
from serve_asking import CALLERS, closed, opened, side, spread
from students import EASY_VQA, teacher_of

from dougong.compress.export import Source
from dougong.core.figures import Figure
from dougong.data.modality.medium import media_bytes
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.serve.event_loop import run_fast

TEACHER: Final = "teacher, as it is"
WAYS: Final = (TEACHER, "teacher-int8", "student-int8")
RECORDS = 200
SLO_SECONDS = 0.05


def compressed(quick: bool) -> Iterator[Figure]:
    repeats, seconds = (1, 2.0) if quick else (3, 10.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles, rows = easy_vqa(folder, WAYS, quick)
        for way, bundle in bundles.items():
            rates, halves, tails = [], [], []
            for repeat in range(repeats):
                with side("ours", "bundle", str(bundle), "", str(SLO_SECONDS), folder=folder) as started:
                    most = run_fast(closed(started, "ours", CALLERS, seconds, rows)).rate
                    calm = run_fast(opened(started, 0.5 * most, seconds, SLO_SECONDS, seed=repeat, rows=rows))
                rates.append(most)
                halves.append(1e3 * calm.quantiles["0.5"])
                tails.append(1e3 * calm.quantiles["0.99"])
            asked = {"asked": "<= 12"} if bundle.name == "student-int8" else {}
            yield spread(f"easy-VQA, {way}: answered to {CALLERS} callers", rates, "1/s")
            yield spread(f"easy-VQA, {way}: p50 at half of that", halves, "ms", **asked)
            yield spread(f"easy-VQA, {way}: p99 at half of that", tails, "ms")


def easy_vqa(folder: Path, ways: Sequence[str], quick: bool) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """What is served, by name (of WAYS), and records to ask about."""
    kept = Kept("compress")
    taught = teacher_of(EASY_VQA, 0, kept, quick=quick)
    calibration = batches(taught.teacher, taught.tables.train, 32, CALIBRATION_RECORDS)
    found = {}
    for way in ways:
        if way == TEACHER:
            found[way] = taught.teacher.save(folder / "teacher")
        else:
            model = student_for(EASY_VQA, 0, kept, quick) if way == "student-int8" else taught.teacher
            found[way] = at_bits("w8a8", Source(model), calibration, folder / way)
    return found, _rows(sample_table(taught.tables.test, RECORDS, seed=0), taught.teacher.preparation.columns)


def _rows(table: Table, columns: list[str]) -> list[dict[str, Any]]:
    return [
        {column: _content(record.get(column), table.folder) for column in columns if record.get(column) is not None}
        for record in table.first(0, RECORDS, columns).to_pylist()
    ]


def _content(cell: Any, folder: Path) -> Any:
    """A medium's encoded file; anything else as it is."""
    return media_bytes(cell, folder) if isinstance(cell, Mapping) else cell
