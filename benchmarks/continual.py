"""Ten tasks learnt one after another by a model of easy-VQA: what is learnt, what is forgotten, what it costs.

Here        the ways to learn them, and what is made of them (claim 11 of docs/claims.md); mixed batches.
Elsewhere   the tasks (lessons.py) and bases (bases.py) beside this file; our way (src/dougong/continual/); ACC,
            forgetting, BWT, FWT, retention (continual/scores.py); planted regressions (gate.py); kills
            (registry_kills.py); options and results (harness.py).
Promise     every way has the same base, records, held-out records, batches, steps and learning-rate schedule, each the
            best of three settings by validation records of the first three tasks of the first order; nothing was chosen
            on test records.

Base        the recipe vqa-demo without its comparison, trained once for each seed. Its own test: 1,000 records of
            easy-VQA's test split, half as written questions, half as spoken ones.
Orders      three, drawn once. A figure is the mean over orders and seeds, its interval the lowest and the highest.
Rows        sequential: all weights go on learning, one output layer a task. EWC: the same with the quadratic penalty of
            Kirkpatrick et al. 2016 (arXiv:1612.00796), Fisher diagonals of the original task and of the others added
            up. shared adapter: one LoRA for all, as large as one of ours. L2P: a pool of prompts chosen by key (Wang
            et al. 2021, arXiv:2112.08654), the base frozen, one output layer over all labels of all tasks, of which
            the record's task is not told; the original task is not asked. ours: given, and inferred. separate: a copy
            of the base for each task, all weights learn; the ceiling.
Settings    three learning rates each; of EWC three weights of its penalty, at the rate that sequential was given.
FWT         of a task that is not learnt yet its output layer is as it was drawn; inferred, the label that is answered
            counts, whichever task's it is.

Parts       mixed: one forward of records of ten tasks beside one of one task, in answers and time. order-O-seed-S: one
            run of every row. What is measured is kept, so a run may be stopped and gone on with, part by part; what
            it took of the processor is told at the end.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from bases import easy_vqa
from harness import Kept, run
from lessons import NUM_TASKS, SPOKEN, Lesson, lessons
from torch import Tensor, nn
from torch.nn import functional

from dougong.bundle.model import Model, load
from dougong.continual.adapters import TaskParts, layers_of, rank_within
from dougong.continual.elastic import Elastic
from dougong.continual.learn import LearnConfig, complete, learn, learn_original
from dougong.continual.prompt import PromptNetwork
from dougong.continual.scores import scores_of
from dougong.continual.tasks import export_task, import_task
from dougong.continual.taught import Taught, open_taught
from dougong.core.config import override, parse
from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.data.holdout import HeldOut, belonging, hold_out
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import Preparation
from dougong.data.split import sample_table
from dougong.data.table import Table, table_of_rows
from dougong.data.target import infer_target
from dougong.engine.batches import to_tensors
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch
from dougong.recipes.known import read_recipe
from dougong.recipes.tables import open_tables

SEEDS: Final = (0, 1, 2)
NUM_ORDERS: Final = 3
ORIGINAL_TEST: Final = 1000
STEPS: Final = 200
BATCH: Final = 32
TRIED_ON: Final = 3
"""Tasks by whose validation records a way's setting is chosen."""

TRIED: Final[dict[str, tuple[float, ...]]] = {
    "ours": (2e-3, 4e-3, 8e-3),
    "shared adapter": (2e-3, 4e-3, 8e-3),
    "L2P": (3e-3, 1e-2, 3e-2),
    "sequential": (1e-4, 3e-4, 1e-3),
    "separate": (1e-4, 3e-4, 1e-3),
    "EWC": (1e2, 1e3, 1e4),
}
"""Learning rates; of EWC weights of its penalty."""

POOL, CHOSEN, LENGTH = 10, 3, 2
"""Of L2P: prompts in the pool, those that a record gets, tokens of each."""


# Ways --------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    seed: int
    steps: int
    rate: float
    penalty: float = 0.0
    """Of EWC."""


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


def preparation_of(preparation: Preparation, lesson: Lesson) -> Preparation:
    target = infer_target(lesson.train.column("answer"), "answer", "single_label")
    own = {name: each for name, each in preparation.modalities.items() if name in lesson.modality}
    return Preparation(own, target)


