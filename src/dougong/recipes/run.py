"""Carries out a recipe: records in, a run's folder out.

Here        run_recipe, and train_recipe for the figures alone; RunResult.
Elsewhere   the description (recipes/recipe.py); which folder and layout it may have (recipes/settle.py); every part
            that is introduced here to the others.
Promise     a run folder is never overwritten; one that was stopped goes on with `resume`, to the same losses. Many
            ranks do together what one does; the first one alone writes and speaks.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import dougong
from dougong.core.bundle import Manifest
from dougong.core.config import parse
from dougong.core.errors import RunError
from dougong.core.events import Announcer, Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.corruption import CorruptConfig
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import TABLE_MODALITY, Preparation
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.contribution import Probe
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.metrics import primary_metric
from dougong.engine.parallel.mesh import share_of
from dougong.engine.parallel.pipeline import block_seconds
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.trainer import Watch, train
from dougong.model.sandwich import Sandwich, SandwichOutput
from dougong.nn.batch import Batch
from dougong.recipes.build import build_model, check_layout, known_preparation, learn_preparation
from dougong.recipes.losses import backward_of, check_blend, check_objective, losses_of
from dougong.recipes.recipe import Recipe
from dougong.recipes.result import result_as_json
from dougong.recipes.samples import write_samples
from dougong.recipes.settle import SETTINGS, settle_recipe
from dougong.recipes.tables import Tables, open_tables
from dougong.recipes.weigh import weigh_votes
from dougong.serve.model import Model
from dougong.watch.progress import Progress
from dougong.watch.report import write_report
from dougong.watch.tensorboard import TensorBoard

JUDGED_AT_ONCE: Final = 256
VOTES_WEIGHED: Final = 4096
MOST_PASSES: Final = 8
"""Over validation records to learn what each vote weighs: as many as make so many ballots."""

MOST_CONDITIONS: Final = 5
"""Modalities up to which each is judged alone and withheld, where the recipe names no conditions."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    recipe: Recipe
    """As it was carried out."""

    model: Model
    evaluations: dict[str, Evaluation]
    """On the test records, by condition."""

    tables: Tables
    num_parameters: int
    train_seconds: float
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return result_as_json(self)


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    tables: Tables | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train, judge, save the bundle and write the report. All of `ranks` call this, with one folder.

    Raises:
        RunError: the folder holds a run already, or none to resume.
    """
    result = train_recipe(recipe, folder, resume=resume, quiet=quiet, tables=tables, ranks=ranks)
    if ranks.first:
        result.model.save(folder / "bundle")
        views = judged_views(result.recipe, result.model.preparation)
        write_evaluation(result, views)
        write_samples(folder, result.model, result.tables.test, views, result.evaluations)
        write_report(folder)
    ranks.wait()
    return result


def train_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    tables: Tables | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train and judge: a run's folder without its bundle and report.

    Raises:
        RunError: the folder holds a run already, or none to resume.
    """
    check_objective(recipe.objective, recipe.model)
    if recipe.plan is not None:
        check_layout(recipe, recipe.plan, ranks.world)
    quiet = quiet or not ranks.first
    settled = ranks.first_says(
        lambda: settle_recipe(recipe, folder, resume=resume, world=ranks.world).model_dump(mode="json")
    )
    recipe = parse(Recipe, settled, where=SETTINGS)
    say = _say_nothing if quiet else _say

    def open_and_prepare() -> tuple[Tables, Preparation, tuple[str, ...]]:
        opened = tables or open_tables(recipe.data, seed=recipe.seed, announce=None if quiet else _tell_progress)
        return opened, *_prepare(recipe, opened, folder)

    tables, preparation, notes = ranks.after_first(open_and_prepare)
    say(_describe(tables, preparation))
    for note in (*tables.notes, *notes):
        say(f"note: {note}")

    model = build_model(recipe, preparation)
    started = time.perf_counter()
    listeners: list[Listener] = [TensorBoard(folder / "tensorboard")] if ranks.first else []
    if not quiet:
        listeners.append(Progress())
    model = _train(recipe, model, tables, preparation, folder, listeners, resume=resume, ranks=ranks)
    train_seconds = time.perf_counter() - started

    views = judged_views(recipe, preparation)
    evaluations = {name: _judge(recipe, model, tables.test, preparation, view, ranks) for name, view in views.items()}
    manifest = Manifest(
        name=recipe.name,
        signature=preparation.signature(),
        model=model.config.model_dump(mode="json"),
        provenance=_provenance(recipe, tables, (*tables.notes, *notes)),
        metrics={name: found.metrics for name, found in evaluations.items()},
    )
    return RunResult(
        folder=folder,
        recipe=recipe,
        model=Model(model, preparation, manifest),
        evaluations=evaluations,
        tables=tables,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=train_seconds,
        notes=(*tables.notes, *notes),
    )


