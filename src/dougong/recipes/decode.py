"""Carries out a recipe that trains the large decoder: records in, a run's folder out.

Here        run_decode, DecodeResult.
Elsewhere   the description (recipes/decoding.py); what a run has in common with those of other kinds
            (recipes/training.py); figures (engine/words.py); what it leaves to a user (bundle/describer.py).
Promise     a run folder is never overwritten; one that was stopped goes on with `resume`, to the same losses, on any
            layout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dougong.bundle.describer import KIND, Describer
from dougong.core.bundle import Manifest
from dougong.core.events import Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.core.signature import ImageInput
from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Share
from dougong.data.preparation import Preparation
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.trainer import Watch
from dougong.engine.words import WordsJudged, judge_words
from dougong.model.decoder import Decoder
from dougong.recipes.build import build_model, loss_of
from dougong.recipes.decoding import DecodeRecipe
from dougong.recipes.result import result_as_json, write_words
from dougong.recipes.tables import Tables
from dougong.recipes.training import (
    Learning,
    Lesson,
    begin_run,
    check_names,
    judging_loader,
    provenance,
    train_on_ranks,
    training_loader,
)
from dougong.watch.gallery import write_gallery

SHOWN: Final = 24
"""Test records in the report."""


@dataclass(frozen=True)
class DecodeResult:
    """A finished run."""

    folder: Path
    recipe: DecodeRecipe
    """As it was carried out."""

    describer: Describer
    evaluations: dict[str, WordsJudged]
    """On the test records, by condition."""

    tables: Tables
    num_parameters: int
    train_seconds: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return result_as_json(self)


def run_decode(
    recipe: DecodeRecipe,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    tables: Tables | None = None,
    ranks: Ranks = ALONE,
) -> DecodeResult:
    """Train, judge, save the bundle and write the report. All of `ranks` call this, with one folder.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: there is no one text to write, or so many ranks cannot train the recipe so.
    """
    recipe, tables, preparation, notes, listeners = begin_run(
        recipe, folder, resume=resume, quiet=quiet, tables=tables, ranks=ranks
    )
    started = time.perf_counter()
    model = _train(recipe, tables, preparation, folder, listeners, resume=resume, ranks=ranks)
    train_seconds = time.perf_counter() - started

    evaluations = _judged(recipe, model, tables.test, preparation, ranks)
    notes = (*notes, "bits: of held-out words, given the true ones before them")
    manifest = Manifest(
        name=recipe.name,
        signature=preparation.signature(),
        model={"kind": KIND, **model.config.model_dump(mode="json")},
        provenance=provenance(recipe.seed, tables, notes),
        metrics={name: found.metrics for name, found in evaluations.items()},
    )
    result = DecodeResult(
        folder=folder,
        recipe=recipe,
        describer=Describer(model, preparation, manifest, recipe.sampling),
        evaluations=evaluations,
        tables=tables,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=train_seconds,
        notes=notes,
    )
    if ranks.first:
        result.describer.save(folder / "bundle")
        write_words(result)
        _write_samples(result)
        write_gallery(folder)
    ranks.wait()
    return result


def _train(
    recipe: DecodeRecipe,
    tables: Tables,
    preparation: Preparation,
    folder: Path,
    listeners: tuple[Listener, ...],
    *,
    resume: bool,
    ranks: Ranks,
) -> Decoder:
    kept = [name for keep in recipe.data.conditions.values() for name in keep]
    check_names("data.conditions", kept, tables, preparation)

    def build() -> Decoder:
        return build_model(recipe, preparation)

    def loader(share: Share) -> Loader:
        return training_loader(recipe, tables, preparation, share=share, ranks=ranks)

    def learn(model: Decoder, together: Ranks) -> Learning:
        def judge() -> dict[str, WordsJudged]:
            return _judged(recipe, model, tables.validation, preparation, together)

        return Learning(loss_of(recipe, preparation, together.group), Watch(judge, "loss", higher_is_better=False))

    return train_on_ranks(recipe, Lesson(build, loader, learn), folder, listeners, resume=resume, ranks=ranks)


def _judged(
    recipe: DecodeRecipe, model: Decoder, table: Table, preparation: Preparation, ranks: Ranks
) -> dict[str, WordsJudged]:
    conditions = recipe.data.conditions or {"all": tuple(preparation.modalities)}
    found = {}
    for name, keep in conditions.items():
        view = View(keep=tuple(each for each in preparation.modalities if each in keep or each == model.writes))
        loader = judging_loader(recipe, table, preparation, view, ranks)
        found[name] = judge_words(model, loader, model.writes, ranks=ranks)
    return found


# What it leaves --------------------------------------------------------------------------------------------------


def _write_samples(result: DecodeResult) -> None:
    """Test records with what is written about them, for the page."""
    folder = result.folder / "gallery"
    folder.mkdir(exist_ok=True)
    preparation = result.describer.preparation
    loader = Loader(result.tables.test, preparation, LoaderConfig(batch_size=SHOWN, workers=0))
    arrays = next((arrays for arrays in loader.one_pass() if len(arrays.row_B)), None)
    samples = [] if arrays is None else _samples(result.describer, arrays, folder, result.recipe.seed)
    write_json(folder / "samples.json", samples)


def _samples(describer: Describer, arrays: BatchArrays, folder: Path, seed: int) -> list[dict[str, Any]]:
    batch, network = to_tensors(arrays), describer.network
    text = batch.media[network.writes]
    inputs = describer.preparation.signature().inputs
    pictures = [name for name in network.names if isinstance(inputs[name], ImageInput)]
    samples = []
    for place, said in enumerate(describer.write(batch, seed=derive_seed(seed, "shown"))):
        sample: dict[str, Any] = {"row": int(arrays.row_B[place]), "written": said}
        if bool(text.present_B[place]):
            sample["caption"] = describer.text(text.values["ids_UT"][text.index_B[place]])
        for name in pictures[:1]:
            image = batch.media[name]
            if bool(image.present_B[place]):
                (picture,) = describer.pictures(name, image.values["pixels_UCHW"][image.index_B[place]][None])
                picture.save(folder / f"{place}-true.png")
                sample["picture"] = f"{folder.name}/{place}-true.png"
        samples.append(sample)
    return samples
