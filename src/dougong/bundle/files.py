"""Predictions from file to file.

Here        predict_file; load_from and load_network_from, for folders that people name.
Elsewhere   answering records (bundle/model.py); reading tables (data/table.py).
Promise     the answers appear whole or not at all, one for each record, in the records' order.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from dougong.bundle.exported import KIND, EngineConfig
from dougong.bundle.model import Model, Prediction, load
from dougong.core.bundle import bundle_in, is_bundle, kind_of
from dougong.core.errors import BundleError, ConfigError
from dougong.core.files import whole_file
from dougong.data.table import Table, open_table

ENDINGS: Final = (".jsonl", ".csv", ".parquet")
ROWS_PER_GROUP: Final = 5000


def load_from(folder: Path, engine: EngineConfig | None = None) -> Model:
    """A model from a bundle, from an export (whose graphs run as `engine` says), or from the run that made one.

    Raises:
        BundleError: there is none.
        ConfigError: an export cannot be opened here (model.py).
    """
    if is_bundle(folder) or not folder.exists():
        return load(folder, engine)
    if is_bundle(folder / "bundle"):
        return load(folder / "bundle", engine)
    raise BundleError(f"{folder} is neither a bundle nor a finished run: it has no bundle.json and no bundle/ in it.")


def load_network_from(folder: Path) -> Model:
    """The same, for who looks into its network or changes it.

    Raises:
        BundleError: there is none, or it is an export.
    """
    place = bundle_in(folder)
    if is_bundle(place) and kind_of(place) == KIND:
        raise BundleError(
            f"{folder} holds an export, which shows and learns nothing: give the bundle that it was exported from."
        )
    return load_from(folder)


def predict_file(
    model: Path | Model,
    records: Path,
    answers: Path,
    withhold: Sequence[str] = (),
    *,
    answer: Callable[[Table], Iterator[Prediction]] | None = None,
    kind: type[Prediction] = Prediction,
) -> dict[str, int | str]:
    """Answer every record of a table into a file; says how many were answered and how many refused.

    `model` is a bundle's or a run's folder, or what has been loaded of one. `answer` makes answers of this kind in
    another way than the bundle's own.

    Raises:
        ConfigError: `answers` has no known ending, or is the table itself.
    """
    if answers.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{answers.name} ends in {answers.suffix!r}: answers are written as {', '.join(ENDINGS)}.")
    if answers.exists() and records.exists() and answers.samefile(records):
        raise ConfigError(f"{answers} is the table of records itself: give the answers another file.")
    if answer is None:
        loaded = load_from(model) if isinstance(model, Path) else model
    table = open_table(records)
    counts = {"answered": 0, "refused": 0}
    with whole_file(answers) as temporary:
        writer = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[answers.suffix.lower()]
        predictions = loaded.predictions(table, withhold=withhold) if answer is None else answer(table)
        for counted in writer(temporary, predictions, kind):
            counts["refused" if counted.error is not None else "answered"] += 1
    return {**counts, "path": str(answers)}


def _flat(prediction: Prediction) -> dict[str, Any]:
    """One row of a flat file; lists and maps as JSON."""
    values = prediction.model_dump()
    return {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else value
        for key, value in values.items()
    }


def _write_jsonl(path: Path, predictions: Any, kind: type[Prediction]) -> Any:
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(prediction.model_dump_json() + "\n")
            yield prediction


def _write_csv(path: Path, predictions: Any, kind: type[Prediction]) -> Any:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(kind.model_fields))
        writer.writeheader()
        for prediction in predictions:
            writer.writerow(_flat(prediction))
            yield prediction


def _write_parquet(path: Path, predictions: Any, kind: type[Prediction]) -> Any:
    text = pa.string()
    numbers = ("confidence", "vacuity", "conflict", "task_confidence")
    kinds = {"row": pa.int64(), **dict.fromkeys(numbers, pa.float64())}
    schema = pa.schema([pa.field(name, kinds.get(name, text)) for name in kind.model_fields])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        held: list[dict[str, Any]] = []
        for prediction in predictions:
            row = _flat(prediction)
            row["answer"] = None if row["answer"] is None else str(row["answer"])
            held.append(row)
            if len(held) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(held, schema))
                held = []
            yield prediction
        if held:
            writer.write_table(pa.Table.from_pylist(held, schema))