def judged_views(recipe: Recipe, preparation: Preparation) -> dict[str, View]:
    """What to judge under: the recipe's conditions, else everything, without each, each alone."""
    names = tuple(preparation.modalities)
    if recipe.data.conditions:
        narrowed = {
            condition: tuple(name for name in keep if name in names)
            for condition, keep in recipe.data.conditions.items()
        }
        return {condition: View(keep=keep) for condition, keep in narrowed.items() if keep}
    views = {"all": View(keep=names)}
    if 1 < len(names) <= MOST_CONDITIONS:
        views.update({f"without {name}": View(keep=tuple(n for n in names if n != name)) for name in names})
    if 2 < len(names) <= MOST_CONDITIONS:
        views.update({f"{name} alone": View(keep=(name,)) for name in names})
    return views


def write_evaluation(result: RunResult, views: Mapping[str, View], more: Mapping[str, Any] | None = None) -> None:
    """evaluation.json, which the report reads; `more` adds a comparison."""
    tables = result.tables
    conditions = {
        name: {
            "split": "validation" if tables.test_is_validation else "test",
            "keep": list(views[name].keep),
            "metrics": found.metrics,
            "confusion": None if found.confusion is None else found.confusion.tolist(),
            "gate": found.gate or None,
            "num_records": found.num_records,
            "seconds": round(found.seconds, 3),
        }
        for name, found in result.evaluations.items()
    }
    bad = [record for found in result.evaluations.values() for record in found.bad]
    distinct = sorted(set(bad))
    write_json(
        result.folder / "evaluation.json",
        {
            "target": result.model.preparation.target.model_dump(mode="json"),
            "data": {
                "name": tables.train.path.name,
                "rows": {
                    "train": tables.train.num_rows,
                    "validation": tables.validation.num_rows,
                    "test": tables.test.num_rows,
                },
                "notes": list(result.notes),
            },
            "conditions": conditions,
            "comparison": [],
            "gains": [],
            "bad": {
                "count": len(distinct),
                "seen": tables.test.num_rows,
                "first": [record._asdict() for record in distinct[:50]],
            },
            **(more or {}),
        },
    )


def _prepare(recipe: Recipe, tables: Tables, folder: Path) -> tuple[Preparation, tuple[str, ...]]:
    """What the columns hold, learnt once per run; and what was left out."""
    known = known_preparation(folder)
    if known is not None:
        return known, ()
    preparation, notes = learn_preparation(recipe, tables)
    preparation.save(folder / "preparation")
    return preparation, notes


def _train(
    recipe: Recipe,
    model: Sandwich,
    tables: Tables,
    preparation: Preparation,
    folder: Path,
    listeners: list[Listener],
    *,
    resume: bool,
    ranks: Ranks,
) -> Sandwich:
    """The model with its best weights, whole on every rank."""
    target = preparation.target
    views = tuple(_narrowed(recipe.data.views, preparation))
    plan = recipe.plan
    assert plan is not None  # it was settled
    share = share_of(plan, ranks)
    loader = Loader(
        tables.train,
        preparation,
        recipe.data.loader,
        seed=recipe.seed,
        train=True,
        views=views,
        one_view_a_batch=recipe.data.one_view_a_batch,
        withhold=recipe.data.withhold,
        corrupt=_corrupt(recipe, tables, preparation),
        withheld_beside=recipe.model.completion is not None and recipe.objective.completion_weight > 0,
        share=share,
        note=None if ranks.heartbeat is None else ranks.heartbeat.modality,
    )
    costs = None
    if plan.pipeline > 1:
        costs = ranks.first_says(lambda: _block_seconds(recipe, preparation, loader))
    layout = prepare_model(model, plan, ranks, accumulation=recipe.train.accumulation, costs=costs)
    together = layout.data_ranks
    metric = primary_metric(target.task)
    # Named conditions are all that matters to this recipe; otherwise what matters is the whole record.
    judged = judged_views(recipe, preparation)
    judged = judged if recipe.data.conditions else {"all": judged["all"]}

    check_blend(recipe.objective, tuple(preparation.modalities))
    losses = losses_of(recipe.objective, recipe.model, target.task, together.group)

    def loss(output: SandwichOutput, batch: Batch) -> Tensor:
        found = losses(output, batch)
        return torch.stack([found.whole, *found.own.values()]).sum()

    def judge() -> dict[str, Evaluation]:
        return {
            name: _judge(recipe, model, tables.validation, preparation, view, together) for name, view in judged.items()
        }

    sampling = recipe.train.sampling
    probe = None
    if sampling is not None and sampling.moves:
        probe = Probe.on(model, tables.validation, preparation, most=sampling.num_records, seed=recipe.seed)

    train(
        model,
        loss,
        loader,
        recipe.train,
        folder=folder,
        watch=Watch(judge, metric.name, higher_is_better=metric.higher_is_better, probe=probe),
        announce=Announcer(*listeners),
        seed=recipe.seed,
        resume=resume,
        backward=backward_of(recipe.objective, model, losses),
        ranks=ranks,
        layout=layout,
    )
    if not layout.is_whole:
        model = build_model(recipe, preparation)
    load_weights(model, best_weights(folder))
    if recipe.model.decide == "weighed":
        weigh_votes(model, _unseen(recipe, tables, preparation, views), target.task)
    return model


