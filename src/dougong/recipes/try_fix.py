"""Tries what would mend a run, by short runs in pairs.

Here        `try_fix`, Trial: as the run was, and with each remedy that is a setting, the same seeds and steps.
Elsewhere   what is wrong, and which settings may mend it (watch/diagnose/); carrying a recipe out (recipes/run.py).
Promise     the run itself is not touched; trials are written into a folder of their own that is gone afterwards. A
            remedy counts as a help only where its figure is better with every seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dougong.core.config import override, parse
from dougong.core.errors import ConfigError, DougongError
from dougong.core.events import read_events
from dougong.engine.metrics import primary_metric
from dougong.recipes.known import read_any_recipe
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import train_recipe
from dougong.recipes.settle import SETTINGS
from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.diagnose.rules import Finding

SEEDS: Final = (0, 1)
STEPS: Final = 60
MOST_SETTINGS: Final = 3

Tell = Callable[[str, int, int], None]


class Trial(NamedTuple):
    """One remedy beside the run as it was."""

    cause: str
    setting: str
    metric: str
    before: list[float]
    """By seed; of a run that failed, not a number."""

    after: list[float]
    helped: bool
    steps: int

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def try_fix(
    run: Path,
    findings: Sequence[Finding],
    *,
    steps: int = STEPS,
    seeds: Sequence[int] = SEEDS,
    tell: Tell | None = None,
) -> list[Trial]:
    """Short paired runs of the surest findings' settings.

    Raises:
        ConfigError: the folder holds no recipe of a model that decides, or no finding has a setting to try.
    """
    path = run / SETTINGS
    if not path.is_file():
        raise ConfigError(f"{run} has no {SETTINGS}: only a recipe's run can be tried again. Mend the script.")
    recipe = read_any_recipe(str(path))
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{run} is a run of another kind, which cannot be tried again in short. Change its recipe.")
    chosen = [(finding.cause, setting) for finding in findings for setting in CATALOGUE[finding.cause].settings]
    if not chosen:
        raise ConfigError("nothing that was found is mended by a setting: do what each finding says by hand.")
    chosen = chosen[:MOST_SETTINGS]
    total, done = (len(chosen) + 1) * len(seeds), 0
    before: list[float] = []
    metric = ""
    for seed in seeds:
        metric, value = _short(recipe, None, seed, steps)
        before.append(value)
        done += 1
        if tell is not None:
            tell("as it was", done, total)
    trials = []
    for cause, setting in chosen:
        after = []
        for seed in seeds:
            after.append(_short(recipe, setting, seed, steps)[1])
            done += 1
            if tell is not None:
                tell(setting, done, total)
        better = [_better(b, a, metric) for b, a in zip(before, after, strict=True)]
        trials.append(Trial(cause, setting, metric, before, after, all(better), steps))
    return trials


def relative(values: dict[str, Any], setting: str) -> str:
    """A setting such as `train.optimizer.learning_rate=0.1x` as a number, from what it was."""
    key, _, text = setting.partition("=")
    if not text.endswith("x") or not text[:-1].replace(".", "", 1).isdigit():
        return setting
    inner: Any = values
    for part in key.split("."):
        inner = inner[part]
    return f"{key}={float(inner) * float(text[:-1])!r}"


def _short(recipe: Recipe, setting: str | None, seed: int, steps: int) -> tuple[str, float]:
    values = recipe.model_dump(mode="json")
    settings = [f"seed={seed}", f"train.steps={steps}", "train.checkpoint_every=null", "train.patience=null"]
    settings += [f"train.evaluate_every={steps}"]
    if setting is not None:
        settings.append(relative(values, setting))
    changed = parse(Recipe, override(values, settings), where="the trial")
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_recipe(changed, Path(folder) / "trial", quiet=True)
        except DougongError:
            return "", float("nan")
        judged = [e for e in read_events(Path(folder) / "trial" / "events.jsonl") if e["kind"] == "Evaluated"]
        metric = primary_metric(result.model.preparation.target.task)
        found = [event["metrics"][metric.name] for event in judged if metric.name in event["metrics"]]
        value = found[-1] if found else float("nan")
        return metric.name, value if metric.higher_is_better else -value


def _better(before: float, after: float, metric: str) -> bool:
    return after > before or (before != before and after == after)
