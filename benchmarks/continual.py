"""Ten tasks learnt one after another by a model of easy-VQA: what is learnt, what is forgotten, what it costs.

Here        the tasks, the ways to learn them, and what is made of them (claim 11 of docs/claims.md); mixed batches.
Elsewhere   our way (src/dougong/continual/); ACC, forgetting, BWT, FWT, retention (continual/scores.py); planted
            regressions (gate.py beside this file); kills (registry_kills.py); options and results (harness.py).
Promise     every way has the same base, records, held-out records, batches, passes and learning-rate schedule, each the
            best of its learning rates by validation records of the first task of the first order; nothing was chosen
            on test records.

Base        the recipe vqa-demo without its comparison, trained once for each seed. Its own test: 1,000 records of
            easy-VQA's test split, as written questions and as spoken ones.
Tasks       spoken digits of five speakers of the Free Spoken Digit Dataset (takes 0 to 9 are the test); three pairs
            of scikit-learn's handwritten digits, four where RAVDESS is absent; emotions of RAVDESS (its last three
            actors are the test); how many of two statements are right of an easy-VQA picture (none, one, two), on
            pictures of the official test split.
Orders      three, drawn once. A figure is the mean over orders and seeds, its interval the lowest and the highest.
Rows        sequential: all weights go on learning, one output layer a task. EWC: the same with the quadratic penalty of
            Kirkpatrick et al. 2016 (arXiv:1612.00796), Fisher diagonals added up. shared adapter: one LoRA for all, as
            large as one of ours. L2P: a pool of prompts chosen by key (Wang et al. 2021, arXiv:2112.08654), the base
            frozen, one output layer over all labels, of which the record's task is not told. ours: given, and inferred.
            separate: a copy of the base for each task, all weights learn; the ceiling.
FWT         of a task that is not learnt yet its output layer is as it was drawn; inferred, the label that is answered
            counts, whichever task's it is.

Parts       tasks; mixed: one forward of records of ten tasks beside one of one task, in answers and time.
"""

from __future__ import annotations

import copy
import importlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from harness import Kept, run
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from dougong.bundle.model import Model, load
from dougong.continual.adapters import TaskParts, layers_of
from dougong.continual.elastic import Elastic
from dougong.continual.learn import LearnConfig, complete, learn, learn_original
from dougong.continual.scores import scores_of
from dougong.continual.taught import Taught, open_taught
from dougong.core.config import override, parse
from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import Preparation
from dougong.data.sources.captions import facts_of
from dougong.data.sources.digits import find_recordings
from dougong.data.split import sample_table, split_table
from dougong.data.table import Table, open_table, table_of_rows
from dougong.data.target import infer_target
from dougong.engine.batches import to_tensors
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch
from dougong.recipes.known import read_recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.tables import cache_folder, open_tables

SHARED: Final = Path(__file__).parents[2] / "shared" / "data"
SPOKEN: Final = SHARED / "fsdd" / "recordings"
EMOTIONS: Final = SHARED / "ravdess"
SEEDS: Final = (0, 1, 2)
NUM_ORDERS: Final = 3
NUM_TASKS: Final = 10
ORIGINAL_TEST: Final = 1000
RATES: Final = {"ours": 4e-3, "shared adapter": 4e-3, "sequential": 5e-4, "EWC": 5e-4, "L2P": 4e-3, "separate": 5e-4}
EWC_WEIGHT: Final = 5000.0
POOL, CHOSEN, LENGTH = 10, 3, 2
"""Of L2P: prompts in the pool, those that a record gets, tokens of each."""

NAMED: Final = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


class Lesson(NamedTuple):
    """A task's records; every table has the base's own column names."""

    name: str
    about: str
    modality: tuple[str, ...]
    train: pa.Table
    test: pa.Table


# Tasks -------------------------------------------------------------------------------------------------------


def lessons(quick: bool) -> list[Lesson]:
    """Ten of them, always the same."""
    found = [*spoken_digits(), *emotions()]
    pairs = handwritten(4 if len(found) == 5 else 3)
    made = [*found, *pairs, counting()]
    assert len(made) == NUM_TASKS, [lesson.name for lesson in made]
    if not quick:
        return made
    few = (made[0], made[6], made[-1])
    return [lesson._replace(train=lesson.train.slice(0, 200), test=lesson.test.slice(0, 50)) for lesson in few]


