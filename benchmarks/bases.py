"""Trained bundles that benchmarks begin from, each trained once.

Here        `easy_vqa` (to be taught further), `uci_views` (versions that differ by their seed).
Elsewhere   what is measured with them (continual.py, gate.py).
Promise     a bundle is taken from an earlier run only where every source that trains it is the same to the letter;
            what is done with it afterwards may change.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from harness import Kept

from dougong.recipes.known import read_recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.tables import open_tables


def easy_vqa(seed: int, quick: bool) -> Path:
    """A bundle of the recipe vqa-demo; `quick` is one that has hardly learnt."""
    folder = _kept().folder / f"easy-vqa-{seed}{'-quick' if quick else ''}"
    if not (folder / "bundle" / "bundle.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        steps = ["train.steps=20", "train.evaluate_every=20"] if quick else []
        run_recipe(read_recipe("vqa-demo", [f"seed={seed}", *steps]), folder, quiet=True)
        print(f"easy-vqa, seed {seed}, is trained", file=sys.stderr)
    return folder / "bundle"


def uci_views(seed: int, quick: bool) -> Path:
    """A bundle of the recipe uci-views in 400 steps. The split is the same for all: the collection's own seed."""
    folder = _kept().folder / f"uci-views-{seed}{'-quick' if quick else ''}"
    if not (folder / "bundle" / "bundle.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        steps = 60 if quick else 400
        recipe = read_recipe("uci-views", [f"train.steps={steps}", f"train.evaluate_every={steps // 4}"])
        tables = open_tables(recipe.data, seed=recipe.seed)
        run_recipe(recipe.model_copy(update={"seed": seed}), folder, quiet=True, tables=tables)
        print(f"uci-views, seed {seed}, is trained", file=sys.stderr)
    return folder / "bundle"


def _kept() -> Kept:
    return Kept("bases")
