"""What a step of a recipe holds and how long it takes, part by part, and what would make it hold less.

Here        `profile_recipe`; ProfileResult, Change; `write_profile`.
Elsewhere   following a step (engine/memory/visits.py) and its bytes (timeline.py); the page (watch/profile.py); bytes
            of ranks that there are not yet (recipes/plan.py).
Promise     the step is the one that training would begin with: the recipe's first records, seen as it says, its losses,
            precision, memory settings and optimizer. Every change that is offered was carried out on the same records:
            its peak is counted and its time measured, by turns with the recipe as it is. None that saves nothing is
            offered. No weight is changed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from dougong.core.config import override, parse
from dougong.core.errors import ConfigError, RunError
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.core.sizes import bytes_as_text
from dougong.data.position import WHOLE, Position, Share
from dougong.data.preparation import Preparation
from dougong.engine.batches import to_tensors
from dougong.engine.memory.account import Account, num_bytes
from dougong.engine.memory.blocks import measure_blocks
from dougong.engine.memory.budget import fit_budget
from dougong.engine.memory.config import keep_of
from dougong.engine.memory.recompute import KEEPS, Keep, all_alike, apply_recompute
from dougong.engine.memory.timeline import Timeline, fewer_moments, moments_in_time, timeline_of
from dougong.engine.memory.visits import Phase, timed_visits
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.precision.adaptive import AdaptivePrecision
from dougong.engine.precision.choice import Chosen, PrecisionChoice, choose_precision
from dougong.engine.random_state import seed_all
from dougong.engine.sampling import ModalitySampler
from dougong.engine.step import Backward, TrainParts, train_step
from dougong.engine.trainer import scaling_of
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.recipes.build import (
    LaidOut,
    belongs_together,
    build_model,
    check_layout,
    learn_preparation,
    loss_of,
    makes_once,
    open_records,
)
from dougong.recipes.known import AnyRecipe
from dougong.recipes.losses import backward_of, check_objective, losses_of
from dougong.recipes.plan import Planned
from dougong.recipes.recipe import Recipe
from dougong.recipes.tables import Tables
from dougong.recipes.training import encodes_withheld, training_loader
from dougong.watch.profile import check_folder, write_page

TURNS: Final = 7
FEWEST_TURNS: Final = 3
BUDGET_SECONDS: Final = 60.0
"""After which no turn begins, but the fewest."""

SHORT_SECONDS: Final = 0.25
REPEATS: Final = 3
"""Of a step that is shorter, in each turn."""

OFFERED: Final = 3
"""Changes."""

LEAST_SAVED: Final = 0.01
"""Share of the peak below which a change is not worth its setting."""

NOISE: Final = 0.01
"""Share of a step's time below which a difference is none."""

BUDGETS: Final = (0.75, 0.5, 0.25)
"""Of what activations take where all are kept."""

SMALLER: Final = (2, 4)
"""Into so many a micro-batch is divided."""

DRAWN: Final = 280
"""Moments of a step that are told and drawn."""

Announce = Callable[[str, int, int], None]


class Change(NamedTuple):
    """Settings that make the peak lower."""

    settings: tuple[str, ...]
    about: str
    """What they cost besides time."""

    peak_bytes: int
    saved_bytes: int
    """Of the peak."""

    added_seconds: float
    """To a step: the median over turns; below zero where it became faster."""

    low_seconds: float
    high_seconds: float
    """Quarters of the turns lie below and above."""


