"""Judging a finished model again.

Here        judge: a bundle or a run on a table, with modalities withheld or spoilt; judge_contribution: what each of
            them counts.
Elsewhere   the figures (engine/evaluate.py); the run's own judgement (recipes/run.py); levels of corruption one after
            the other (recipes/robust.py).
Promise     without a table, it is the run's own test table, never its training records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dougong.bundle.contribution import Contribution, measure_contribution
from dougong.bundle.describer import KIND, Describer, load_describer
from dougong.bundle.files import load_from, load_network_from
from dougong.bundle.model import Model
from dougong.core.bundle import bundle_in, is_bundle, kind_of
from dougong.core.config import from_yaml, parse
from dougong.core.errors import ConfigError
from dougong.data.corruption import Corruption, check_corruptions
from dougong.data.table import Table
from dougong.engine.evaluate import Evaluation
from dougong.recipes.align import open_align_tables
from dougong.recipes.alignment import AlignRecipe
from dougong.recipes.build import LaidOut, open_records
from dougong.recipes.known import KINDS
from dougong.recipes.recipe import Recipe
from dougong.recipes.settle import SETTINGS


def judge(
    model: Path, table: Path | None, missing: Sequence[str] = (), corrupt: Sequence[Corruption] = ()
) -> dict[str, Any]:
    """Figures by condition: everything, everything without `missing`, and each of these spoilt by `corrupt`.

    Raises:
        ConfigError: there is no table to judge on, or `missing` or `corrupt` names what is not there.
    """
    loaded = _load(model)
    names = list(loaded.network.names if isinstance(loaded, Describer) else loaded.preparation.modalities)
    check_modalities(missing, names)
    check_corruptions(corrupt, loaded.preparation.modalities)
    spared = [one.modality for one in corrupt if one.modality in missing]
    if spared:
        raise ConfigError(f"--corrupt and --missing both name {spared[0]!r}: what is withheld cannot be spoilt.")
    where = table_to_judge_on(model, table)
    kept = {"all": tuple(names)}
    if missing:
        kept[f"without {', '.join(missing)}"] = tuple(name for name in names if name not in missing)
    conditions: dict[str, tuple[tuple[str, ...], Sequence[Corruption]]] = {name: (kept[name], ()) for name in kept}
    if corrupt:
        how = ", ".join(map(str, corrupt))
        conditions.update({how if name == "all" else f"{name}, {how}": (kept[name], corrupt) for name in kept})
    figures: dict[str, Any] = {}
    for condition, (keep, corruptions) in conditions.items():
        found = loaded.evaluate(where, keep=keep, corruptions=corruptions)
        figures[condition] = {
            "metrics": found.metrics,
            "num_records": found.num_records,
            "set_aside": len(found.bad),
            "gate": found.gate if isinstance(found, Evaluation) else {},
        }
    return figures


def _load(model: Path) -> Model | Describer:
    found = bundle_in(model)
    return load_describer(found) if is_bundle(found) and kind_of(found) == KIND else load_from(model)


def check_modalities(missing: Sequence[str], names: Sequence[str]) -> None:
    """Refuse names to withhold that are none.

    Raises:
        ConfigError: which, and what would work.
    """
    strange = [name for name in missing if name not in names]
    if strange:
        raise ConfigError(f"--missing {strange[0]!r} is no modality of this model. Use some of {', '.join(names)}.")


def table_to_judge_on(model: Path, table: Path | None) -> Table | Path:
    """The table that was named, or the run's own test table.

    Raises:
        ConfigError: there is neither.
    """
    return table if table is not None else _own_test_table(model)


def judge_contribution(model: Path, table: Path | None) -> Contribution:
    """How much each modality counts, on a table.

    Raises:
        BundleError: it is an export.
        ConfigError: there is no table to judge on, or the model has one modality.
    """
    return measure_contribution(load_network_from(model), table_to_judge_on(model, table))


def _own_test_table(model: Path) -> Table:
    run = model if (model / SETTINGS).exists() else model.parent
    if not (run / SETTINGS).exists():
        raise ConfigError(f"{model} is a bundle without its run: name a table to judge on, with --data.")
    values = from_yaml((run / SETTINGS).read_text(encoding="utf-8"), where=SETTINGS)
    recipe = parse(KINDS.get(str(values.get("kind")), Recipe), values, where=SETTINGS)
    if isinstance(recipe, AlignRecipe):
        return open_align_tables(recipe.data, seed=recipe.seed).test
    return open_records(cast(LaidOut, recipe)).test
