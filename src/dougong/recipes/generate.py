"""Carries out a recipe that learns to write: records in, a run's folder out.

Here        run_generation, GenerationResult, judge_writer; `check_spare`; `writing_losses`, what a writer minimises;
            `found_of_other`, how often a record's picture finds its words.
Elsewhere   the description (recipes/generation.py); every part that is introduced here to the others.
Promise     a run folder is never overwritten; one that was stopped goes on with `resume`, to the same losses, whether
            the tokenizer or the writer was being trained.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dougong.bundle.generator import KIND, Generator, load_generator
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError
from dougong.core.events import Announcer, Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.core.signature import NOTHING, ImageInput
from dougong.data.keyed import KeyedLoader, keys_by_row
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.text import TextModality
from dougong.data.position import Loader as AnyLoader
from dougong.data.position import Share
from dougong.data.preparation import Preparation, fit_preparation
from dougong.data.split import part_of
from dougong.data.table import Table, cells_of
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.evaluate import evaluating
from dougong.engine.memory.recompute import Keep
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.retrieval import recall_among
from dougong.engine.step import SumOfTerms
from dougong.engine.trainer import Watch, train
from dougong.engine.words import WordsJudged, WordSums
from dougong.model.mining import Keyed, spared
from dougong.model.reading import num_media
from dougong.model.vq import Coded, PictureTokenizer
from dougong.model.writer import Direction, Writer, WriterOutput, Written
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.contrastive import all_pairs_loss
from dougong.objectives.generation import generation_loss, token_losses
from dougong.objectives.missing import Unexplained, completion_loss
from dougong.objectives.reconstruction import reconstruction_loss
from dougong.recipes.build import target_of
from dougong.recipes.generation import GenerateRecipe, GenerationObjective
from dougong.recipes.result import result_as_json, write_words
from dougong.recipes.settle import settle_recipe
from dougong.recipes.tables import Tables, open_tables
from dougong.recipes.training import Learning, Lesson, kept_alone, provenance, train_on_ranks
from dougong.watch.gallery import write_gallery
from dougong.watch.progress import Progress
from dougong.watch.tensorboard import TensorBoard

SETTINGS: Final = "run.yaml"
GALLERY: Final = "gallery"
JUDGED_AT_ONCE: Final = 128
LOOKED_FOR: Final = 1000
"""Records of which the own is looked for among all that they have."""

SHOWN: Final = 24
"""Test records in the report."""


@dataclass(frozen=True)
class GenerationResult:
    """A finished run."""

    folder: Path
    generator: Generator
    evaluations: dict[str, WordsJudged]
    """On the test records, by direction."""

    tables: Tables
    num_parameters: int
    train_seconds: float
    """Of the writer alone."""

    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return result_as_json(self)


def run_generation(
    recipe: GenerateRecipe, folder: Path, *, resume: bool = False, quiet: bool = False
) -> GenerationResult:
    """Train the tokenizer, then the writer; judge, save the bundle and write the report.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ConfigError: the records are not of one picture and one text, the tokenizer to take is another one, or a table
            lacks the column objective.spare.
    """
    recipe = settle_recipe(recipe, folder, resume=resume, kept=_kept_blocks)
    tables = open_tables(recipe.data, seed=recipe.seed, decides=False)
    check_spare(recipe, tables)
    preparation = _prepare(recipe, tables, folder)
    listeners: list[Listener] = [] if quiet else [Progress()]
    tokenizer = _tokenizer(recipe, tables, preparation, folder, listeners, resume=resume)

    lesson = _lesson(recipe, tables, preparation, lambda: tokenizer)
    started = time.perf_counter()
    model = train_on_ranks(recipe, lesson, folder, (*listeners, TensorBoard(folder / "tensorboard")), resume=resume)
    train_seconds = time.perf_counter() - started

    notes = (
        *tables.notes,
        "names: share of pictures whose caption has every word of the record's own label and of no other",
        "bits: of held-out words or codes, given the true ones before them",
        *_notes_of_parts(recipe),
    )
    evaluations = judge_writer(model, tables.test, preparation, spare=recipe.objective.spare)
    generator = _generator(recipe, model, preparation, tables, evaluations, notes)
    labels = _labels(tables)
    if "caption" in evaluations and labels:
        named = captions_that_name(generator, tables.test, labels, seed=recipe.seed)
        evaluations["caption"].metrics["names"] = named
        generator = _generator(recipe, model, preparation, tables, evaluations, notes)
    generator.save(folder / "bundle")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    result = GenerationResult(folder, generator, evaluations, tables, num_parameters, train_seconds, notes)
    write_words(result)
    _write_samples(result, recipe)
    write_gallery(folder)
    return result


def judge_writer(
    model: Writer,
    table: Table,
    preparation: Preparation,
    *,
    batch_size: int = JUDGED_AT_ONCE,
    spare: str | None = None,
) -> dict[str, WordsJudged]:
    """By direction, of what is written given the truth before it: `loss` (nats a token), `bits` (the same in bits), and
    `token_accuracy` (how often the likeliest token is the true one), means over all tokens of the table.

    Of a model that completes also `left`: of the spread of what an encoder says of the content, the share that
    completing it leaves unexplained. Of one that aligns, what `found_of_other` says with this `spare`.
    """
    sums: dict[Direction, WordSums] = {direction: WordSums() for direction in model.config.directions}
    unexplained: dict[Direction, Unexplained] = {direction: Unexplained() for direction in model.config.directions}
    with torch.inference_mode(), evaluating(model):
        for batch in batches_of(table, preparation, batch_size):
            for direction, written in model(batch).written.items():
                loss_RN = token_losses(written.score_RNV, written.target_RN)
                sums[direction].add(written.score_RNV, written.target_RN, loss_RN, written.due_RN)
                held = _held_against(written, batch.media[model.content[direction]])
                if held is not None:
                    unexplained[direction].add(*held)
    found = found_of_other(model, table, preparation, spare=spare) if model.config.align else {}
    judged: dict[str, WordsJudged] = {}
    for direction, summed in sums.items():
        told, left = summed.judged(), unexplained[direction].left()
        if told.metrics:
            more = {**({} if left is None else {"left": left}), **found.get(direction, {})}
            judged[direction] = told._replace(metrics={**told.metrics, **more})
    return judged


def found_of_other(
    model: Writer, table: Table, preparation: Preparation, *, spare: str | None = None
) -> dict[Direction, dict[str, float]]:
    """How well the aligned vectors belong together, by direction: `recall_at_10`, the share of records whose own is
    among the ten likest of the other modality's distinct media (of caption, a picture's own words); `chance_at_10`,
    what guessing has.

    Asked of LOOKED_FOR records at most, from all over the table. The media of records that share its own medium, or the
    value of the column `spare`, are left out: they count neither as right nor as wrong.

    Raises:
        ConfigError: the table has no such column.
    """
    rows = np.linspace(0, table.num_rows - 1, min(LOOKED_FOR, table.num_rows)).astype(np.int64)
    # In one batch, in which a medium that records share stands once.
    loader = Loader(part_of(table, rows), preparation, LoaderConfig(batch_size=LOOKED_FOR, workers=0))
    arrays = next((arrays for arrays in loader.one_pass() if len(arrays.row_B)), None)
    if arrays is None:
        return {}
    batch, names = to_tensors(arrays), (model.picture, model.words)
    both_B = torch.stack([batch.media[name].present_B for name in names]).all(dim=0)
    if not bool(both_B.any()):
        return {}
    key_B = torch.arange(batch.num_records)
    if spare is not None:
        keys = keys_by_row(table, spare)
        key_B = torch.tensor([keys[row] for row in arrays.row_B.tolist()])
    index = {name: batch.media[name].index_B[both_B] for name in names}
    has = {name: batch.media[name].present_B for name in names}
    with torch.inference_mode(), evaluating(model):
        vectors = {name: _vectors(model, batch.media[name], name) for name in names}
    found: dict[Direction, dict[str, float]] = {}
    for direction in model.config.directions:
        asks, other = model.given[direction], model.content[direction]
        left_out_UV = spared(
            *(Keyed(batch.media[n].index_B[has[n]], key_B[has[n]], len(vectors[n])) for n in (asks, other))
        )
        found[direction] = recall_among(
            vectors[asks], vectors[other], index[asks].numpy(), index[other].numpy(), left_out_UV.numpy()
        )
    return found


def _vectors(model: Writer, media: MediaBatch, name: str) -> npt.NDArray[np.float32]:
    """Of all distinct media, some at a time."""
    found = []
    for start in range(0, num_media(media), JUDGED_AT_ONCE):
        values = {key: value[start : start + JUDGED_AT_ONCE] for key, value in media.values.items()}
        found.append(model.vectors(media._replace(values=values), name).float())
    vector_UD: npt.NDArray[np.float32] = torch.cat(found).numpy()
    return vector_UD


def captions_that_name(generator: Generator, table: Table, labels: Mapping[int, str], *, seed: int = 0) -> float:
    """Share of the table's pictures of which a caption is written that has the words of the record's own label, and of
    the other words that labels are made of none. `labels` are by row; a record without one, or without a picture, is
    not counted. Not a number where none is."""
    known = {word for label in labels.values() for word in label.split()}
    right = total = 0
    loader = Loader(table, generator.preparation, LoaderConfig(batch_size=JUDGED_AT_ONCE))
    for number, arrays in enumerate(arrays for arrays in loader.one_pass() if len(arrays.row_B)):
        batch = to_tensors(arrays)
        captions = generator.write(batch, "caption", seed=derive_seed(seed, "judged", number))
        seen_B = batch.media[generator.network.picture].present_B
        for caption, row, seen in zip(captions, arrays.row_B.tolist(), seen_B.tolist(), strict=True):
            if seen and row in labels:
                right += known & set(caption.split()) == set(labels[row].split())
                total += 1
    return right / total if total else math.nan


def _labels(tables: Tables) -> dict[int, str]:
    """The words of each test record's label, by row, where a column is named as the target; it is not learnt."""
    name = next((name for name, role in tables.roles.items() if role.role == "target"), None)
    found: dict[int, str] = {}
    if name is not None and name in tables.test.schema.names:
        for chunk in range(tables.test.num_chunks):
            cells = cells_of(tables.test.read(chunk, [name]).column(name))
            rows = tables.test.numbers_of(chunk).tolist()
            found |= {
                row: cell for row, cell in zip(rows, cells, strict=True) if isinstance(cell, str) and cell.strip()
            }
    return found


