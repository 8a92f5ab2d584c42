"""A trained model as its user has it: loaded from a bundle, asked for predictions, saved again.

Here        Model (predict, evaluate, save), load, Prediction.
Elsewhere   the bundle's files and sums (core/bundle.py); training one (recipes/); reading records (data/); an export's
            graphs in the place of a network (exported.py).
Promise     what is saved and loaded answers the same; a record with any modality withheld is answered; a record that
            cannot be read gets its reason in place of an answer, and its neighbours theirs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from dougong.bundle.exported import KIND, EngineConfig, EngineNetwork, open_exported
from dougong.bundle.saving import load_network, save_bundle
from dougong.core.bundle import Manifest, read_bundle
from dougong.core.config import Config, parse
from dougong.core.errors import BundleError, ConfigError, DataError
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request, View
from dougong.data.corruption import Corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation
from dougong.data.table import Table, open_table
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.model.sandwich import Sandwich, SandwichConfig, SandwichOutput
from dougong.objectives.decision import decision_probabilities

BATCH_SIZE: Final = 64

Rows: TypeAlias = "Sequence[Mapping[str, Any]] | Table | pa.Table | str | Path"


class Prediction(Config):
    """The answer to one record."""

    row: int
    """The record's place, from 0."""

    answer: str | float | list[str] | None
    """A label, a number, or the labels that hold; None where `error` says why there is none."""

    confidence: float | None = None
    """Of a label: its probability."""

    probabilities: dict[str, float] = {}
    """Of every label; empty for a number."""

    gate: dict[str, float] = {}
    """How much each modality counted."""

    absent: tuple[str, ...] = ()
    """Modalities that the record lacked."""

    vacuity: float | None = None
    """How little evidence there is, 0 to 1; of a model that decides by evidence."""

    conflict: float | None = None
    """How far the modalities' own decisions are apart, 0 to 1; of a model in which they decide by themselves."""

    completed: tuple[str, ...] = ()
    """Of those, the ones that were made up from the others before the answer."""

    error: str | None = None


