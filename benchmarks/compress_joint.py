"""One search over shapes and bits, against pruning and then rounding, and rounding and then pruning.

Here        three budgets of bytes on easy-VQA, each met in three ways.
Elsewhere   the search (src/dougong/compress/search.py); teachers and their records (students.py).
Promise     all ways have the same teacher, records, learning rate and budget, run on the same engine, and are judged on
            test records that none has seen. Those that go one step after the other take the same share of the budget
            by each (its root), and learn for as many steps as the whole search does, its proxies included. What one of
            them finds impossible counts as the accuracy of always saying the most frequent answer. Intervals are from
            the lowest seed to the highest.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from harness import Kept
from parts import each_seed
from students import EASY_VQA, SEEDS, Taught, lessons, mean, measured_importance, teacher_of

from dougong.bundle.exported import EngineConfig
from dougong.bundle.model import Model
from dougong.compress.backends import OpenVinoBackend
from dougong.compress.candidate import Budget
from dougong.compress.distil import DistilConfig, distil, judge_on
from dougong.compress.importance import Importance
from dougong.compress.outcome import BudgetError
from dougong.compress.parts import cut
from dougong.compress.prune import PruneConfig, pruned_shape
from dougong.compress.records import Records
from dougong.compress.search import Search
from dougong.compress.search_config import SearchConfig
from dougong.compress.structure import Structure, structure_of
from dougong.compress.student import StudentConfig, build_student, inherit, shape_of
from dougong.compress.workshop import Asked, model_of
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch

SHARES: Final = (1 / 8, 1 / 16, 1 / 32)
"""Budgets, of the bytes that the teacher's weights take."""

STEPS: Final = 400
TEST_RECORDS: Final = 2000
CALIBRATION_RECORDS: Final = 256
JOINT: Final = "joint search"
PRUNED_FIRST: Final = "pruned, then rounded"
ROUNDED_FIRST: Final = "rounded, then pruned"


class Setting(NamedTuple):
    """What all ways are given."""

    taught: Taught
    records: Records
    structure: Structure
    importance: Importance
    backend: OpenVinoBackend
    calibration: list[Batch]
    distil: DistilConfig
    most_bytes: float
    share: float
    seed: int


def measure(quick: bool, kept: Kept) -> Iterator[Figure]:
    how = "quick" if quick else "whole"
    for share in SHARES[:1] if quick else SHARES:
        find = functools.partial(one_budget, share, kept=kept, quick=quick)
        found = each_seed(kept, f"joint, a {1 / share:.0f}th, {how}", 1 if quick else SEEDS, find)
        yield from figures(f"a {1 / share:.0f}th of the bytes", found)


def figures(name: str, found: list[dict[str, float]]) -> Iterator[Figure]:
    for way in found[0]:
        values = [each[way] for each in found]
        yield Figure(
            name=f"{name}, {way}: accuracy",
            value=mean(values),
            unit="",
            low=min(values),
            high=max(values),
            seeds=len(values),
        )
    over = [each[JOINT] - max(each[PRUNED_FIRST], each[ROUNDED_FIRST]) for each in found]
    yield Figure(
        name=f"{name}: joint search over the better one",
        value=mean(over),
        unit="",
        asked=">= 0",
        low=min(over),
        high=max(over),
        seeds=len(over),
    )


def one_budget(share: float, seed: int, *, kept: Kept, quick: bool) -> dict[str, float]:
    """The accuracy of each way."""
    taught = teacher_of(EASY_VQA, seed, kept, quick=quick)
    teacher, tables = taught.teacher, taught.tables
    judge = sample_table(tables.test, 200 if quick else TEST_RECORDS, seed=seed)
    structure = structure_of(teacher.network)
    setting = Setting(
        taught,
        Records(tables.train, tables.validation, judge, None, True, ()),
        structure,
        measured_importance(teacher, structure, tables, seed),
        OpenVinoBackend(EngineConfig(threads=1)),
        batches(teacher, tables.train),
        lessons(taught.recipe, seed, taught=True, quick=quick),
        share * sum(weight.nbytes for weight in teacher.network.state_dict().values()),
        share,
        seed,
    )
    config = search_config(setting, quick)
    num_steps = search_steps(config)
    guess = most_frequent(judge, teacher)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        found[JOINT] = searched(setting, config, kept, quick, guess)
        for way, prune_first in {PRUNED_FIRST: True, ROUNDED_FIRST: False}.items():
            scratch = Path(temporary) / str(prune_first)
            found[way] = one_after_the_other(setting, num_steps, scratch, guess, prune_first=prune_first)
    return found


def search_config(setting: Setting, quick: bool) -> SearchConfig:
    steps = STEPS // (20 if quick else 1)
    values = SearchConfig().model_dump(mode="json") | {"pool": False, "seed": setting.seed}
    values["distil"] = setting.distil.model_dump(mode="json")
    values["distil"]["train"]["steps"] = steps
    if quick:
        values |= {"widths": [1.0, 0.5], "keeps": [1.0, 0.35], "ranked": 2, "proxy_steps": 2, "tried": 1}
    return parse(SearchConfig, values, where="joint")


