"""Carries out a recipe that draws modalities together: records in, a run's folder out.

Here        run_align, AlignResult; `check_align_ranks`, before any rank is connected; open_align_tables and fit_sides,
            for whoever only looks.
Elsewhere   the description (recipes/alignment.py); every part that is introduced here to the others.
Promise     a run folder is never overwritten; one that was stopped goes on with `resume`, to the same losses, on any
            number of ranks; the test records are looked at once, at the end.
"""

from __future__ import annotations

import io
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

import dougong
from dougong.bundle.aligner import KIND, Aligner, vectors_of_cells
from dougong.core.bundle import Manifest
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.events import Listener
from dougong.core.files import write_atomic, write_json
from dougong.core.seeds import derive_seed
from dougong.core.signature import NOTHING
from dougong.data.columns import ColumnRole, infer_role
from dougong.data.leak import Leak, check_leaks, find_leaks
from dougong.data.likeness import Likeness
from dougong.data.modality.image import open_picture
from dougong.data.modality.medium import BadValue, media_bytes
from dougong.data.pairs import PairLoader
from dougong.data.position import Share
from dougong.data.preparation import Preparation, fit_preparation
from dougong.data.sources.emoji import TABLE, prepare_emoji, split_emoji
from dougong.data.split import part_of
from dougong.data.table import Table, cells_of, open_table, table_of_rows
from dougong.engine.memory.recompute import Keep
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.retrieval import Retrieved, retrieval_metrics
from dougong.engine.retrieval import ranks as ranks_of
from dougong.engine.step import SumOfTerms
from dougong.engine.trainer import Watch
from dougong.model.dual import Dual, DualOutput
from dougong.nn.batch import Batch
from dougong.objectives.contrastive import WeightOf, all_pairs_loss, negative_weights
from dougong.objectives.gathered import gathered_all_pairs_loss
from dougong.objectives.matching import matching_loss
from dougong.recipes.alignment import AlignDataConfig, AlignRecipe
from dougong.recipes.build import known_preparation
from dougong.recipes.result import result_as_json
from dougong.recipes.room import building, check_state
from dougong.recipes.settle import SETTINGS, settle_recipe, wanted_recipe
from dougong.recipes.tables import cache_folder
from dougong.recipes.training import Learning, Lesson, kept_alone, train_on_ranks
from dougong.watch.progress import Progress
from dougong.watch.retrieval import MOST_FOUND, RETRIEVALS, write_retrieval_report
from dougong.watch.tensorboard import TensorBoard

METRIC: Final = "recall_at_10"
SHOWN_GROUPS: Final = 2
SHOWN_QUERIES: Final = 12
SHOWN_PIXELS: Final = 72
LARGEST_PIXELS: Final = 50_000_000
LOOKED_AT: Final = 1000


class AlignTables(NamedTuple):
    """What a run reads."""

    train: Table
    validation: Table
    test: Table
    test_is_validation: bool
    notes: tuple[str, ...]
    leaks: tuple[Leak, ...] = ()
    """What the tables share; only where that is allowed."""


@dataclass(frozen=True)
class AlignResult:
    """A finished run."""

    folder: Path
    aligner: Aligner
    evaluations: dict[str, Retrieved]
    """On the test records, by the two sides."""

    tables: AlignTables
    num_parameters: int
    train_seconds: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return result_as_json(self)