def check_spare(recipe: GenerateRecipe, tables: Tables) -> None:
    """
    Raises:
        ConfigError: a table lacks the column whose equal values are not held against each other.
    """
    spare = recipe.objective.spare
    for table in (tables.train, tables.validation, tables.test):
        if spare is not None and spare not in table.schema.names:
            known = ", ".join(table.schema.names[:40])
            raise ConfigError(f"objective.spare names {spare!r}, which {table.path.name} lacks. Use one of {known}.")


def _notes_of_parts(recipe: GenerateRecipe) -> tuple[str, ...]:
    """What the figures mean of parts that a recipe may have."""
    notes = []
    if recipe.model.completion is not None:
        notes.append(
            "left: of the spread of what an encoder says of the content, the share that completing it from what is "
            "given leaves unexplained; the mean leaves 1"
        )
    if recipe.model.align:
        spare = recipe.objective.spare
        alike = "" if spare is None else f"; those of other records with the same {spare} are left out"
        notes.append(
            f"recall at 10: share of {LOOKED_FOR} records at most whose own caption or picture is among the ten likest "
            f"to the picture or caption{alike}; chance at 10: what guessing has"
        )
    return tuple(notes)


def batches_of(table: Table, preparation: Preparation, batch_size: int = JUDGED_AT_ONCE) -> Iterator[Batch]:
    for arrays in Loader(table, preparation, LoaderConfig(batch_size=batch_size)).one_pass():
        if len(arrays.row_B):
            yield to_tensors(arrays)