class Model:
    """A network with the preparation that feeds it."""

    def __init__(self, network: Sandwich, preparation: Preparation, manifest: Manifest) -> None:
        self.network = network.eval()
        self.preparation = preparation
        self.manifest = manifest
        self._device = next(network.parameters()).device

    def __repr__(self) -> str:
        inputs = ", ".join(self.preparation.modalities)
        return f"<dougong.Model {self.manifest.name!r}: {inputs} -> {self.preparation.target.name}>"

    @property
    def is_export(self) -> bool:
        """Whether graphs answer in the network's place: it can be asked and judged, not trained or looked into."""
        return isinstance(self.network, EngineNetwork)

    def predict(
        self, rows: Rows, *, withhold: Sequence[str] = (), folder: str | Path = ".", batch_size: int = BATCH_SIZE
    ) -> list[Prediction]:
        """Answer records: a list of dicts, a path of a table, or an Arrow table.

        A cell is what the column had in training; media may be bytes, a path below `folder`, or a Pillow picture.
        Columns may be missing. `withhold` names modalities to answer without.

        Raises:
            ConfigError: `withhold` names no modality.
            DataError: the rows are of no known kind, or have none of the model's columns.
        """
        return list(self.predictions(rows, withhold=withhold, folder=folder, batch_size=batch_size))

    def predictions(
        self, rows: Rows, *, withhold: Sequence[str] = (), folder: str | Path = ".", batch_size: int = BATCH_SIZE
    ) -> Iterator[Prediction]:
        """The same, one after the other, holding one batch at a time."""
        names = list(self.preparation.modalities)
        strange = [name for name in withhold if name not in names]
        if strange:
            raise ConfigError(f"withhold {strange[0]!r} is no modality of this model. Use some of {', '.join(names)}.")
        views = (View(keep=tuple(name for name in names if name not in withhold)),)
        place, requests = self._requests(rows, Path(folder), batch_size)
        collator = Collator(self.preparation, place, seed=0, views=views, cache_bytes=64 * 2**20)
        for request in requests:
            yield from self._answer(collator(request))

    def evaluate(
        self,
        table: Table | str | Path,
        *,
        keep: Sequence[str] | None = None,
        corruptions: Sequence[Corruption] = (),
        seed: int = 0,
    ) -> Evaluation:
        """The figures on a table with the target in it, seen by the modalities in `keep` (None: all).

        `corruptions` spoils media first; how each is spoilt follows from the medium and `seed` alone.

        Raises:
            ConfigError: a corruption names what is not there.
            DataError: the table has no target, or not one usable record.
        """
        opened = table if isinstance(table, Table) else open_table(table)
        if self.preparation.target.name not in opened.schema.names:
            raise DataError(f"{opened.path.name} has no column {self.preparation.target.name!r} to judge against.")
        opened = self._with_all_columns(opened)
        views = () if keep is None else (View(keep=tuple(keep)),)
        config = LoaderConfig(batch_size=256)
        loader = Loader(opened, self.preparation, config, seed=seed, views=views, corruptions=corruptions)
        return evaluate(self.network, loader, self.preparation.target)

    def explain(self, rows: Sequence[Mapping[str, Any]], *, folder: str | Path = ".") -> tuple[BatchArrays, Any]:
        """One batch of records and the network's intermediates on it, attention included.

        Raises:
            ConfigError: an export's inner values stay inside its engine.
        """
        if self.is_export:
            raise ConfigError("an export shows nothing of its inside. Ask the bundle that it was exported from.")
        place, requests = self._requests(rows, Path(folder), max(1, len(rows)))
        arrays = Collator(self.preparation, place, seed=0)(next(iter(requests)))
        with torch.inference_mode():
            return arrays, self.network.explain(to_tensors(arrays, self._device))

    def save(self, folder: str | Path) -> Path:
        """Write a bundle; an older bundle at that place is replaced at once and whole.

        Raises:
            BundleError: the folder holds something else, or this is an export.
        """
        if self.is_export:
            raise BundleError(f"an export has no weights to save. Copy its folder to {folder} instead.")
        return save_bundle(folder, self.manifest, self.preparation, self.network, model_card(self.manifest))

    def _requests(self, rows: Rows, folder: Path, batch_size: int) -> tuple[Path, Iterator[Request]]:
        """Where the records' paths begin, and the records in batches."""
        if isinstance(rows, str | Path):
            rows = open_table(rows)
        if isinstance(rows, Table):
            return rows.folder, self._table_requests(rows, batch_size)
        if isinstance(rows, pa.Table):
            rows = rows.to_pylist()
        records: object = rows
        if not isinstance(records, Sequence) or not all(isinstance(row, Mapping) for row in records):
            raise DataError(f"cannot read {type(rows).__name__} as records. Give a list of dicts, or a table's path.")
        self._check_columns({str(key) for row in rows for key in row})
        return folder, self._row_requests(rows, batch_size)

    def _row_requests(self, rows: Sequence[Mapping[str, Any]], batch_size: int) -> Iterator[Request]:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            cells = {column: [_cell(row.get(column)) for row in part] for column in self.preparation.columns}
            yield Request(np.arange(start, start + len(part)), cells, (0, start))

    def _table_requests(self, table: Table, batch_size: int) -> Iterator[Request]:
        self._check_columns(set(table.schema.names))
        known = [column for column in self.preparation.columns if column in table.schema.names]
        for chunk in range(table.num_chunks):
            held, numbers = table.read(chunk, known), table.numbers_of(chunk)
            for start in range(0, held.num_rows, batch_size):
                part = held.slice(start, batch_size)
                cells = {column: [None] * part.num_rows for column in self.preparation.columns}
                cells.update({column: part.column(column).to_pylist() for column in known})
                yield Request(numbers[start : start + batch_size], cells, (chunk, start))

    def _check_columns(self, given: set[str]) -> None:
        wanted = self.preparation.columns
        if given and not given & set(wanted):
            raise DataError(
                f"the records have the columns {', '.join(sorted(given))}, and the model reads {', '.join(wanted)}. "
                "Name at least one of those."
            )

    def _with_all_columns(self, table: Table) -> Table:
        missing = [column for column in self.preparation.columns if column not in table.schema.names]
        if missing:
            raise DataError(f"{table.path.name} lacks the column {missing[0]!r}. Leave its cells empty where unknown.")
        return table

    def _answer(self, arrays: BatchArrays) -> Iterator[Prediction]:
        answers: dict[int, Prediction] = {
            bad.row: Prediction(row=bad.row, answer=None, error=f"{bad.column}: {bad.reason}") for bad in arrays.bad
        }
        if len(arrays.row_B):
            with torch.inference_mode():
                output = self.network(to_tensors(arrays, self._device))
            for place, row in enumerate(arrays.row_B.tolist()):
                answers[row] = self._one_answer(arrays, output, place, row)
        for row in sorted(answers):
            yield answers[row]

    def _one_answer(self, arrays: BatchArrays, output: SandwichOutput, place: int, row: int) -> Prediction:
        target = self.preparation.target
        names = list(self.preparation.modalities)
        absent = tuple(name for name in names if not arrays.media[name].present_B[place])
        completed = tuple(name for name, made in zip(names, output.completed_BM[place].tolist(), strict=True) if made)
        lacked: dict[str, Any] = {"absent": absent, "completed": completed}
        gate = {} if output.weight_BM is None else dict(zip(names, _rounded(output.weight_BM[place]), strict=True))
        if target.task == "regression":
            number = float(output.output_BC[place, 0]) * target.scale + target.mean
            return Prediction(row=row, answer=number, gate=gate, **lacked)
        chances = decision_probabilities(output.output_BC[place : place + 1], target.task)[0]
        probabilities = dict(zip(target.labels, _rounded(chances), strict=True))
        if target.task == "multi_label":
            chosen = [label for label, chance in probabilities.items() if chance >= 0.5]
            return Prediction(row=row, answer=chosen, probabilities=probabilities, gate=gate, **lacked)
        best = int(chances.argmax())
        opinion, conflict_B = output.opinion, output.conflict_B
        return Prediction(
            row=row,
            answer=target.labels[best],
            confidence=round(float(chances[best]), 6),
            probabilities=probabilities,
            gate=gate,
            vacuity=None if opinion is None else round(float(opinion.vacuity_B[place]), 6),
            conflict=None if conflict_B is None else round(float(conflict_B[place]), 6),
            **lacked,
        )


