"""Captions of pictures and pictures of captions by one decoder, held against a decoder of each direction alone.

Pictures of easy-VQA with captions made of its questions and answers; figures are of the official test pictures, each
met once. The tokenizer, which all models share, and the classifier that judges drawn pictures are trained once, on
training pictures; every writer starts anew for every seed, with the same settings, batches and schedule.

"The same total steps" is read so: a joint model takes N steps, in which the records of a batch take turns (half of
them caption, half draw); the two models of one direction take N/2 steps each, with whole batches. Both sides then take
N steps in all, read as many records in each direction, and cost about the same. The rows "by half batches" give each
model of one direction N steps, as many updates as the joint model has and as long a schedule, with half as many records
in each. What is asked is of the better of the two. The rows "of N steps" are the harder
reading: each model of one direction takes N steps by itself, and so reads twice as many records of its direction as
the joint model does; together the two take 2N.

bits: of a held-out code (or word), given the true ones before it; less is better. An interval is the lowest and the
highest of the seeds; a gain's is a 95 % interval of the seeds' mean by Student's t.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from harness import Kept, run
from parts import each_seed

from dougong.bundle.generator import Generator
from dougong.bundle.model import Model
from dougong.core.config import override, parse
from dougong.core.figures import Figure
from dougong.data.modality.image import ImageAugment
from dougong.data.preparation import PreparationConfig
from dougong.data.table import Table
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.recipes.generate import GenerationResult, batches_of, run_generation
from dougong.recipes.generation import GenerateRecipe, vqa_generate
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.run import run_recipe

SEEDS: Final = (0, 1, 2, 3, 4)
STEPS: Final = 900
"""N, of what is compared."""

BATCH: Final = vqa_generate().data.loader.batch_size

LONG_SEEDS: Final = 5
"""Of the model that is trained as the recipe says, whose captions and pictures are judged."""

STUDENT: Final = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % point of Student's t, by the number of seeds."""


DRAWS: Final = 3
"""Of all test captions, by each model: of one alone the standard error is .007."""

FULL: Final = "as-the-recipe-says"
"""Half an hour of a core for each seed, which are kept."""

