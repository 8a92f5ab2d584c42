"""The demo: sandwich and baselines on easy-VQA's official test split, over seeds.

Every model of a seed has the same records, steps, batches, augmentation and optimizer (recipes/compare.py). A figure is
the mean over seeds, its interval the lowest and the highest of them; the gains' own intervals, which resample
pictures, are printed by `dougong demo`. The spoken questions are synthetic (espeak-ng), the test voices unheard.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from harness import run

from dougong.core.figures import Figure
from dougong.recipes.compare import run_demo

SEEDS = (0, 1, 2)
ASKED = {"sandwich, written": ">= 0.93", "sandwich, spoken": ">= 0.85"}


def measure(quick: bool) -> Iterator[Figure]:
    seeds = SEEDS[:1] if quick else SEEDS
    found: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"seed={seed}", *(["train.steps=40"] if quick else [])]
            result = run_demo(Path(folder) / "run", settings, quiet=True)
        for row in result.rows:
            for condition, accuracy in row.figures.items():
                found[f"{row.name}, {condition}"].append(accuracy)
        for condition, gain in result.gains.items():
            found[f"gain over late concat, {condition}"].append(gain.value)
        found["seconds in all"].append(result.seconds)
    for name, values in found.items():
        seconds = name == "seconds in all"
        yield Figure(
            name=name,
            value=sum(values) / len(values),
            unit="s" if seconds else "",
            asked="<= 360" if seconds else ASKED.get(name),
            low=min(values),
            high=max(values),
            seeds=len(values),
        )


if __name__ == "__main__":
    run("vqa_demo", "Sandwich and baselines on easy-VQA's test split.", measure)
