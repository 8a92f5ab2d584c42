"""A student with a quarter of its teacher's parameters.

Here        the subjects (easy-VQA: pictures and typed questions; digits that are seen and spoken, by a speaker that
            nobody was taught); teachers, one a seed; students that inherit and are taught, beside students of the same
            shape without the one, the other, or both; accuracy on the collections' own test records.
Elsewhere   the parts (compress.py); what a student is (src/dougong/compress/).
Promise     all students of a seed have the same shape, batches, augmentation and steps. The best weights are chosen by
            records held out of training as the recipe says (pictures, speakers); test records are asked once. The
            interval is from the lowest seed to the highest.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from harness import Kept
from lessons import SPOKEN
from parts import each_seed

from dougong.bundle.files import load_from
from dougong.bundle.model import Model
from dougong.compress.distil import DistilConfig, distil, judge_on
from dougong.compress.importance import Importance, ImportanceConfig, measure_importance
from dougong.compress.prune import PruneConfig, pruned_shape
from dougong.compress.structure import Structure, structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, inherit, shape_of
from dougong.compress.workshop import model_of
from dougong.core.bundle import is_bundle
from dougong.core.config import parse
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch
from dougong.recipes.known import read_recipe
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.tables import Tables, open_tables

SEEDS: Final = 3
SHARE: Final = 0.25
"""Of the teacher's parameters."""

TEACHER_STEPS: Final = 1500
STUDENT_STEPS: Final = 1200
EASY_VQA: Final = "easy-VQA"
DIGITS: Final = "digits seen and spoken"
SUBJECTS: Final = (EASY_VQA, *([DIGITS] if SPOKEN.is_dir() else []))

WAYS: Final[dict[str, tuple[bool, bool]]] = {
    "inherits, taught": (True, True),
    "inherits, labels alone": (True, False),
    "from scratch, taught": (False, True),
    "from scratch, labels alone": (False, False),
}
"""By name: whether it begins with its teacher's weights, and whether it learns from its answers."""


class Measured(NamedTuple):
    """Of one seed."""

    teacher: float
    share: float
    accuracy: dict[str, float]


def measure(quick: bool, kept: Kept) -> Iterator[Figure]:
    for subject in SUBJECTS:
        find = functools.partial(one_seed, subject, kept=kept, quick=quick)
        found = each_seed(kept, f"student, {subject}, {'quick' if quick else 'whole'}", 1 if quick else SEEDS, find)
        yield from figures(subject, [Measured(**values) for values in found])


def figures(subject: str, found: Sequence[Measured]) -> Iterator[Figure]:
    count = len(found)
    yield Figure(name=f"{subject}: teacher's accuracy", value=mean(f.teacher for f in found), unit="", seeds=count)
    share = max(f.share for f in found)
    name = f"{subject}: student's share of the parameters"
    yield Figure(name=name, value=share, unit="", asked=f"<= {SHARE}", seeds=count)
    ours, *others = WAYS
    for way in WAYS:
        ratios = [f.accuracy[way] / f.teacher for f in found]
        yield Figure(
            name=f"{subject}: student's accuracy over the teacher's: {way}",
            value=mean(ratios),
            unit="",
            asked=">= 0.985" if way == ours else None,
            low=min(ratios),
            high=max(ratios),
            seeds=count,
            baseline=mean(f.accuracy[others[-1]] / f.teacher for f in found) if way == ours else None,
        )


def mean(values: Iterable[float]) -> float:
    each = list(values)
    return sum(each) / len(each)


