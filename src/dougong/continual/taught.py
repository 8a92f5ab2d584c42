"""A bundle that has been taught, as its user asks it: told the task, or left to find it.

Here        Taught (predict, evaluate), Answer, `open_taught`.
Elsewhere   the forward (continual/elastic.py); finding the task (continual/recognition.py); a bundle's own task, asked
            as ever (bundle/model.py).
Promise     one batch may have records of many tasks, in one forward; a record is answered by the task that was named,
            or by the one it was found to be of, or not at all: "none of these" is an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dougong.bundle.files import load_network_from
from dougong.bundle.model import BATCH_SIZE, Model, Prediction, Rows
from dougong.continual.elastic import Elastic, ElasticOutput
from dougong.continual.recognition import Features, Recognition, frozen_features, num_features
from dougong.continual.tasks import (
    ORIGINAL,
    Part,
    Task,
    elastic_of,
    extra_modality,
    known_tasks,
    read_original,
    read_parts,
)
from dougong.core.bundle import Manifest, bundle_in, read_bundle
from dougong.core.errors import BundleError, ConfigError, DataError
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request, View
from dougong.data.corruption import Corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.medium import Modality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.data.table import Table, open_table
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.decision import decision_probabilities

AUTO: Final = "auto"
SURE: Final = 0.99
"""Above this chance of one task, no adapter is asked how sure it is."""

ASKED: Final = 3
"""Tasks that are asked otherwise."""


class Answer(Prediction):
    """The answer to one record, and which task's it is."""

    task: str | None = None
    """None: it is of none that is known here, and has no answer."""

    task_confidence: float | None = None
    """Chance of that task among all; None where the task was given."""


class _Item(NamedTuple):
    """Who may answer: the base, or one part of a task."""

    key: str | None
    task: str
    part: Part | None


class _Voice(Model):
    """The base, answering in a task's labels."""

    def say(self, arrays: BatchArrays, said: ElasticOutput, place: int) -> Prediction:
        width = self.preparation.target.num_outputs
        own = said.output_BC[:, :width]
        output = said.base._replace(output_BC=own, opinion=None, conflict_B=None)
        return self._one_answer(arrays, output, place, int(arrays.row_B[place]))


