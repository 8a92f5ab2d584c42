"""What a recipe's model is made of: what its columns hold, and its weights before the first step.

Here        LaidOut, the kinds of recipe that any layout can train; `open_records`, `target_of`, `learn_preparation`,
            `known_preparation`; `build_model`, `loss_of`; `check_layout`, `belongs_together`, of
            what needs a batch in one place; `makes_once`.
Elsewhere   training it (recipes/training.py); laying it out on devices (recipes/plan.py).
Promise     the same recipe and records give the same preparation and the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias, TypeVar, overload

import torch
import torch.distributed as dist

from dougong.core.errors import ConfigError, RunError
from dougong.core.seeds import derive_seed
from dougong.core.signature import NOTHING, Target, VolumeInput
from dougong.data.preparation import Preparation, fit_preparation
from dougong.data.target import infer_target
from dougong.engine.memory.saved import check_saved
from dougong.engine.memory.segments import check_segments
from dougong.engine.parallel.plan import PlanConfig, check_plan
from dougong.engine.prepare import check_precision
from dougong.engine.step import Loss
from dougong.model.decoder import Decoder
from dougong.model.sandwich import Sandwich
from dougong.objectives.generation import words_loss
from dougong.recipes.decoding import DecodeRecipe
from dougong.recipes.losses import DecisionLoss, check_ranks, compared_by, losses_of
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.tables import Announce, Tables, open_tables

LaidOut: TypeAlias = Recipe | DecodeRecipe
LaidOutT = TypeVar("LaidOutT", bound=LaidOut)


def open_records(recipe: LaidOut, announce: Announce | None = None) -> Tables:
    """The recipe's tables; a target is needed only where one is decided."""
    decides = isinstance(recipe, Recipe)
    return open_tables(recipe.data, seed=recipe.seed, announce=announce, decides=decides)


def target_of(data: DataConfig, tables: Tables) -> Target:
    """What the training records say of the target; NOTHING where nothing is decided."""
    if tables.target is None:
        return NOTHING
    return infer_target(tables.train.column(tables.target), tables.target, data.task)


def learn_preparation(recipe: LaidOut, tables: Tables) -> tuple[Preparation, tuple[str, ...]]:
    """What the training columns hold; and notes of what was left out.

    Raises:
        RunError: no modality is left.
    """
    target = target_of(recipe.data, tables)
    preparation = fit_preparation(tables.train, tables.roles, target, recipe.data.preparation)
    notes: list[str] = []
    for name, modality in list(preparation.modalities.items()):
        if isinstance(modality.signature(), VolumeInput):
            notes.append(f"{name} is left out: there is no encoder yet for a {modality.signature().kind}")
            del preparation.modalities[name]
    if recipe.data.modalities is not None:
        strange = [name for name in recipe.data.modalities if name not in preparation.modalities]
        if strange:
            known = ", ".join(preparation.modalities)
            raise RunError(f"data.modalities names {strange[0]!r}, which is no modality here. Use some of {known}.")
        preparation = preparation.only(recipe.data.modalities)
    if not preparation.modalities:
        raise RunError("no modality is left that has an encoder. Name other roles in data.columns.")
    return preparation, tuple(notes)


def known_preparation(folder: Path) -> Preparation | None:
    """What a run in this folder has learnt already."""
    kept = folder / "preparation"
    return Preparation.load(kept) if (kept / "preparation.json").exists() else None


@overload
def build_model(recipe: Recipe, preparation: Preparation) -> Sandwich: ...
@overload
def build_model(recipe: DecodeRecipe, preparation: Preparation) -> Decoder: ...
def build_model(recipe: LaidOut, preparation: Preparation) -> Sandwich | Decoder:
    """The recipe's model before its first step; the same seed draws the same weights."""
    torch.manual_seed(derive_seed(recipe.seed, "model"))
    return recipe.model.build(preparation.signature())


def loss_of(recipe: LaidOut, preparation: Preparation, group: dist.ProcessGroup | None) -> Loss:
    """What the recipe minimises; `group` is of the ranks that share out each batch."""
    if isinstance(recipe, DecodeRecipe):
        weight = recipe.objective.further_weight
        return lambda output, batch: words_loss(output, further_weight=weight)
    return DecisionLoss(losses_of(recipe.objective, recipe.model, preparation.target.task, group))


def check_layout(recipe: LaidOut, plan: PlanConfig, world: int) -> None:
    """
    Raises:
        ConfigError: so many ranks cannot train this recipe so; the message says what would work.
    """
    shares = check_plan(plan, world, accumulation=recipe.train.accumulation)
    check_precision(plan, recipe.train.weights, recipe.train.optimizer.states, recipe.memory.offload)
    if shares > 1 and recipe.data.corrupt is not None and recipe.data.corrupt.spare_one:
        raise ConfigError(
            f"data.corrupt.spare_one looks at all records of a batch, and {shares} ranks share each out. "
            "Set data.corrupt.spare_one: false, or train in one process."
        )
    products = recipe.memory.recompute == "cheap" or "products" in (recipe.memory.keep or ())
    if products and not makes_once(recipe):
        raise ConfigError(
            "objective.balance=mmpareto asks for gradients several times, and products that are kept can be used once. "
            "Use memory.recompute: blocks, or none."
        )
    check_saved(recipe.memory.saved, recipe.memory.saved_as, torch.get_default_device().type, shard=plan.shard)
    if recipe.memory.segments is not None:
        _check_segments(recipe, plan)
    if isinstance(recipe, Recipe):
        _check_decision(recipe, plan, world, shares)


def _check_segments(recipe: LaidOut, plan: PlanConfig) -> None:
    check_segments(plan)
    precision = recipe.train.precision
    if precision == "adaptive":
        raise ConfigError(
            "memory.segments compiles several blocks as one, and train.precision=adaptive gives each a format of its "
            "own. Use train.precision: bf16, or leave memory.segments out."
        )
    if precision == "auto" and recipe.memory.segments == "auto":
        raise ConfigError(
            "memory.segments=auto is measured before training, and train.precision=auto is not known by then. "
            "Use train.precision: bf16 or fp32, or say in memory.segments how many blocks."
        )
    if not makes_once(recipe):
        raise ConfigError(
            "objective.balance=mmpareto asks for gradients several times, and compiled segments give theirs once. "
            "Leave memory.segments out."
        )


def belongs_together(recipe: LaidOut) -> str | None:
    """The setting for which the records of a batch belong together, so that a step cannot be cut into others."""
    if recipe.data.corrupt is not None and recipe.data.corrupt.spare_one:
        return "data.corrupt.spare_one"
    return compared_by(recipe.objective, recipe.model) if isinstance(recipe, Recipe) else None


def makes_once(recipe: LaidOut) -> bool:
    """Whether a step asks for each gradient once, so that what a block makes anew it makes once."""
    return not (isinstance(recipe, Recipe) and recipe.objective.balance == "mmpareto")


def _check_decision(recipe: Recipe, plan: PlanConfig, world: int, shares: int) -> None:
    check_ranks(recipe.objective, recipe.model, shares)
    if recipe.train.sampling is not None and world > 1:
        raise ConfigError(
            f"train.sampling draws for whole batches, and there are {world} ranks. "
            "Train in one process, or use data.withhold."
        )
    if recipe.objective.balance != "none" and plan.tensor * plan.pipeline * plan.shard * plan.expert > 1:
        raise ConfigError(
            f"objective.balance={recipe.objective.balance} needs the whole model on every rank. "
            "Use plan tensor, pipeline, shard and expert of 1, or balance: none."
        )
