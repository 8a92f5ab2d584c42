"""Fusion under noise, imbalance and missing modalities: ten ways to fuse on three sets, trained alike.

Here        the sets, the ways, one run of each, and what is made of them (claims 8 and 9 of docs/claims.md).
Elsewhere   each way is settings of one recipe (recipes/recipe.py); corruption (data/corruption.py); robustness
            (engine/robustness.py); options and the written result (harness.py).
Promise     every way has the same encoders, records, steps, batches, learning rates, augmentation, corruption and
            withheld modalities in training, and is judged on the same test records at its best of the same
            evaluations on validation records. Nothing was chosen on test records.

Sets        easy-vqa: picture (32 pixels) and typed question, official split, 2,000 test records from all over it.
            seen-and-spoken: a written digit (8 x 8) and a spoken one, test speaker and pictures unseen, other ones with
            each seed. uci-views: three sets of features of a written digit; uci-views-untaught: the same, where nothing
            is spoilt or withheld in training, and so ours' gate is not taught by what was.
In training each medium is spoilt with chance .5 (.3 in easy-vqa, which else is not learnt in these steps) by any of
            its modality's corruptions at a level from 0 to 1 (one modality of a record is always spared), and each
            modality is withheld with chance .15.
Judged      clean; each modality missing; each modality, and all at once, spoilt by any of its corruptions at levels
            .25, .5, .75 and 1. "noise" is the mean accuracy over all of the last, "missing" over each one missing;
            relative and effective robustness are means over what was spoilt.
Ways        "best single" is trained for each modality alone, OGM-GE, QMF and TMC with each setting of TRIED; validation
            records choose. Ours has one setting for all sets, chosen on validation records when it was made.
            Gradient-Blending's pilot of a fifth of the steps comes on top of its own. Ours is the bridge, its gate
            reading quality and taught by known corruption, and a head of each modality that also learns from all
            together; votes are weighed after training on the validation records that choose every way's best moment.

A figure is the mean over seeds, its interval the lowest and the highest. `--quick` is one seed, a tenth of the steps.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from harness import Kept, run
from torchmetrics.functional.classification import binary_auroc

from dougong.core.config import parse
from dougong.core.events import read_events
from dougong.core.figures import Figure
from dougong.data.collate import View
from dougong.data.corruption import Corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.robustness import effective_robustness, relative_robustness
from dougong.recipes.known import read_recipe
from dougong.recipes.pilot import blending_pilot
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import RunResult, train_recipe
from dougong.recipes.tables import open_tables

SEEDS: Final = (0, 2, 3, 4, 5)
"""Not 1: by it the speaker of the test is the one on whose records ours was settled when it was made."""

LEVELS: Final = (0.25, 0.5, 0.75, 1.0)
TEST_RECORDS: Final = 2000
SPOKEN: Final = Path(__file__).parents[2] / "shared" / "data" / "fsdd" / "recordings"

UNTAUGHT: Final = "uci-views-untaught"
OURS: Final = "ours"
BASELINE: Final = "late concat"
SINGLE: Final = "best single"

WAYS: Final[dict[str, dict[str, Any]]] = {
    "late concat": {"model.fusion": "late"},
    "late logits": {"model.fusion": "late", "model.decide": "mean"},
    "merged attention": {"model.bridge.kind": "merged"},
    "OGM-GE": {"model.fusion": "late", "model.own_heads": "watching", "objective.balance": "ogm-ge"},
    "Gradient-Blending": {"model.fusion": "late", "model.own_heads": "taught", "pilot": True},
    "MMPareto": {"model.fusion": "late", "model.own_heads": "taught", "objective.balance": "mmpareto"},
    "QMF": {"model.fusion": "late", "model.decide": "confidence"},
    "TMC": {"model.fusion": "late", "model.decide": "evidence"},
    "ours": {
        "model.decide": "weighed",
        "model.gate_quality": True,
        "data.preparation.quality": True,
        "objective.gate_weight": 0.5,
        "objective.teach_weight": 1.0,
    },
}
TRIED: Final[dict[str, dict[str, dict[str, Any]]]] = {
    # Published for SGD; under AdamW noise as wide as the gradient weighs more.
    "OGM-GE": {
        "with noise": {"objective.ogm_noise": True},
        "without": {"objective.ogm_noise": False},
        "weak": {"objective.ogm_noise": False, "objective.ogm_alpha": 0.2},
    },
    "QMF": {"as published": {"objective.rank_weight": 1.0}, "weak": {"objective.rank_weight": 0.3}},
    "TMC": {
        "as built": {"objective.doubt_weight": 0.1},
        "weak": {"objective.doubt_weight": 0.01},
        "averaged": {"objective.doubt_weight": 0.1, "model.evidence_rule": "average"},
    },
}
"""Settings of a way that are all tried; validation records choose."""


class Job(NamedTuple):
    """One training."""

    set_name: str
    way: str
    seed: int
    choice: str | None
    """One of those between which validation records choose: the modality of a single one, or one of TRIED."""

    quick: bool


def base(set_name: str, seed: int) -> dict[str, Any]:
    """A set's recipe, which every way alters."""
    common: dict[str, Any] = {
        "name": f"fusion-{set_name}",
        "seed": seed,
        "train": {
            "precision": "fp32",
            "checkpoint_seconds": None,
            "keep": 1,
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.05, "warmup_ratio": 0.1},
        },
        "model": {"width": 64, "bridge": {"num_heads": 4}},
    }
    spoilt: dict[str, Any] = {"withhold": 0.15, "corrupt": {"chance": 0.3 if set_name == "easy-vqa" else 0.5}}
    if set_name == UNTAUGHT:
        spoilt = {}
    if set_name == "easy-vqa":
        common["data"] = {
            "source": "easy-vqa",
            "target": "answer",
            "modalities": ["image", "question"],
            "columns": {"voice": "ignore", "image_id": "ignore", "speech": "ignore"},
            "validation_share": 0.03,
            "preparation": {"image_size": 32, "image_augment": {"flip": True, "shift_pixels": 2}},
            "loader": {"batch_size": 128, "group_by": "image", "records_per_medium": 4},
            **spoilt,
        }
        picture = {"kind": "image", "width": 64, "num_layers": 1, "num_heads": 4, "feedforward_ratio": 2.0}
        words = {"kind": "text", "width": 64, "num_layers": 1, "num_heads": 4, "feedforward_ratio": 2.0}
        common["model"]["encoders"] = {
            "image": {**picture, "patch_size": 4, "stem": "convolution", "pool": 2},
            "question": words,
        }
        common["train"] |= {"steps": 1500, "evaluate_every": 500}
        common["train"]["optimizer"] |= {"learning_rate": 1.5e-3, "betas": (0.9, 0.95)}
    elif set_name == "seen-and-spoken":
        common["data"] = {
            "source": "seen-and-spoken",
            "folder": str(SPOKEN),
            "target": "digit",
            "modalities": ["image", "speech"],
            "columns": {"speaker": "ignore"},
            "preparation": {
                "image_size": 16,
                "image_augment": {"shift_pixels": 2},
                "audio_augment": {"gain_decibels": 3.0, "noise": 0.1, "shift_seconds": 0.1, "speed": 0.1},
            },
            "loader": {"batch_size": 64},
            **spoilt,
        }
        common["model"]["encoders"] = read_recipe("seen-and-spoken").model_dump(mode="json")["model"]["encoders"]
        common["train"] |= {"steps": 600, "evaluate_every": 100}
    else:
        common["data"] = {
            "source": "uci-views",
            "target": "digit",
            "modalities": ["fou", "kar", "zer"],
            "columns": {"record_id": "ignore"},
            "loader": {"batch_size": 64},
            **spoilt,
        }
        common["train"] |= {"steps": 800, "evaluate_every": 100}
    return common