def spoken_digits() -> list[Lesson]:
    found, _ = find_recordings(SPOKEN)
    speakers = sorted({each.speaker for each in found})[:5]
    made = []
    for speaker in speakers:
        own = [each for each in found if each.speaker == speaker]
        sides = [[each for each in own if (each.take < 10) is test] for test in (False, True)]
        tables = [
            pa.table(
                {
                    "speech": [{"bytes": each.path.read_bytes(), "path": each.path.name} for each in side],
                    "answer": [each.digit for each in side],
                }
            )
            for side in sides
        ]
        made.append(Lesson(f"speaker-{speaker}", "which digit does the voice say", ("speech",), *map(shuffled, tables)))
    return made


def handwritten(number: int) -> list[Lesson]:
    digits = importlib.import_module("sklearn.datasets").load_digits()
    made = []
    for pair in range(number):
        labels = (2 * pair, 2 * pair + 1)
        places = np.flatnonzero(np.isin(digits.target, labels))
        places = np.random.default_rng(0).permutation(places)
        rows = [{"image": _png(digits.images[place]), "answer": str(digits.target[place])} for place in places]
        test = len(rows) // 3
        tables = [pa.Table.from_pylist(part) for part in (rows[test:], rows[:test])]
        about = f"is the handwritten digit {labels[0]} or {labels[1]}"
        made.append(Lesson(f"written-{labels[0]}{labels[1]}", about, ("image",), *tables))
    return made


def _png(ink_HW: Any) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray((255 * ink_HW / 16).astype(np.uint8)).convert("RGB").resize((64, 64)).save(content, format="PNG")
    return {"bytes": content.getvalue(), "path": None}


def emotions() -> list[Lesson]:
    if not EMOTIONS.is_dir():
        return []
    files = sorted(EMOTIONS.glob("Actor_*/*.flac"))
    actors = sorted({path.parent.name for path in files})
    sides: list[list[dict[str, Any]]] = [[], []]
    for path in files:
        side = sides[path.parent.name in actors[-3:]]
        side.append(
            {
                "speech": {"bytes": path.read_bytes(), "path": path.name},
                "answer": NAMED[int(path.stem.split("-")[2]) - 1],
            }
        )
    tables = [shuffled(pa.Table.from_pylist(side)) for side in sides]
    return [Lesson("emotions", "which emotion does the voice have", ("speech",), *tables)]


def counting() -> Lesson:
    """Two statements of a picture, one of its colour and one of its shape."""
    sides = []
    for split, most in (("train", 900), ("test", 300)):
        table = open_table(cache_folder() / "easy-vqa" / f"{split}.parquet")
        rows = table.read(0, ["image", "question", "answer", "image_id"]).to_pylist()
        by_picture: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_picture.setdefault(row["image_id"], []).append(row)
        facts = {
            number: facts_of((row["question"], row["answer"]) for row in own) for number, own in by_picture.items()
        }
        known = {number: found for number, found in facts.items() if found.colour and found.shape}
        colours = sorted({found.colour or "" for found in known.values()})
        shapes = sorted({found.shape or "" for found in known.values()})
        random = np.random.default_rng(derive_seed(0, "counting", split))
        made = []
        for number, found in list(known.items()) * 3:
            right = [bool(random.integers(2)) for _ in range(2)]
            said = [
                fact if is_right else str(random.choice([each for each in every if each != fact]))
                for fact, is_right, every in zip((found.colour, found.shape), right, (colours, shapes), strict=True)
            ]
            question = f"how many are right: is it {said[0]}, is there a {said[1]}?"
            made.append(
                {
                    "image": by_picture[number][0]["image"],
                    "question": question,
                    "answer": ("none", "one", "two")[sum(right)],
                }
            )
        random.shuffle(made)
        sides.append(pa.Table.from_pylist(made[:most]))
    return Lesson("counting", "how many statements are right of the picture", ("image", "question"), *sides)


def shuffled(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))