def parted(lesson: Lesson, preparation: Preparation, seed: int) -> HeldOut:
    """What is learnt from, and what every way holds out of it as ours does."""
    table = table_of_rows(lesson.train, Path("."))
    media = list(preparation_of(preparation, lesson).media)
    return hold_out(table, LearnConfig().held_out, belonging(table, media, None), seed=seed)


def held_out(lesson: Lesson, preparation: Preparation, seed: int) -> Lesson:
    """The same with the validation records in place of the test's."""
    held = parted(lesson, preparation, seed).aside
    rows = [held.read(chunk, held.schema.names) for chunk in range(held.num_chunks)]
    return lesson._replace(test=pa.concat_tables(rows))


class Tests:
    """Records that judge, decoded once."""

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._held: dict[str, list[Batch]] = {}

    def of(self, lesson: Lesson) -> list[Batch]:
        if lesson.name not in self._held:
            table, preparation = table_of_rows(lesson.test, Path(".")), preparation_of(self._preparation, lesson)
            self._held[lesson.name] = batches_of(table, preparation)
        return self._held[lesson.name]


def batches_of(table: Table, preparation: Preparation) -> list[Batch]:
    loader = Loader(table, preparation, LoaderConfig(batch_size=256, workers=0))
    return [to_tensors(arrays) for arrays in loader.one_pass()]