# The run ---------------------------------------------------------------------------------------------------------


def _prepare(recipe: GenerateRecipe, tables: Tables, folder: Path) -> Preparation:
    kept = folder / "preparation"
    if (kept / "preparation.json").exists():
        return Preparation.load(kept)
    preparation = prepare_records(recipe, tables)
    preparation.save(kept)
    return preparation


def prepare_records(recipe: GenerateRecipe, tables: Tables) -> Preparation:
    """What the two columns hold, learnt from training records alone."""
    if recipe.tokenizer.take is not None:
        # Codes mean something only for pixels that are normalised as the tokenizer's were.
        taken = load_generator(recipe.tokenizer.take).preparation
        return Preparation(taken.modalities, NOTHING, quality=taken.quality)
    target = target_of(recipe.data, tables)
    preparation = fit_preparation(tables.train, tables.roles, target, recipe.data.preparation)
    return preparation if recipe.data.modalities is None else preparation.only(recipe.data.modalities)


def _end_of_words(preparation: Preparation) -> int:
    text = next((one for one in preparation.modalities.values() if isinstance(one, TextModality)), None)
    if text is None:
        raise ConfigError("a writer needs one text, and the records have none. Name it in data.modalities.")
    return int(text.tokenizer.encode("").ids[-1])


def _picture(preparation: Preparation) -> str:
    name = next((n for n, one in preparation.signature().inputs.items() if isinstance(one, ImageInput)), None)
    if name is None:
        raise ConfigError("a writer needs one picture, and the records have none. Name it in data.modalities.")
    return name