def _block_seconds(recipe: Recipe, preparation: Preparation, loader: Loader) -> list[float]:
    """What embedding, each block and the head cost of the first batch that has records."""
    arrays = next(found for _, found in loader.batches(Position()) if len(found.row_B))
    return block_seconds(build_model(recipe, preparation), to_tensors(arrays))


def _unseen(recipe: Recipe, tables: Tables, preparation: Preparation, views: tuple[View, ...]) -> Iterator[BatchArrays]:
    """Validation records, few of them several times, each time spoilt and withheld anew as in training."""
    passes = min(MOST_PASSES, -(-VOTES_WEIGHED // tables.validation.num_rows))
    for number in range(passes):
        yield from Loader(
            tables.validation,
            preparation,
            LoaderConfig(batch_size=JUDGED_AT_ONCE, workers=recipe.data.loader.workers),
            seed=derive_seed(recipe.seed, "weigh", number),
            views=views,
            withhold=recipe.data.withhold,
            corrupt=_corrupt(recipe, tables, preparation),
        ).one_pass()


def _narrowed(views: tuple[View, ...], preparation: Preparation) -> list[View]:
    """The views of a recipe, as far as these modalities go."""
    narrowed = [
        view.model_copy(
            update={
                "keep": tuple(name for name in view.keep if name in preparation.modalities),
                "beside": tuple(name for name in view.beside if name in preparation.modalities),
            }
        )
        for view in views
    ]
    return [view for view in narrowed if view.keep]


def _corrupt(recipe: Recipe, tables: Tables, preparation: Preparation) -> CorruptConfig | None:
    """What is spoilt in training, as far as these modalities go."""
    corrupt = recipe.data.corrupt
    if corrupt is None:
        return None
    # Those that the recipe leaves out may be named: its baselines are the same recipe with fewer.
    known = {*preparation.modalities, *tables.roles, TABLE_MODALITY}
    named = [*(corrupt.chance if isinstance(corrupt.chance, dict) else ()), *corrupt.kinds]
    strange = [name for name in named if name not in known]
    if strange:
        known_here = ", ".join(preparation.modalities)
        raise RunError(f"data.corrupt names {strange[0]!r}, which is no modality here. Use some of {known_here}.")
    return corrupt.only(tuple(preparation.modalities))


def _judge(
    recipe: Recipe, model: Sandwich, table: Table, preparation: Preparation, view: View, ranks: Ranks
) -> Evaluation:
    config = LoaderConfig(batch_size=JUDGED_AT_ONCE, workers=recipe.data.loader.workers)
    note = None if ranks.heartbeat is None else ranks.heartbeat.modality
    loader = Loader(table, preparation, config, views=(view,), share=ranks.share, note=note)
    return evaluate(model, loader, preparation.target, ranks=ranks)


def _provenance(recipe: Recipe, tables: Tables, notes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "dougong": dougong.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": recipe.seed,
        "trained on": f"{tables.train.path.name}, {tables.train.num_rows} records",
        "judged on": f"{tables.test.path.name}, {tables.test.num_rows} records",
        "notes": list(notes),
    }


def _describe(tables: Tables, preparation: Preparation) -> str:
    lines = [f"{tables.train.path.name}: {tables.train.num_rows} training records"]
    lines += [f"  {name:20} {role:9} {reason}" for name, (role, reason) in tables.roles.items()]
    lines.append(f"  predicts {tables.target} ({preparation.target.task.replace('_', ' ')})")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_nothing(text: str) -> None:
    pass


def _tell_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr)