class ProfileResult(NamedTuple):
    """What was counted and measured."""

    recipe: LaidOut
    precision: PrecisionChoice
    num_records: int
    """Of a step."""

    modalities: dict[str, int]
    """Of these records, how many have it."""

    timeline: Timeline
    times: tuple[float, ...]
    """Of each of its moments, in seconds after the first."""

    part_seconds: tuple[dict[Phase, float], ...]
    """Of each part, over all micro-batches: medians over turns."""

    begin_seconds: float
    optimizer_seconds: float
    step_seconds: float
    """The median, with nothing in the way."""

    turns: int
    changes: tuple[Change, ...]
    """All that save something, the most for their cost first."""

    notes: tuple[str, ...]

    @property
    def offered(self) -> tuple[Change, ...]:
        """The best ones, of which none is worse in both bytes and time than another."""
        return cheapest(self.changes, self.step_seconds)

    def as_json(self) -> dict[str, Any]:
        timeline, held = self.timeline, self.timeline.held
        peak = timeline.peak_moment
        kept = fewer_moments(timeline.total, self.times, DRAWN)
        visit = timeline.visit_at(peak)
        activations = {
            series.part: timeline.bytes[row]
            for row, series in enumerate(timeline.series)
            if series.kind == "activations"
        }
        return {
            "recipe": self.recipe.name,
            "records": self.num_records,
            "micro_batches": self.recipe.train.accumulation,
            "modalities": self.modalities,
            "precision": self.precision.precision,
            "precision_ratio": self.precision.ratio,
            "peak_bytes": held.peak,
            "peak_seconds": self.times[peak],
            "peak_during": {
                "phase": visit.phase,
                "part": None if visit.part is None else timeline.parts[visit.part].label,
            },
            "at_peak": timeline.at_peak(),
            "parts": [
                {
                    "name": part.name,
                    "modality": part.modality,
                    "kind": part.kind,
                    "bytes_at_peak": int(activations[place][peak]),
                    "most_bytes": int(activations[place].max()),
                    "forward_seconds": self.part_seconds[place].get("forward", 0.0),
                    "backward_seconds": self.part_seconds[place].get("backward", 0.0),
                }
                for place, part in enumerate(timeline.parts)
            ],
            "begin_seconds": self.begin_seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "step_seconds": self.step_seconds,
            "turns": self.turns,
            "offered": [change._asdict() for change in self.offered],
            "measured": [change._asdict() for change in self.changes],
            "course": {
                "seconds": [self.times[moment] for moment in kept],
                "visits": [
                    {"seconds": self.times[begun], "phase": visit.phase, "part": visit.part}
                    for visit, begun in timeline.visits
                ],
                "series": [
                    {"kind": series.kind, "part": series.part, "bytes": timeline.bytes[row, kept].tolist()}
                    for row, series in enumerate(timeline.series)
                ],
            },
            "notes": list(self.notes),
        }


def cheapest(changes: Sequence[Change], step_seconds: float, most: int = OFFERED) -> tuple[Change, ...]:
    """The most bytes for each second of a step, differences below a hundredth of it counting as that."""
    least = NOISE * step_seconds

    def cost(change: Change) -> float:
        return max(change.added_seconds, least)

    def worse(change: Change, other: Change) -> bool:
        no_better = change.saved_bytes <= other.saved_bytes and cost(change) >= cost(other)
        return no_better and (change.saved_bytes, cost(change)) != (other.saved_bytes, cost(other))

    good = [change for change in changes if not any(worse(change, other) for other in changes)]
    return tuple(sorted(good, key=lambda change: -change.saved_bytes / cost(change))[:most])


def check_profile(recipe: AnyRecipe) -> LaidOut:
    """
    Raises:
        ConfigError: a step of this recipe cannot be carried out here.
    """
    if not isinstance(recipe, LaidOut):
        raise ConfigError(
            f"--profile carries out a step of recipes that decide or decode, and {recipe.name} learns to "
            f"{recipe.kind}. Leave --profile out."
        )
    plan = recipe.plan or PlanConfig()
    if max(plan.tensor, plan.context, plan.pipeline, plan.shard, plan.expert) > 1:
        raise ConfigError(
            f"--profile carries out a step in one process, and the recipe's plan is of several ({plan.in_words()}). "
            "Add --set plan=null, or see by rank with: dougong plan."
        )
    check_layout(recipe, plan, 1)
    if isinstance(recipe, Recipe):
        check_objective(recipe.objective, recipe.model)
    return recipe


