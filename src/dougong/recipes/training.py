"""What every run has in common whose model any layout can train.

Here        `begin_run`: settled, opened, prepared; `training_loader` and `judging_loader`; Learning and
            `train_on_ranks`: laid out, trained, whole again; `provenance`.
Elsewhere   what each kind of run learns and judges, and what it leaves (recipes/run.py, recipes/decode.py).
Promise     what a recipe says of its data holds for every kind. Many ranks do together what one does; the first one
            alone writes and speaks.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch

import dougong
from dougong.core.config import parse
from dougong.core.errors import RunError
from dougong.core.events import Announcer, Listener
from dougong.data.collate import View
from dougong.data.corruption import CorruptConfig
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import WHOLE, Position, Share
from dougong.data.preparation import TABLE_MODALITY, Preparation
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.memory.config import keep_of
from dougong.engine.memory.recompute import KEEPS
from dougong.engine.parallel.mesh import share_of
from dougong.engine.parallel.pipeline import block_seconds
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.step import Backward, Loss
from dougong.engine.trainer import Watch, train
from dougong.nn.block_stack import BlockStack
from dougong.recipes.build import LaidOut, LaidOutT, check_layout, known_preparation, learn_preparation, open_records
from dougong.recipes.recipe import Recipe
from dougong.recipes.settle import SETTINGS, settle_recipe
from dougong.recipes.tables import Tables
from dougong.watch.progress import Progress
from dougong.watch.tensorboard import TensorBoard

JUDGED_AT_ONCE: Final = 256

ModelT = TypeVar("ModelT", bound=BlockStack[Any, Any])


class Begun(NamedTuple, Generic[LaidOutT]):
    """A run before its first step."""

    recipe: LaidOutT
    """As it is carried out."""

    tables: Tables
    preparation: Preparation
    notes: tuple[str, ...]
    """What a reader of the figures must know."""

    listeners: tuple[Listener, ...]


class Learning(NamedTuple):
    """What a model that has been laid out learns, and by what it is steered."""

    loss: Loss
    watch: Watch
    backward: Backward | None = None


def begin_run(
    recipe: LaidOutT, folder: Path, *, resume: bool, quiet: bool, tables: Tables | None = None, ranks: Ranks = ALONE
) -> Begun[LaidOutT]:
    """What the run is of, the same on all ranks; what the columns hold is learnt once per run.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: so many ranks cannot train the recipe so.
    """
    if recipe.plan is not None:
        check_layout(recipe, recipe.plan, ranks.world)
    quiet = quiet or not ranks.first
    settled = ranks.first_says(
        lambda: settle_recipe(recipe, folder, resume=resume, world=ranks.world).model_dump(mode="json")
    )
    recipe = parse(type(recipe), settled, where=SETTINGS)

    def open_and_prepare() -> tuple[Tables, Preparation, tuple[str, ...]]:
        found = tables or open_records(recipe, None if quiet else _tell_progress)
        preparation, left_out = _prepare(recipe, found, folder)
        return found, preparation, (*found.notes, *left_out)

    opened, preparation, notes = ranks.after_first(open_and_prepare)
    if not quiet:
        print(
            "\n".join([_describe(recipe, opened, preparation, ranks), *(f"note: {note}" for note in notes)]),
            file=sys.stderr,
        )
    listeners: list[Listener] = [TensorBoard(folder / "tensorboard")] if ranks.first else []
    if not quiet:
        listeners.append(Progress())
    return Begun(recipe, opened, preparation, notes, tuple(listeners))


def train_on_ranks(
    recipe: LaidOut,
    build: Callable[[], ModelT],
    loader: Callable[[Share], Loader],
    learn: Callable[[ModelT, Ranks], Learning],
    folder: Path,
    listeners: tuple[Listener, ...],
    *,
    resume: bool,
    ranks: Ranks,
) -> ModelT:
    """The model with its best weights, whole on every rank.

    `build` makes the same weights at every call; `loader` is asked for one rank's share of each batch; `learn` is told
    the model as it is laid out, and which ranks share the records out.
    """
    plan = recipe.plan
    assert plan is not None  # it was settled
    model = build()
    own = loader(share_of(plan, ranks))
    costs = None
    if plan.pipeline > 1:
        costs = ranks.first_says(lambda: _block_seconds(build(), own))
    keep = keep_of(recipe.memory, len(model.blocks))
    layout = prepare_model(
        model,
        plan,
        ranks,
        accumulation=recipe.train.accumulation,
        costs=costs,
        keep=keep,
        weights=recipe.train.weights,
    )
    learning = learn(model, layout.data_ranks)
    train(
        model,
        learning.loss,
        own,
        recipe.train,
        folder=folder,
        watch=learning.watch,
        announce=Announcer(*listeners),
        seed=recipe.seed,
        resume=resume,
        backward=learning.backward,
        ranks=ranks,
        layout=layout,
    )
    if not layout.is_whole:
        model = build()
    load_weights(model, best_weights(folder))
    return model


def training_loader(
    recipe: LaidOut,
    tables: Tables,
    preparation: Preparation,
    *,
    share: Share = WHOLE,
    ranks: Ranks = ALONE,
    withheld_beside: bool = False,
) -> Loader:
    """Training records, seen as the recipe says."""
    return Loader(
        tables.train,
        preparation,
        recipe.data.loader,
        seed=recipe.seed,
        train=True,
        views=narrowed_views(recipe, preparation),
        one_view_a_batch=recipe.data.one_view_a_batch,
        withhold=recipe.data.withhold,
        corrupt=narrowed_corrupt(recipe, tables, preparation),
        withheld_beside=withheld_beside,
        share=share,
        note=None if ranks.heartbeat is None else ranks.heartbeat.modality,
    )


def judging_loader(recipe: LaidOut, table: Table, preparation: Preparation, view: View, ranks: Ranks) -> Loader:
    """All records of a table, as they are."""
    config = LoaderConfig(batch_size=JUDGED_AT_ONCE, workers=recipe.data.loader.workers)
    note = None if ranks.heartbeat is None else ranks.heartbeat.modality
    return Loader(table, preparation, config, views=(view,), share=ranks.share, note=note)


def narrowed_views(recipe: LaidOut, preparation: Preparation) -> tuple[View, ...]:
    """The views of a recipe, as far as these modalities go."""
    narrowed = [
        view.model_copy(
            update={
                "keep": tuple(name for name in view.keep if name in preparation.modalities),
                "beside": tuple(name for name in view.beside if name in preparation.modalities),
            }
        )
        for view in recipe.data.views
    ]
    return tuple(view for view in narrowed if view.keep)


def narrowed_corrupt(recipe: LaidOut, tables: Tables, preparation: Preparation) -> CorruptConfig | None:
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


def provenance(seed: int, tables: Tables, notes: tuple[str, ...]) -> dict[str, Any]:
    """Where a model comes from, for its bundle."""
    return {
        "dougong": dougong.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "trained on": f"{tables.train.path.name}, {tables.train.num_rows} records",
        "judged on": f"{tables.test.path.name}, {tables.test.num_rows} records",
        "notes": list(notes),
    }


def _prepare(recipe: LaidOut, tables: Tables, folder: Path) -> tuple[Preparation, tuple[str, ...]]:
    known = known_preparation(folder)
    if known is not None:
        return known, ()
    preparation, notes = learn_preparation(recipe, tables)
    preparation.save(folder / "preparation")
    return preparation, notes


def _block_seconds(model: BlockStack[Any, Any], loader: Loader) -> list[float]:
    """What embedding, each block and the head cost of the first batch that has records."""
    arrays = next(found for _, found in loader.batches(Position()) if len(found.row_B))
    return block_seconds(model, to_tensors(arrays))


def _describe(recipe: LaidOut, tables: Tables, preparation: Preparation, ranks: Ranks) -> str:
    lines = [f"{tables.train.path.name}: {tables.train.num_rows} training records"]
    lines += [f"  {name:20} {role:9} {reason}" for name, (role, reason) in tables.roles.items()]
    if isinstance(recipe, Recipe):
        lines.append(f"  predicts {tables.target} ({preparation.target.task.replace('_', ' ')})")
    if ranks.world > 1 and recipe.plan is not None:
        lines.append(f"  on {ranks.world} ranks: {recipe.plan.in_words()}")
    if recipe.memory.activations is not None and recipe.memory.keep is not None:
        keep = recipe.memory.keep
        counts = ", ".join(f"{keep.count(each)} keep {each}" for each in KEEPS if each in keep)
        lines.append(f"  of {len(keep)} blocks {counts}, to meet memory.activations={recipe.memory.activations}")
    return "\n".join(lines)


def _tell_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr)