def run_align(
    recipe: AlignRecipe, folder: Path, *, resume: bool = False, quiet: bool = False, ranks: Ranks = ALONE
) -> AlignResult:
    """Train, judge, save the bundle and write the report. All of `ranks` call this, with one folder.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: a side's columns are not there, or not of one kind, or so many ranks cannot train the recipe.
        DataError: the records cannot be fetched or read.
    """
    quiet = quiet or not ranks.first
    settled = ranks.first_says(lambda: _settled(recipe, folder, ranks.world, resume=resume).model_dump(mode="json"))
    recipe = parse(AlignRecipe, settled, where=SETTINGS)

    def open_and_prepare() -> tuple[AlignTables, Preparation]:
        found = open_align_tables(recipe.data, seed=recipe.seed, quiet=quiet)
        return found, _kept_preparation(recipe.data, found.train, folder)

    tables, preparation = ranks.after_first(open_and_prepare)

    listeners: list[Listener] = [TensorBoard(folder / "tensorboard")] if ranks.first else []
    if not quiet:
        listeners.append(Progress())
    started = time.perf_counter()
    lesson = _lesson(recipe, tables, preparation, ranks)
    model = train_on_ranks(recipe, lesson, folder, tuple(listeners), resume=resume, ranks=ranks)
    train_seconds = time.perf_counter() - started

    judged = judge_alignment(model, tables.test, preparation, recipe.data, model.pairs, ranks)
    evaluations = {name: _of_numbers(found) for name, found in judged.items()}
    shares = next(iter(evaluations.values()))
    among = f"one is looked for among {shares.num_records}: chance has it in its first ten by "
    notes = (
        *tables.notes,
        f"{among}{shares.metrics['chance_at_10']:.3f}",
        *(f"{name}: none was looked for, since no record has both" for name in _unjudged(judged)),
    )
    manifest = Manifest(
        name=recipe.name,
        signature=preparation.signature(),
        model=model.config.model_dump(mode="json"),
        provenance={
            "kind": KIND,
            "dougong": dougong.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seed": recipe.seed,
            "trained on": f"{tables.train.num_rows} records",
            "judged on": f"{tables.test.num_rows} records",
            "columns": {side: list(recipe.data.judged_columns(side)) for side in recipe.data.sides},
            "notes": list(notes),
        },
        metrics={name: found.metrics for name, found in evaluations.items()},
    )
    aligner = Aligner(model.eval(), preparation, manifest)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    result = AlignResult(folder, aligner, evaluations, tables, num_parameters, train_seconds, notes)
    if ranks.first:
        aligner.save(folder / "bundle")
        _write_evaluation(result)
        _write_retrievals(result, recipe.data)
        write_retrieval_report(folder)
    ranks.wait()
    return result


def check_align_ranks(
    recipe: AlignRecipe, folder: Path, world: int, *, per_node: int | None = None, resume: bool = False
) -> None:
    """What a run on so many ranks, `per_node` of them on this machine (None: all), would be refused for.

    Nothing is written, and no process group may exist yet.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: so many ranks cannot train this recipe, or nobody can.
        DataError: the records cannot be fetched or read.
    """
    recipe = wanted_recipe(recipe, folder, resume=resume)
    _check_world(recipe, world)
    tables = open_align_tables(recipe.data, seed=recipe.seed)
    lesson = _lesson(recipe, tables, known_preparation(folder) or fit_sides(recipe.data, tables.train))
    with building(recipe.memory.offload, folder, ranks=per_node or world):
        model = lesson.build()
    check_state(model, recipe.memory.offload, ranks=per_node or world)


def _settled(recipe: AlignRecipe, folder: Path, world: int, *, resume: bool) -> AlignRecipe:
    """The recipe that is really run; nothing is written of one that is refused."""
    _check_world(wanted_recipe(recipe, folder, resume=resume), world)
    return settle_recipe(recipe, folder, resume=resume, kept=_kept_blocks)


def _check_world(recipe: AlignRecipe, world: int) -> None:
    if world == 1:
        return
    if recipe.model.bridge is not None:
        raise ConfigError(
            f"model.bridge learns from wrong pairs that it looks for in a whole batch, and {world} ranks share each "
            "out. Leave model.bridge out, or train in one process."
        )
    if recipe.train.sampling is not None:
        raise ConfigError(
            f"train.sampling draws for whole batches, and {world} ranks share each out. Leave train.sampling out, or "
            "train in one process."
        )
    if recipe.train.flow is not None:
        raise ConfigError(
            f"train.flow looks into one process, and there are {world} ranks. Use train.flow: null, or train in one "
            "process."
        )
    if recipe.memory.activations is not None and recipe.memory.keep is None:
        raise ConfigError(
            f"memory.activations is met by what one process measures, and there are {world} ranks. Say in memory.keep "
            "what each block keeps, or train in one process."
        )


def _of_numbers(found: Retrieved) -> Retrieved:
    """Without figures that nobody could find, which JSON cannot hold."""
    return found._replace(metrics={name: value for name, value in found.metrics.items() if math.isfinite(value)})


def _unjudged(found: dict[str, Retrieved]) -> list[str]:
    """Pairs of which no record has both sides."""
    return [name for name, each in found.items() if math.isnan(each.metrics[METRIC])]