def search_steps(config: SearchConfig) -> int:
    """All that it learns for, proxies included."""
    steps = config.distil.train.steps or 0
    whole = config.tried * config.try_share + 1 - config.try_share  # the first that is finished will do
    return round(steps * whole) + config.ranked * config.proxy_steps


def searched(setting: Setting, config: SearchConfig, kept: Kept, quick: bool, guess: float) -> float:
    """The joint search's; it goes on where an earlier run was stopped."""
    size = f"{setting.share:.4f}-{setting.seed}-{'quick' if quick else 'whole'}"
    folder = kept.folder / f"joint-{size}"
    # As much as it may lose, so that it ends with the best that it found.
    budget = Budget(size_bytes=setting.most_bytes, max_loss=1.0)
    search = Search(
        setting.taught.teacher,
        setting.records,
        budget,
        config,
        folder,
        resume=(folder / "search.json").is_file(),
        backends=(setting.backend,),
    )
    try:
        outcome = search.run()
    except BudgetError:
        return guess
    assert outcome.chosen is not None
    found = accuracy(Asked(search.runner_of(outcome.chosen)), setting)
    shutil.rmtree(folder)
    return found


def one_after_the_other(setting: Setting, steps: int, scratch: Path, guess: float, *, prune_first: bool) -> float:
    """Each takes the root of the share."""
    teacher, backend, root = setting.taught.teacher, setting.backend, math.sqrt(setting.share)
    whole = setting.most_bytes / setting.share
    try:
        if prune_first:
            student = learnt(pruned(setting, root), setting, steps, scratch / "learnt")
            bits = backend.fill(student, setting.calibration, setting.calibration[0], setting.most_bytes, None)
        else:
            bits = backend.fill(teacher, setting.calibration, setting.calibration[0], root * whole, None)
            student = learnt(pruned_to_fit(setting, bits, scratch), setting, steps, scratch / "learnt")
    except ConfigError:
        return guess
    runner = backend.carry_out(student, of_it(bits, student), setting.calibration, scratch / "engine")
    return accuracy(Asked(runner), setting)


def pruned(setting: Setting, keep: float) -> Model:
    """The teacher with about so many of its parameters."""
    teacher = setting.taught.teacher
    structure, importance = setting.structure, setting.importance
    base = shape_of(StudentConfig(), structure, importance)
    shape = pruned_shape(teacher.network, structure, importance, base, keep, PruneConfig())
    network, _ = build_student(teacher.network, teacher.manifest.signature, shape)
    inherit(teacher.network, network, shape, importance)
    return model_of(network, teacher)


def pruned_to_fit(setting: Setting, bits: Mapping[str, str], scratch: Path) -> Model:
    """The largest one that keeps to the budget at these bits, to a fiftieth of the teacher.

    Raises:
        ConfigError: none does.
    """
    for keep in np.linspace(1.0, 0.02, 50):
        model = pruned(setting, float(keep))
        layers = {name: weight.numel() for name, weight in model.network.named_parameters()}
        least = sum(
            count * (int(bits.get(name.removesuffix(".weight"), "w16")[1:].split("a")[0]) / 8)
            for name, count in layers.items()
        )
        if least > setting.most_bytes:
            continue  # without its scales it is larger already
        runner = setting.backend.carry_out(model, of_it(bits, model), setting.calibration, scratch / f"{keep:.2f}")
        if runner.num_bytes <= setting.most_bytes:
            return model
    raise ConfigError("no share keeps to the budget at these bits. Use more bytes.")


def of_it(bits: Mapping[str, str], model: Model) -> dict[str, str]:
    """Of the layers that it still has, and that are large enough to have a choice."""
    layers = cut(model.network, model.manifest.signature).layers
    return {name: bits.get(name, "w16a16") for name in layers}


def learnt(student: Model, setting: Setting, steps: int, folder: Path) -> Model:
    train = setting.distil.train.model_copy(update={"steps": steps, "evaluate_every": max(1, steps // 6)})
    distil(
        student.network,
        student.preparation,
        setting.taught.teacher,
        setting.records.learn,
        setting.records.choose,
        setting.distil.model_copy(update={"train": train}),
        folder,
    )
    return student


def accuracy(asked: Asked, setting: Setting) -> float:
    return judge_on(asked, setting.records.judge, setting.taught.teacher.preparation).metrics["accuracy"]


def most_frequent(table: Table, model: Model) -> float:
    name = model.preparation.target.name
    answers = Counter(
        answer for c in range(table.num_chunks) for answer in table.read(c, [name]).column(name).to_pylist()
    )
    return max(answers.values()) / sum(answers.values())


def batches(model: Model, table: Table) -> list[Batch]:
    some = sample_table(table, CALIBRATION_RECORDS, seed=0)
    loader = Loader(some, model.preparation, LoaderConfig(batch_size=64, workers=0))
    return [to_tensors(arrays) for arrays in loader.one_pass() if len(arrays.row_B)]
