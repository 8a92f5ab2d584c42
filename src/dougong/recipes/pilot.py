"""How much each head's loss should weigh, found by a short run before the real one.

Here        `blending_pilot`.
Elsewhere   the formula (objectives/balance.py); using the weights (recipes/losses.py's `blend`).
Promise     held-out losses are the validation records', never the test's; the result is plain settings, so the real
            run can be written down, repeated and resumed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Final

import torch

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.model.sandwich import Sandwich
from dougong.objectives.balance import blending_weights
from dougong.recipes.build import build_model
from dougong.recipes.losses import WHOLE, losses_of
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import train_recipe
from dougong.recipes.tables import Tables

MOST_RECORDS: Final = 2048
"""Of training and of validation records, of which the losses are taken."""


def blending_pilot(recipe: Recipe, folder: Path, tables: Tables, *, share: float = 0.2) -> dict[str, float]:
    """Train for `share` of the recipe's steps with all heads alike, and weigh them by Gradient-Blending's rule.

    The offline form of Wang et al. 2020 (arXiv:1905.12681), except that all heads are trained together in one run
    where they train one network for each. Its steps come on top of the recipe's.

    Raises:
        ConfigError: the recipe has no taught heads, or no number of steps.
    """
    if recipe.model.own_heads != "taught":
        raise ConfigError("a pilot weighs each modality's own loss. Set model.own_heads: taught.")
    if recipe.train.steps is None:
        raise ConfigError("a pilot runs for a share of train.steps. Set them.")
    values = recipe.model_dump(mode="json")
    steps = max(1, round(share * recipe.train.steps))
    values["train"] |= {"steps": steps, "evaluate_every": steps, "patience": None}
    values["objective"] |= {"blend": {}, "own_weight": 1.0}
    pilot = parse(Recipe, values, where="pilot")
    result = train_recipe(pilot, folder, quiet=True, tables=tables)
    preparation, trained = result.model.preparation, result.model.network
    before = build_model(pilot, preparation).eval()
    losses = [
        _head_losses(pilot, model, table, preparation)
        for table in (tables.train, tables.validation)
        for model in (before, trained)
    ]
    # A modality that the records looked at lack on one side has no gap to be judged by.
    shared = set.intersection(*(set(each) for each in losses))
    return blending_weights(*({name: each[name] for name in each if name in shared} for each in losses))


@torch.inference_mode()
def _head_losses(recipe: Recipe, model: Sandwich, table: Table, preparation: Preparation) -> dict[str, float]:
    """Each head's mean loss over some of the table's records, drawn from all over it."""
    losses_by_head = losses_of(recipe.objective, recipe.model, preparation.target.task)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    table = sample_table(table, MOST_RECORDS, seed=derive_seed(recipe.seed, "pilot"))
    for arrays in Loader(table, preparation, LoaderConfig(batch_size=256)).one_pass():
        batch = to_tensors(arrays)
        if not batch.num_records:
            continue
        found = losses_by_head(model(batch), batch)
        sums[WHOLE] += float(found.whole)
        counts[WHOLE] += batch.num_records
        for name, loss in found.own.items():
            sums[name] += float(loss)
            counts[name] += int(batch.media[name].present_B.sum())
    return {name: sums[name] / counts[name] for name in sums}