def recipe_of(job: Job) -> Recipe:
    """The set's recipe, altered as the way says."""
    values = base(job.set_name, job.seed)
    if job.way == SINGLE:
        assert job.choice is not None
        values["data"]["modalities"] = [job.choice]
        values["data"]["withhold"] = 0.0  # a record's only modality is never withheld
        values["model"]["fusion"] = "late"
        encoders = values["model"].get("encoders", {})
        values["model"]["encoders"] = {name: each for name, each in encoders.items() if name == job.choice}
    tried = TRIED.get(job.way, {}).get(job.choice or "", {})
    for key, value in (WAYS.get(job.way, {}) | tried).items():
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    values.pop("pilot", None)
    if job.set_name == UNTAUGHT:
        values.get("objective", {}).pop("gate_weight", None)  # nothing is spoilt that could teach it
    values["data"]["conditions"] = {"all": values["data"]["modalities"]}
    if job.quick:
        values["train"]["steps"] //= 10
        values["train"]["evaluate_every"] //= 10
    return parse(Recipe, values, where=job.way)


def carry_out(job: Job) -> dict[str, Any]:
    """Train and judge; plain figures."""
    torch.set_num_threads(1)
    recipe = recipe_of(job)
    tables = open_tables(recipe.data, seed=recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        if WAYS.get(job.way, {}).get("pilot"):
            blend = blending_pilot(recipe, Path(folder) / "pilot", tables)
            objective = recipe.objective.model_copy(update={"blend": blend})
            recipe = recipe.model_copy(update={"objective": objective})
        result = train_recipe(recipe, Path(folder) / "run", quiet=True, tables=tables)
        finished = next(e for e in read_events(Path(folder) / "run" / "events.jsonl") if e["kind"] == "RunFinished")
    test = sample_table(tables.test, TEST_RECORDS, seed=0)
    figures = judge(result, test, job)
    return figures | {"validation": finished["best_metric"], "seconds": result.train_seconds}


def judge(result: RunResult, test: Table, job: Job) -> dict[str, Any]:
    """Accuracy under every condition, and what the gate knew."""
    model = result.model
    here = tuple(model.preparation.modalities)
    names = tuple(base(job.set_name, job.seed)["data"]["modalities"])  # a single one's model stands the others' noise

    def under(view: View | None, corruptions: tuple[Corruption, ...]) -> Evaluation:
        config = LoaderConfig(batch_size=256)
        views = () if view is None else (view,)
        loader = Loader(test, model.preparation, config, views=views, corruptions=corruptions)
        return evaluate(model.network, loader, model.preparation.target)

    found: dict[str, Any] = {"clean": under(None, ()).metrics["accuracy"]}
    for name in names:
        kept = tuple(other for other in here if other != name)
        found[f"missing {name}"] = under(View(keep=kept), ()).metrics["accuracy"]
    told: dict[str, list[float]] = {"score": [], "spoilt": [], "level": []}
    for level in LEVELS:
        for name in names:
            spoilt = under(None, tuple(Corruption(modality=each, level=level) for each in (name,) if each in here))
            found[f"noise {name} {level}"] = spoilt.metrics["accuracy"]
            if spoilt.weight_BM is not None:
                told["score"] += (1.0 - spoilt.weight_BM).round(5).ravel().tolist()
                told["spoilt"] += [float(other == name) for other in names] * len(spoilt.weight_BM)
                told["level"] += [level] * spoilt.weight_BM.size
        everything = tuple(Corruption(modality=name, level=level) for name in here)
        found[f"noise all {level}"] = under(None, everything).metrics["accuracy"]
    if told["score"]:
        score, spoilt_B = torch.tensor(told["score"]), torch.tensor(told["spoilt"]).long()
        found["auroc"] = float(binary_auroc(score, spoilt_B))
        for level in LEVELS:
            at = torch.tensor(told["level"]) == level
            found[f"auroc {level}"] = float(binary_auroc(score[at], spoilt_B[at]))
    return found


SETS: Final = ("easy-vqa", "seen-and-spoken", "uci-views", UNTAUGHT)


def measure(quick: bool, parts: Sequence[str] = SETS) -> Iterator[Figure]:
    sets = [name for name in parts if name != "seen-and-spoken" or SPOKEN.is_dir()]
    for name in set(parts) - set(sets):
        print(f"{name} is left out: its recordings are not there.", file=sys.stderr)
    seeds = SEEDS[:1] if quick else SEEDS
    jobs = [
        Job(set_name, way, seed, choice, quick)
        for seed in seeds
        for set_name in sets
        for way in (SINGLE, *WAYS)
        for choice in choices(set_name, way)
    ]
    found = dict(results(jobs))
    for set_name in sets:
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for seed in seeds:
            for way in (SINGLE, *WAYS):
                tried = [found[job] for job in jobs if job[:3] == (set_name, way, seed)]
                rows[way].append(max(tried, key=lambda one: float(one["validation"])))
        yield from figures_of(set_name, rows)


def choices(set_name: str, way: str) -> tuple[str | None, ...]:
    """What validation records choose between."""
    if way == SINGLE:
        return tuple(base(set_name, 0)["data"]["modalities"])
    return tuple(TRIED.get(way, {})) or (None,)


def results(jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Of each job, in any order; two at a time, with one thread each."""
    kept = Kept("fusion")
    waiting = []
    for job in jobs:
        known = kept.get(repr(job))
        if known is None:
            waiting.append(job)
        else:
            yield job, known
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = {pool.submit(_and_kept, job): job for job in waiting}
        for done, future in enumerate(as_completed(running), start=1):
            job, figures = running[future], future.result()
            print(f"{done} of {len(waiting)}: {job.set_name}, {job.way}, seed {job.seed}", file=sys.stderr)
            yield job, figures


def _and_kept(job: Job) -> dict[str, Any]:
    """In the process that has loaded what ran."""
    kept, figures = Kept("fusion"), carry_out(job)
    kept.put(repr(job), figures)
    return figures


def summary(one: Mapping[str, Any], late: Mapping[str, Any]) -> dict[str, float]:
    """A run's figures; `late` is late concat of the same seed, robustness' baseline."""
    levels = (0.0, *LEVELS)
    kinds = sorted({key.split()[1] for key in one if key.startswith("noise ")})

    def curve(run: Mapping[str, Any], what: str) -> list[float]:
        return [run["clean"], *(run[f"noise {what} {level}"] for level in LEVELS)]

    return {
        "clean": one["clean"],
        "noise": float(np.mean([one[f"noise {kind} {level}"] for kind in kinds for level in LEVELS])),
        "relative robustness": float(np.mean([relative_robustness(levels, curve(one, kind)) for kind in kinds])),
        "effective robustness": float(
            np.mean([effective_robustness(levels, curve(one, kind), curve(late, kind)) for kind in kinds])
        ),
        "missing": float(np.mean([value for key, value in one.items() if key.startswith("missing ")])),
        **{key: value for key, value in one.items() if key.startswith("missing ")},
    }


def figures_of(set_name: str, rows: Mapping[str, list[dict[str, Any]]]) -> Iterator[Figure]:
    """A set's table, and whether ours is first."""
    told = {
        way: [summary(one, late) for one, late in zip(runs, rows[BASELINE], strict=True)] for way, runs in rows.items()
    }
    for what in next(iter(told.values()))[0]:
        for way, runs in told.items():
            values = [one[what] for one in runs]
            yield spread(f"{set_name}, {what}: {way}", values)
        others = {way: np.array([one[what] for one in runs]) for way, runs in told.items() if way != OURS}
        best = max(others, key=lambda way: float(others[way].mean()))
        gains = np.array([one[what] for one in told[OURS]]) - others[best]
        asked = None
        if what == "clean":
            deviation = float(others[best].std(ddof=1)) if len(gains) > 1 else 0.0
            asked = f">= {-deviation:.4f}"
        elif what in ("noise", "relative robustness", "effective robustness", "missing"):
            asked = ">= 0"
        yield spread(f"{set_name}, {what}: ours over the best other, {best}", gains.tolist(), asked=asked)
    for key in ("auroc", *(f"auroc {level}" for level in LEVELS)):
        name = (
            f"{set_name}, AUROC of 1 - gate weight for the spoilt modality{key.removeprefix('auroc') or ', all levels'}"
        )
        yield spread(name, [one[key] for one in rows[OURS]], asked=">= 0.95" if key == "auroc" else None)
    yield spread(f"{set_name}, seconds of a training: ours", [one["seconds"] for one in rows[OURS]], unit="s")


def spread(name: str, values: list[float], *, asked: str | None = None, unit: str = "") -> Figure:
    return Figure(
        name=name,
        value=float(np.mean(values)),
        unit=unit,
        asked=asked,
        low=min(values),
        high=max(values),
        seeds=len(values),
    )


if __name__ == "__main__":
    run("fusion", "Ten ways to fuse three sets, under noise and with modalities missing.", measure, parts=SETS)
