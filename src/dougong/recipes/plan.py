"""Which layout a recipe should have on some devices, and what it would cost.

Here        plan_recipe, read_cluster, PlanResult.
Elsewhere   formulas and search (engine/planner/); carrying a layout out (recipes/run.py).
Promise     nothing is trained. The model is built and run once, on a real batch of the recipe's training records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dougong.core.config import from_yaml, parse
from dougong.core.errors import ConfigError
from dougong.data.loader import Loader
from dougong.data.position import Position
from dougong.data.preparation import fit_preparation
from dougong.data.target import infer_target
from dougong.engine.batches import to_tensors
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner.cluster import KNOWN, ClusterConfig
from dougong.engine.planner.predict import BytesConfig, Prediction
from dougong.engine.planner.search import Found, SearchConfig, describe, find_layouts, reason
from dougong.engine.planner.shape import ModelShape, measure_shape
from dougong.recipes.losses import losses_of
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import build_model
from dougong.recipes.tables import open_tables


class PlanResult(NamedTuple):
    """What was found."""

    recipe: str
    cluster: ClusterConfig
    shape: ModelShape
    found: Found

    @property
    def best(self) -> Prediction:
        return self.found.predictions[0]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "cluster": self.cluster.model_dump(mode="json"),
            "parameters": self.shape.parameters,
            "considered": self.found.considered,
            "layouts": [_as_json(each) for each in self.found.predictions],
            "reason": reason(self.found),
        }


def plan_recipe(recipe: Recipe, cluster: ClusterConfig, *, recompute: bool = False, most: int = 10) -> PlanResult:
    """Predict every layout of the recipe on these devices.

    Raises:
        ConfigError: none fits; the message says what is nearest.
    """
    tables = open_tables(recipe.data, seed=recipe.seed)
    target = infer_target(tables.train.column(tables.target), tables.target, recipe.data.task)
    preparation = fit_preparation(tables.train, tables.roles, target, recipe.data.preparation)
    if recipe.data.modalities is not None:
        preparation = preparation.only(recipe.data.modalities)
    model = build_model(recipe, preparation)
    loader = Loader(tables.train, preparation, recipe.data.loader, seed=recipe.seed, train=True)
    arrays = next(found for _, found in loader.batches(Position()) if len(found.row_B))
    losses = losses_of(recipe.objective, recipe.model, target.task, None)
    shape = measure_shape(model, to_tensors(arrays), lambda output, batch: losses(output, batch).whole)
    search = SearchConfig(
        records=shape.num_records * recipe.train.accumulation,
        micro_batches=recipe.train.accumulation,
        recompute=recompute,
        most=most,
    )
    sizes = BytesConfig(activation=1.0 if recipe.train.precision in ("fp32", "auto") else 0.5)
    return PlanResult(recipe.name, cluster, shape, find_layouts(shape, cluster, search, sizes))


def read_cluster(name: str, devices: int, memory_bytes: float | None = None) -> ClusterConfig:
    """A cluster by the kind of its devices, or from a YAML file.

    Raises:
        ConfigError: there is no such kind or file, or a setting is wrong.
    """
    if name in KNOWN:
        values = KNOWN[name].model_dump()
    elif name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{name} does not exist. Use one of {', '.join(KNOWN)}, or a file that does.")
        values = from_yaml(Path(name).read_text(encoding="utf-8"), where=name)
    else:
        raise ConfigError(
            f"{name!r} is no kind of device. Use one of {', '.join(KNOWN)}, or a file that ends in .yaml."
        )
    values["devices"] = devices
    if memory_bytes is not None:
        values["memory_bytes"] = memory_bytes
    return parse(ClusterConfig, values, where=f"cluster {name}")


def _as_json(found: Prediction) -> dict[str, Any]:
    return {
        "layout": describe(found.choice),
        "plan": found.choice.plan.model_dump(mode="json"),
        "settings": _settings(found.choice.plan),
        "micro_batches": found.choice.micro_batches,
        "recompute": found.choice.recompute,
        "seconds": found.seconds,
        "records_per_second": found.records_per_second,
        "work_seconds": found.work_seconds,
        "tensor_seconds": found.tensor_seconds,
        "waiting_ratio": found.waiting_ratio,
        "data_seconds": found.data_seconds,
        "optimizer_seconds": found.optimizer_seconds,
        "memory_bytes": list(found.memory_bytes),
        "state_bytes": list(found.state_bytes),
    }


def _settings(plan: PlanConfig) -> list[str]:
    """What must be set, beside what is so by default."""
    values = plan.model_dump(mode="json")
    return [f"plan.{key}={value}" for key, value in values.items() if value != PlanConfig.model_fields[key].default]
