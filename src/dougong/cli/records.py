"""A run's training records, for whoever diagnoses it.

Here        `examine_run`.
Elsewhere   the scorer (engine/examine.py); the command (inside.py).
Promise     only the first records are read, in the table's own order, and none is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dougong.bundle.files import load_from
from dougong.core.errors import ConfigError
from dougong.data.loader import Loader, LoaderConfig
from dougong.engine.batches import to_tensors
from dougong.engine.examine import Examined, examine
from dougong.nn.batch import Batch
from dougong.recipes.build import open_records
from dougong.recipes.known import read_any_recipe
from dougong.recipes.recipe import Recipe
from dougong.recipes.settle import SETTINGS

AT_ONCE = 24
"""Records of a batch: neighbours are looked for within one."""


def examine_run(run: Path) -> Examined:
    """What a run's first training records say of each other.

    Raises:
        ConfigError: the folder holds no recipe of a model that decides.
        BundleError: it holds no trained model yet, whose preparation the records need.
    """
    path = run / SETTINGS
    recipe = read_any_recipe(str(path)) if path.is_file() else None
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"--records: {run} is no run of a recipe that decides, so its records are not known. Leave --records out; "
            "watch() in a script asks them by itself."
        )
    loader = Loader(open_records(recipe).train, load_from(run).preparation, LoaderConfig(batch_size=AT_ONCE, workers=0))

    def batches() -> Iterator[Batch]:
        for arrays in loader.one_pass():
            yield to_tensors(arrays)

    return examine(batches())