@torch.no_grad()
def share_right(say: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
    right = total = 0
    for batch in batches:
        assert batch.target is not None
        right += int((say(batch).argmax(dim=1) == batch.target).sum())
        total += batch.num_records
    return right / total


def fit_student(
    student: Student,
    preparation: Preparation,
    lesson: Lesson,
    settings: Settings,
    *more: Callable[[], Tensor],
) -> None:
    """As many steps as ours has, the same warm-up and half cosine. `more` is added to the loss."""
    train = parted(lesson, preparation, settings.seed).rest
    config = LoaderConfig(batch_size=BATCH, workers=0)
    loader = Loader(train, preparation_of(preparation, lesson), config, seed=settings.seed, train=True)
    schedule = LearnConfig().train.optimizer
    weights = [*student.trunk, *student.heads[lesson.name].parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.rate, weight_decay=0.0)
    for step, (_, arrays) in enumerate(loader.batches(Position())):
        if step == settings.steps:
            break
        batch = to_tensors(arrays)
        assert batch.target is not None
        loss = functional.cross_entropy(student.say(batch, lesson.name), batch.target)
        for each in more:
            loss = loss + each()
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * schedule.learning_rate_at(step, settings.steps) / schedule.learning_rate
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


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


def one_by_one(
    order: Sequence[Lesson], learn_one: Callable[[Lesson], None], score: Callable[[Lesson], float]
) -> tuple[list[list[float]], list[float]]:
    """R and b of continual/scores.py. Beyond the next task no figure reads R, and nothing is asked."""
    before = [score(each) for each in order]
    rows = []
    for number, lesson in enumerate(order):
        learn_one(lesson)
        rows.append([score(each) if place <= number + 1 else math.nan for place, each in enumerate(order)])
    return rows, before


def baseline(
    way: str, bundle: Path, order: Sequence[Lesson], tests: Tests, original: Original | None, settings: Settings
) -> Outcome:
    """sequential, EWC, or one shared adapter: told the task."""
    model = load(bundle)
    numbers = sum(parameter.numel() for parameter in model.network.parameters())
    parts = adapter_like_ours(model) if way == "shared adapter" else None
    student = Student(model.network, parts is None, parts)

    def original_share() -> float:
        return math.nan if original is None else share_right(lambda batch: student.say(batch, None), original.test)

    before_original = original_share()
    for lesson in order:
        target = preparation_of(model.preparation, lesson).target
        student.add(lesson.name, target.num_outputs, settings.seed)
    anchors: list[Tensor] = []
    fisher: list[Tensor] = []

    def remember(table: Table, preparation: Preparation, name: str | None) -> None:
        found = fisher_of(student, table, preparation, name, settings.seed)
        fisher[:] = found if not fisher else [f + g for f, g in zip(fisher, found, strict=True)]
        anchors[:] = [parameter.detach().clone() for parameter in student.trunk]

    def penalty() -> Tensor:
        pairs = zip(fisher, student.trunk, anchors, strict=True)
        return 0.5 * settings.penalty * torch.stack([(f * (p - a).square()).sum() for f, p, a in pairs]).sum()

    def learn_one(lesson: Lesson) -> None:
        fit_student(student, model.preparation, lesson, settings, *((penalty,) if anchors else ()))
        if way == "EWC":
            own = preparation_of(model.preparation, lesson)
            remember(table_of_rows(lesson.train, Path(".")), own, lesson.name)

    if way == "EWC" and original is not None:
        remember(original.train, model.preparation, None)
    rows, before = one_by_one(
        order, learn_one, lambda each: share_right(lambda batch: student.say(batch, each.name), tests.of(each))
    )
    added = sum(head.weight.numel() + head.bias.numel() for head in student.heads.values())
    added += 0 if parts is None else sum(p.numel() for p in parts.parameters())
    return Outcome(rows, before, original_share(), before_original, None, added / len(order) / numbers)


def adapter_like_ours(model: Model, outputs: int = 1, prompts: int = 0, carrier: str | None = None) -> TaskParts:
    """One LoRA on all layers, of the rank that the budget allows."""
    base = model.network
    layers = layers_of(base, base.names)
    numbers = sum(parameter.numel() for parameter in base.parameters())
    rank = rank_within(layers, numbers=round(LearnConfig().budget * numbers), besides=0)
    prompt = None
    if prompts and carrier is not None:
        prompt = PromptNetwork(width=base.width, num_prompts=prompts, hidden=4, description=carrier)
    return TaskParts(
        layers, rank=rank, hidden=base.decision.out.in_features, num_outputs=outputs, prompt=prompt, extras={}
    )


def fisher_of(student: Student, table: Table, preparation: Preparation, name: str | None, seed: int) -> list[Tensor]:
    """Squares of gradients of the answered label's logarithm, record by record, of up to 100 records."""
    few = sample_table(table, 100, seed=seed)
    total = [torch.zeros_like(parameter) for parameter in student.trunk]
    count = 0
    for arrays in Loader(few, preparation, LoaderConfig(batch_size=1, workers=0)).one_pass():
        said = student.say(to_tensors(arrays), name)
        drawn = said.detach().softmax(dim=1).multinomial(1)[:, 0]
        found = torch.autograd.grad(functional.cross_entropy(said, drawn), student.trunk, allow_unused=True)
        for own, gradient in zip(total, found, strict=True):
            if gradient is not None:
                own += gradient.square()
        count += 1
    return [each / count for each in total]


def separate(bundle: Path, order: Sequence[Lesson], tests: Tests, settings: Settings) -> dict[str, float]:
    """A copy of the base for each task."""
    found = {}
    for lesson in order:
        model = load(bundle)
        student = Student(model.network, True)
        student.add(lesson.name, preparation_of(model.preparation, lesson).target.num_outputs, settings.seed)
        fit_student(student, model.preparation, lesson, settings)
        found[lesson.name] = share_right(lambda batch, s=student, n=lesson.name: s.say(batch, n), tests.of(lesson))  # type: ignore[misc]
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


def l2p(bundle: Path, order: Sequence[Lesson], tests: Tests, settings: Settings) -> Outcome:
    """One output layer over all labels of all tasks; nobody says the task. While a task is learnt, other labels are
    masked, as in its paper."""
    model = load(bundle)
    base = model.network
    numbers = sum(parameter.numel() for parameter in base.parameters())
    parts = TaskParts({}, rank=1, hidden=base.decision.out.in_features, num_outputs=1, prompt=None, extras={})
    torch.manual_seed(derive_seed(settings.seed, "pool"))
    pool = Pool(base.width)
    parts.prompt = pool  # type: ignore[assignment]
    student = Student(base, False, parts)
    student.trunk = list(pool.parameters())
    student.elastic.carriers = {"shared": "question"}
    targets = {lesson.name: preparation_of(model.preparation, lesson).target for lesson in order}
    labels = [(lesson.name, each) for lesson in order for each in targets[lesson.name].labels]
    student.add("all", len(labels), settings.seed)
    seen = torch.zeros(len(labels), dtype=torch.bool)
    texts = [text for _, text in labels]

    def score(lesson: Lesson) -> float:
        place = {label: number for number, label in enumerate(targets[lesson.name].labels)}

        def say(batch: Batch) -> Tensor:
            said_BL = student.say(batch, "all").masked_fill(~seen if bool(seen.any()) else seen, -1e9)
            best = [texts[place] for place in said_BL.argmax(dim=1).tolist()]
            answered_B = torch.tensor([place.get(text, len(place)) for text in best])
            return functional.one_hot(answered_B, len(place) + 1).float()

        return share_right(say, tests.of(lesson))

    def learn_one(lesson: Lesson) -> None:
        own_L = torch.tensor([name == lesson.name for name, _ in labels])
        student.heads[lesson.name] = _Masked(student.heads["all"], own_L)
        fit_student(student, model.preparation, lesson, settings, lambda: 0.5 * pool.pull)
        seen.logical_or_(own_L)

    rows, before = one_by_one(order, learn_one, score)
    share = (sum(p.numel() for p in pool.parameters()) + student.heads["all"].weight.numel()) / len(order) / numbers
    return Outcome(rows, before, math.nan, math.nan, None, share)


class _Masked(nn.Linear):
    """Those outputs of a shared layer that are one task's, in order."""

    def __init__(self, whole: nn.Linear, own_L: Tensor) -> None:
        super().__init__(1, 1)
        self.weight, self.bias = whole.weight, whole.bias
        self._own_L = own_L

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[:, self._own_L]


# Ours --------------------------------------------------------------------------------------------------------


def learnt(place: Path, lesson: Lesson, settings: Settings, kept: Path) -> float:
    """Have the bundle know a task; its accuracy on held-out records. A task is learnt the same whatever came before,
    so each is learnt once for each seed."""
    known = kept / f"{lesson.name}-{settings.seed}-{settings.steps}-{settings.rate}-{lesson.train.num_rows}"
    if known.is_dir():
        (task,) = import_task(place, known)
        return task.metrics["accuracy"]
    given = {
        "seed": settings.seed,
        "batch_size": BATCH,
        "train.steps": settings.steps,
        "train.evaluate_every": settings.steps,  # as the others: what stands at the end counts
        "train.optimizer.learning_rate": settings.rate,
    }
    texts = [f"{name}={value}" for name, value in given.items()]
    config = parse(LearnConfig, override(LearnConfig().model_dump(), texts), where="learn")
    table = table_of_rows(lesson.train, Path("."))
    found = learn(place, lesson.name, table, config, target="answer", description=lesson.about)
    export_task(place, lesson.name, known)
    return found.task.metrics["accuracy"]


def ours(
    bundle: Path, order: Sequence[Lesson], tests: Tests, original: Original, settings: Settings, kept: Path
) -> dict[str, Any]:
    """Given and inferred."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) / "bundle"
        shutil.copytree(bundle, place)
        learn_original(place, original.train, seed=settings.seed)
        taught = open_taught(place)
        before_original = _told(taught, original.table, "original")
        before = [_found(taught, table_of_rows(each.test, Path(".")), each.name)[0] for each in order]
        fresh = [_fresh(load(bundle), each, tests, settings) for each in order]
        rows: dict[str, list[list[float]]] = {"given": [], "inferred": []}
        shares = []
        for number, lesson in enumerate(order):
            learnt(place, lesson, settings, kept)
            taught = open_taught(place)
            shares.append(taught.task(lesson.name).of_base)
            given, inferred, right = [], [], []
            for at, each in enumerate(order):
                table = table_of_rows(each.test, Path("."))
                given.append(_told(taught, table, each.name) if at <= number else fresh[at])
                score, share = _found(taught, table, each.name) if at <= number + 1 else (math.nan, math.nan)
                inferred.append(score)
                right.append(share)
            rows["given"].append(given)
            rows["inferred"].append(inferred)
        original_given = _told(taught, original.table, "original")
        original_inferred, original_right = _found(taught, original.table, "original")
    for each, share in zip(order, right, strict=True):
        print(f"  {each.name}: task found {share:.4f}", file=sys.stderr)
    found = float(np.mean([*right, original_right]))
    mean = float(np.mean(shares))
    return {
        "given": Outcome(rows["given"], fresh, original_given, before_original, None, mean).as_json(),
        "inferred": Outcome(rows["inferred"], before, original_inferred, before_original, found, mean).as_json(),
    }


def _told(taught: Taught, table: Table, task: str) -> float:
    answers = taught.predict(table, task)
    wanted = table.column("answer").to_pylist()
    return float(np.mean([a.answer == w for a, w in zip(answers, wanted, strict=True)]))


def _found(taught: Taught, table: Table, task: str) -> tuple[float, float]:
    """Share of right answers, and of records whose task was found."""
    answers = taught.predict(table)
    wanted = table.column("answer").to_pylist()
    right = [a.answer == w for a, w in zip(answers, wanted, strict=True)]
    return float(np.mean(right)), float(np.mean([a.task == task for a in answers]))


def _fresh(model: Model, lesson: Lesson, tests: Tests, settings: Settings) -> float:
    """The score of an output layer that has not learnt, on the base as it is."""
    student = Student(model.network, False)
    student.add(lesson.name, preparation_of(model.preparation, lesson).target.num_outputs, settings.seed)
    return share_right(lambda batch: student.say(batch, lesson.name), tests.of(lesson))


# Parts -------------------------------------------------------------------------------------------------------

WAYS: Final = ("sequential", "EWC", "shared adapter", "L2P")


class Original(NamedTuple):
    """The base's own task."""

    train: Table
    """By some of which ours knows its records, and EWC which weights they need."""

    table: Table
    test: list[Batch]


class Measured:
    """What was measured and kept, with the processor's time that it took."""

    def __init__(self, kept: Kept, quick: bool) -> None:
        self.kept, self.quick = kept, quick
        self.seconds = 0.0

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        name = f"{key}{', quick' if self.quick else ''}"
        found = self.kept.get(name)
        if found is None:
            started = time.process_time()
            found = {"value": measure(), "seconds": time.process_time() - started}
            self.kept.put(name, found)
            print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr)
        self.seconds += found["seconds"]
        return found["value"]