class Taught:
    """A base with the tasks that were added to it."""

    def __init__(self, model: Model, manifest: Manifest, folder: Path) -> None:
        self.model, self.manifest = model, manifest
        self.parts = read_parts(folder, manifest)
        self.elastic: Elastic = elastic_of(model.network, self.parts)
        self.base: Sandwich = model.network
        self._items = [
            _Item(None, ORIGINAL, None),
            *(_Item(part.task.key, part.task.name, part) for part in self.parts),
        ]
        covered = {(part.task.name, number) for part in self.parts for number in part.task.covers}
        self._asked = [
            item for item in self._items if item.part is None or (item.task, item.part.task.number) not in covered
        ]
        original = read_original(folder, manifest)
        traits = {item.key: item.part.traits for item in self._asked if item.part is not None}
        traits[None] = original
        here = {part.task.name for part in self.parts}
        self._known = [
            item
            for item in self._asked
            if traits[item.key] is not None
            # Beside all that it was made of, a merged task would be as near as they are.
            and not (item.part is not None and item.part.task.merged and here.issuperset(item.part.task.merged))
        ]
        self.recognition = None
        if self._known:
            kept = [found for item in self._known if (found := traits[item.key]) is not None]
            size = num_features(self.base)
            if any(x_CF.shape[1] != size for each in kept for x_CF in each.mean.values()):
                raise BundleError(
                    f"{folder} keeps other traits of its tasks than are compared now, from an older version. "
                    "Learn the tasks again, from the bundle that they were added to."
                )
            self.recognition = Recognition(self.base.names, kept)
            self._sure = {item.key: found.sure for item, found in zip(self._known, kept, strict=True)}
        self.preparation = _with_extras(model.preparation, [part.task for part in self.parts])
        self._voices = {
            item.key: model
            if item.part is None
            else _Voice(self.base, Preparation(model.preparation.modalities, item.part.task.target), manifest)
            for item in self._items
        }
        self._first = _Voice(self.base, model.preparation, manifest)

    @property
    def tasks(self) -> list[str]:
        """Names, the original one first."""
        return list(dict.fromkeys(item.task for item in self._items))

    def task(self, name: str) -> Task:
        """The newest part of a task.

        Raises:
            ConfigError: there is no such task.
        """
        self.check(name)
        found = [part.task for part in self.parts if part.task.name == name]
        if not found:
            raise ConfigError(f"{ORIGINAL} is the bundle's own task and was not taught. {known_tasks(self.manifest)}")
        return found[-1]

    def predict(
        self,
        rows: Rows,
        task: str | Sequence[str] = AUTO,
        *,
        folder: str | Path = ".",
        batch_size: int = BATCH_SIZE,
    ) -> list[Answer]:
        """Answer records. `task` is a name for all, one for each record, or "auto", which may stand beside names too.

        Raises:
            ConfigError: a name is no task's, or there is not one for each record.
            DataError: the rows are of no known kind.
        """
        return list(self.answers(rows, task, folder=folder, batch_size=batch_size))

    def answers(
        self,
        rows: Rows,
        task: str | Sequence[str] = AUTO,
        *,
        folder: str | Path = ".",
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Answer]:
        """The same, one after the other, holding one batch at a time."""
        for name in {task} if isinstance(task, str) else set(task):
            self.check(name)
        place, chunks = _chunks(rows, Path(folder), batch_size)
        collator = Collator(self.preparation, place, seed=0, cache_bytes=64 * 2**20)
        start = 0
        for records in chunks:
            names = [task] * len(records) if isinstance(task, str) else list(task[start : start + len(records)])
            if len(names) != len(records):
                raise ConfigError(f"{len(task)} tasks are named for more records. Name one for each, or one for all.")
            yield from self._answer(collator, records, names, start)
            start += len(records)
        if not isinstance(task, str) and start != len(task):
            raise ConfigError(f"{len(task)} tasks are named for {start} records. Name one for each, or one for all.")

    def evaluate(
        self,
        table: Table | str | Path,
        task: str,
        *,
        keep: Sequence[str] | None = None,
        corruptions: Sequence[Corruption] = (),
        seed: int = 0,
    ) -> Evaluation:
        """The figures of a task's newest part on a table with its target in it, told the task. `keep` and
        `corruptions` as a model's own.

        Raises:
            ConfigError: there is no such task.
            DataError: the table lacks what it reads.
        """
        found = self.task(task)
        opened = table if isinstance(table, Table) else open_table(table)
        if found.target.name not in opened.schema.names:
            raise DataError(f"{opened.path.name} has no column {found.target.name!r} to judge against.")
        own = {
            name: renamed(modality, found.columns)
            for name, modality in self.model.preparation.modalities.items()
            if name in found.modalities
        }
        extras = {name: extra_modality(extra) for name, extra in found.extras.items()}
        preparation = Preparation({**own, **extras}, found.target)
        views = () if keep is None else (View(keep=tuple(name for name in preparation.modalities if name in keep)),)
        some = [one for one in corruptions if one.modality in preparation.modalities]
        loader = Loader(opened, preparation, LoaderConfig(batch_size=256), seed=seed, views=views, corruptions=some)
        self.elastic.active = found.key
        try:
            return evaluate(self.elastic, loader, found.target)
        finally:
            self.elastic.active = None

    def check(self, name: str) -> None:
        """
        Raises:
            ConfigError: it is no task's name, nor "auto".
        """
        if name != AUTO and name not in self.tasks:
            raise ConfigError(f"{name!r} is no task of this bundle. {known_tasks(self.manifest)} {AUTO!r} finds it.")

    def _answer(
        self, collator: Collator, records: Sequence[Mapping[str, Any]], names: Sequence[str], start: int
    ) -> Iterator[Answer]:
        cells = self._cells(records, names)
        arrays = collator(Request(np.arange(start, start + len(records)), cells, (0, start)))
        answers = {bad.row: Answer(row=bad.row, answer=None, error=f"{bad.column}: {bad.reason}") for bad in arrays.bad}
        if len(arrays.row_B):
            with torch.inference_mode():
                batch = to_tensors(arrays, next(self.base.parameters()).device)
                asked = [names[row - start] for row in arrays.row_B.tolist()]
                items, chances = self._find(batch, asked)
                keys = [None if item is None else item.key for item in items]
                said = self.elastic.answer(batch, keys)
                only = _without_extras(arrays, self.base.names)
                for place, row in enumerate(arrays.row_B.tolist()):
                    answers[row] = self._one(only, said, place, items[place], chances[place])
        for row in sorted(answers):
            yield answers[row]

    def _one(
        self, arrays: BatchArrays, said: ElasticOutput, place: int, item: _Item | None, chance: float | None
    ) -> Answer:
        row = int(arrays.row_B[place])
        rounded = None if chance is None else round(chance, 6)
        if item is None:
            return Answer(row=row, answer=None, task=None, task_confidence=rounded)
        voice = self._first if item.key is None else self._voices[item.key]
        assert isinstance(voice, _Voice)
        found = voice.say(arrays, said, place)
        return Answer(**found.model_dump(), task=item.task, task_confidence=rounded)

    # Which task ----------------------------------------------------------------------------------------------

    def _find(self, batch: Batch, names: Sequence[str]) -> tuple[list[_Item | None], list[float | None]]:
        """Who answers each record, and how likely that is where nobody said."""
        count = batch.num_records
        allowed_BS = torch.zeros(count, len(self._asked), dtype=torch.bool)
        for place, item in enumerate(self._asked):
            named_B = torch.tensor([name in (AUTO, item.task) for name in names])
            if item.part is not None and item.part.task.extras:
                having = [batch.media[name].present_B.cpu() for name in item.part.task.extras if name in batch.media]
                named_B &= torch.stack(having).any(dim=0) if having else torch.zeros(count, dtype=torch.bool)
            allowed_BS[:, place] = named_B
        # Told the task, a part that reads what a record has besides is asked before one that does not.
        for place, item in enumerate(self._asked):
            if item.part is not None and item.part.task.extras:
                for other, theirs in enumerate(self._asked):
                    if theirs.task == item.task and (theirs.part is None or not theirs.part.task.extras):
                        allowed_BS[:, other] &= ~allowed_BS[:, place]
        open_B = torch.tensor([name == AUTO for name in names])
        undecided_B = open_B | (allowed_BS.sum(dim=1) > 1)
        items: list[_Item | None] = [
            self._asked[int(row.nonzero()[-1])] if bool(row.any()) else None for row in allowed_BS
        ]
        chances: list[float | None] = [None] * count
        for row in open_B.nonzero()[:, 0].tolist():
            items[row] = self._items[0]  # until more is known
        if not bool(undecided_B.any()) or self.recognition is None:
            return items, chances
        row_R = undecided_B.nonzero()[:, 0]
        some = _rows(batch, row_R)
        features = _on_cpu(frozen_features(self.base, _of_base(some, self.base.names)))
        guess = self.recognition(features)
        place_of = {item.key: number for number, item in enumerate(self._asked)}
        place_K = torch.tensor([place_of[item.key] for item in self._known])
        score_RK = guess.score_BS.masked_fill(~allowed_BS[row_R][:, place_K], -1e9)
        score_RK = self._with_confidence(some, score_RK)
        chance_RK = score_RK.softmax(dim=1)
        original = self._items[0] if ORIGINAL not in {item.task for item in self._known} else None
        for number, row in enumerate(row_R.tolist()):
            best = int(chance_RK[number].argmax())
            if not bool(allowed_BS[row, place_K[best]]):
                continue  # none of those that may answer is known by traits: the newest does
            if bool(open_B[row]):
                chances[row] = float(chance_RK[number, best])
                # Where nothing is known of the original task, it is what is left.
                items[row] = self._known[best] if bool(guess.known_BS[number, best]) else original
            else:
                items[row] = self._known[best]
        return items, chances

    def _with_confidence(self, batch: Batch, score_RK: Tensor) -> Tensor:
        """Where more than one task is likely, how sure each would be of its answer, beside how sure it usually is."""
        chance_RK = score_RK.softmax(dim=1)
        unsure_R = (chance_RK.amax(dim=1) < SURE).nonzero()[:, 0]
        if not len(unsure_R) or len(self._known) < 2:
            return score_RK
        asked_NK = score_RK[unsure_R].topk(min(ASKED, len(self._known)), dim=1).indices
        row_N = unsure_R.repeat_interleave(asked_NK.shape[1])
        known_N = asked_NK.flatten()
        items = [self._known[place] for place in known_N.tolist()]
        said = self.elastic.answer(_rows(batch, row_N), [item.key for item in items])
        more = torch.full_like(score_RK, -10.0)  # who is not asked is left behind
        for number, item in enumerate(items):
            target = self.model.preparation.target if item.part is None else item.part.task.target
            sure = confidence_of(said.output_BC[number : number + 1, : target.num_outputs], target.task)
            more[row_N[number], known_N[number]] = float(sure) - self._sure[item.key]
        more[chance_RK.amax(dim=1) >= SURE] = 0.0
        return score_RK + more

    def _cells(self, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
        """By the base's columns, whatever the tasks call them."""
        cells: dict[str, list[Any]] = {}
        for column in self.preparation.columns:
            called = {part.task.name: part.task.columns.get(column, column) for part in self.parts}
            # Left to find the task, any of its names will do.
            aliases = list(dict.fromkeys([column, *called.values()]))
            cells[column] = [
                _first_of(record, aliases) if name == AUTO else record.get(called.get(name, column))
                for record, name in zip(records, names, strict=True)
            ]
        return cells


def open_taught(folder: Path) -> Taught:
    """A taught bundle, or the run that has it.

    Raises:
        BundleError: it is none, or is not whole.
    """
    place = bundle_in(folder)
    model = load_network_from(place)
    return Taught(model, read_bundle(place), place)


def renamed(modality: Modality, columns: Mapping[str, str]) -> Modality:
    """The same, reading the columns that a task's table has for it."""
    if isinstance(modality, TableModality):
        return modality
    (column,) = modality.columns
    if column not in columns:
        return modality
    config = modality.config.model_copy(update={"column": columns[column]})  # type: ignore[attr-defined]
    if isinstance(modality, TextModality):
        return TextModality(config, modality.tokenizer)
    found: Modality = type(modality)(config)  # type: ignore[call-arg]
    return found


def confidence_of(output_BC: Tensor, task: str) -> Tensor:
    """Logarithm of the likeliest class's probability, (B,); 0 where there are no classes."""
    if task != "single_label":
        return torch.zeros(len(output_BC))
    found: Tensor = decision_probabilities(output_BC, "single_label").amax(dim=1).clamp(min=1e-6).log()
    return found


def _with_extras(preparation: Preparation, tasks: Sequence[Task]) -> Preparation:
    extras = {name: extra_modality(extra) for task in tasks for name, extra in task.extras.items()}
    # The original target is nobody's to read here: records come without one.
    return Preparation({**preparation.modalities, **extras}, preparation.target, quality=preparation.quality)


def _without_extras(arrays: BatchArrays, names: Sequence[str]) -> BatchArrays:
    return arrays._replace(media={name: arrays.media[name] for name in names})


def _of_base(batch: Batch, names: Sequence[str]) -> Batch:
    return Batch({name: batch.media[name] for name in names}, batch.target)


def _on_cpu(features: Features) -> Features:
    return Features(
        {name: x.cpu() for name, x in features.x.items()}, {name: x.cpu() for name, x in features.present.items()}
    )


def _rows(batch: Batch, row_R: Tensor) -> Batch:
    """Some records, as often as they are named."""
    media: dict[str, MediaBatch] = {}
    for name, one in batch.media.items():
        there_R = None if one.there_B is None else one.there_B[row_R]
        media[name] = one._replace(index_B=one.index_B[row_R], present_B=one.present_B[row_R], there_B=there_R)
    return Batch(media, None if batch.target is None else batch.target[row_R])


def _first_of(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _chunks(rows: Rows, folder: Path, size: int) -> tuple[Path, Iterator[list[Mapping[str, Any]]]]:
    """Where paths begin, and records in batches."""
    if isinstance(rows, str | Path):
        rows = open_table(rows)
    if isinstance(rows, Table):
        return rows.folder, _table_chunks(rows, size)
    if isinstance(rows, pa.Table):
        rows = rows.to_pylist()
    records: object = rows
    if not isinstance(records, Sequence) or not all(isinstance(row, Mapping) for row in records):
        raise DataError(f"cannot read {type(rows).__name__} as records. Give a list of dicts, or a table's path.")
    return folder, (list(records[start : start + size]) for start in range(0, len(records), size))


def _table_chunks(table: Table, size: int) -> Iterator[list[Mapping[str, Any]]]:
    for chunk in range(table.num_chunks):
        held = table.read(chunk, table.schema.names)
        for start in range(0, held.num_rows, size):
            yield held.slice(start, size).to_pylist()
