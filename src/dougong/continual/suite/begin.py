"""Writes a suite from a model and the records that it was tested on.

Here        `begin_suite`.
Elsewhere   what the checks mean (suite.py); which records a run was tested on (recipes/, asked by the command).
Promise     the suite is whole in its folder, records included, so that it can be kept under version control and asked
            on another machine; the model that it was written from passes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dougong.continual.suite.ask import ask
from dougong.continual.suite.suite import (
    Change,
    Dataset,
    InvarianceCheck,
    LatencyCheck,
    MemoryCheck,
    MetricCheck,
    MinimumCheck,
    Slice,
    Suite,
    write_suite,
)
from dougong.continual.taught import Taught
from dougong.core.errors import ConfigError
from dougong.core.files import whole_file
from dougong.data.columns import infer_role
from dougong.data.corruption import Corruption
from dougong.data.modality.audio import AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.medium import BadValue, media_bytes
from dougong.data.split import sample_table
from dougong.data.table import Table, cells_of, open_table

MOST_RECORDS: Final = 2000
MOST_VALUES: Final = 12
FEWEST_IN_SLICE: Final = 30
SIMPLE: Final = 20
SPOILT: Final = 0.5
HARDLY_SPOILT: Final = 0.1
ROOM: Final = 0.05
"""Between what the model does and what is asked of the next one."""

APART: Final = 3.0
"""Standard deviations of equally good versions that are tolerated: two of them differ by sqrt(2) of one."""


def begin_suite(
    taught: Taught,
    table: Table,
    path: Path,
    *,
    name: str,
    unit: str | None = None,
    seed: int = 0,
    also: Sequence[Taught] = (),
) -> Suite:
    """Write `path`, and its records beside it: slices of all columns with few values, each modality missing, each
    spoilt, answers that hardly spoilt media must not change, records that every version must answer, time and memory.

    `also` are versions that are as good, trained with other seeds: what they differ by in a check or slice becomes its
    tolerance. Without them it is the same for all, and a check that moves more with the seed will refuse good versions.

    Raises:
        ConfigError: `path` is there already.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already, and may have been changed by hand. Name another file.")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{path} does not end in .yaml. Name for example suites/{name}.yaml.")
    preparation = taught.model.preparation
    target = preparation.target
    if unit is not None and unit not in table.schema.names:
        raise ConfigError(f"unit {unit!r} is no column. Use one of {', '.join(table.schema.names)}.")
    rows = _with_media(sample_table(table, MOST_RECORDS, seed=seed), taught)
    records = path.parent / f"{path.stem}-data" / "test.parquet"
    with whole_file(records) as temporary:
        pq.write_table(rows, temporary, compression="zstd")
    kept = open_table(records)
    data = {"test": Dataset(table=records.relative_to(path.parent).as_posix(), unit=unit)}
    slices = _slices(kept, taught)
    modalities = list(preparation.modalities)
    checks: list[Any] = [MetricCheck(name="all records", data="test", slices=slices)]
    if len(modalities) > 1:
        checks += [MetricCheck(name=f"without {each}", data="test", without=(each,)) for each in modalities]
    checks += [
        MetricCheck(name=f"{each} spoilt", data="test", corrupt=(str(Corruption(modality=each, level=SPOILT)),))
        for each in modalities
    ]
    for each in modalities:
        little = Corruption(modality=each, level=HARDLY_SPOILT)
        share = _share_that_changes(taught, kept, little, seed)
        if target.task != "regression" and share is not None and share < 0.5:
            checks.append(
                InvarianceCheck(
                    name=f"{each} hardly spoilt",
                    data="test",
                    change=Change(corrupt=str(little)),
                    most_changed=round(min(0.9, share + ROOM), 3),
                )
            )
    simple = _simple(taught, kept) if target.task == "single_label" else None
    if simple is not None:
        file = records.with_name("simple.parquet")
        with whole_file(file) as temporary:
            pq.write_table(simple, temporary, compression="zstd")
        data["simple"] = Dataset(table=file.relative_to(path.parent).as_posix())
        checks.append(MinimumCheck(name="simple records", data="simple", least=0.9))
    checks += [LatencyCheck(name="latency", data="test"), MemoryCheck(name="memory", data="test")]
    suite = Suite(name=name, data=data, checks=tuple(checks), seed=seed)
    if also:
        suite = _tolerant(suite, [taught, *also], path.parent)
    write_suite(path, suite)
    return suite