def profile_recipe(recipe: AnyRecipe, announce: Announce | None = None) -> ProfileResult:
    """Carry out two steps and follow the second, then steps with one thing changed; `announce` is told what is done.

    Raises:
        ConfigError: a step of this recipe cannot be carried out here.
        RunError: its first step is not finite, or it has no records.
    """
    recipe = check_profile(recipe)
    # Of a run's concerns, not of a step's.
    recipe = _with(recipe, ["data.allow_leak=true", "data.loader.workers=0"])
    tables = open_records(recipe)
    preparation, left_out = learn_preparation(recipe, tables)
    trial = _Trial(recipe, tables, preparation)
    whole = trial.as_it_is()
    timeline = trial.timeline(whole)
    tried = [whole, *trial.changed(whole, announce)]
    peaks = [timeline.held.peak, *(trial.peak(each) for each in tried[1:])]
    saving = [
        (each, peak) for each, peak in zip(tried, peaks, strict=True) if peaks[0] - peak >= LEAST_SAVED * peaks[0]
    ]
    seconds = trial.times([whole, *(each for each, _ in saving)], announce)
    stays = trial.stays(whole, turns=len(seconds[0]))
    step_seconds = statistics.median(seconds[0])
    changes = tuple(
        _change(each, peaks[0], peak, [b - a for a, b in zip(seconds[0], own, strict=True)])
        for (each, peak), own in zip(saving, seconds[1:], strict=True)
    )
    by_visit = [statistics.median(times) for times in zip(*(turn for turn in stays), strict=True)]
    by_place = _by_place(timeline, stays)
    return ProfileResult(
        recipe=recipe,
        precision=trial.precision,
        num_records=trial.num_records,
        modalities=trial.modalities(whole),
        timeline=timeline,
        times=tuple(moments_in_time(timeline, by_visit)),
        part_seconds=tuple(
            {phase: by_place[phase, place] for phase in ("forward", "backward") if (phase, place) in by_place}
            for place in range(len(timeline.parts))
        ),
        begin_seconds=by_place["begin", None],
        optimizer_seconds=by_place["optimizer", None],
        step_seconds=step_seconds,
        turns=len(seconds[0]),
        changes=tuple(sorted(changes, key=lambda change: -change.saved_bytes)),
        notes=(*tables.notes, *left_out, *trial.notes(whole)),
    )


def write_profile(result: ProfileResult, folder: Path) -> Path:
    """Write `profile.html` and `profile.json` there, over those of an earlier profile.

    Raises:
        ConfigError: it cannot be a folder.
    """
    check_folder(folder)
    told = result.as_json()
    write_json(folder / "profile.json", told)
    return write_page(folder, told)


class _Setup(NamedTuple):
    """One way to take the step."""

    settings: tuple[str, ...]
    """Laid over the recipe."""

    about: str
    batches: tuple[Batch, ...]
    precision: Chosen
    keep: tuple[Keep, ...] | None