def _first_tokenizer(recipe: GenerateRecipe, preparation: Preparation) -> PictureTokenizer:
    """Taken, or before its first step."""
    if recipe.tokenizer.take is not None:
        taken = load_generator(recipe.tokenizer.take).network.tokenizer
        if taken.config != recipe.model.tokenizer:
            raise ConfigError(f"the tokenizer of {recipe.tokenizer.take} is not as model.tokenizer says. Set it alike.")
        return taken
    torch.manual_seed(derive_seed(recipe.seed, "tokenizer"))
    shape = preparation.signature().inputs[_picture(preparation)]
    assert isinstance(shape, ImageInput)
    return recipe.model.tokenizer.build(shape)


def _tokenizer(
    recipe: GenerateRecipe,
    tables: Tables,
    preparation: Preparation,
    folder: Path,
    listeners: Sequence[Listener],
    *,
    resume: bool,
) -> PictureTokenizer:
    """Taken, or trained in a folder of its own inside the run's."""
    name = _picture(preparation)
    tokenizer = _first_tokenizer(recipe, preparation)
    if recipe.tokenizer.take is not None:
        return tokenizer
    pictures = preparation.only([name])

    def loss(output: Coded, batch: Batch) -> Tensor:
        media = batch.media[name]
        # A record without a picture has none to be made.
        index_B = media.index_B[media.present_B]
        return reconstruction_loss(
            output.x_UDHW,
            media.values["pixels_UCHW"],
            output.strayed_U,
            index_B,
            commitment=recipe.model.tokenizer.commitment,
        )

    loader = Loader(
        tables.train,
        pictures,
        LoaderConfig(batch_size=recipe.tokenizer.batch_size, workers=recipe.data.loader.workers),
        seed=derive_seed(recipe.seed, "tokenizer"),
        train=True,
    )
    train(
        tokenizer,
        loss,
        loader,
        recipe.tokenizer.train,
        folder=folder / "tokenizer",
        announce=Announcer(*listeners),
        seed=recipe.seed,
        resume=resume,
    )
    if recipe.tokenizer.train.ema is not None:
        load_weights(tokenizer, best_weights(folder / "tokenizer"))
    return tokenizer


def _lesson(
    recipe: GenerateRecipe, tables: Tables, preparation: Preparation, tokenizer: Callable[[], PictureTokenizer]
) -> Lesson[Writer]:
    def build() -> Writer:
        settings = recipe.model.model_copy(update={"end_of_words": _end_of_words(preparation)})
        own = tokenizer()
        torch.manual_seed(derive_seed(recipe.seed, "model"))
        return settings.build(preparation.signature(), own)

    spare = recipe.objective.spare

    def loader(_: Share) -> AnyLoader:
        plain = Loader(tables.train, preparation, recipe.data.loader, seed=recipe.seed, train=True)
        return plain if spare is None else KeyedLoader(plain, keys_by_row(tables.train, spare))

    def learn(model: Writer, _: Ranks) -> Learning:
        def terms(output: WriterOutput, batch: Batch) -> dict[str, Tensor]:
            return writing_losses(output, batch, recipe.objective, model.content)

        def judge() -> dict[str, WordsJudged]:
            return judge_writer(model, tables.validation, preparation, spare=spare)

        return Learning(SumOfTerms(terms), Watch(judge, "loss", higher_is_better=False))

    return Lesson(build, loader, learn)


def _kept_blocks(recipe: GenerateRecipe) -> tuple[Keep, ...] | None:
    """What each of the writer's blocks keeps to meet the recipe's budget, whatever its tokenizer has learnt."""
    tables = open_tables(recipe.data, seed=recipe.seed, decides=False)
    preparation = prepare_records(recipe, tables)
    tokenizer = functools.partial(_first_tokenizer, recipe, preparation)
    return kept_alone(recipe, _lesson(recipe, tables, preparation, tokenizer))


