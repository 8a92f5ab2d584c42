"""One search over shapes and bits, against pruning and then rounding, and rounding and then pruning.

Here        three budgets of bytes on easy-VQA, each met in three ways.
Elsewhere   the search (src/dougong/compress/search.py); teachers and their records (students.py).
Promise     all ways have the same teacher, records, learning rate and budget, run on the same engine, and are judged on
            test records that none has seen. Those that go one step after the other choose shapes by the same search as
            the joint one, with as many proxies and steps: in floats, or at the bits that the teacher's layers got. The
            first step takes the budget's root; where the second then finds no way to the rest, the first goes as much
            farther as the second needs. A budget that a way cannot meet even so counts as the accuracy of always saying
            the most frequent answer. Intervals are from the lowest seed to the highest.

At an eighth of the bytes every way keeps all that its teacher can (.998 and .999 of test records), so budgets begin
where something must be lost.
"""

from __future__ import annotations

import functools
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from harness import Kept
from parts import each_seed
from students import EASY_VQA, SEEDS, lessons, mean, teacher_of

from dougong.bundle.exported import EngineConfig
from dougong.bundle.model import Model
from dougong.compress.backends import OpenVinoBackend
from dougong.compress.candidate import Backend, Budget, Eager, Point, Runner
from dougong.compress.delivery import uniform_plans
from dougong.compress.distil import DistilConfig, judge_on
from dougong.compress.outcome import BudgetError
from dougong.compress.parts import cut
from dougong.compress.records import Records
from dougong.compress.search import Search
from dougong.compress.search_config import SearchConfig
from dougong.compress.workshop import Asked
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch

SHARES: Final = (1 / 16, 1 / 24, 1 / 32)
"""Budgets, of the bytes that the teacher's weights take."""

FIRST_STEPS: Final = (1 / 2, 3 / 4, 1.0)
"""Powers of the budget's share that pruning alone goes to, until rounding does the rest."""

STEPS: Final = 400
TEST_RECORDS: Final = 2000
CALIBRATION_RECORDS: Final = 256
ONE_CORE: Final = EngineConfig(threads=1)


class Setting(NamedTuple):
    """What all ways are given."""

    teacher: Model
    records: Records
    calibration: list[Batch]
    config: SearchConfig
    whole_bytes: float
    share: float
    """Of these, that the budget is."""

    folder: Path

    @property
    def most_bytes(self) -> float:
        return self.whole_bytes * self.share


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
    over = [each[JOINT] - max(each[way] for way in each if way != JOINT) for each in found]
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
    whole = sum(weight.nbytes for weight in teacher.network.state_dict().values())
    setting = Setting(
        teacher,
        Records(tables.train, tables.validation, judge, None, True, ()),
        batches(teacher, tables.train),
        search_config(lessons(taught.recipe, seed, taught=True, quick=quick), seed, quick),
        whole,
        share,
        kept.folder / f"joint-{share:.4f}-{seed}-{'quick' if quick else 'whole'}",
    )
    guess = most_frequent(judge, teacher)
    found = {}
    for name, way in WAYS.items():
        try:
            found[name] = accuracy(way(setting), setting)
        except BudgetError as error:
            print(f"a {1 / share:.0f}th, seed {seed}, {name}: {error}", file=sys.stderr)
            found[name] = guess
    shutil.rmtree(setting.folder, ignore_errors=True)
    return found


def search_config(taught: DistilConfig, seed: int, quick: bool) -> SearchConfig:
    values = SearchConfig().model_dump(mode="json") | {"pool": False, "seed": seed}
    values["distil"] = taught.model_dump(mode="json")
    values["distil"]["train"]["steps"] = STEPS // (20 if quick else 1)
    if quick:
        values |= {"widths": [1.0, 0.5], "keeps": [1.0, 0.35], "ranked": 2, "proxy_steps": 2, "tried": 1}
    return parse(SearchConfig, values, where="joint")


def at_once(setting: Setting) -> Runner:
    search, point = sought(setting, "joint", setting.most_bytes, OpenVinoBackend(ONE_CORE))
    return search.runner_of(point)


def pruned_then_rounded(setting: Setting) -> Runner:
    backend = OpenVinoBackend(ONE_CORE)
    for power in FIRST_STEPS:
        name = f"pruned to {setting.share**power:.3f}"
        search, point = sought(setting, name, setting.whole_bytes * setting.share**power, Eager())
        student = search.network_of(point)
        calibration = [search.workshop.seen_by(student, batch) for batch in setting.calibration]
        try:
            bits = backend.fill(student, calibration, calibration[0], setting.most_bytes, None)
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        return backend.carry_out(student, bits, calibration, setting.folder / "pruned-rounded")
    raise AssertionError("rounding to 16 bits halves what pruning alone left of the budget")


def rounded_then_pruned(setting: Setting) -> Runner:
    teacher, half_way = setting.teacher, setting.whole_bytes * math.sqrt(setting.share)
    try:
        bits = OpenVinoBackend(ONE_CORE).fill(teacher, setting.calibration, setting.calibration[0], half_way, None)
    except ConfigError as error:
        print(f"rounded to {math.sqrt(setting.share):.3f}: {error}", file=sys.stderr)
        layers = cut(teacher.network, teacher.manifest.signature).layers
        bits = uniform_plans(layers)["w4a16"].layers
    search, point = sought(setting, "rounded", setting.most_bytes, AtTheseBits(bits))
    return search.runner_of(point)


JOINT: Final = "joint search"
WAYS: Final[Mapping[str, Callable[[Setting], Runner]]] = {
    JOINT: at_once,
    "pruned, then rounded": pruned_then_rounded,
    "rounded, then pruned": rounded_then_pruned,
}


class AtTheseBits(OpenVinoBackend):
    """Each layer at the bits that were chosen for the teacher's."""

    def __init__(self, bits: Mapping[str, str]) -> None:
        super().__init__(ONE_CORE)
        self._bits = dict(bits)

    def options(self) -> Sequence[Mapping[str, str]]:
        return [self._bits]

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        layers = cut(model.network, model.manifest.signature).layers
        own = {name: self._bits.get(name, "w16a16") for name in layers}  # one that has lost a layer has no bits for it
        return super().carry_out(model, own, calibration, folder, nearest=nearest)

    def fill(
        self,
        model: Model,
        calibration: Sequence[Batch],
        timed: Batch,
        most_bytes: float | None,
        most_seconds: float | None,
    ) -> Mapping[str, str]:
        raise ConfigError("bits were chosen before. Use these.")


def sought(setting: Setting, name: str, most_bytes: float, backend: Backend) -> tuple[Search, Point]:
    """What a search ends with; it goes on where an earlier run was stopped.

    Raises:
        BudgetError: nothing that was tried keeps to the budget.
    """
    folder = setting.folder / name
    # As much as it may lose, so that it ends with the best that it found.
    budget = Budget(size_bytes=most_bytes, max_loss=1.0)
    resume = (folder / "search.json").is_file()
    search = Search(
        setting.teacher, setting.records, budget, setting.config, folder, resume=resume, backends=(backend,)
    )
    outcome = search.run()
    assert outcome.chosen is not None
    return search, outcome.chosen


def accuracy(runner: Runner, setting: Setting) -> float:
    return judge_on(Asked(runner), setting.records.judge, setting.teacher.preparation).metrics["accuracy"]


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
