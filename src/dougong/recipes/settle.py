"""Which recipe a run's folder really carries out, and on which layout.

Here        `settle_recipe`, for runs of every kind; `lay_out`, before any rank is connected; `wanted_recipe`, with
            which both begin.
Elsewhere   carrying it out (recipes/run.py and its like); the planner (recipes/plan.py).
Promise     a folder that holds a run is never taken for another; a layout that the model, the records or the memory do
            not allow is refused before a process group is made, with what would work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, cast

import torch.distributed as dist

from dougong.core.config import from_yaml, parse, to_yaml
from dougong.core.errors import ConfigError, RunError
from dougong.core.files import write_atomic
from dougong.engine.memory.recompute import Keep
from dougong.recipes.build import LaidOut, LaidOutT, check_layout, known_preparation, learn_preparation, open_records
from dougong.recipes.known import AnyRecipe
from dougong.recipes.plan import Planned, chosen_plan

SETTINGS: Final = "run.yaml"

RecipeT = TypeVar("RecipeT", bound=AnyRecipe)


def settle_recipe(
    recipe: RecipeT,
    folder: Path,
    *,
    resume: bool,
    world: int = 1,
    kept: Callable[[RecipeT], tuple[Keep, ...] | None] | None = None,
) -> RecipeT:
    """The recipe that is really run: the folder's own when it is resumed, on the layout that is given now, or that the
    planner chooses for `world` ranks where none is.

    `kept` says what each block keeps to meet memory.activations, of a kind that no layout is chosen for.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: the run in the folder is of another kind.
    """
    recipe = wanted_recipe(recipe, folder, resume=resume)
    if isinstance(recipe, LaidOut) and recipe.plan is None:
        plan = chosen_plan(_planned(recipe, folder), world)
        recipe = cast(RecipeT, recipe.model_copy(update={"plan": plan}))
    if recipe.memory.activations is not None and recipe.memory.keep is None:
        if dist.is_initialized():
            raise ConfigError(
                "memory.activations is met before ranks are connected, and they are. Start the run by `dougong train`, "
                "or say in memory.keep what each block keeps."
            )
        if isinstance(recipe, LaidOut):
            assert recipe.plan is not None
            keep = _planned(recipe, folder).kept(recipe.plan, world)
        else:
            assert kept is not None
            keep = kept(recipe)
        recipe = _keeping(recipe, keep)
    if recipe.memory.segments == "auto":
        if not isinstance(recipe, LaidOut):
            raise ConfigError(
                f"memory.segments=auto is not measured for recipes like {recipe.name}. Say how many blocks make "
                "one, or leave it out."
            )
        assert recipe.plan is not None
        check_layout(recipe, recipe.plan, world)
        size = _planned(recipe, folder).segments().size
        memory = recipe.memory.model_copy(update={"segments": size})
        recipe = cast(RecipeT, recipe.model_copy(update={"memory": memory}))
    if not resume:
        write_atomic(folder / SETTINGS, to_yaml(recipe))
    return recipe


def lay_out(
    recipe: LaidOutT, folder: Path, world: int, *, per_node: int | None = None, resume: bool = False
) -> LaidOutT:
    """The recipe with the layout that so many ranks are to have, `per_node` of them on this machine (None: all).

    Nothing is written, and no process group may exist yet.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: the layout cannot be.
    """
    planned = _planned(wanted_recipe(recipe, folder, resume=resume), folder, per_node or world)
    plan = recipe.plan
    if plan is None:
        plan = chosen_plan(planned, world, per_node)
    planned.check(world, planned.choice(plan))
    keep = planned.kept(plan, world)
    planned.check_memory(world, plan, per_node, keep=keep)
    laid_out = recipe.model_copy(update={"plan": plan})
    return cast(LaidOutT, laid_out if recipe.memory.activations is None else _keeping(laid_out, keep))


def _keeping(recipe: RecipeT, keep: tuple[Keep, ...] | None) -> RecipeT:
    return cast(RecipeT, recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"keep": keep})}))


def wanted_recipe(recipe: RecipeT, folder: Path, *, resume: bool) -> RecipeT:
    """The recipe that is asked for: the folder's own when it is resumed.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: the run in the folder is of another kind.
    """
    settings = folder / SETTINGS
    if resume:
        if not settings.is_file():
            raise RunError(f"{folder} has no {SETTINGS}: there is no run to resume. Start it without --resume.")
        values = from_yaml(settings.read_text(encoding="utf-8"), where=str(settings))
        kept = parse(type(recipe), values, where=str(settings))
        if isinstance(recipe, LaidOut):
            return cast(RecipeT, kept.model_copy(update={"plan": recipe.plan}))
        return kept
    # One that was refused before it learnt anything of its tables has left its settings alone.
    if settings.exists() and any(each != settings for each in folder.iterdir()):
        raise RunError(f"{folder} holds a run already. Go on with it by --resume, or name another folder by --out.")
    return recipe


def _planned(recipe: LaidOut, folder: Path, per_node: int = 1) -> Planned:
    tables = open_records(recipe)
    preparation = known_preparation(folder) or learn_preparation(recipe, tables)[0]
    return Planned(recipe, tables, preparation, run=folder, per_node=per_node)