def writing_losses(
    output: WriterOutput, batch: Batch, objective: GenerationObjective, content: Mapping[Direction, str]
) -> dict[str, Tensor]:
    """What a writer minimises, by part, weighted: what was written and, where the model has them, what was completed of
    each direction, and the alignment. Sums over records.

    Args:
        batch: its target, where it has one, is what records share that are not held against each other.
        content: the modality that each direction writes.
    """
    weights = {"caption": objective.caption_weight, "draw": objective.draw_weight}
    found: dict[str, Tensor] = {
        direction: weights[direction] * generation_loss(written.score_RNV, written.target_RN, written.due_RN)
        for direction, written in output.written.items()
    }
    for direction, written in output.written.items():
        held = _held_against(written, batch.media[content[direction]]) if objective.completion_weight else None
        if held is not None:
            found[f"{direction} completed"] = objective.completion_weight * completion_loss(*held)
    if len(output.aligned) == 2:
        found["alignment"] = objective.align_weight * all_pairs_loss(
            output.aligned,
            {name: batch.media[name].index_B for name in output.aligned},
            {name: batch.media[name].present_B for name in output.aligned},
            temperature=output.temperature,
            key_B=batch.target,
        )
    return found


def _held_against(written: Written, content: MediaBatch) -> tuple[Tensor, Tensor, Tensor] | None:
    """What was completed for records that have the content, the truth of each medium, and which of these each record
    has; None where there is nothing to hold against each other."""
    completed = written.completed
    if completed is None or completed.truth_UKD is None:
        return None
    known_R = completed.made_R & content.present_B[written.row_R]
    return completed.made_RKD[known_R], completed.truth_UKD, content.index_B[written.row_R[known_R]]


# What it leaves --------------------------------------------------------------------------------------------------


def _generator(
    recipe: GenerateRecipe,
    model: Writer,
    preparation: Preparation,
    tables: Tables,
    evaluations: dict[str, WordsJudged],
    notes: tuple[str, ...],
) -> Generator:
    manifest = Manifest(
        name=recipe.name,
        signature=preparation.signature(),
        model={"kind": KIND, **model.config.model_dump(mode="json")},
        provenance=provenance(recipe.seed, tables, notes),
        metrics={name: found.metrics for name, found in evaluations.items()},
    )
    return Generator(model, preparation, manifest, recipe.sampling)


def _write_samples(result: GenerationResult, recipe: GenerateRecipe) -> None:
    """Test records with what is written about them, for the page."""
    generator, network = result.generator, result.generator.network
    loader = Loader(result.tables.test, generator.preparation, LoaderConfig(batch_size=SHOWN, workers=0))
    arrays = next(arrays for arrays in loader.one_pass() if len(arrays.row_B))
    batch, labels = to_tensors(arrays), _labels(result.tables)
    folder = result.folder / GALLERY
    folder.mkdir(exist_ok=True)
    image, text = batch.media[network.picture], batch.media[network.words]
    written = {
        direction: generator.write(batch, direction, seed=derive_seed(recipe.seed, "shown"))
        for direction in network.config.directions
    }
    pixels_UCHW = image.values["pixels_UCHW"]
    with torch.inference_mode():
        coded = generator.pictures(network.pictures(network.tokenizer.encode(pixels_UCHW)))
    true = generator.pictures(pixels_UCHW)
    samples = []
    for place in range(batch.num_records):
        row = int(arrays.row_B[place])
        sample: dict[str, Any] = {"row": row}
        if row in labels:
            sample["label"] = labels[row]
        if bool(text.present_B[place]):
            sample["caption"] = generator.text(text.values["ids_UT"][text.index_B[place]])
            if "draw" in written:
                sample["drawn"] = _save(written["draw"][place], folder / f"{place}-drawn.png")
        if bool(image.present_B[place]):
            sample["picture"] = _save(true[int(image.index_B[place])], folder / f"{place}-true.png")
            sample["coded"] = _save(coded[int(image.index_B[place])], folder / f"{place}-coded.png")
            if "caption" in written:
                sample["written"] = written["caption"][place]
        samples.append(sample)
    write_json(folder / "samples.json", samples)


def _save(picture: Any, path: Path) -> str:
    picture.save(path)
    return f"{path.parent.name}/{path.name}"