COMPARED: Final = "joint-against-alone"
PARTS: Final = (FULL, COMPARED)


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    seeds, steps = (SEEDS[:1], 20) if quick else (SEEDS, STEPS)
    with tempfile.TemporaryDirectory() as name:
        # Whole runs lie where an interrupted benchmark finds them again; a quick one leaves nothing.
        kept = Kept("generation")
        folder = Path(name) if quick else kept.folder
        first = _train(folder / "tokenizer", 0, 1, ["tokenizer.train.steps=20"] if quick else [])
        take = [f"tokenizer.take={folder / 'tokenizer'}"]
        if FULL in parts:
            one = functools.partial(_as_the_recipe_says, folder, first, take, quick=quick)
            how = "quick" if quick else "whole"
            yield from _shown(each_seed(kept, f"{FULL}, {how}", 1 if quick else LONG_SEEDS, one))
        found: dict[str, list[float]] = defaultdict(list)
        for seed in seeds if COMPARED in parts else ():
            _note(found, _train(folder / f"joint-{seed}", seed, steps, take), "joint")
            for direction in ("caption", "draw"):
                alone = [*take, f"model.directions=[{direction}]"]
                _note(found, _train(folder / f"{direction}-{seed}", seed, steps // 2, alone), "alone")
                half = [*alone, f"data.loader.batch_size={BATCH // 2}"]
                _note(found, _train(folder / f"{direction}-{seed}-half", seed, steps, half), "alone, by half batches")
                if not quick:
                    longer = _train(folder / f"{direction}-{seed}-longer", seed, steps, alone)
                    _note(found, longer, "alone, of N steps")
    if found:
        yield from _figures(found)


def _as_the_recipe_says(
    folder: Path, first: GenerationResult, take: list[str], seed: int, *, quick: bool
) -> dict[str, Any]:
    """Captions and pictures of a model that is trained in full."""
    test = first.tables.test
    labels = [str(label) for label in test.column("named").to_pylist()]
    judge = _judge(folder / "judge", 10 if quick else 1200)
    found: dict[str, list[float]] = defaultdict(list)
    steps = 40 if quick else vqa_generate().train.steps
    assert steps is not None
    long = _train(folder / f"long-{seed}", seed, steps, take)
    _note(found, long, "as the recipe says")
    captions = test.column("caption").to_pylist()
    return {
        "judge": judge.manifest.metrics["all"]["accuracy"],
        "coded": _right(judge, _through_tokenizer(first.generator, test), labels),
        "names": found.pop("caption names, as the recipe says")[0],
        "shown": [_right(judge, long.generator.draw(captions, seed=DRAWS * seed + n), labels) for n in range(DRAWS)],
        "others": {name: value for name, (value,) in found.items()},
    }


def _shown(found: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """A model's figure is the mean of its draws; what is asked is of the mean over models, and of each."""
    yield _figure("judge right, real test pictures", [found[0]["judge"]])
    yield _figure("judge right, test pictures through the tokenizer", [found[0]["coded"]])
    shown = [statistics.fmean(one["shown"]) for one in found]
    for name, values, asked in (
        ("captions name colour and shape", [one["names"] for one in found], 0.98),
        ("pictures show colour and shape", shown, 0.95),
    ):
        yield _figure(name, values, f">= {asked}")
        half = _half_interval(values)
        if half is not None:
            lower = statistics.fmean(values) - half
            yield Figure(name=f"{name}: lower end over seeds", value=lower, unit="", seeds=len(values))
    for seed, one in enumerate(found):
        yield _figure(f"pictures show colour and shape, seed {seed}, each draw", one["shown"])
    for name in found[0]["others"]:
        yield _figure(name, [one["others"][name] for one in found])


def _note(found: dict[str, list[float]], result: GenerationResult, who: str) -> None:
    for direction, judged in result.evaluations.items():
        for metric in ("token_accuracy", "bits", "names"):
            if metric in judged.metrics:
                found[f"{direction} {metric.replace('_', ' ')}, {who}"].append(judged.metrics[metric])


def _figures(found: dict[str, list[float]]) -> Iterator[Figure]:
    for name, better in (
        ("caption token accuracy", 1),
        ("draw bits", -1),
        ("draw token accuracy", 1),
        ("caption bits", -1),
    ):
        ours = found[f"{name}, joint"]
        ways = [found[f"{name}, {way}"] for way in ("alone", "alone, by half batches")]
        theirs = max(ways, key=lambda values: better * statistics.fmean(values))
        gains = [better * (a - b) for a, b in zip(ours, theirs, strict=True)]
        mean, half = statistics.fmean(gains), _half_interval(gains)
        low, high = (None, None) if half is None else (mean - half, mean + half)
        unit = "bits" if "bits" in name else ""
        gain = f"joint better than the better alone by, {name}"
        yield Figure(name=gain, value=mean, unit=unit, low=low, high=high, seeds=len(gains))
        if low is not None and name in ("caption token accuracy", "draw bits"):
            # What must be above nothing is the whole interval, not its middle.
            yield Figure(name=f"{gain}: its lower end", value=low, unit=unit, asked=">= 0", seeds=len(gains))
    for name, values in found.items():
        yield _figure(name, values)


def _half_interval(values: list[float]) -> float | None:
    if len(values) not in STUDENT:
        return None
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _figure(name: str, values: list[float], asked: str | None = None) -> Figure:
    unit = "bits" if " bits" in name else ""
    mean = statistics.fmean(values)
    return Figure(name=name, value=mean, unit=unit, asked=asked, low=min(values), high=max(values), seeds=len(values))


def _train(folder: Path, seed: int, steps: int, settings: list[str]) -> GenerationResult:
    values = vqa_generate().model_dump(mode="json")
    given = [f"seed={seed}", f"train.steps={steps}", f"train.evaluate_every={max(1, steps // 2)}", *settings]
    recipe = parse(GenerateRecipe, override(values, given), where="benchmark")
    return run_generation(recipe, folder, resume=(folder / "run.yaml").exists(), quiet=True)


def _judge(folder: Path, steps: int) -> Model:
    """A small convolutional classifier of colour and shape, trained on real training pictures."""
    recipe = Recipe(
        name="judge",
        data=DataConfig(
            source="captions",
            target="named",
            columns={"colour": "ignore", "shape": "ignore", "image_id": "ignore"},
            modalities=("image",),
            unit="image_id",
            preparation=PreparationConfig(image_size=32, image_augment=ImageAugment(flip=True, shift_pixels=3)),
        ),
        model=SandwichConfig(
            width=64,
            fusion="late",
            encoders={
                "image": ImageEncoderConfig(
                    width=64, num_layers=1, num_heads=4, patch_size=4, stem="convolution", pool=2
                )
            },
        ),
        train=TrainConfig(
            steps=steps, precision="fp32", evaluate_every=100, optimizer=OptimizerConfig(learning_rate=3e-3)
        ),
    )
    return run_recipe(recipe, folder, resume=(folder / "run.yaml").exists(), quiet=True).model


def _right(judge: Model, pictures: Sequence[Any], labels: list[str]) -> float:
    """Share of the pictures that the judge takes for what was asked."""
    answers = judge.predict([{"image": picture} for picture in pictures])
    return statistics.fmean(answer.answer == label for answer, label in zip(answers, labels, strict=True))


def _through_tokenizer(generator: Generator, table: Table) -> list[Any]:
    """Every record's picture as codes and back: no drawing can be judged better than these."""
    network, pictures = generator.network, []
    for batch in batches_of(table, generator.preparation):
        media = batch.media[network.picture]
        code_BP = network.tokenizer.encode(media.values["pixels_UCHW"][media.index_B])
        pictures += generator.pictures(network.pictures(code_BP))
    return pictures


if __name__ == "__main__":
    run(
        "generation", "Captions and pictures by one decoder, against one of each direction alone.", measure, parts=PARTS
    )