class Course:
    """Everything that is measured of one seed."""

    def __init__(self, measured: Measured, seed: int, every: Sequence[Lesson]) -> None:
        self.measured, self.seed, self.every = measured, seed, every
        self.quick, self.steps = measured.quick, 10 if measured.quick else STEPS
        self.bundle = easy_vqa(seed, measured.quick)
        self.tests = Tests(load(self.bundle).preparation)
        self.adapters = measured.kept.folder / "adapters"

    def original(self) -> Original:
        recipe = read_recipe("vqa-demo", [f"seed={self.seed}"])
        tables = open_tables(recipe.data, seed=self.seed)
        train = _both_ways(sample_table(tables.train, 200 if self.quick else 3000, seed=self.seed))
        test = _both_ways(sample_table(tables.test, 60 if self.quick else ORIGINAL_TEST, seed=0))
        return Original(train, test, batches_of(test, load(self.bundle).preparation))

    def alone(self, chosen: Mapping[str, float]) -> dict[str, float]:
        settings = Settings(self.seed, self.steps, chosen["separate"])
        key = f"separate, seed {self.seed}"
        found: dict[str, float] = self.measured(key, lambda: separate(self.bundle, self.every, self.tests, settings))
        return found

    def outcomes(self, order: Sequence[Lesson], number: int, chosen: Mapping[str, float]) -> dict[str, Outcome]:
        """Of each row."""
        original: list[Original] = []

        def measure(way: str) -> Any:
            if not original:
                original.append(self.original())
            settings = settings_of(way, self.seed, self.steps, chosen)
            if way == "ours":
                return ours(self.bundle, order, self.tests, original[0], settings, self.adapters)
            if way == "L2P":
                return l2p(self.bundle, order, self.tests, settings).as_json()
            return baseline(way, self.bundle, order, self.tests, original[0], settings).as_json()

        found: dict[str, Outcome] = {}
        for way in (*WAYS, "ours"):
            value = self.measured(f"{way}, seed {self.seed}, order {number}", lambda way=way: measure(way))  # type: ignore[misc]
            if way == "ours":
                found |= {f"ours, {how}": Outcome(**each) for how, each in value.items()}
            else:
                found[way] = Outcome(**value)
        return found

    def choose(self, order: Sequence[Lesson]) -> dict[str, float]:
        """Each way's setting, by validation records of the first tasks."""
        preparation = load(self.bundle).preparation
        first = [held_out(lesson, preparation, self.seed) for lesson in order[:TRIED_ON]]
        tests = Tests(preparation)
        chosen: dict[str, float] = {}
        for way, tried in TRIED.items():  # EWC is the last: it takes sequential's rate
            found = {
                setting: self.measured(
                    f"{way} tried at {setting:g}",
                    lambda way=way, setting=setting: self._tried(way, setting, first, tests, chosen),  # type: ignore[misc]
                )
                for setting in (tried[:2] if self.quick else tried)
            }
            chosen[way] = max(found, key=lambda setting: found[setting])
            said = ", ".join(f"{setting:g} {score:.4f}" for setting, score in found.items())
            print(f"{way}: {chosen[way]:g} of {said}", file=sys.stderr)
        return chosen

    def _tried(
        self, way: str, setting: float, first: Sequence[Lesson], tests: Tests, chosen: Mapping[str, float]
    ) -> float:
        settings = settings_of(way, self.seed, self.steps, {**chosen, way: setting})
        if way == "ours":
            with tempfile.TemporaryDirectory() as made:
                place = Path(made) / "bundle"
                shutil.copytree(self.bundle, place)
                return float(np.mean([learnt(place, lesson, settings, self.adapters) for lesson in first]))
        if way == "separate":
            return float(np.mean([*separate(self.bundle, first, tests, settings).values()]))
        if way == "L2P":
            outcome = l2p(self.bundle, first, tests, settings)
        else:
            original = self.original() if way == "EWC" else None
            outcome = baseline(way, self.bundle, first, tests, original, settings)
        return scores_of(outcome.score_TT).acc


