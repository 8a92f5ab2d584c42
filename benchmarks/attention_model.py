"""The model whose maps attention.py judges: trained once, and kept while all that trained it stays the same.

Here        `trained`, `asked_recipe`; run by itself, it trains.
Elsewhere   judging the maps (attention.py); what is kept for how long (harness.py).
Promise     a run that was stopped goes on from its last checkpoint; a change of how maps are made or judged trains
            nothing anew.
"""

from __future__ import annotations

from typing import Final

from harness import Kept

from dougong.bundle.model import Model, load
from dougong.core.config import parse
from dougong.recipes.known import read_recipe
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import train_recipe

STEPS: Final = 600


def asked_recipe(quick: bool) -> Recipe:
    """vqa-demo with typed questions alone."""
    steps = 60 if quick else STEPS
    values = read_recipe("vqa-demo").model_dump(mode="json")
    values["data"].update(modalities=["image", "question"], views=[], one_view_a_batch=False, conditions={})
    values["model"].update(align=[])
    values["model"]["encoders"].pop("speech", None)
    values["objective"] = {}
    values["train"].update(steps=steps, evaluate_every=steps)
    values["train"]["optimizer"]["multipliers"].pop("speech", None)
    return parse(Recipe, values, where="vqa-demo")


def trained(recipe: Recipe, quick: bool) -> Model:
    """From its folder, or trained into it."""
    folder = Kept("attention_model").folder / ("quick" if quick else "model")
    if not (folder / "bundle" / "bundle.json").is_file():
        result = train_recipe(recipe, folder / "run", resume=(folder / "run" / "run.yaml").is_file(), quiet=True)
        result.model.save(folder / "bundle")
    return load(folder / "bundle")


if __name__ == "__main__":
    trained(asked_recipe(quick=False), quick=False)
