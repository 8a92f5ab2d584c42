"""What every run has in common, and more of it where any layout can train the model.

Here        `begin_run`: settled, opened, prepared; `training_loader` and `judging_loader`; `encodes_withheld`;
            Lesson, Learning and `train_on_ranks`: laid out, trained, whole again; `kept_alone`; `provenance`.
Elsewhere   what each kind of run learns and judges, and what it leaves (recipes/run.py, recipes/decode.py; on copies
            alone recipes/align.py; in one process recipes/generate.py).
Promise     what a recipe says of its data holds for every kind. Many ranks do together what one does; the first one
            alone writes and speaks.
"""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch

import dougong
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.events import Announcer, Listener
from dougong.data.collate import View
from dougong.data.corruption import CorruptConfig
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import WHOLE, Position, Share
from dougong.data.position import Loader as AnyLoader
from dougong.data.preparation import TABLE_MODALITY, Preparation
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.memory.config import keep_of, settled_keep
from dougong.engine.memory.recompute import KEEPS, Keep
from dougong.engine.parallel.mesh import share_of
from dougong.engine.parallel.pipeline import block_seconds
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.prepare import prepare_model
from dougong.engine.step import Backward, Loss
from dougong.engine.trainer import Watch, train
from dougong.model.decoder import written_text
from dougong.nn.block_stack import BlockStack
from dougong.recipes.build import LaidOut, LaidOutT, check_layout, known_preparation, learn_preparation, open_records
from dougong.recipes.decoding import DecodeRecipe
from dougong.recipes.known import AnyRecipe
from dougong.recipes.recipe import Recipe
from dougong.recipes.room import building, check_state, shelf_folder
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


class Lesson(NamedTuple, Generic[ModelT]):
    """What a run trains."""

    build: Callable[[], ModelT]
    """Makes the same weights at every call."""

    loader: Callable[[Share], AnyLoader]
    """Is asked for one rank's share of each batch."""

    learn: Callable[[ModelT, Ranks], Learning]
    """Is told the model as it is laid out, and which ranks share the records out."""


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
    recipe: AnyRecipe,
    lesson: Lesson[ModelT],
    folder: Path,
    listeners: tuple[Listener, ...],
    *,
    resume: bool,
    ranks: Ranks = ALONE,
) -> ModelT:
    """The model with its best weights, whole on every rank."""
    plan, offload = recipe.plan if isinstance(recipe, LaidOut) else PlanConfig(), recipe.memory.offload
    assert plan is not None  # it was settled
    build, loader, learn = lesson

    def built() -> ModelT:
        with building(offload, folder):
            return build()

    model = built()
    if ranks.world == 1:  # of more it was checked before they were connected
        check_state(model, offload)
    own = loader(share_of(plan, ranks))
    costs = None
    if plan.pipeline > 1:
        costs = ranks.first_says(lambda: _block_seconds(built(), own))
    keep = keep_of(recipe.memory, len(model.blocks))
    segments = recipe.memory.segments
    assert segments != "auto"  # it was settled
    layout = prepare_model(
        model,
        plan,
        ranks,
        accumulation=recipe.train.accumulation,
        costs=costs,
        keep=keep,
        weights=recipe.train.weights,
        segments=segments,
        saved=recipe.memory.saved,
        saved_as=recipe.memory.saved_as,
        offload=offload,
        folder=shelf_folder(offload, folder),
    )
    try:
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
    finally:
        if layout.shelved is not None:
            layout.shelved.close()
    if not layout.has_whole_model:
        model = built()
    load_weights(model, best_weights(folder))
    return model


def kept_alone(recipe: AnyRecipe, lesson: Lesson[ModelT]) -> tuple[Keep, ...] | None:
    """What each block keeps where one process trains, as the recipe says; where that is a budget, what meets it.

    Raises:
        ConfigError: nothing meets it.
    """
    model = lesson.build()
    read = (arrays for _, arrays in lesson.loader(WHOLE).batches(Position()) if len(arrays.row_B))
    batches = [to_tensors(arrays) for arrays in itertools.islice(read, recipe.train.accumulation)]
    what = Rehearsal(
        build=lesson.build,
        batches=lambda _: batches,
        loss=lesson.learn(model, ALONE).loss,
        optimizer=recipe.train.optimizer.build,
        precision="fp32" if recipe.train.precision == "auto" else recipe.train.precision,
    )

    def measured(keep: Sequence[Keep]) -> int:
        return rehearse(what._replace(keep=keep), PlanConfig(), 1, 0).activations

    return settled_keep(recipe.memory, model, what.loss, batches[0], measured, precision=what.precision)