def recipe_of(subject: str, seed: int, *, quick: bool) -> Recipe:
    """The named recipe; that of easy-VQA for pictures and typed questions alone."""
    if subject == EASY_VQA:
        values = read_recipe("vqa").model_dump(mode="json")
        pair = {"modalities": ["image", "question"], "views": [], "one_view_a_batch": False, "conditions": {}}
        values["data"] |= pair
        values["data"]["columns"]["speech"] = "ignore"
        values["model"]["align"] = []
        values["model"]["encoders"].pop("speech")
        values["train"]["optimizer"]["multipliers"] = {}
    else:
        values = read_recipe("seen-and-spoken").model_dump(mode="json")
        values["data"]["folder"] = str(SPOKEN)
    values |= {"name": "compress-teacher", "seed": seed}
    values["train"] |= {"steps": TEACHER_STEPS // (20 if quick else 1), "evaluate_every": 500, "keep": 1}
    return parse(Recipe, values, where="teacher")


class Taught(NamedTuple):
    """A teacher, and what it learnt from."""

    recipe: Recipe
    tables: Tables
    teacher: Model


def teacher_of(subject: str, seed: int, kept: Kept, *, quick: bool) -> Taught:
    """Trained once of the same sources."""
    recipe = recipe_of(subject, seed, quick=quick)
    tables = open_tables(recipe.data, seed=seed)
    folder = kept.folder / f"teacher-{SUBJECTS.index(subject)}-{seed}-{'quick' if quick else 'whole'}"
    if not is_bundle(folder / "bundle"):
        run_recipe(recipe, folder, resume=(folder / "run.yaml").exists(), quiet=True, tables=tables)
    return Taught(recipe, tables, load_from(folder))


def one_seed(subject: str, seed: int, *, kept: Kept, quick: bool) -> dict[str, Any]:
    """A teacher and its students."""
    recipe, tables, teacher = teacher_of(subject, seed, kept, quick=quick)
    whole = sum(p.numel() for p in teacher.network.parameters())
    structure = structure_of(teacher.network)
    importance = measured_importance(teacher, structure, tables, seed)
    shape = quarter(teacher, structure, importance)
    accuracy: dict[str, float] = {}
    share = 1.0
    with tempfile.TemporaryDirectory() as folder:
        for way, (inherits, taught) in WAYS.items():
            student = student_of(teacher, shape, importance if inherits else None, seed)
            share = sum(p.numel() for p in student.network.parameters()) / whole
            config = lessons(recipe, seed, taught=taught, quick=quick)
            distil(
                student.network,
                student.preparation,
                teacher,
                tables.train,
                tables.validation,
                config,
                Path(folder) / way.replace(" ", "-").replace(",", ""),
            )
            accuracy[way] = judge_on(student.network, tables.test, student.preparation).metrics["accuracy"]
    told = judge_on(teacher.network, tables.test, teacher.preparation).metrics["accuracy"]
    return Measured(told, share, accuracy)._asdict()


def measured_importance(teacher: Model, structure: Structure, tables: Tables, seed: int) -> Importance:
    some = sample_table(tables.train, 512, seed=seed)
    loader = Loader(some, teacher.preparation, LoaderConfig(batch_size=64, workers=0))
    batches: list[Batch] = [to_tensors(arrays) for arrays in loader.one_pass()]
    target = teacher.preparation.target
    return measure_importance(teacher.network, structure, batches, target, ImportanceConfig())


def quarter(teacher: Model, structure: Structure, importance: Importance) -> Shape:
    """Half as wide, then pruned to no more than a quarter of all parameters."""
    base = shape_of(StudentConfig(width=0.5), structure, importance)
    half, _ = build_student(teacher.network, teacher.manifest.signature, base)
    whole = sum(p.numel() for p in teacher.network.parameters())
    # A percent less: parameters are counted before the model is built, a stem's by the width alone.
    keep = min(1.0, 0.99 * SHARE * whole / sum(p.numel() for p in half.parameters()))
    config = PruneConfig(layers=False)
    return pruned_shape(teacher.network, structure, importance, base, keep, config)


def student_of(teacher: Model, shape: Shape, importance: Importance | None, seed: int) -> Model:
    torch.manual_seed(seed)
    network, _ = build_student(teacher.network, teacher.manifest.signature, shape)
    if importance is not None:
        inherit(teacher.network, network, shape, importance)
    return model_of(network, teacher)


def lessons(recipe: Recipe, seed: int, *, taught: bool, quick: bool) -> DistilConfig:
    """Both learn from labels; who is not taught, from them alone."""
    values: dict[str, Any] = {
        "seed": seed,
        "loader": recipe.data.loader.model_dump(),
        "train": recipe.train.model_dump() | {"steps": STUDENT_STEPS // (20 if quick else 1), "evaluate_every": 200},
    }
    if not taught:
        no_lessons = ("answer_weight", "own_weight", "relation_weight", "attention_weight", "gate_weight")
        values |= dict.fromkeys(no_lessons, 0.0) | {"label_weight": 1.0}
    return parse(DistilConfig, values, where="student")