class _Trial:
    """The recipe's model with its optimizer, which takes the same step in any way."""

    def __init__(self, recipe: LaidOut, tables: Tables, preparation: Preparation) -> None:
        self.recipe, self.tables, self.preparation = recipe, tables, preparation
        self._seed = derive_seed(recipe.seed, "train")
        self._batches = self._read(1)
        self.num_records = sum(batch.num_records for batch in self._batches)
        if not self.num_records:
            raise RunError(f"{tables.train.path.name} has no record that can be used: dougong check says why.")
        self.model: BlockStack[Any, Any] = build_model(recipe, preparation).train()
        self.loss = loss_of(recipe, preparation, None)
        self.optimizer = recipe.train.optimizer.build(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the same work, and every step is of the same weights
        seed_all(self._seed)
        wanted = recipe.train.precision
        self.precision = (
            choose_precision(self.model, self.loss, self._batches[0])
            if wanted == "auto"
            else PrecisionChoice(wanted, None)
        )

    def as_it_is(self) -> _Setup:
        memory = self.recipe.memory
        if memory.activations is not None and memory.keep is None:
            # As a run settles it, before it begins.
            keep = Planned(self.recipe, self.tables, self.preparation).kept(PlanConfig(), 1)
        else:
            keep = keep_of(memory, len(self.model.blocks))
        return _Setup((), "", self._batches, self.precision.precision, keep)

    def changed(self, whole: _Setup, announce: Announce | None) -> Iterator[_Setup]:
        """All that may save something, one thing at a time."""
        num_blocks = len(self.model.blocks)
        fresh = {"every": 1, "activations": None, "keep": None, "recompute": "none"}
        once = makes_once(self.recipe)
        keeps: dict[str, tuple[Keep, ...]] = {"blocks": all_alike("nothing", num_blocks)}
        if once:
            keeps["cheap"] = all_alike("products", num_blocks)
        for recompute, keep in keeps.items():
            settings = self._memory({**fresh, "recompute": recompute})
            yield whole._replace(settings=settings, about=_ABOUT[recompute], keep=keep)
        profile = measure_blocks(
            self.model,
            self.loss,
            self._batches[0],
            precision=whole.precision,
            keeps=KEEPS if once else ("all", "nothing"),
        )
        measured = functools.cache(lambda keep: self._activations(whole._replace(keep=keep)))
        for place, share in enumerate(BUDGETS):
            if announce is not None:
                announce("budgets fitted", place + 1, len(BUDGETS))
            with contextlib.suppress(ConfigError):  # nothing fits it
                chosen = fit_budget(profile, functools.partial(_share_of, share), measured, tries=3)
                settings = self._memory({**fresh, "activations": share})
                yield whole._replace(settings=settings, about=_ABOUT["activations"], keep=chosen.keep)
        if whole.precision == "fp32":
            settings = ("train.precision=bf16",)
            yield whole._replace(settings=settings, about=_ABOUT["bf16"], precision="bf16")
        size, accumulation = self.recipe.data.loader.batch_size, self.recipe.train.accumulation
        together = belongs_together(self.recipe) is not None or self.recipe.train.sampling is not None
        for count in SMALLER:
            if not together and size % count == 0 and min(batch.num_records for batch in self._batches) >= count:
                settings = (f"data.loader.batch_size={size // count}", f"train.accumulation={accumulation * count}")
                yield whole._replace(settings=settings, about=_ABOUT["smaller"], batches=self._read(count))

    # Carrying it out -----------------------------------------------------------------------------------------

    def timeline(self, setup: _Setup) -> Timeline:
        """Of the second step."""
        with self._prepared(setup) as parts:
            self._step(parts, setup)
            return timeline_of(functools.partial(self._step, setup=setup), parts)

    def peak(self, setup: _Setup) -> int:
        return self._counted(setup).bytes.peak

    def times(self, setups: Sequence[_Setup], announce: Announce | None) -> list[list[float]]:
        """Seconds of a step, by turn; the order is drawn anew in each."""
        found: list[list[float]] = [[] for _ in setups]
        began = time.perf_counter()
        with _no_collecting():
            for turn in range(TURNS):
                if turn >= FEWEST_TURNS and time.perf_counter() - began > BUDGET_SECONDS:
                    break
                if announce is not None:
                    announce("turns timed", turn + 1, TURNS)
                for place in np.random.default_rng(turn).permutation(len(setups)).tolist():
                    with self._prepared(setups[place]) as parts:
                        found[place].append(self._seconds(parts, setups[place]))
        return found

    def _seconds(self, parts: TrainParts, setup: _Setup) -> float:
        """Of a step; of a short one the median of some in a row."""
        found: list[float] = []
        while len(found) < (1 if found and found[0] >= SHORT_SECONDS else REPEATS):
            self._finish()
            started = time.perf_counter()
            self._step(parts, setup)
            self._finish()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def stays(self, setup: _Setup, turns: int) -> list[list[float]]:
        """Seconds of each visit, by turn."""
        with self._prepared(setup) as parts, _no_collecting():
            step = functools.partial(self._step, setup=setup)
            return [[stay.seconds for stay in timed_visits(step, parts)] for _ in range(turns)]

    def _counted(self, setup: _Setup) -> Account:
        with self._prepared(setup) as parts:
            account = Account(self.model, self.optimizer)
            with account:
                self._step(parts, setup)
        return account

    def _activations(self, setup: _Setup) -> int:
        return self._counted(setup).bytes.activations

    def _step(self, parts: TrainParts, setup: _Setup) -> None:
        seed_all(self._seed)
        report = train_step(parts, setup.batches, num_records=self.num_records)
        if report.skipped:
            raise RunError(
                f"the first step of {self.recipe.name} is not finite (loss {report.loss}, gradient "
                f"{report.grad_norm}): there is no whole step to follow. dougong train says where it began."
            )

    @contextlib.contextmanager
    def _prepared(self, setup: _Setup) -> Iterator[TrainParts]:
        """The model set up so, and afterwards as before."""
        before = [(block, vars(block).get("forward")) for block in self.model.blocks]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        if setup.keep is not None:
            apply_recompute(self.model, setup.keep)
        train = self.recipe.train
        scaling = scaling_of(train, setup.precision, self.model, self._device.type)
        try:
            yield TrainParts(
                self.model,
                self.loss,
                self.optimizer,
                train.max_grad_norm,
                setup.precision,
                self._device.type,
                self._backward(),
                scaling=scaling,
            )
        finally:
            if isinstance(scaling, AdaptivePrecision):
                scaling.remove()
            for block, forward in before:
                _put_back(block, forward)
            with torch.no_grad():
                for buffer, was in buffers:
                    buffer.copy_(was)

    def _backward(self) -> Backward | None:
        if not isinstance(self.recipe, Recipe):
            return None
        task = self.preparation.target.task
        losses = losses_of(self.recipe.objective, self.recipe.model, task, None)
        return backward_of(self.recipe.objective, cast(Sandwich, self.model), losses)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _finish(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()

    # What it reads -------------------------------------------------------------------------------------------

    def _read(self, count: int) -> tuple[Batch, ...]:
        """The first batches that have records, each in so many parts."""
        loaders = [
            training_loader(
                self.recipe,
                self.tables,
                self.preparation,
                share=WHOLE if count == 1 else Share(place, count),
                withheld_beside=encodes_withheld(self.recipe),
            )
            for place in range(count)
        ]
        wanted, found = self.recipe.train.accumulation, []
        batches = [loader.batches(Position()) for loader in loaders]
        for _ in range(loaders[0].batches_per_epoch):
            arrays = [next(each)[1] for each in batches]
            if sum(len(each.row_B) for each in arrays):
                found.append([to_tensors(each) for each in arrays])
            if len(found) == wanted:
                break
        sampling = self.recipe.train.sampling
        if sampling is not None:
            sampler = ModalitySampler(sampling, self.recipe.seed, figures=self.preparation.quality_names)
            found = [[sampler(batch, step=0, part=place) for batch in row] for place, row in enumerate(found)]
        return tuple(batch for row in found for batch in row)

    def _memory(self, wanted: dict[str, Any]) -> tuple[str, ...]:
        """What must be set for the memory settings to be these."""
        now = self.recipe.memory.model_dump(mode="json")
        return tuple(
            f"memory.{key}={json.dumps(value).strip(chr(34))}" for key, value in wanted.items() if now[key] != value
        )

    def modalities(self, setup: _Setup) -> dict[str, int]:
        return {
            name: sum(int(batch.media[name].present_B.sum()) for batch in setup.batches)
            for name in self.preparation.modalities
        }

    def notes(self, setup: _Setup) -> Iterator[str]:
        absent = [name for name, number in self.modalities(setup).items() if not number]
        if absent:
            yield (
                f"the first records have no {', '.join(absent)}: data.views or data.withhold leave it out of them, and "
                "steps that have it take more"
            )
        if self.recipe.train.ema is not None:
            size = num_bytes(list(self.model.parameters()))
            yield f"train.ema keeps the weights once more ({bytes_as_text(size)}), which is not in these figures"
        buffers = num_bytes(list(self.model.buffers()))
        if buffers > LEAST_SAVED * num_bytes(list(self.model.parameters())):
            yield f"buffers of the model, {bytes_as_text(buffers)}, are not in these figures"


_ABOUT: Final = {
    "cheap": "Norms, activation functions and the like are made anew in the backward. Losses stay the same to the bit.",
    "blocks": "Every block is computed once more in the backward. Losses stay the same to the bit.",
    "activations": "Blocks are made anew as far as it takes, the cheapest first. Losses stay the same to the bit.",
    "bf16": "Products are computed with 8 bits of precision. Losses differ a little.",
    "smaller": "The same records in a step, in smaller batches. Losses stay the same up to rounding and random draws.",
}


def _change(setup: _Setup, before: int, peak: int, added: Sequence[float]) -> Change:
    low, median, high = np.quantile(added, (0.25, 0.5, 0.75)).tolist()
    return Change(setup.settings, setup.about, peak, before - peak, median, low, high)


def _by_place(timeline: Timeline, stays: Sequence[Sequence[float]]) -> dict[tuple[Phase, int | None], float]:
    """Seconds of all visits of a part, medians over turns."""
    turns: list[dict[tuple[Phase, int | None], float]] = []
    for turn in stays:
        spent: dict[tuple[Phase, int | None], float] = {}
        for (visit, _), seconds in zip(timeline.visits, turn, strict=True):
            spent[visit.phase, visit.part] = spent.get((visit.phase, visit.part), 0.0) + seconds
        turns.append(spent)
    return {key: statistics.median(spent[key] for spent in turns) for key in turns[0]}


@contextlib.contextmanager
def _no_collecting() -> Iterator[None]:
    """Garbage is collected before, not in the midst of what is timed."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _share_of(share: float, whole: int) -> float:
    return share * whole


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is not None:
        block.forward = forward
    elif "forward" in vars(block):
        del block.forward


def _with(recipe: LaidOut, settings: Sequence[str]) -> LaidOut:
    return parse(type(recipe), override(recipe.model_dump(mode="json"), settings), where=f"recipe {recipe.name}")