def open_align_tables(data: AlignDataConfig, *, seed: int, quiet: bool = True) -> AlignTables:
    """Open, and hold out.

    Raises:
        ConfigError: there is no validation table, or a column is not there that would be asked for.
        DataError: a table cannot be used, or two of them share a medium and data.allow_leak is not set.
    """
    if data.source == "emoji":
        prepared = _emoji_tables(data, seed=seed, quiet=quiet)
        _check_columns(data, prepared)
        return prepared
    assert data.train is not None  # AlignDataConfig has seen to it
    if data.validation is None:
        raise ConfigError("no validation table is named, so nothing chooses the checkpoint. Set data.validation.")
    validation = open_table(data.validation)
    test = validation if data.test is None else open_table(data.test)
    notes = () if data.test else ("no test table was given: the figures are of the validation records",)
    given = {"train": open_table(data.train), "validation": validation}
    if data.test is not None:
        given["test"] = test
    roles = roles_of_sides(data, given["train"])
    opened = AlignTables(given["train"], validation, test, data.test is None, notes)
    _check_columns(data, opened)
    leaks = find_leaks(given, roles)
    if not data.allow_leak:
        check_leaks(leaks)
    said = [f"data.allow_leak: {leak.line()}" for leak in leaks]
    return opened._replace(notes=(*notes, *said), leaks=leaks)


def _check_columns(data: AlignDataConfig, tables: AlignTables) -> None:
    """Whatever is asked for after training too: a run must not end there."""
    asked = [
        (table, column, f"by which {side} is judged. Add it, or name others in data.judged.")
        for table in (tables.validation, tables.test)
        for side in data.sides
        for column in data.judged_columns(side)
    ]
    if data.spare is not None:
        asked.append((tables.train, data.spare, "by which records are spared. Name another in data.spare, or none."))
    if data.group is not None:
        asked.append((tables.test, data.group, "by which the report is grouped. Name another in data.group, or none."))
    for table, column, why in asked:
        if column not in table.schema.names:
            raise ConfigError(f"{table.path.name} lacks the column {column!r}, {why}")


def roles_of_sides(data: AlignDataConfig, table: Table) -> dict[str, ColumnRole]:
    """What the columns of all sides hold.

    Raises:
        ConfigError: one is not there.
    """
    return {
        column: ColumnRole(side_role(side, (column,), table).role, f"shows {side}")
        for side, columns in data.sides.items()
        for column in columns
    }


def _emoji_tables(data: AlignDataConfig, *, seed: int, quiet: bool) -> AlignTables:
    packages = Path(data.folder) if data.folder else None
    place = cache_folder() / "emoji"
    prepare_emoji(place, packages=packages, announce=None if quiet else _tell_progress)
    table = open_table(place / TABLE)
    held = data.held_out
    subgroups, hexcodes, alike = (cells_of(table.column(name)) for name in ("subgroup", "hexcode", "alike"))
    split = split_emoji(
        subgroups,
        hexcodes,
        alike,
        seed=seed if held.seed is None else held.seed,
        num_held_out=held.subgroups,
        num_validation=held.validation,
        between=held.between,
    )
    notes = (
        f"held out whole: {', '.join(split.held_out)}",
        f"{split.num_alike} emoji were left out of training because they look like one that is held out",
    )
    parts = [part_of(table, rows) for rows in (split.train, split.validation, split.test)]
    return AlignTables(parts[0], parts[1], parts[2], test_is_validation=False, notes=notes)


# Preparation -----------------------------------------------------------------------------------------------------


def _kept_preparation(data: AlignDataConfig, table: Table, folder: Path) -> Preparation:
    kept = folder / "preparation"
    if (kept / "preparation.json").exists():
        return Preparation.load(kept)
    preparation = fit_sides(data, table)
    preparation.save(kept)
    return preparation


def fit_sides(data: AlignDataConfig, table: Table) -> Preparation:
    """A modality for each side, learnt from all its columns together.

    Raises:
        ConfigError: a column is not there, or a side's columns are of several kinds.
    """
    modalities = {}
    for side, columns in data.sides.items():
        role = side_role(side, columns, table)
        cells = pa.chunked_array([chunk for column in columns for chunk in table.column(column).chunks])
        stacked = table_of_rows(pa.table({side: cells}), table.folder)
        fitted = fit_preparation(stacked, {side: role}, NOTHING, data.preparation)
        if side not in fitted.modalities:
            raise ConfigError(
                f"side {side!r} holds {role.role} columns, which have no encoder here. Use media or text."
            )
        modalities[side] = fitted.modalities[side]
    return Preparation(modalities, NOTHING)


