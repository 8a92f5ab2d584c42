"""A model's robustness: judged at graded levels of corruption, modality by modality and all at once.

Here        `sweep`.
Elsewhere   what the figures mean (engine/robustness.py); what is done to records (data/corruption.py); judging at one
            level (recipes/judge.py).
Promise     every level is judged on the same records; a medium is spoilt alike for the model and its baseline, and at
            every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from dougong.bundle.files import load_from
from dougong.bundle.model import Model
from dougong.core.errors import ConfigError
from dougong.data.corruption import Corruption
from dougong.data.table import Table
from dougong.engine.metrics import primary_metric
from dougong.engine.robustness import Robustness, effective_robustness, relative_robustness
from dougong.recipes.judge import check_modalities, table_to_judge_on

LEVELS: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
EVERY: Final = "every modality"

Announce = Callable[[str, int, int], None]


def sweep(
    model: Path,
    table: Path | None,
    missing: Sequence[str] = (),
    *,
    baseline: Path | None = None,
    levels: Sequence[float] = LEVELS,
    announce: Announce | None = None,
) -> list[Robustness]:
    """Judge with each modality spoilt, all kinds of corruption mixed, then with all of them.

    `baseline` is another model (a bundle or a run) of the same target, against which effective robustness is taken.

    Raises:
        ConfigError: there is no table, `missing` names no modality, or the baseline answers another question.
    """
    loaded = load_from(model)
    check_modalities(missing, list(loaded.preparation.modalities))
    where = table_to_judge_on(model, table)
    metric = primary_metric(loaded.preparation.target.task)
    kept = [name for name in loaded.preparation.modalities if name not in missing]
    if not kept:
        raise ConfigError("every modality is missing, so none is left to be spoilt. Leave one of them in.")
    spoilt = {name: (name,) for name in kept} | ({EVERY: tuple(kept)} if len(kept) > 1 else {})
    other = None if baseline is None else _baseline(baseline, loaded)
    steps = (len(levels) - 1) * len(spoilt) * (1 if other is None else 2)
    tell = _Steps(steps, announce)
    ours = _curves(loaded, where, kept, spoilt, levels, metric.name, tell)
    theirs = {} if other is None else _curves(other, where, kept, spoilt, levels, metric.name, tell)
    return [
        Robustness(
            what=what,
            metric=metric.name,
            levels=tuple(levels),
            scores=tuple(scores),
            relative=relative_robustness(levels, scores),
            effective=effective_robustness(levels, scores, theirs[what], higher_is_better=metric.higher_is_better)
            if what in theirs
            else None,
        )
        for what, scores in ours.items()
    ]


class _Steps:
    def __init__(self, total: int, announce: Announce | None) -> None:
        self._done, self._total, self._announce = 0, total, announce

    def __call__(self, what: str) -> None:
        self._done += 1
        if self._announce is not None:
            self._announce(what, self._done, self._total)


def _curves(
    model: Model,
    table: Table | Path,
    kept: Sequence[str],
    spoilt: Mapping[str, Sequence[str]],
    levels: Sequence[float],
    metric: str,
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    own = [name for name in kept if name in model.preparation.modalities]
    clean = _score(model, table, own, (), metric)
    curves: dict[str, list[float]] = {}
    for what, names in spoilt.items():
        curves[what] = [clean]
        for level in levels[1:]:
            # A baseline of fewer modalities is not touched by what befalls the others.
            corruptions = [Corruption(modality=name, level=level) for name in names if name in own]
            curves[what].append(_score(model, table, own, corruptions, metric) if corruptions else clean)
            tell(f"{what} {level:g}")
    return curves


def _score(
    model: Model, table: Table | Path, keep: Sequence[str], corruptions: Sequence[Corruption], metric: str
) -> float:
    metrics = model.evaluate(table, keep=keep, corruptions=corruptions).metrics
    if metric not in metrics:
        raise ConfigError(f"these records do not define {metric}: no curve can be drawn. Judge on more of them.")
    return metrics[metric]


def _baseline(path: Path, model: Model) -> Model:
    other = load_from(path)
    if other.preparation.target != model.preparation.target:
        raise ConfigError(
            f"--baseline {path} predicts {other.preparation.target.name!r} with other labels or scale than the model. "
            "Give a model that was trained on the same table."
        )
    if not set(other.preparation.modalities) & set(model.preparation.modalities):
        raise ConfigError(f"--baseline {path} shares no modality with the model. Give one that does.")
    return other