def _tolerant(suite: Suite, versions: Sequence[Taught], folder: Path) -> Suite:
    """The same, each check and slice with a tolerance of what equally good versions differ by."""
    asked = [ask(version, suite, folder).scored for version in versions]
    apart = {}
    for place, one in enumerate(asked[0]):
        means = [float(scored[place].score_N.mean()) if len(scored[place].score_N) else 0.0 for scored in asked]
        apart[one.check, one.slice] = round(max(suite.tolerance, APART * float(np.std(means, ddof=1))), 4)
    checks: list[Any] = []
    for check in suite.checks:
        if (check.name, "") not in apart:
            checks.append(check)
            continue
        changes: dict[str, Any] = {"tolerance": apart[check.name, ""]}
        if isinstance(check, MetricCheck):
            changes["slices"] = tuple(
                part.model_copy(update={"tolerance": apart[check.name, str(part)]}) for part in check.slices
            )
        checks.append(check.model_copy(update=changes))
    return suite.model_copy(update={"checks": tuple(checks)})


def _with_media(table: Table, taught: Taught) -> pa.Table:
    """All rows, with the bytes of their media in place of paths."""
    rows = pa.concat_tables([table.read(chunk, table.schema.names) for chunk in range(table.num_chunks)])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for modality in taught.model.preparation.modalities.values():
        if not isinstance(modality, ImageModality | AudioModality):
            continue
        (column,) = modality.columns
        if column not in rows.column_names:
            continue
        cells = [_inline(cell, table.folder) for cell in cells_of(rows.column(column))]
        rows = rows.set_column(rows.column_names.index(column), column, pa.array(cells, kind))
    return rows


def _inline(cell: Any, folder: Path) -> dict[str, Any] | None:
    if cell is None:
        return None
    path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    try:
        return {"bytes": media_bytes(cell, folder), "path": path}
    except BadValue:
        return {"bytes": None, "path": path}  # it could not be read here, and cannot be there


def _slices(table: Table, taught: Taught) -> tuple[Slice, ...]:
    target = taught.model.preparation.target
    sample = table.head(1000)
    found: list[Slice] = []
    for name in table.schema.names:
        role = infer_role(sample.column(name), name).role
        if name != target.name and role != "category":
            continue
        if name == target.name and target.task != "single_label":
            continue
        cells = cells_of(table.column(name))
        values = sorted({cell for cell in cells if isinstance(cell, str | int | bool)}, key=str)
        often = [value for value in values if cells.count(value) >= FEWEST_IN_SLICE]
        found += [Slice(column=name, value=value) for value in often[:MOST_VALUES]]
    return tuple(found)


def _share_that_changes(taught: Taught, table: Table, corruption: Corruption, seed: int) -> float | None:
    as_it_is = taught.model.evaluate(table)
    spoilt = taught.model.evaluate(table, corruptions=[corruption], seed=seed)
    if not np.array_equal(as_it_is.row_B, spoilt.row_B) or not len(as_it_is.row_B):
        return None
    same_B = as_it_is.prediction_B == spoilt.prediction_B
    return 1.0 - float(np.mean(same_B if same_B.ndim == 1 else same_B.all(axis=1)))


def _simple(taught: Taught, table: Table) -> pa.Table | None:
    """Records that the model answers rightly and surely, of as many labels as there are."""
    found = taught.model.evaluate(table)
    if found.target_B is None or found.probability_BC is None:
        return None
    sure_B = found.probability_BC.max(axis=1)
    right = np.flatnonzero((found.prediction_B == found.target_B) & (sure_B > 0.95))
    if len(right) < SIMPLE // 2:
        return None
    order = right[np.argsort(-sure_B[right], kind="stable")]
    chosen: list[int] = []
    # The surest of each label in turn.
    by_label = {
        label: [place for place in order if found.target_B[place] == label] for label in set(found.target_B[order])
    }
    while len(chosen) < min(SIMPLE, len(order)):
        for places in by_label.values():
            if places and len(chosen) < SIMPLE:
                chosen.append(places.pop(0))
    rows = pa.concat_tables([table.read(chunk, table.schema.names) for chunk in range(table.num_chunks)])
    return rows.take(pa.array(sorted(found.row_B[chosen].tolist()), pa.int64()))