def load(folder: str | Path, engine: EngineConfig | None = None, *, trusted: bool = False) -> Model:
    """A model from its bundle or its export; the sum of every file is checked first, and nothing is unpickled.

    `engine` is how an export's graphs use the machine. A torch.export package is opened only where it is `trusted`
    (exported.py).

    Raises:
        BundleError: it is not a whole, unaltered bundle.
        ConfigError: an export's library is not installed, or it is code and not trusted.
    """
    folder = Path(folder)
    manifest = read_bundle(folder)
    if manifest.kind == KIND:
        preparation, network = open_exported(folder, manifest, engine, trusted=trusted)
        return Model(network, preparation, manifest)
    if manifest.kind is not None:
        what = "model that gives vectors" if manifest.kind == "align" else manifest.kind
        raise BundleError(f"{folder} holds a {what}, not a model that decides. See dougong --help.")

    def build() -> Sandwich:
        return parse(SandwichConfig, manifest.model, where="the bundle's model").build(manifest.signature)

    preparation, network = load_network(folder, manifest, build)
    return Model(network, preparation, manifest)


def model_card(manifest: Manifest) -> str:
    """What the model is, and its measured figures, for people."""
    target = manifest.signature.target
    lines = [
        f"# {manifest.name}",
        "",
        f"Predicts `{target.name}` ({target.task.replace('_', ' ')}) from {', '.join(manifest.signature.inputs)}.",
        "",
        "Load it with `dougong.load(FOLDER)`, or ask it with `dougong predict FOLDER IN OUT`.",
        "",
        "## Measured",
        "",
    ]
    names = sorted({name for metrics in manifest.metrics.values() for name in metrics})
    if names:
        lines += [f"| condition | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for condition, metrics in manifest.metrics.items():
            figures = " | ".join(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)
            lines.append(f"| {condition} | {figures} |")
    else:
        lines.append("Nothing was measured.")
    lines += ["", "## Where it comes from", ""]
    lines += [f"- {key}: {_plain(value)}" for key, value in manifest.provenance.items()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> Any:
    """What people hold in a notebook, as a table would hold it."""
    if isinstance(value, Image.Image):
        content = io.BytesIO()
        value.save(content, format="PNG")
        return content.getvalue()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and np.isnan(value):
        return None  # how pandas writes a missing value
    return value


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.float().tolist()]