def training_loader(
    recipe: LaidOut,
    tables: Tables,
    preparation: Preparation,
    *,
    share: Share = WHOLE,
    ranks: Ranks = ALONE,
    withheld_beside: bool = False,
) -> Loader:
    """Training records, seen as the recipe says; the text that is to be written always as it is."""
    written = written_text(recipe.model, preparation.signature())[0] if isinstance(recipe, DecodeRecipe) else None
    return Loader(
        tables.train,
        preparation,
        recipe.data.loader,
        seed=recipe.seed,
        train=True,
        views=narrowed_views(recipe, tables, preparation, written),
        one_view_a_batch=recipe.data.one_view_a_batch,
        withhold=recipe.data.withhold,
        corrupt=narrowed_corrupt(recipe, tables, preparation, written),
        withheld_beside=withheld_beside,
        spared=() if written is None else (written,),
        share=share,
        note=None if ranks.heartbeat is None else ranks.heartbeat.modality,
    )


def encodes_withheld(recipe: LaidOut) -> bool:
    """Whether training encodes what it withholds, for a model that learns to complete it."""
    return isinstance(recipe, Recipe) and recipe.model.completion is not None and recipe.objective.completion_weight > 0


def judging_loader(recipe: LaidOut, table: Table, preparation: Preparation, view: View, ranks: Ranks) -> Loader:
    """All records of a table, as they are."""
    config = LoaderConfig(batch_size=JUDGED_AT_ONCE, workers=recipe.data.loader.workers)
    note = None if ranks.heartbeat is None else ranks.heartbeat.modality
    return Loader(table, preparation, config, views=(view,), share=ranks.share, note=note)


def narrowed_views(
    recipe: LaidOut, tables: Tables, preparation: Preparation, written: str | None = None
) -> tuple[View, ...]:
    """The views of a recipe, as far as these modalities go; a text that is to be written is kept in each.

    Raises:
        ConfigError: one names what is no modality, or none is left of them.
    """
    views = recipe.data.views
    check_names("data.views", [name for view in views for name in (*view.keep, *view.beside)], tables, preparation)
    narrowed = [
        view.model_copy(
            update={
                "keep": tuple(name for name in preparation.modalities if name in view.keep or name == written),
                "beside": tuple(name for name in view.beside if name in preparation.modalities),
            }
        )
        for view in views
    ]
    return tuple(view for view in narrowed if view.keep)


def narrowed_corrupt(
    recipe: LaidOut, tables: Tables, preparation: Preparation, written: str | None = None
) -> CorruptConfig | None:
    """What is spoilt in training, as far as these modalities go, and but for a text that is to be written.

    Raises:
        ConfigError: it names what is no modality.
    """
    corrupt = recipe.data.corrupt
    if corrupt is None:
        return None
    named = [*(corrupt.chance if isinstance(corrupt.chance, dict) else ()), *corrupt.kinds]
    check_names("data.corrupt", named, tables, preparation)
    read = tuple(name for name in preparation.modalities if name != written)
    if written is not None and not isinstance(corrupt.chance, dict):
        corrupt = corrupt.model_copy(update={"chance": dict.fromkeys(read, corrupt.chance)})
    return corrupt.only(read)


def check_names(where: str, named: Iterable[str], tables: Tables, preparation: Preparation) -> None:
    """Those that the recipe leaves out may be named: its baselines are the same recipe with fewer.

    Raises:
        ConfigError: one is no modality.
    """
    known = {*preparation.modalities, *tables.roles, TABLE_MODALITY}
    strange = [name for name in named if name not in known]
    if strange:
        known_here = ", ".join(preparation.modalities)
        raise ConfigError(f"{where} names {strange[0]!r}, which is no modality here. Use some of {known_here}.")


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


def _block_seconds(model: BlockStack[Any, Any], loader: AnyLoader) -> list[float]:
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
    if recipe.memory.segments is not None:
        lines.append(f"  segments of {recipe.memory.segments} blocks are compiled and made anew as one")
    return "\n".join(lines)


def _tell_progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr)
