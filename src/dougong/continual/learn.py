"""Teaches a bundle one more task, and leaves all that it could as it was.

Here        LearnConfig, Learnt, `learn`; `learn_original`, by which records of the bundle's own task are known.
Elsewhere   what is added (continual/adapters.py, prompt.py, extra.py); the loop (engine/trainer.py); a folder that
            grows (continual/stream.py).
Promise     nothing of the bundle changes but that a part is added, at the end and whole; learning that was killed goes
            on with `resume`; what is judged was held out of learning.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from torch import Tensor

from dougong.bundle.files import load_network_from
from dougong.bundle.model import Model
from dougong.continual.adapters import TaskParts, layers_of, rank_within
from dougong.continual.elastic import Elastic, ElasticOutput
from dougong.continual.extra import ExtraModality
from dougong.continual.origin import program
from dougong.continual.prompt import PromptNetwork
from dougong.continual.recognition import Features, Traits, frozen_features, traits_of
from dougong.continual.rehearsal import RehearsalStore
from dougong.continual.tasks import (
    Extra,
    Part,
    Task,
    add_original,
    add_part,
    base_sum,
    build_parts,
    check_name,
    extra_modality,
    hidden_width,
    read_original,
    read_parts,
)
from dougong.continual.taught import confidence_of, renamed
from dougong.core.bundle import read_bundle
from dougong.core.config import Config
from dougong.core.errors import ConfigError, DataError, RunError
from dougong.core.events import Announcer, Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.core.signature import Target
from dougong.data.columns import infer_role
from dougong.data.holdout import HeldOut, belonging, hold_out
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.medium import Modality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.split import Inseparable
from dougong.data.table import Table, table_of_rows
from dougong.data.target import infer_target
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, checkpoints_of, latest_checkpoint, load_weights
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.metrics import primary_metric
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.random_state import random_state_kept
from dougong.engine.trainer import TrainConfig, Watch, train
from dougong.engine.weights import distinct_weights, put_weights
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.decision import decision_loss

TARGET_NAMES: Final = ("target", "label", "answer", "class", "y")
BEGUN: Final = "begun.json"
"""In the folder of learning that is under way: what the task had when it began."""

TRAITS_OF: Final = 4096
"""Records that a task is known by; more change little."""


class LearnConfig(Config):
    """How a task is learnt."""

    budget: float = Field(default=0.03, gt=0, le=1)
    """Numbers that a task may add, as a share of the base's; the rank of its adapter follows from it. Modalities that
    the base lacks come on top."""

    rank: int | None = Field(default=None, gt=0)
    """In place of the highest one within the budget; never above it."""

    prompts: int = Field(default=2, ge=0)
    """Tokens that tell the bridge what is asked. 0: none."""

    prompt_width: int = Field(default=4, gt=0)
    """Channels inside the network that makes them."""

    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the records, or units, that judge and calibrate."""

    unit: str | None = None
    """A column: records of one unit (a speaker, a patient) are on one side. None: a medium that records share, where
    there is one."""

    batch_size: int = Field(default=32, gt=0)
    seed: int = 0

    train: TrainConfig = TrainConfig(
        epochs=30,
        precision="fp32",
        patience=None,
        optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.0),
    )

    @field_validator("train")
    @classmethod
    def _as_few_numbers_are(cls, train: TrainConfig) -> TrainConfig:
        if train.weights != "fp32" or train.sampling is not None:
            raise ValueError("train.weights and train.sampling are for whole models. Leave them out.")
        return train


class Learnt(NamedTuple):
    """What came of it."""

    task: Task
    evaluation: Evaluation
    """On held-out records, told the task."""

    seconds: float

    def as_json(self) -> dict[str, Any]:
        task = self.task
        return {
            "task": task.name,
            "part": task.number,
            "labels": list(task.target.labels),
            "rank": task.rank,
            "parameters": task.num_parameters,
            "of_base": task.of_base,
            "records": task.records,
            "held_out": self.evaluation.num_records,
            "set_aside": len(self.evaluation.bad),
            "metrics": self.evaluation.metrics,
            "seconds": round(self.seconds, 2),
        }