def side_role(side: str, columns: tuple[str, ...], table: Table) -> ColumnRole:
    """What a side's columns hold.

    Raises:
        ConfigError: one is not there, or they are of several kinds.
    """
    found: dict[str, str] = {}
    for column in columns:
        if column not in table.schema.names:
            known = ", ".join(table.schema.names[:40])
            raise ConfigError(f"data.sides.{side} names {column!r}, which {table.path.name} lacks. It has {known}.")
        role = infer_role(table.head(LOOKED_AT, [column]).column(column), column)
        # A name of one word is text here, whatever it would be in a table of records.
        found[column] = "text" if pa.types.is_string(table.schema.field(column).type) else role.role
    if len(set(found.values())) > 1:
        said = ", ".join(f"{column} {kind}" for column, kind in found.items())
        raise ConfigError(f"data.sides.{side} mixes kinds: {said}. Put each kind on a side of its own.")
    return ColumnRole(next(iter(found.values())), f"a side by {len(columns)} columns")  # type: ignore[arg-type]


# Training --------------------------------------------------------------------------------------------------------


def _lesson(recipe: AlignRecipe, tables: AlignTables, preparation: Preparation, ranks: Ranks = ALONE) -> Lesson[Dual]:
    weight_of = _weight_of(recipe, tables)

    def build() -> Dual:
        torch.manual_seed(derive_seed(recipe.seed, "model"))
        return recipe.model.build(preparation.signature())

    def loader(share: Share) -> PairLoader:
        return PairLoader(
            tables.train,
            preparation,
            recipe.data.sides,
            batch_size=recipe.data.batch_size,
            views=recipe.data.views,
            key=recipe.data.spare,
            seed=recipe.seed,
            train=True,
            share=share,
            note=None if ranks.heartbeat is None else ranks.heartbeat.modality,
        )

    def learn(model: Dual, together: Ranks) -> Learning:
        def terms(output: DualOutput, batch: Batch) -> dict[str, Tensor]:
            return alignment_losses(
                output,
                batch,
                pairs=model.pairs,
                matching_weight=recipe.objective.matching_weight,
                weight_of=weight_of,
                width=model.config.width,
                group=together.group,
            )

        def judge() -> dict[str, Retrieved]:
            judged = judge_alignment(model, tables.validation, preparation, recipe.data, model.pairs, together)
            # What nobody was looked for by says nothing for or against a checkpoint, where others do.
            unjudged = _unjudged(judged)
            return {name: found for name, found in judged.items() if name not in unjudged} or judged

        return Learning(SumOfTerms(terms), Watch(judge, METRIC))

    return Lesson(build, loader, learn)


def _weight_of(recipe: AlignRecipe, tables: AlignTables) -> WeightOf | None:
    """How much records of unequal values are held against each other; None: wholly."""
    if recipe.objective.spare_alike is None:
        return None
    low, high = recipe.objective.spare_alike
    assert recipe.data.spare is not None  # AlignRecipe has seen to it
    likeness = Likeness(cells_of(tables.train.column(recipe.data.spare)), recipe.data.spare)

    def weight_of(key_K: Tensor) -> Tensor:
        alike_KK = torch.from_numpy(likeness(key_K.cpu().numpy())).to(key_K.device)
        return negative_weights(alike_KK, low=low, high=high)

    return weight_of


def _kept_blocks(recipe: AlignRecipe) -> tuple[Keep, ...] | None:
    """What each block keeps to meet the recipe's budget."""
    tables = open_align_tables(recipe.data, seed=recipe.seed)
    return kept_alone(recipe, _lesson(recipe, tables, fit_sides(recipe.data, tables.train)))