def settings_of(way: str, seed: int, steps: int, chosen: Mapping[str, float]) -> Settings:
    if way == "EWC":
        return Settings(seed, steps, chosen["sequential"], chosen["EWC"])
    return Settings(seed, steps, chosen[way])


def part_of(order: int, seed: int) -> str:
    return f"order-{order}-seed-{seed}"


def measure_tasks(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    if not SPOKEN.is_dir():
        print("tasks are left out: the recordings of the Free Spoken Digit Dataset are not there.", file=sys.stderr)
        return
    torch.set_num_threads(1)
    measured = Measured(Kept("continual"), quick)
    every = lessons(quick)
    random = np.random.default_rng(0)
    orders = [[every[place] for place in random.permutation(len(every))] for _ in range(NUM_ORDERS)]
    wanted = [(order, seed) for seed in SEEDS for order in range(NUM_ORDERS) if part_of(order, seed) in parts]
    chosen = Course(measured, SEEDS[0], every).choose(orders[0])
    found: dict[str, list[Outcome]] = {}
    ceilings: list[float] = []
    for seed in dict.fromkeys(seed for _, seed in wanted):
        course = Course(measured, seed, every)
        alone = course.alone(chosen)
        for number in (order for order, each in wanted if each == seed):
            for way, outcome in course.outcomes(orders[number], number, chosen).items():
                found.setdefault(way, []).append(outcome)
            ceilings.append(float(np.mean(list(alone.values()))))
    yield _spread("separate, ACC", ceilings)
    for name, outcomes in found.items():
        yield from _row(name, outcomes, ceilings)
    yield Figure(name="processor time of all this, without bases", value=measured.seconds / 3600, unit="h")


def _row(name: str, outcomes: Sequence[Outcome], ceilings: Sequence[float]) -> Iterator[Figure]:
    scores = [scores_of(one.score_TT, one.before_T) for one in outcomes]
    inferred = name == "ours, inferred"
    yield _spread(f"{name}, ACC", [one.acc for one in scores])
    if inferred:
        below = [ceiling - one.acc for ceiling, one in zip(ceilings, scores, strict=True)]
        yield _spread(f"{name}, ACC below separate", below, "<= 0.02")
    yield _spread(f"{name}, F", [one.forgetting or 0.0 for one in scores])
    yield _spread(f"{name}, BWT", [one.bwt or 0.0 for one in scores])
    yield _spread(f"{name}, FWT", [one.fwt or 0.0 for one in scores])
    yield _spread(f"{name}, retention of earlier tasks", [one.retention or 0.0 for one in scores])
    kept_share = [one.original / one.original_before for one in outcomes]
    if all(np.isfinite(kept_share)):
        asked = ">= 1" if name == "ours, given" else ">= 0.99" if inferred else None
        yield _spread(f"{name}, retention of the original task", kept_share, asked)
    if inferred:
        yield _spread(f"{name}, task found", [one.task_accuracy or 0.0 for one in outcomes])
    asked = "<= 0.03" if name.startswith("ours") else None
    yield _spread(f"{name}, parameters a task, of the base's", [one.share for one in outcomes], asked)


def measure_mixed(quick: bool) -> Iterator[Figure]:
    """Sixty-four records of ten tasks in one forward, beside sixty-four of one."""
    torch.set_num_threads(1)
    model = load(easy_vqa(SEEDS[0], quick))
    base = model.network
    parts: dict[str, TaskParts] = {}
    carriers: dict[str, str | None] = {}
    for number in range(NUM_TASKS):
        key, carrier = f"task-{number}", base.names[number % len(base.names)]
        torch.manual_seed(number)
        made = copy.deepcopy(adapter_like_ours(model, outputs=10, prompts=2, carrier=carrier))
        for change in made.parameters():
            nn.init.normal_(change, std=0.05)
        parts[key], carriers[key] = made, carrier
    whole = Elastic(base, parts, carriers=carriers).eval()
    table = _both_ways(sample_table(open_tables(read_recipe("vqa-demo").data, seed=0).test, 64, seed=0))
    mixed = [f"task-{number % NUM_TASKS}" for number in range(table.num_rows)]

    def asked(places: Sequence[int]) -> Batch:
        rows = pa.concat_tables([table.read(chunk, table.schema.names) for chunk in range(table.num_chunks)])
        (batch,) = batches_of(table_of_rows(rows.take(pa.array(places)), table.folder), model.preparation)
        return complete(batch, base.names)

    batch = asked(range(table.num_rows))
    with torch.inference_mode():
        together = whole.answer(batch, mixed).output_BC
        scale = float(together.abs().max())
        apart: dict[str, float] = {}
        for key in parts:
            rows = [row for row, each in enumerate(mixed) if each == key]
            for what, said in (
                ("the same records as one task's", whole.answer(batch, [key] * batch.num_records).output_BC[rows]),
                ("a task's records by themselves", whole.answer(asked(rows), [key] * len(rows)).output_BC),
            ):
                beside = f"mixed batch beside {what}: largest difference of"
                chances = (together[rows].softmax(dim=1) - said.softmax(dim=1)).abs().max()
                for name, found in (
                    (f"{beside} a probability", float(chances)),
                    (f"{beside} a score, of the largest", float((together[rows] - said).abs().max()) / scale),
                ):
                    apart[name] = max(apart.get(name, 0.0), found)
        pairs = []
        for turn in range(5 if quick else 41):
            seconds = []
            # Of one task: each in its turn, since prompts stand where that task's carrier is.
            for keys in ([f"task-{turn % NUM_TASKS}"] * batch.num_records, mixed):
                started = time.perf_counter()
                whole.answer(batch, keys)
                seconds.append(time.perf_counter() - started)
            pairs.append(seconds)
    whole.detach()
    single, many = np.median(np.array(pairs), axis=0)
    for name, found in apart.items():
        yield Figure(name=name, value=found, unit="", asked="<= 1e-6")
    yield Figure(name="largest score of the mixed batch", value=scale, unit="")
    yield Figure(
        name="mixed batch of ten tasks, time beside one task's", value=float(many / single), unit="x", asked="<= 1.2"
    )


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


PARTS: Final = ("mixed", *(part_of(order, seed) for order in range(NUM_ORDERS) for seed in SEEDS))


def measure(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Figure]:
    if "mixed" in parts:
        yield from measure_mixed(quick)
    some = [part for part in parts if part != "mixed"]
    if some:
        yield from measure_tasks(quick, some[:1] if quick else some)


if __name__ == "__main__":
    run(
        "continual",
        "Ten tasks learnt one after another: what is learnt, forgotten, and what it costs.",
        measure,
        parts=PARTS,
    )