def base_of(seed: int, quick: bool, kept: Kept) -> Path:
    """A bundle of easy-VQA, trained once for each seed."""
    folder = kept.folder / f"base-{seed}{'-quick' if quick else ''}"
    if not (folder / "bundle" / "bundle.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        steps = ["train.steps=60", "train.evaluate_every=60"] if quick else []
        run_recipe(read_recipe("vqa-demo", [f"seed={seed}", *steps]), folder, quiet=True)
    return folder / "bundle"


# Ways --------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    seed: int
    epochs: int
    batch: int = 32


class Student(nn.Module):
    """What a baseline trains: a base, or changes of one, and one output layer a task."""

    def __init__(self, base: Sandwich, whole: bool, parts: TaskParts | None = None) -> None:
        super().__init__()
        self.elastic = Elastic(
            base, {} if parts is None else {"shared": parts}, active=None if parts is None else "shared"
        )
        if parts is not None:
            self.elastic.carriers = {"shared": base.names[0]}
        self.trunk = [*base.parameters()] if whole else list(self.elastic.parameters())
        for parameter in self.trunk:
            parameter.requires_grad_(True)
        self.heads: dict[str, nn.Linear] = {}
        self.hidden: list[Tensor] = []
        base.decision.out.register_forward_pre_hook(lambda _, given: self.hidden.append(given[0]))

    def add(self, name: str, outputs: int, seed: int) -> None:
        torch.manual_seed(derive_seed(seed, "head", name))
        self.heads[name] = nn.Linear(self.elastic.base.decision.out.in_features, outputs)

    def say(self, batch: Batch, name: str | None) -> Tensor:
        self.hidden.clear()
        output = self.elastic(batch)
        said: Tensor = output.base.output_BC if name is None else self.heads[name](self.hidden[-1])
        return said


def preparation_of(model: Model, lesson: Lesson) -> Preparation:
    target = infer_target(lesson.train.column("answer"), "answer", "single_label")
    own = {name: each for name, each in model.preparation.modalities.items() if name in lesson.modality}
    return Preparation(own, target)


def fit_student(
    student: Student,
    model: Model,
    lesson: Lesson,
    settings: Settings,
    rate: float,
    penalty: Callable[[], Tensor] | None = None,
    extra_loss: Callable[[], Tensor] | None = None,
) -> None:
    """As many passes as ours has, the same warm-up and half cosine."""
    preparation = preparation_of(model, lesson)
    train, _ = split_table(table_of_rows(lesson.train, Path(".")), 0.2, unit=None, seed=settings.seed)
    loader = Loader(
        train, preparation, LoaderConfig(batch_size=settings.batch, workers=0), seed=settings.seed, train=True
    )
    schedule = LearnConfig().train.optimizer
    weights = [*student.trunk, *student.heads[lesson.name].parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps = settings.epochs * loader.batches_per_epoch
    for step, (_, arrays) in enumerate(loader.batches(Position())):
        if step == steps:
            break
        batch = to_tensors(arrays)
        assert batch.target is not None
        loss = functional.cross_entropy(student.say(batch, lesson.name), batch.target)
        for more in (penalty, extra_loss):
            if more is not None:
                loss = loss + more()
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule.learning_rate_at(step, steps) / schedule.learning_rate
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


@torch.no_grad()
def right_share(say: Callable[[Batch], Tensor], model: Model, lesson: Lesson) -> float:
    preparation = preparation_of(model, lesson)
    loader = Loader(table_of_rows(lesson.test, Path(".")), preparation, LoaderConfig(batch_size=256, workers=0))
    right = total = 0
    for arrays in loader.one_pass():
        batch = to_tensors(arrays)
        assert batch.target is not None
        right += int((say(batch).argmax(dim=1) == batch.target).sum())
        total += batch.num_records
    return right / total


@torch.no_grad()
def original_share(say: Callable[[Batch], Tensor], model: Model, test: Table) -> float:
    right = total = 0
    for arrays in Loader(test, model.preparation, LoaderConfig(batch_size=256, workers=0)).one_pass():
        batch = to_tensors(arrays)
        assert batch.target is not None
        right += int((say(batch).argmax(dim=1) == batch.target).sum())
        total += batch.num_records
    return right / total


class Outcome(NamedTuple):
    """Of one way, one order, one seed."""

    score_TT: list[list[float]]
    before_T: list[float]
    original: float
    original_before: float
    task_accuracy: float | None
    share: float
    """Parameters a task, of the base's."""

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def baseline(way: str, bundle: Path, order: Sequence[Lesson], test: Table, settings: Settings, rate: float) -> Outcome:
    """sequential, EWC, or one shared adapter: told the task."""
    model = load(bundle)
    numbers = sum(parameter.numel() for parameter in model.network.parameters())
    parts = None
    if way == "shared adapter":
        parts = adapter_like_ours(model)
    student = Student(model.network, way != "shared adapter", parts)
    before_original = original_share(lambda batch: student.say(batch, None), model, test)
    for lesson in order:
        student.add(lesson.name, preparation_of(model, lesson).target.num_outputs, settings.seed)

    def score(lesson: Lesson) -> float:
        return right_share(lambda batch: student.say(batch, lesson.name), model, lesson)

    before = [score(lesson) for lesson in order]
    anchors: list[Tensor] = []
    fisher: list[Tensor] = []

    def penalty() -> Tensor:
        if not anchors:
            return torch.zeros(())
        pairs = zip(fisher, student.trunk, anchors, strict=True)
        return 0.5 * EWC_WEIGHT * torch.stack([(f * (p - a).square()).sum() for f, p, a in pairs]).sum()

    rows = []
    for lesson in order:
        fit_student(student, model, lesson, settings, rate, penalty if way == "EWC" else None)
        rows.append([score(each) for each in order])
        if way == "EWC":
            found = fisher_of(student, model, lesson, settings)
            fisher = found if not fisher else [f + g for f, g in zip(fisher, found, strict=True)]
            anchors = [parameter.detach().clone() for parameter in student.trunk]
    after = original_share(lambda batch: student.say(batch, None), model, test)
    added = sum(head.weight.numel() + head.bias.numel() for head in student.heads.values()) / len(order)
    share = (added + (0 if parts is None else sum(p.numel() for p in parts.parameters()) / len(order))) / numbers
    return Outcome(rows, before, after, before_original, None, share)


def adapter_like_ours(model: Model) -> TaskParts:
    """One LoRA on all layers, of the rank that the budget allows."""
    from dougong.continual.adapters import rank_within

    base = model.network
    layers = layers_of(base, base.names)
    numbers = sum(parameter.numel() for parameter in base.parameters())
    rank = rank_within(layers, numbers=round(LearnConfig().budget * numbers), besides=0)
    return TaskParts(layers, rank=rank, hidden=base.decision.out.in_features, num_outputs=1, prompt=None, extras={})


def fisher_of(student: Student, model: Model, lesson: Lesson, settings: Settings) -> list[Tensor]:
    """Squares of gradients of the answered label's logarithm, record by record, of up to 100 records."""
    preparation = preparation_of(model, lesson)
    few = sample_table(table_of_rows(lesson.train, Path(".")), 100, seed=settings.seed)
    total = [torch.zeros_like(parameter) for parameter in student.trunk]
    count = 0
    for arrays in Loader(few, preparation, LoaderConfig(batch_size=1, workers=0)).one_pass():
        said = student.say(to_tensors(arrays), lesson.name)
        drawn = said.detach().softmax(dim=1).multinomial(1)[:, 0]
        found = torch.autograd.grad(functional.cross_entropy(said, drawn), student.trunk, allow_unused=True)
        for own, gradient in zip(total, found, strict=True):
            if gradient is not None:
                own += gradient.square()
        count += 1
    return [each / count for each in total]


def separate(bundle: Path, order: Sequence[Lesson], settings: Settings, rate: float) -> dict[str, float]:
    """A copy of the base for each task."""
    found = {}
    for lesson in order:
        model = load(bundle)
        student = Student(model.network, True)
        student.add(lesson.name, preparation_of(model, lesson).target.num_outputs, settings.seed)
        fit_student(student, model, lesson, settings, rate)
        found[lesson.name] = right_share(lambda batch, s=student, n=lesson.name: s.say(batch, n), model, lesson)  # type: ignore[misc]
    return found


class Pool(nn.Module):
    """L2P's prompts, chosen by the record's own key."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.key_ND = nn.Parameter(torch.randn(POOL, width))
        self.prompt_NPD = nn.Parameter(torch.randn(POOL, LENGTH, width))
        self.pull = torch.zeros(())

    def forward(self, record_BD: Tensor) -> Tensor:
        alike_BN = functional.normalize(record_BD, dim=1) @ functional.normalize(self.key_ND, dim=1).t()
        near = alike_BN.topk(CHOSEN, dim=1)
        self.pull = -near.values.sum(dim=1).mean()
        return self.prompt_NPD[near.indices].flatten(1, 2)


def l2p(bundle: Path, order: Sequence[Lesson], test: Table, settings: Settings, rate: float) -> Outcome:
    """One output layer over all labels of all tasks; nobody says the task. While a task is learnt, other labels are
    masked, as in its paper."""
    model = load(bundle)
    base = model.network
    numbers = sum(parameter.numel() for parameter in base.parameters())
    parts = TaskParts({}, rank=1, hidden=base.decision.out.in_features, num_outputs=1, prompt=None, extras={})
    pool = Pool(base.width)
    parts.prompt = pool  # type: ignore[assignment]
    student = Student(base, False, parts)
    student.trunk = list(pool.parameters())
    student.elastic.carriers = {"shared": "question"}
    labels = [(lesson.name, each) for lesson in order for each in preparation_of(model, lesson).target.labels]
    student.add("all", len(labels), settings.seed)
    allowed = {lesson.name: torch.tensor([name == lesson.name for name, _ in labels]) for lesson in order}
    seen = torch.zeros(len(labels), dtype=torch.bool)
    texts = [text for _, text in labels]

    def score(lesson: Lesson) -> float:
        target = preparation_of(model, lesson).target

        def say(batch: Batch) -> Tensor:
            said_BL = student.say(batch, "all").masked_fill(~seen if bool(seen.any()) else seen, -1e9)
            best = [texts[place] for place in said_BL.argmax(dim=1).tolist()]
            place = {label: number for number, label in enumerate(target.labels)}
            return functional.one_hot(
                torch.tensor([place.get(text, len(place)) for text in best]), len(place) + 1
            ).float()

        return right_share(say, model, lesson)

    rows = []
    before = [score(lesson) for lesson in order]
    for lesson in order:
        own = allowed[lesson.name]
        student.heads[lesson.name] = _Masked(student.heads["all"], own)
        fit_student(student, model, lesson, settings, rate, extra_loss=lambda: 0.5 * pool.pull)
        seen = seen | own
        rows.append([score(each) for each in order])
    share = (sum(p.numel() for p in pool.parameters()) + student.heads["all"].weight.numel()) / len(order) / numbers
    del test
    return Outcome(rows, before, float("nan"), float("nan"), None, share)


class _Masked(nn.Linear):
    """Those outputs of a shared layer that are one task's, in order."""

    def __init__(self, whole: nn.Linear, own: Tensor) -> None:
        super().__init__(1, 1)
        self.weight, self.bias = whole.weight, whole.bias
        self._own = own

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[:, self._own]


def ours(
    bundle: Path, order: Sequence[Lesson], test: Table, settings: Settings, rate: float, kept: Path
) -> dict[str, Any]:
    """Given and inferred. A task is learnt the same whatever came before, so each is learnt once for each seed."""
    config = parse(
        LearnConfig,
        override(
            LearnConfig().model_dump(),
            [f"seed={settings.seed}", f"train.epochs={settings.epochs}", f"train.optimizer.learning_rate={rate}"],
        ),
        where="learn",
    )
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) / "bundle"
        shutil.copytree(bundle, place)
        tables = open_tables(read_recipe("vqa-demo", [f"seed={settings.seed}"]).data, seed=settings.seed)
        learn_original(place, _both_ways(sample_table(tables.train, 3000, seed=settings.seed)), seed=settings.seed)
        before_original = _accuracy(open_taught(place), test, "original")
        rows: dict[str, list[list[float]]] = {"given": [], "inferred": []}
        untaught = open_taught(place)
        before = [_auto(untaught, lesson)[0] for lesson in order]
        fresh = [_fresh(load(bundle), lesson, settings) for lesson in order]
        shares = []
        for number, lesson in enumerate(order):
            known = kept / f"{lesson.name}-{settings.seed}-{settings.epochs}-{lesson.train.num_rows}"
            if not known.is_dir():
                learn(
                    place,
                    lesson.name,
                    table_of_rows(lesson.train, Path(".")),
                    config,
                    target="answer",
                    description=lesson.about,
                )
                from dougong.continual.tasks import export_task

                export_task(place, lesson.name, known)
            else:
                from dougong.continual.tasks import import_task

                import_task(place, known)
            taught = open_taught(place)
            shares.append(taught.task(lesson.name).of_base)
            rows["given"].append(
                [_given(taught, each) if place_ <= number else fresh[place_] for place_, each in enumerate(order)]
            )
            found = [_auto(taught, each) for each in order]
            rows["inferred"].append([score for score, _ in found])
        original_given = _accuracy(taught, test, "original")
        original_inferred, original_task = _original_auto(taught, test)
        task_accuracy = float(np.mean([*(share for _, share in found), original_task]))
    share = float(np.mean(shares))
    return {
        "given": Outcome(rows["given"], fresh, original_given, before_original, None, share).as_json(),
        "inferred": Outcome(
            rows["inferred"], before, original_inferred, before_original, task_accuracy, share
        ).as_json(),
    }


def _both_ways(table: Table) -> Table:
    """Half of the records as written questions, half as spoken ones, as the base is asked."""
    rows = pa.concat_tables(
        [table.read(chunk, ["image", "question", "speech", "answer"]) for chunk in range(table.num_chunks)]
    )
    half = rows.num_rows // 2
    parts = []
    for part, lacking in ((rows.slice(0, half), "speech"), (rows.slice(half), "question")):
        place = part.column_names.index(lacking)
        parts.append(part.set_column(place, lacking, pa.nulls(part.num_rows, part.schema.field(lacking).type)))
    return table_of_rows(pa.concat_tables(parts), table.folder)


def _accuracy(taught: Taught, table: Table, task: str) -> float:
    answers = taught.predict(table, task)
    wanted = table.column("answer").to_pylist()
    return float(np.mean([a.answer == w for a, w in zip(answers, wanted, strict=True)]))


def _given(taught: Taught, lesson: Lesson) -> float:
    return _accuracy(taught, table_of_rows(lesson.test, Path(".")), lesson.name)


def _auto(taught: Taught, lesson: Lesson) -> tuple[float, float]:
    """Share of right answers, and of records whose task was found."""
    answers = taught.predict(table_of_rows(lesson.test, Path(".")))
    wanted = lesson.test.column("answer").to_pylist()
    return (
        float(np.mean([a.answer == w for a, w in zip(answers, wanted, strict=True)])),
        float(np.mean([a.task == lesson.name for a in answers])),
    )


def _original_auto(taught: Taught, table: Table) -> tuple[float, float]:
    answers = taught.predict(table)
    wanted = table.column("answer").to_pylist()
    return (
        float(np.mean([a.answer == w for a, w in zip(answers, wanted, strict=True)])),
        float(np.mean([a.task == "original" for a in answers])),
    )


def _fresh(model: Model, lesson: Lesson, settings: Settings) -> float:
    """The score of an output layer that has not learnt, on the base as it is."""
    student = Student(model.network, False)
    student.add(lesson.name, preparation_of(model, lesson).target.num_outputs, settings.seed)
    return right_share(lambda batch: student.say(batch, lesson.name), model, lesson)


# Parts -------------------------------------------------------------------------------------------------------

WAYS: Final = ("sequential", "EWC", "shared adapter", "L2P")


def measure_tasks(quick: bool) -> Iterator[Figure]:
    if not SPOKEN.is_dir():
        print("tasks are left out: the recordings of the Free Spoken Digit Dataset are not there.", file=sys.stderr)
        return
    torch.set_num_threads(1)
    kept = Kept("continual")
    every = lessons(quick)
    random = np.random.default_rng(0)
    orders = [random.permutation(len(every)).tolist() for _ in range(1 if quick else NUM_ORDERS)]
    found: dict[str, list[Outcome]] = {}
    ceiling: list[float] = []
    retained: dict[str, list[float]] = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        bundle = base_of(seed, quick, kept)
        settings = Settings(seed, 2 if quick else 30)
        whole = open_tables(read_recipe("vqa-demo", [f"seed={seed}"]).data, seed=seed).test
        test = _both_ways(sample_table(whole, 100 if quick else ORIGINAL_TEST, seed=0))
        key = f"separate-{seed}-{quick}"
        alone = kept.get(key)
        if alone is None:
            alone = separate(bundle, every, settings, RATES["separate"])
            kept.put(key, alone)
        ceiling.append(float(np.mean(list(alone.values()))))
        for number, places in enumerate(orders):
            order = [every[place] for place in places]
            for way in (*WAYS, "ours"):
                key = f"{way}-{seed}-{number}-{quick}"
                outcome = kept.get(key)
                if outcome is None:
                    started = time.perf_counter()
                    if way == "ours":
                        outcome = ours(bundle, order, test, settings, RATES["ours"], kept.folder / "adapters")
                    elif way == "L2P":
                        outcome = l2p(bundle, order, test, settings, RATES[way]).as_json()
                    else:
                        outcome = baseline(way, bundle, order, test, settings, RATES[way]).as_json()
                    kept.put(key, outcome)
                    print(f"{way}, seed {seed}, order {number}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
                named = {f"ours, {how}": each for how, each in outcome.items()} if way == "ours" else {way: outcome}
                for name, each in named.items():
                    found.setdefault(name, []).append(Outcome(**each))
    separate_mean = float(np.mean(ceiling))
    yield _spread("separate, ACC", ceiling)
    for name, outcomes in found.items():
        scores = [scores_of(one.score_TT, one.before_T) for one in outcomes]
        inferred = name == "ours, inferred"
        yield _spread(
            f"{name}, ACC", [one.acc for one in scores], f">= {separate_mean - 0.02:.4f}" if inferred else None
        )
        yield _spread(f"{name}, F", [one.forgetting or 0.0 for one in scores])
        yield _spread(f"{name}, BWT", [one.bwt or 0.0 for one in scores])
        yield _spread(f"{name}, FWT", [one.fwt or 0.0 for one in scores])
        yield _spread(f"{name}, retention of earlier tasks", [one.retention or 0.0 for one in scores])
        kept_share = [one.original / one.original_before for one in outcomes]
        if all(np.isfinite(kept_share)):
            asked = ">= 1" if name == "ours, given" else ">= 0.99" if inferred else None
            yield _spread(f"{name}, retention of the original task", kept_share, asked)
            retained[name] = kept_share
        if outcomes[0].task_accuracy is not None:
            yield _spread(f"{name}, task found", [one.task_accuracy or 0.0 for one in outcomes])
        asked = "<= 0.03" if name.startswith("ours") else None
        yield _spread(f"{name}, parameters a task, of the base's", [one.share for one in outcomes], asked)


def measure_mixed(quick: bool) -> Iterator[Figure]:
    """Sixty-four records of ten tasks in one forward, beside sixty-four of one."""
    torch.set_num_threads(1)
    kept = Kept("continual")
    model = load(base_of(0, quick, kept))
    base = model.network
    parts: dict[str, TaskParts] = {}
    carriers: dict[str, str | None] = {}
    for number in range(NUM_TASKS):
        torch.manual_seed(number)
        made = copy.deepcopy(adapter_like_ours(model))
        for change in made.parameters():
            nn.init.normal_(change, std=0.05)
        parts[f"task-{number}"], carriers[f"task-{number}"] = made, None
    whole = Elastic(base, parts, carriers=carriers).eval()
    table = sample_table(open_tables(read_recipe("vqa-demo").data, seed=0).test, 64, seed=0)
    arrays = next(iter(Loader(table, model.preparation, LoaderConfig(batch_size=64, workers=0)).one_pass()))
    batch = complete(to_tensors(arrays), base.names)
    mixed = [f"task-{number % NUM_TASKS}" for number in range(batch.num_records)]
    with torch.inference_mode():
        together = whole.answer(batch, mixed).output_BC
        apart = 0.0
        for key in parts:
            rows = torch.tensor([row for row, each in enumerate(mixed) if each == key])
            alone = whole.answer(batch, [key] * batch.num_records).output_BC
            apart = max(apart, float((together[rows] - alone[rows]).abs().max()))
        pairs = []
        for _ in range(5 if quick else 41):
            seconds = []
            for keys in (["task-0"] * batch.num_records, mixed):
                started = time.perf_counter()
                whole.answer(batch, keys)
                seconds.append(time.perf_counter() - started)
            pairs.append(seconds)
    whole.detach()
    single, many = np.median(np.array(pairs), axis=0)
    scale = float(together.abs().max())
    yield Figure(
        name="mixed batch, largest difference of a score", value=apart, unit="", asked="<= 1e-6", baseline=scale
    )
    yield Figure(
        name="mixed batch of ten tasks, time beside one task's", value=float(many / single), unit="x", asked="<= 1.2"
    )


def _spread(name: str, values: Sequence[float], asked: str | None = None) -> Figure:
    return Figure(
        name=name,
        value=float(np.mean(values)),
        unit="",
        asked=asked,
        low=min(values),
        high=max(values),
        seeds=len(values),
    )


PARTS: Final = ("tasks", "mixed")


def measure(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Figure]:
    if "mixed" in parts:
        yield from measure_mixed(quick)
    if "tasks" in parts:
        yield from measure_tasks(quick)


if __name__ == "__main__":
    run(
        "continual",
        "Ten tasks learnt one after another: what is learnt, forgotten, and what it costs.",
        measure,
        parts=PARTS,
    )