def alignment_losses(
    output: DualOutput,
    batch: Batch,
    *,
    pairs: tuple[tuple[str, str], ...] = (),
    matching_weight: float = 1.0,
    weight_of: WeightOf | None = None,
    width: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The contrastive loss, and that of matching where the model has it, weighted; sums over the batch's pairs. A
    batch's target, where it has one, is what records share that are not held against each other. `group` has the ranks
    that share out the batch, whose vectors are `width` wide."""
    index = {name: media.index_B for name, media in batch.media.items()}
    there = {name: media.present_B for name, media in batch.media.items()}
    if group is None:
        contrast = all_pairs_loss(
            output.vectors,
            index,
            there,
            pairs=pairs,
            temperature=output.temperature,
            key_B=batch.target,
            weight_of=weight_of,
        )
    else:
        assert width is not None
        ids = {name: media.id_U for name, media in batch.media.items() if media.id_U is not None}
        assert len(ids) == len(index), "a batch that is shared out numbers its media"
        contrast = gathered_all_pairs_loss(
            output.vectors,
            index,
            there,
            ids,
            group,
            width=width,
            pairs=pairs,
            temperature=output.temperature,
            key_B=batch.target,
            weight_of=weight_of,
        )
    found = {"contrast": contrast}
    if output.match_P is not None:
        assert output.is_pair_P is not None
        found["matching"] = matching_weight * matching_loss(output.match_P, output.is_pair_P, output.known_P)
    return found


def judge_alignment(
    model: Dual,
    table: Table,
    preparation: Preparation,
    data: AlignDataConfig,
    pairs: tuple[tuple[str, str], ...],
    ranks: Ranks = ALONE,
) -> dict[str, Retrieved]:
    """Each pair of sides of the table's records: one looked for by the other, both ways. Ranks share out the media, and
    all of them find the same."""
    part = ranks.share.of(table.num_rows)
    vectors = {}
    for side in dict.fromkeys(name for pair in pairs for name in pair):
        own = [table.column(column).slice(part.start, part.stop - part.start) for column in data.judged_columns(side)]
        own_ND = vectors_of_cells(model, preparation, side, [cells_of(each) for each in own], table.folder).x_ND
        vectors[side] = ranks.rows(torch.from_numpy(own_ND)).numpy()
    return {
        f"{left} and {right}": retrieval_metrics(vectors[left], vectors[right], names=(left, right))
        for left, right in pairs
    }


# What stays ------------------------------------------------------------------------------------------------------


def _write_evaluation(result: AlignResult) -> None:
    tables = result.tables
    write_json(
        result.folder / "evaluation.json",
        {
            "kind": KIND,
            "rows": {
                "train": tables.train.num_rows,
                "validation": tables.validation.num_rows,
                "test": tables.test.num_rows,
            },
            "split": "validation" if tables.test_is_validation else "test",
            "notes": list(result.notes),
            "conditions": {
                name: {"metrics": found.metrics, "num_records": found.num_records}
                for name, found in result.evaluations.items()
            },
        },
    )


def _write_retrievals(result: AlignResult, data: AlignDataConfig) -> None:
    """Of some records of the test, by group: what was asked, and the ten that were found, best first."""
    name, found = next(iter(result.evaluations.items()))
    left, right = result.aligner.network.pairs[0]
    kinds = {side: shape.kind for side, shape in result.aligner.preparation.signature().inputs.items()}
    # Words look for pictures, where there are both.
    asked, shown = (right, left) if kinds[left] != "text" and kinds[right] == "text" else (left, right)
    score_NN = found.score_NN if asked == left else np.ascontiguousarray(found.score_NN.T)
    table = result.tables.test
    groups = [str(cell) for cell in cells_of(table.column(data.group))] if data.group else ["all"] * table.num_rows
    rank_N = ranks_of(score_NN)
    pages = _Shown(result.folder, table)
    entries: list[dict[str, Any]] = []
    if METRIC not in found.metrics:
        groups = []  # nothing was looked for
    for group in sorted(set(groups), key=lambda one: (-groups.count(one), one))[:SHOWN_GROUPS]:
        for row in [place for place, one in enumerate(groups) if one == group][:SHOWN_QUERIES]:
            best = np.argsort(-score_NN[row], kind="stable")[:MOST_FOUND]
            entries.append(
                {
                    "group": group,
                    "query": pages.of(data.judged_columns(asked)[0], kinds[asked], row),
                    "rank": int(rank_N[row]) + 1,
                    "found": [
                        {
                            **pages.of(data.judged_columns(shown)[0], kinds[shown], int(other)),
                            "right": int(other) == row,
                        }
                        for other in best
                    ],
                }
            )
    write_json(result.folder / RETRIEVALS, {"pair": name, "asked": asked, "shown": shown, "entries": entries})


class _Shown:
    """Cells as a page shows them; pictures become small files in the run's folder."""

    def __init__(self, folder: Path, table: Table) -> None:
        self._folder, self._table = folder, table
        self._cells: dict[str, list[Any]] = {}

    def of(self, column: str, kind: str, row: int) -> dict[str, Any]:
        if column not in self._cells:
            self._cells[column] = cells_of(self._table.column(column))
        cell = self._cells[column][row]
        if kind == "text":
            return {"text": str(cell)}
        if kind != "image" or cell is None:
            return {"text": f"record {row}"}
        file = f"retrievals/{row}.png"
        if not (self._folder / file).exists():
            try:
                picture = open_picture(media_bytes(cell, self._table.folder), LARGEST_PIXELS)
            except BadValue:
                return {"text": f"record {row}"}
            picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
            content = io.BytesIO()
            picture.save(content, format="PNG")
            write_atomic(self._folder / file, content.getvalue())
        return {"file": file}


def _tell_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr)