def learn(
    bundle: Path,
    name: str,
    table: Table,
    config: LearnConfig | None = None,
    *,
    description: str = "",
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    rehearsal: RehearsalStore | None = None,
    work: Path | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    covers_earlier: bool = False,
    note: Mapping[str, Any] | None = None,
) -> Learnt:
    """Learn a task from a table and add it to the bundle, in place. `columns` says which modality of the base a column
    is, by the base's name, where the names differ.

    A name that the bundle has already gets a further part: of new classes, another domain, or a modality more. With
    `rehearsal`, what was kept of its earlier records is learnt again beside the new ones, and the part stands for
    both; `covers_earlier` says that the table itself holds them.

    With `resume`, go on with learning that was stopped, in `work` (beside the bundle, where it is not given), or begin
    where there is none; a part that was added before the stop is not added again.

    Raises:
        ConfigError: a name or column that does not exist, or a budget that is too small; `resume` where nothing of a
            task that is there was stopped.
        DataError: the table has nothing that the base reads, or no second unit.
        RunError: `work` holds learning that was stopped, and `resume` is not asked for.
    """
    started = time.perf_counter()
    config = config or LearnConfig()
    check_name(name)
    manifest = read_bundle(bundle)
    model = load_network_from(bundle)
    base = model.network
    parts_there = [part for part in read_parts(bundle, manifest) if part.task.name == name]
    work = work or bundle.resolve().parent / f".{bundle.resolve().name}.learning" / name
    begun = _begun(work, name, len(parts_there), resume=resume)
    # What stands there beyond those was added by the learning that is gone on with.
    earlier, added = parts_there[:begun], parts_there[begun:]
    if rehearsal is not None:
        kept = rehearsal.records(name)
        fresh = _all_rows(table)
        if kept is not None:
            if not kept.schema.equals(fresh.schema):
                raise DataError(f"{table.path.name} has other columns than the rehearsed records of {name!r}.")
            table = _table_again(pa.concat_tables([fresh, kept]), table)
            covers_earlier = True

    found_target = _target(table, target, earlier)
    reading = _reading(model, table, found_target, columns or {}, earlier, name)
    preparation = Preparation({**reading.own, **reading.extra_modalities()}, found_target)
    parted = _parted(table, config.held_out, preparation, config.unit, config.seed)
    training, held_out = parted.rest, parted.aside

    numbers = sum(parameter.numel() for parameter in base.parameters())
    task, parts = _build(base, name, description, config, reading, found_target, numbers, earlier)
    task = task.model_copy(update={"base": base_sum(manifest)})
    whole = Elastic(base, {task.key: parts}, active=task.key, carriers={task.key: task.carrier})
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / BEGUN, {"parts": begun})
    try:
        loader_config = LoaderConfig(batch_size=config.batch_size, workers=0)
        judging = LoaderConfig(batch_size=256, workers=0)

        def judge() -> dict[str, Evaluation]:
            return {"all": evaluate(whole, Loader(held_out, preparation, judging), found_target)}

        def loss(output: ElasticOutput, batch: Batch) -> Tensor:
            assert batch.target is not None
            return decision_loss(output.output_BC, batch.target, found_target.task)

        metric = primary_metric(found_target.task)
        result = train(
            whole,
            loss,
            Loader(training, preparation, loader_config, seed=config.seed, train=True),
            config.train,
            folder=work,
            watch=Watch(judge, metric.name, higher_is_better=metric.higher_is_better),
            announce=Announcer(*listeners),
            seed=config.seed,
            resume=resume,
        )
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        load_weights(whole, best_weights(work))
        whole.eval()
        evaluation = judge()["all"]
        traits = _traits(whole, training, held_out, preparation, judging, config.seed)
    finally:
        whole.detach()
    num_parameters = sum(parameter.numel() for parameter in parts.parameters())
    task = task.model_copy(
        update={
            "metrics": {key: float(value) for key, value in evaluation.metrics.items()},
            "records": training.num_rows,
            "num_parameters": num_parameters,
            "of_base": num_parameters / numbers,
            "covers": tuple(part.task.number for part in earlier) if covers_earlier else (),
            "trait_counts": traits.count,
            "patterns": traits.patterns,
            "sure": traits.sure,
            "provenance": {
                "learnt from": f"{table.path.name}, {table.num_rows} records",
                "held out": f"{held_out.num_rows} records, {'; '.join((parted.by, *parted.notes))}",
                "seed": config.seed,
                "code": program(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                **(note or {}),
            },
        }
    )
    task = added[-1].task if added else add_part(bundle, task, distinct_weights(parts), traits)
    # Gone at once: half of it would be taken for learning that was stopped. Only then are records offered, since with
    # them a stop before would go on with another table.
    done = work.with_name(f"{work.name}.done")
    shutil.rmtree(done, ignore_errors=True)
    work.rename(done)
    shutil.rmtree(done, ignore_errors=True)
    if rehearsal is not None:
        rehearsal.offer(name, fresh)
    return Learnt(task, evaluation, time.perf_counter() - started)


def _begun(work: Path, name: str, parts: int, *, resume: bool) -> int:
    """How many parts the task had when the learning began that is now to be done, or gone on with."""
    marker = work / BEGUN
    stopped = latest_checkpoint(checkpoints_of(work)).checkpoint is not None
    if stopped and not resume:
        raise RunError(
            f"{work} holds learning of {name!r} that was stopped. Go on with it by resume, or remove that folder to "
            "begin anew."
        )
    if not resume:
        return parts
    if marker.is_file():
        return min(parts, int(json.loads(marker.read_text(encoding="utf-8"))["parts"]))
    if parts and not stopped:
        raise ConfigError(
            f"nothing of task {name!r} was stopped, and it is there, in {parts} part{'s' if parts > 1 else ''}. Leave "
            "resume out to have it learn more."
        )
    return parts


def learn_original(bundle: Path, table: Table, *, seed: int = 0) -> None:
    """Keep by what records of the bundle's own task are known, from a table of them. Nothing is trained.

    Raises:
        DataError: the table lacks a column that the bundle reads, or its records all hang together.
    """
    if read_original(bundle, read_bundle(bundle)) is not None:
        return
    model = load_network_from(bundle)
    base, preparation = model.network, model.preparation
    parted = _parted(table, 0.2, preparation, None, seed)
    training, held_out = parted.rest, parted.aside
    loader = LoaderConfig(batch_size=256, workers=0)

    def told(batch: Batch) -> Tensor:
        with torch.inference_mode():
            output_BC: Tensor = base(batch).output_BC
            return output_BC

    seen = [_features(base, part, preparation, loader, seed, told) for part in (training, held_out)]
    classes = preparation.target.num_outputs if preparation.target.task == "single_label" else 1
    traits = traits_of(seen[0].features, seen[0].class_B, classes, seen[1].features)
    sure = float(confidence_of(seen[1].output_BC, preparation.target.task).mean())
    add_original(bundle, traits._replace(sure=sure))


def _parted(table: Table, share: float, preparation: Preparation, unit: str | None, seed: int) -> HeldOut:
    """What judges and calibrates, and has no unit and no medium of what is learnt from.

    Raises:
        Inseparable: there is no second unit.
    """
    media = [name for name in preparation.media if name in table.schema.names]  # what lacks is told by who reads it
    try:
        return hold_out(table, share, belonging(table, media, unit), seed=seed)
    except Inseparable as error:
        raise Inseparable(f"{error} Give more records, of others too.") from None


# What the table has for the base ------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """Which modalities a task reads, and how."""

    own: dict[str, Modality]
    """Of the base, reading the table's columns."""

    columns: dict[str, str]
    extras: dict[str, Extra]

    def extra_modalities(self) -> dict[str, Modality]:
        return {name: extra_modality(extra) for name, extra in self.extras.items()}


def _target(table: Table, named: str | None, earlier: Sequence[Part]) -> Target:
    names = table.schema.names
    if named is None and earlier:
        named = earlier[-1].task.target.name
    if named is None:
        named = next((name for name in names if name.lower() in TARGET_NAMES), None)
    if named is None or named not in names:
        given = "no column is named as the target" if named is None else f"target {named!r} is not a column"
        raise DataError(f"{given} of {table.path.name}. Use --target with one of {', '.join(names)}.")
    task = earlier[-1].task.target.task if earlier else None
    found = infer_target(table.column(named), named, task)
    if earlier and found.labels and set(found.labels) <= set(earlier[-1].task.target.labels):
        return earlier[-1].task.target  # the same question, in the same order of answers
    return found


def _reading(
    model: Model, table: Table, target: Target, named: Mapping[str, str], earlier: Sequence[Part], task: str
) -> _Reading:
    """Columns by name, by what the caller says, else the one column of the one modality of that kind."""
    base = model.preparation
    names = [name for name in table.schema.names if name != target.name]
    known = {**(earlier[-1].task.columns if earlier else {}), **named}
    for name, column in named.items():
        if name not in base.modalities:
            have = ", ".join(base.modalities)
            raise ConfigError(f"--column {name}={column}: {name!r} is no modality of the base. It has {have}.")
        if column not in names:
            raise ConfigError(f"--column {name}={column}: the table has no such column. It has {', '.join(names)}.")
    sample = table.head(1000)
    roles = {name: infer_role(sample.column(name), name).role for name in names}
    own: dict[str, Modality] = {}
    columns: dict[str, str] = {}
    for name, modality in base.modalities.items():
        if isinstance(modality, TableModality):
            if all(column in names for column in modality.columns):
                own[name] = modality
            continue
        (column,) = modality.columns
        kind = modality.signature().kind
        fits = [each for each in names if roles[each] == kind and each not in base.columns]
        alike = [other for other in base.modalities.values() if other.signature().kind == kind]
        chosen = known.get(name) or (column if column in names else None)
        if chosen is None and len(fits) == 1 and len(alike) == 1:
            chosen = fits[0]
        if chosen is None:
            continue
        own[name] = renamed(modality, {column: chosen})
        if chosen != column:
            columns[column] = chosen
    read = {column for modality in own.values() for column in modality.columns}
    extras: dict[str, Extra] = dict(earlier[-1].task.extras) if earlier else {}
    extras = {key: extra for key, extra in extras.items() if set(extra_modality(extra).columns) <= set(names)}
    read |= {column for extra in extras.values() for column in extra_modality(extra).columns}
    if earlier and own.keys() >= set(earlier[-1].task.modalities):
        # An old task's table has a column more: a modality that it has not had.
        more = [name for name in names if name not in read and roles[name] not in ("ignore", "category", "number")]
        extras |= _fit_extras(table, more, task)
    if not own:
        raise DataError(
            f"{table.path.name} has no column that the base reads ({', '.join(base.columns)}), nor one of such a kind. "
            "Name one by --column MODALITY=COLUMN."
        )
    return _Reading(own, columns, extras)


def _fit_extras(table: Table, columns: Sequence[str], task: str) -> dict[str, Extra]:
    if not columns:
        return {}
    sample = table.head(1000)
    roles = {name: infer_role(sample.column(name), name) for name in columns}
    target = Target(name="none", task="regression")
    fitted = fit_preparation(table, roles, target, PreparationConfig())
    extras: dict[str, Extra] = {}
    for name, modality in fitted.modalities.items():
        with random_state_kept():
            encoder = ExtraModality(name, modality.signature(), 16).resolved()
        tokenizer = modality.tokenizer.to_str(pretty=False) if isinstance(modality, TextModality) else None
        extras[f"{task}.{name}"] = Extra(
            modality=modality.config,  # type: ignore[attr-defined]
            encoder=encoder,
            tokenizer=tokenizer,
        )
    return extras


# What is added ------------------------------------------------------------------------------------------------


def _build(
    base: Sandwich,
    name: str,
    description: str,
    config: LearnConfig,
    reading: _Reading,
    target: Target,
    numbers: int,
    earlier: Sequence[Part],
) -> tuple[Task, TaskParts]:
    """The task, and its parts as they begin: anew, or from where the task's last part stands."""
    modalities = tuple(reading.own)
    carrier = _carrier(base, modalities) if config.prompts else None
    hidden = hidden_width(base)
    layers = layers_of(base, modalities)
    description = description or (earlier[-1].task.description if earlier else "")
    last = earlier[-1].task if earlier else None
    besides = hidden * target.num_outputs + target.num_outputs
    if carrier is not None:
        prompt = PromptNetwork(
            width=base.width, num_prompts=config.prompts, hidden=config.prompt_width, description=description
        )
        besides += sum(parameter.numel() for parameter in prompt.parameters())
    rank = rank_within(layers, numbers=round(config.budget * numbers), besides=besides)
    if config.rank is not None:
        if config.rank > rank:
            raise ConfigError(
                f"rank={config.rank} is beyond budget={config.budget}, which allows {rank}. Raise budget."
            )
        rank = config.rank
    task = Task(
        name=name,
        base="",
        description=description,
        target=target,
        columns=reading.columns,
        modalities=modalities,
        extras=reading.extras,
        carrier=carrier,
        rank=rank if last is None else last.rank,
        prompts=config.prompts if carrier is not None else 0,
        prompt_width=config.prompt_width,
        num_parameters=0,
        of_base=0.0,
    )
    with random_state_kept():
        torch.manual_seed(derive_seed(config.seed, "adapter", name))
        extras = {
            key: ExtraModality(key, shape.signature(), base.width) for key, shape in reading.extra_modalities().items()
        }
        task = task.model_copy(
            update={
                "extras": {
                    key: extra.model_copy(update={"encoder": extras[key].resolved()})
                    for key, extra in reading.extras.items()
                }
            }
        )
        parts = build_parts(base, task, extras)
    if earlier:
        _begin_from(parts, earlier[-1], same_answers=earlier[-1].task.target == target)
    return task, parts


def _begin_from(parts: TaskParts, last: Part, *, same_answers: bool) -> None:
    """What the task knows already, as far as it has the same place here."""
    own = distinct_weights(parts)
    begun = {
        name: last.weights[name]
        if name in last.weights
        and last.weights[name].shape == x.shape
        and (same_answers or not name.startswith("out."))
        else x
        for name, x in own.items()
    }
    put_weights(parts, begun, where=f"task {last.task.name!r}")


def _carrier(base: Sandwich, modalities: Sequence[str]) -> str | None:
    """Whose place prompts take: of a modality that the task does not read, so that all it reads ask them; else of the
    last one that it reads, since the base's order has pictures and text first. None without a bridge."""
    if base.late:
        return None
    free = [name for name in base.names if name not in modalities]
    if free:
        return free[0]
    return modalities[-1] if len(modalities) > 1 else None


# By what it is known ------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    features: Features
    class_B: Tensor
    output_BC: Tensor


def _traits(
    whole: Elastic, training: Table, held_out: Table, preparation: Preparation, loader: LoaderConfig, seed: int
) -> Traits:
    def told(batch: Batch) -> Tensor:
        with torch.inference_mode():
            output: ElasticOutput = whole(batch)
            return output.output_BC

    seen = [_features(whole.base, part, preparation, loader, seed, told) for part in (training, held_out)]
    target = preparation.target
    classes = target.num_outputs if target.task == "single_label" else 1
    traits = traits_of(seen[0].features, seen[0].class_B, classes, seen[1].features)
    return traits._replace(sure=float(confidence_of(seen[1].output_BC, target.task).mean()))


def _features(
    base: Sandwich, table: Table, preparation: Preparation, loader: LoaderConfig, seed: int, told: Any
) -> _Seen:
    found: list[Features] = []
    classes: list[Tensor] = []
    outputs: list[Tensor] = []
    count = 0
    for arrays in Loader(table, preparation, loader, seed=seed).one_pass():
        if not len(arrays.row_B):
            continue
        batch = to_tensors(arrays)
        outputs.append(told(batch))
        found.append(frozen_features(base, complete(batch, base.names)))
        single = preparation.target.task == "single_label" and batch.target is not None
        classes.append(batch.target if single and batch.target is not None else torch.zeros(batch.num_records).long())
        count += batch.num_records
        if count >= TRAITS_OF:
            break
    if not found:
        raise DataError(f"{table.path.name} has not one usable record. dougong check says why.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))  # a few stand for all later
    names = found[0].x
    features = Features(
        {name: torch.cat([each.x[name] for each in found])[order] for name in names},
        {name: torch.cat([each.present[name] for each in found])[order] for name in names},
    )
    return _Seen(features, torch.cat(classes)[order], torch.cat(outputs)[order])


def complete(batch: Batch, names: Sequence[str]) -> Batch:
    """The same batch with all of the base's modalities, those that it lacks absent from every record."""
    like = next(iter(batch.media.values())).index_B
    absent = MediaBatch({"none": torch.zeros(0, device=like.device)}, torch.zeros_like(like), like < 0)
    return Batch({name: batch.media.get(name, absent) for name in names}, batch.target)


def _all_rows(table: Table) -> pa.Table:
    return pa.concat_tables([table.read(chunk, table.schema.names) for chunk in range(table.num_chunks)])


def _table_again(rows: pa.Table, like: Table) -> Table:
    return table_of_rows(rows, like.folder)
