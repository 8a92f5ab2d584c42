"""Carries out a recipe: records in, a run's folder out.

Here        run_recipe, and train_recipe for the figures alone; RunResult.
Elsewhere   the description (recipes/recipe.py); what a run has in common with those of other kinds
            (recipes/training.py); every part that is introduced here to the others.
Promise     a run folder is never overwritten; one that was stopped goes on with `resume`, to the same losses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dougong.bundle.model import Model
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError
from dougong.core.events import Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Share
from dougong.data.preparation import Preparation
from dougong.data.table import Table
from dougong.engine.contribution import Probe
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.metrics import primary_metric
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.trainer import Watch
from dougong.model.sandwich import Sandwich
from dougong.recipes.build import build_model, loss_of
from dougong.recipes.losses import backward_of, check_blend, check_objective, losses_of
from dougong.recipes.recipe import Recipe
from dougong.recipes.result import result_as_json
from dougong.recipes.samples import write_samples
from dougong.recipes.tables import Tables
from dougong.recipes.training import (
    JUDGED_AT_ONCE,
    Learning,
    Lesson,
    begin_run,
    check_names,
    encodes_withheld,
    judging_loader,
    narrowed_corrupt,
    narrowed_views,
    provenance,
    train_on_ranks,
    training_loader,
)
from dougong.recipes.weigh import weigh_votes
from dougong.watch.report import write_report

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
    recipe, tables, preparation, notes, listeners = begin_run(
        recipe, folder, resume=resume, quiet=quiet, tables=tables, ranks=ranks
    )
    started = time.perf_counter()
    model = _train(recipe, tables, preparation, folder, listeners, resume=resume, ranks=ranks)
    train_seconds = time.perf_counter() - started

    views = judged_views(recipe, preparation)
    evaluations = {name: _judge(recipe, model, tables.test, preparation, view, ranks) for name, view in views.items()}
    manifest = Manifest(
        name=recipe.name,
        signature=preparation.signature(),
        model=model.config.model_dump(mode="json"),
        provenance=provenance(recipe.seed, tables, notes),
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
        notes=notes,
    )


def judged_views(recipe: Recipe, preparation: Preparation) -> dict[str, View]:
    """What to judge under: the recipe's conditions, else everything, without each, each alone.

    Raises:
        ConfigError: no condition keeps any of the modalities.
    """
    names = tuple(preparation.modalities)
    if recipe.data.conditions:
        narrowed = {
            condition: tuple(name for name in keep if name in names)
            for condition, keep in recipe.data.conditions.items()
        }
        found = {condition: View(keep=keep) for condition, keep in narrowed.items() if keep}
        if not found:
            raise ConfigError(
                f"data.conditions keep none of the modalities here: {', '.join(names)}. Name some of them."
            )
        return found
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


def _train(
    recipe: Recipe,
    tables: Tables,
    preparation: Preparation,
    folder: Path,
    listeners: tuple[Listener, ...],
    *,
    resume: bool,
    ranks: Ranks,
) -> Sandwich:
    """The model with its best weights, whole on every rank."""
    task = preparation.target.task
    metric = primary_metric(task)
    beside = encodes_withheld(recipe)
    # Named conditions are all that matters to this recipe; otherwise what matters is the whole record.
    kept = [name for keep in recipe.data.conditions.values() for name in keep]
    check_names("data.conditions", kept, tables, preparation)
    judged = judged_views(recipe, preparation)
    judged = judged if recipe.data.conditions else {"all": judged["all"]}
    check_blend(recipe.objective, tuple(preparation.modalities))

    def loader(share: Share) -> Loader:
        return training_loader(recipe, tables, preparation, share=share, ranks=ranks, withheld_beside=beside)

    def learn(model: Sandwich, together: Ranks) -> Learning:
        def judge() -> dict[str, Evaluation]:
            return {
                name: _judge(recipe, model, tables.validation, preparation, view, together)
                for name, view in judged.items()
            }

        sampling = recipe.train.sampling
        probe = None
        if sampling is not None and sampling.moves:
            probe = Probe.on(model, tables.validation, preparation, most=sampling.num_records, seed=recipe.seed)
        return Learning(
            loss_of(recipe, preparation, together.group),
            Watch(judge, metric.name, higher_is_better=metric.higher_is_better, probe=probe),
            backward_of(recipe.objective, model, losses_of(recipe.objective, recipe.model, task, together.group)),
        )

    def build() -> Sandwich:
        return build_model(recipe, preparation)

    model = train_on_ranks(recipe, Lesson(build, loader, learn), folder, listeners, resume=resume, ranks=ranks)
    if recipe.model.decide == "weighed":
        weigh_votes(model, _unseen(recipe, tables, preparation), task)
    return model


def _unseen(recipe: Recipe, tables: Tables, preparation: Preparation) -> Iterator[BatchArrays]:
    """Validation records, few of them several times, each time spoilt and withheld anew as in training."""
    passes = min(MOST_PASSES, -(-VOTES_WEIGHED // tables.validation.num_rows))
    for number in range(passes):
        yield from Loader(
            tables.validation,
            preparation,
            LoaderConfig(batch_size=JUDGED_AT_ONCE, workers=recipe.data.loader.workers),
            seed=derive_seed(recipe.seed, "weigh", number),
            views=narrowed_views(recipe, tables, preparation),
            withhold=recipe.data.withhold,
            corrupt=narrowed_corrupt(recipe, tables, preparation),
        ).one_pass()


def _judge(
    recipe: Recipe, model: Sandwich, table: Table, preparation: Preparation, view: View, ranks: Ranks
) -> Evaluation:
    loader = judging_loader(recipe, table, preparation, view, ranks)
    return evaluate(model, loader, preparation.target, ranks=ranks)
