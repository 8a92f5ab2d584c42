"""Finds the smallest loss within a budget, by measurement.

Here        SearchConfig; Search, which drafts candidates, ranks them by a proxy, lets the best of them learn, and
            decides; Outcome; BudgetError.
Elsewhere   what a candidate is, and what carries one out (candidate.py); learning (distil.py); from a bundle to a
            bundle (bundle.py).
Promise     real time on this machine decides, never the proxy. A search that was killed goes on where it was, and comes
            to the same candidates. A budget that cannot be met ends with the closest points, and what binds.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from dougong.bundle.files import load_network_from
from dougong.bundle.model import Model
from dougong.compress.candidate import (
    ALL,
    EAGER,
    Backend,
    Budget,
    Candidate,
    Eager,
    EagerRunner,
    Point,
    Runner,
    weights_bytes,
)
from dougong.compress.clock import interleaved
from dougong.compress.distil import DistilConfig, Lessons, Teacher, agreement, distil, judge_on, teacher_beside
from dougong.compress.importance import Importance, ImportanceConfig, measure_importance
from dougong.compress.plan import CHOICES
from dougong.compress.prune import PruneConfig, SparseConfig, Sparsity, pruned_shape
from dougong.compress.records import Records
from dougong.compress.recover import RecoverConfig
from dougong.compress.sensitivity import rows_of
from dougong.compress.structure import BRIDGE, Structure, structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, inherit, shape_of
from dougong.core.bundle import Manifest
from dougong.core.config import Config
from dougong.core.errors import ConfigError, DougongError, RunError
from dougong.core.events import Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.split import sample_table
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.evaluate import Evaluation, evaluating
from dougong.engine.metrics import primary_metric
from dougong.engine.random_state import random_state_kept
from dougong.engine.step import TrainParts, train_step
from dougong.engine.weights import distinct_weights, mapped_weights, put_weights, write_weights
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, only_media
from dougong.nn.block_stack import BlockStack
from dougong.objectives.distillation import distillation_loss

DRAFTING: Final = 0.3
RANKING: Final = 0.45
"""Shares of a time limit after which drafting, and ranking, makes do with what it has."""

SPARED: Final = 0.05
"""Share of a time limit that is kept for judging and writing at the end."""

FORETOLD: Final = 1.2
"""How far beyond the budget a candidate may be foretold to be, and is measured all the same."""

AS_MANY: Final = 1.05
"""Bytes within which two engines' files are as large."""

CLOSEST: Final = 3
"""Points that are told where the budget cannot be met."""

RECOVERED: Final = "weights.safetensors"

Say = Callable[[str], None]


class SearchConfig(Config):
    """What is tried, and how long."""

    widths: tuple[float, ...] = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)
    layers: tuple[float, ...] = (1.0, 0.5)
    blocks: tuple[float, ...] = (1.0, 0.5)
    keeps: tuple[float, ...] = (1.0, 0.6, 0.35)
    """Shares that are combined: of widths, of encoders' layers, of the bridge's blocks, and what pruning leaves."""

    modalities: tuple[str, ...] | None = None
    """All that the result is to be asked with: it learns to do without the others, which its teacher sees. None: all
    that the teacher reads."""

    pool: bool = True
    """Whether twice as many neighbouring tokens of pictures and sounds may become one, too."""

    batch_size: int = Field(default=1, gt=0)
    """Records that are answered at once where time is measured."""

    turns: int = Field(default=15, gt=0)
    """Times that each is measured."""

    ranked: int = Field(default=12, gt=0)
    """Candidates within the budget, those with most parameters, that the proxy ranks."""

    proxy_steps: int = Field(default=20, ge=0)
    """Steps that a candidate learns before its answers are held against the teacher's."""

    tried: int = Field(default=4, gt=0)
    """Of these, how many learn for a while."""

    try_share: float = Field(default=0.3, gt=0, le=1)
    """Of distil.train.steps, for how long."""

    finished: int = Field(default=2, gt=0)
    """Of these, how many at most learn on to the end, the best one first, until one loses no more than it may."""

    held_out: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the records that choose among candidates; as many judge at the end where no table is given for it."""

    unit: str | None = None
    """A column whose values are on one side each. None: a medium that records share, where there is one."""

    importance: ImportanceConfig = ImportanceConfig()
    prune: PruneConfig = PruneConfig()
    sparse: SparseConfig | None = None
    """Of what learns, make some weights zero where they are. None: no."""

    distil: DistilConfig = DistilConfig()
    recover: RecoverConfig | None = RecoverConfig()
    """Where rounding costs what may not be lost, and the weights as they learnt do not: how long they are taught to
    live with their bits. None: not at all."""

    beside: dict[str, Path] = {}
    """Further teachers of one modality each, by its name: a bundle or a run of that modality alone."""

    seed: int = 0

    @model_validator(mode="after")
    def _one_that_leaves_out(self) -> Self:
        if self.modalities is not None and (self.distil.views or self.distil.withhold):
            raise ValueError(
                "modalities says what the student is shown, and so does distil.views or distil.withhold. Give one of "
                "them."
            )
        strange = [name for name in self.beside if self.modalities is not None and name not in self.modalities]
        if strange:
            raise ValueError(f"beside.{strange[0]} teaches a modality that the student does not read. Leave it out.")
        return self


class Outcome(NamedTuple):
    """What a search came to."""

    teacher: Point
    points: tuple[Point, ...]
    """All that were measured."""

    chosen: Point | None
    closest: tuple[Point, ...]
    """Where none was chosen."""

    binds: tuple[str, ...]
    """What the closest ones do not keep to."""

    def front(self) -> tuple[Point, ...]:
        """Points that learnt and that no other one beats in time, size and loss together; the fastest first."""
        judged = [point for point in (self.teacher, *self.points) if point.loss is not None]
        best = [point for point in judged if not any(_beats(other, point) for other in judged)]
        return tuple(sorted(best, key=lambda point: point.latency_seconds))


class BudgetError(DougongError):
    """No candidate keeps to the budget; the closest points are in it."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def _beats(one: Point, other: Point) -> bool:
    a = (one.latency_seconds, one.size_bytes, one.loss or 0.0)
    b = (other.latency_seconds, other.size_bytes, other.loss or 0.0)
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


class Asked(BlockStack[Any, Any]):
    """Whatever answers, where a network is judged."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.place = nn.Parameter(torch.zeros(()))  # says on which device it is
        self._runner = runner

    def embed(self, batch: Batch) -> Any:
        return self._runner(batch)

    def head(self, state: Any) -> Any:
        return state


class Search:
    """One search, kept in a folder."""

    def __init__(
        self,
        teacher: Model,
        records: Records,
        budget: Budget,
        config: SearchConfig,
        folder: Path,
        *,
        resume: bool = False,
        time_limit: float | None = None,
        say: Say = lambda line: None,
        listeners: Sequence[Listener] = (),
        backends: Sequence[Backend] = (Eager(),),
    ) -> None:
        """`time_limit` is in seconds, from now.

        Raises:
            RunError: the folder holds another search, or one that `resume` is not asked for, or none to resume.
        """
        self.teacher, self.records, self.budget, self.config, self.folder = teacher, records, budget, config, folder
        self._say, self._listeners, self._backends = say, listeners, {each.name: each for each in backends}
        self._started, self._limit = time.perf_counter(), time_limit
        self._points: dict[str, Point] = {}
        self._step_seconds: dict[str, float] = {}
        self._held: tuple[str, str, Model] | None = None
        """The model that was last asked for, by shape and stage: engines convert a model once."""
        names = tuple(teacher.preparation.modalities)
        self._distil = config.distil
        if config.modalities is not None:
            strange = [name for name in config.modalities if name not in names]
            if strange or not config.modalities:
                raise ConfigError(
                    f"modalities={list(config.modalities)} are not what this bundle reads. Use some of "
                    f"{', '.join(names)}."
                )
            views = (View(keep=config.modalities, beside=names),)
            self._distil = config.distil.model_copy(update={"views": views})
        self._beside = {name: load_network_from(folder) for name, folder in config.beside.items()}
        for name, model in self._beside.items():
            teacher_beside(name, model, teacher)  # it would be refused only after all has been drafted
        settings = self._open(resume)
        self._calibration = self._batches(config.importance.num_records)
        self._probe = fullest(self._calibration, config.batch_size)
        self._structure: Structure = structure_of(teacher.network)
        self._importance: Importance = measure_importance(
            teacher.network, self._structure, self._calibration, teacher.preparation.target, config.importance
        )
        self._metric = primary_metric(teacher.preparation.target.task)
        self._told = judge_on(teacher.network, records.choose, teacher.preparation)
        self.teacher_point = self._teacher_point()
        if not budget.binds(self.teacher_point):
            raise ConfigError(f"the bundle keeps to this budget as it is: {self.teacher_point.in_words}. Ask for less.")
        if not resume:  # only now: what is refused leaves nothing behind
            write_json(folder / "search.json", settings)

    def run(self) -> Outcome:
        """Search.

        Raises:
            BudgetError: nothing that was tried keeps to the budget; the outcome is in it.
        """
        fitting = self._draft()
        if not fitting:
            raise self._unmet(cost=True)
        ranked = self._rank(fitting)
        tried = self._try(ranked)
        chosen = self._finish(tried)
        if chosen is None:
            raise self._unmet(cost=False)
        return Outcome(self.teacher_point, self._offered(), chosen, (), ())

    def network_of(self, point: Point) -> Model:
        """The model of a candidate that has learnt, with its best weights; it is not to be changed."""
        candidate, stage = point.candidate, ""
        if candidate.recovered:
            stage = f"recovered-{candidate.key}"
        elif not self._is_untaught(candidate):
            done = self._stage(candidate, "final") / "done.json"
            better = done.is_file() and json.loads(done.read_text(encoding="utf-8"))["better"]
            stage = "final" if better else "try"
        if self._held is None or self._held[:2] != (candidate.shape_key, stage):
            model = self._built(candidate)
            if candidate.recovered:
                file = self._stage(candidate, stage) / RECOVERED
                put_weights(model.network, mapped_weights(file), where=str(file))
            elif stage:
                load_weights(model.network, best_weights(self._stage(candidate, stage)))
            model.network.eval()
            self._held = (candidate.shape_key, stage, model)
        return self._held[2]

    def _is_untaught(self, candidate: Candidate) -> bool:
        """Whether it is shipped with the teacher's own weights, as they are."""
        return candidate.is_teacher and self.config.sparse is None

    def runner_of(self, point: Point) -> Runner:
        """The same, carried out by its engine."""
        return self._carried_out(point.candidate, self.network_of(point))

    def _carried_out(self, candidate: Candidate, model: Model) -> Runner:
        if candidate.engine == EAGER:
            return EagerRunner(model)
        folder = self.folder / "engine"  # of one at a time
        shutil.rmtree(folder, ignore_errors=True)
        calibration = [self._seen_by(model, batch) for batch in self._calibration]
        backend = self._backends[candidate.engine]
        return backend.carry_out(model, candidate.bits, calibration, folder, nearest=candidate.recovered)

    # Drafts: what each candidate costs ----------------------------------------------------------------------------

    def candidates(self) -> Iterator[Candidate]:
        """All shapes that are combined, the largest first; engines and bits are added to them by `_draft_on`."""
        config, stacks = self.config, self._structure.stacks
        layers = config.layers if any(s.num_layers > 1 for name, s in stacks.items() if name != BRIDGE) else (1.0,)
        blocks = config.blocks if stacks[BRIDGE].num_layers > 1 else (1.0,)
        pools: list[dict[str, int]] = [{}]
        if config.pool and (more := self._more_pooling()):
            pools.append(more)
        for width, depth, block, pool, keep in itertools.product(config.widths, layers, blocks, pools, config.keeps):
            shares = {"width": width, "layers": depth, "blocks": block}
            yield Candidate(student=StudentConfig(**shares, pool=pool, modalities=config.modalities), keep=keep)

    def _more_pooling(self) -> dict[str, int]:
        """Each modality whose tokens may be put together, twice as many as now."""
        found: dict[str, int] = {}
        for name, encoder in self.teacher.network.config.encoders.items():
            if self.config.modalities is not None and name not in self.config.modalities:
                continue
            if isinstance(encoder, ImageEncoderConfig):
                rows, columns = self.teacher.network.grids[name]
                if rows % 2 == 0 and columns % 2 == 0:
                    found[name] = 2 * encoder.pool
            elif isinstance(encoder, AudioEncoderConfig):
                found[name] = 2 * encoder.pool
        return found

    def _draft(self) -> list[Point]:
        """Measure what candidates cost; those that keep to the budget."""
        wanted = list(self.candidates())
        others = [backend for backend in self._backends.values() if backend.name != EAGER]
        late = DRAFTING / 2 if others else DRAFTING
        done = 0
        for place, shape in enumerate(wanted):
            if self._is_late(late) and done:
                self._say(f"time is short: {len(wanted) - place} shapes are not drafted")
                break
            if shape.key in self._points:
                done += 1
                continue
            try:
                model = self._built(shape)
            except ConfigError as error:
                self._say(f"{shape.in_words()} cannot be: {error}")
                continue
            self._measure(shape, model)
            self._keep_points()
            done += 1
            if done % 6 == 0 or place + 1 == len(wanted):
                self._say(f"{place + 1} of {len(wanted)} shapes drafted, {self._left(place + 1, len(wanted))}")
        for backend in others:
            self._draft_on(backend)
        return self._fitting()

    def _offered(self) -> tuple[Point, ...]:
        """All that were measured on an engine that was asked for, but for the teacher as it is."""
        return tuple(
            point
            for point in self._points.values()
            if point.candidate.engine in self._backends
            and not (point.candidate.is_teacher and point.candidate.engine == EAGER)
        )

    def _fitting(self) -> list[Point]:
        """Of these, what keeps to the budget."""
        return [point for point in self._offered() if not self.budget.binds(point)]

    def _draft_on(self, backend: Backend) -> None:
        """Measure an engine, the largest shapes first, until so many keep to the budget as are ranked.

        Shapes and bits that are foretold to be beyond it are passed over. Where none keeps to it, those are measured
        that are foretold to come closest.
        """
        shapes = [point for point in self._points.values() if point.candidate.engine == EAGER]
        shapes.sort(key=lambda point: (-point.num_parameters, point.latency_seconds, point.candidate.key))
        found = 0
        passed: list[tuple[float, Candidate]] = []
        self._say(f"drafting on {backend.name}, the largest of {len(shapes)} shapes first")
        for place, eager in enumerate(shapes):
            if found == self.config.ranked:
                break
            if self._is_late(DRAFTING) and place:
                self._say(f"time is short: {len(shapes) - place} shapes are not drafted on {backend.name}")
                break
            model: Model | None = None
            for bits in backend.options():
                candidate = eager.candidate.model_copy(update={"engine": backend.name, "bits": dict(bits)})
                if candidate.key not in self._points:
                    foretold = self._foretold(eager, candidate)
                    if foretold is not None and self.budget.excess(foretold) > FORETOLD:
                        passed.append((self.budget.excess(foretold), candidate))
                        continue
                    model = model or self._built(eager.candidate)  # bits share what is converted of it
                    try:
                        self._measure(candidate, model)
                    except ConfigError as error:
                        self._say(f"{backend.name} is left out: {error}")
                        return
                    self._keep_points()
                if not self.budget.binds(self._points[candidate.key]):
                    found += 1
                    self._say(f"{found} of {self.config.ranked} found: {self._points[candidate.key].in_words}")
                    break  # what comes after loses more
            if place == 0 and self._is_beaten(backend, eager.candidate):
                self._say(f"{backend.name} is left out: another engine is as small and faster on the largest shape")
                return
        if not found:
            for _, candidate in sorted(passed, key=lambda each: each[0])[:CLOSEST]:
                self._measure(candidate, self._built(candidate))
                self._keep_points()

    def _is_beaten(self, backend: Backend, shape: Candidate) -> bool:
        """Whether each of its points of this shape has another engine's that takes no more time, and as many bytes."""
        alike = [point for point in self._points.values() if point.candidate.shape_key == shape.shape_key]
        others = [point for point in alike if point.candidate.engine not in (EAGER, backend.name)]
        return all(
            any(o.latency_seconds <= p.latency_seconds and o.size_bytes <= AS_MANY * p.size_bytes for o in others)
            for p in alike
            if p.candidate.engine == backend.name
        )

    def _foretold(self, eager: Point, candidate: Candidate) -> Point | None:
        """What it would cost, by what the shape nearest in time costs on that engine at those bits, against torch."""
        known: list[tuple[float, Point, Point]] = []
        for point in self._points.values():
            own = point.candidate
            if (own.engine, own.bits) == (candidate.engine, candidate.bits):
                other = self._points[own.model_copy(update={"engine": EAGER, "bits": {}}).key]
                known.append((abs(math.log(other.latency_seconds / eager.latency_seconds)), point, other))
        if not known:
            return None
        _, point, other = min(known, key=lambda each: each[0])
        faster = other.latency_seconds / point.latency_seconds
        return eager.model_copy(
            update={
                "candidate": candidate,
                "size_bytes": round(eager.size_bytes * point.size_bytes / other.size_bytes),
                "latency_seconds": eager.latency_seconds / faster,
                "speedup": eager.speedup * faster,
            }
        )

    def _measure(self, candidate: Candidate, model: Model, turns: int | None = None) -> None:
        """Size and time; what else is known of it stays."""
        runner = self._carried_out(candidate, model)
        asked, probe = EagerRunner(self.teacher), self._seen_by(model, self._probe)
        timed = interleaved(
            {"teacher": lambda: asked(self._probe), "student": lambda: runner(probe)},
            turns=turns or self.config.turns,
            seed=self.config.seed,
        )
        measured = Point(
            candidate=candidate,
            num_parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            size_bytes=runner.num_bytes,
            latency_seconds=timed["student"].median,
            speedup=timed["student"].times_as_fast_as(timed["teacher"]),
        )
        before = self._points.get(candidate.key, measured)
        self._points[candidate.key] = before.model_copy(
            update={name: getattr(measured, name) for name in ("size_bytes", "latency_seconds", "speedup")}
        )

    def _seen_by(self, model: Model, batch: Batch) -> Batch:
        return Batch({name: batch.media[name] for name in model.network.names}, batch.target)

    # Ranking by a proxy -------------------------------------------------------------------------------------------

    def _rank(self, fitting: list[Point]) -> list[Point]:
        """Those whose answers come closest to the teacher's after a few steps, one of each shape."""
        largest = sorted(fitting, key=lambda point: (-point.num_parameters, point.latency_seconds, point.candidate.key))
        shapes: dict[str, Point] = {}
        for point in largest:
            shapes.setdefault(point.candidate.shape_key, point)
        chosen = list(shapes.values())[: self.config.ranked]
        self._say(f"{len(fitting)} candidates keep to the budget; {len(chosen)} are ranked")
        for place, point in enumerate(chosen):
            if self._points[point.candidate.key].divergence is None:
                if self._is_late(RANKING) and place:
                    self._say(f"time is short: {len(chosen) - place} candidates are not ranked")
                    break
                self._put(point, divergence=self._divergence(point.candidate))
            self._say(f"ranked {place + 1} of {len(chosen)}, {self._left(place + 1, len(chosen))}")
        found = [self._points[point.candidate.key] for point in chosen]
        known = [(point.divergence, point.candidate.key, point) for point in found if point.divergence is not None]
        return [point for *_, point in sorted(known, key=lambda each: each[:2])]

    def _divergence(self, candidate: Candidate) -> float:
        """The proxy. Leaves no trace in what is learnt later."""
        model, config, task = self._built(candidate), self._distil, self.teacher.preparation.target.task
        everything = Teacher(self.teacher.network, tuple(self.teacher.preparation.modalities))
        lessons = Lessons(model.network, everything, (), config, task)
        parts = TrainParts(
            model.network.train(), lessons, config.train.optimizer.build(model.network), config.train.max_grad_norm
        )
        loader = Loader(
            self.records.learn,
            self.teacher.preparation,
            config.loader,
            seed=derive_seed(self.config.seed, "proxy"),
            train=True,
            views=config.views,
            one_view_a_batch=config.one_view_a_batch,
            withhold=config.withhold,
        )
        started, count = time.perf_counter(), 0
        with random_state_kept(), lessons.listening():
            torch.manual_seed(derive_seed(self.config.seed, "proxy"))
            for _, arrays in itertools.islice(loader.batches(Position()), self.config.proxy_steps):
                if len(arrays.row_B):
                    train_step(parts, [to_tensors(arrays)], num_records=len(arrays.row_B))
                    count += 1
        self._step_seconds[candidate.shape_key] = (time.perf_counter() - started) / max(1, count)
        total, records = 0.0, 0
        with torch.inference_mode(), evaluating(model.network):
            for batch in self._calibration:
                own = model.network(Batch({n: batch.media[n] for n in model.network.names}, None)).output_BC
                total += float(distillation_loss(own, self.teacher.network(batch).output_BC, task))
                records += batch.num_records
        return total / max(1, records)

    # Learning -----------------------------------------------------------------------------------------------------

    def _try(self, ranked: list[Point]) -> list[Point]:
        """The best of these learn for a while; the best first."""
        steps = max(1, round(self._total_steps() * self.config.try_share))
        chosen = ranked[: self.config.tried]
        tried: list[Point] = []
        for place, point in enumerate(chosen):
            if self._is_late(1 - SPARED) and tried:
                self._say(f"time is short: {len(chosen) - place} candidates are not tried")
                break
            # As much time for each of those to come, and as much again for the one that goes on.
            runs = len(chosen) - place + (1 - self.config.try_share) / self.config.try_share
            self._say(f"learning, {place + 1} of {len(chosen)} for a while: {point.candidate.in_words()}")
            tried.append(self._learn(point, "try", steps, runs))
        return sorted(tried, key=_best_first)

    def _finish(self, tried: list[Point]) -> Point | None:
        """The first that loses no more than it may, after it has learnt to the end, and still is fast enough."""
        good = [point for point in tried if _loss(point) <= self.budget.max_loss]
        rest = round(self._total_steps() * (1 - self.config.try_share))
        for point in tried[: self.config.finished] if rest else []:
            if self._is_late(1 - SPARED):
                self._say("time is short: what has learnt so far decides")
                break
            self._say(f"learning on to the end: {point.candidate.in_words()}")
            best = self._learn(point, "final", rest, 1.0)
            if (confirmed := self._confirmed_of(best)) is not None:
                return confirmed
            if point in good:
                break  # it lost little enough before, so others are not better
            self._say(f"it loses {_loss(best):.4f}, and may lose {self.budget.max_loss:g}")
        return next((found for point in good if (found := self._confirmed_of(point)) is not None), None)

    def _confirmed_of(self, point: Point) -> Point | None:
        """Of its shape's candidates, the one that loses least of those that keep to all when measured once more."""
        for each in sorted(self._of_shape(point.candidate), key=_best_first):
            if _loss(each) <= self.budget.max_loss and self._confirmed(each):
                return self._points[each.candidate.key]
        recovered = self._recovered(point.candidate)
        if recovered is not None and _loss(recovered) <= self.budget.max_loss and self._confirmed(recovered):
            return self._points[recovered.candidate.key]
        return None

    def _recovered(self, candidate: Candidate) -> Point | None:
        """Of this shape, what has bits and loses least, taught to live with them; None where rounding is not what costs
        too much, where nothing can be taught, or where time is short."""
        rounded = [point for point in self._of_shape(candidate) if point.candidate.bits]
        if self.config.recover is None or not rounded or min(map(_loss, rounded)) <= self.budget.max_loss:
            return None
        point = min(rounded, key=_best_first)
        known = point.candidate.model_copy(update={"recovered": True})
        if known.key in self._points and self._points[known.key].loss is not None:
            return self._points[known.key]
        model, folder = self.network_of(point), self._stage(known, f"recovered-{known.key}")
        exact = self._loss_of(self._figure(judge_on(model.network, self.records.choose, model.preparation)))
        if exact > self.budget.max_loss or self._is_late(1 - SPARED):
            return None
        self._say(f"rounding costs {_loss(point) - exact:.4f}: teaching {point.candidate.in_words()} to live with it")
        calibration = [self._seen_by(model, batch) for batch in self._calibration]
        try:
            taught = self._backends[known.engine].recover(model, known.bits, calibration, self.config.recover)
        except ConfigError as error:
            self._say(f"not recovered: {error}")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / RECOVERED, distinct_weights(taught.network))
        self._held = None
        model = self.network_of(point.model_copy(update={"candidate": known}))
        self._measure(known, model)
        metric = self._figure(self._judge(known, model))
        recovered = self._put(self._points[known.key], metric=metric, loss=self._loss_of(metric), steps=point.steps)
        self._say(recovered.in_words)
        return recovered

    def _confirmed(self, point: Point) -> bool:
        """Whether it keeps to the budget when measured once more, as it is shipped."""
        self._measure(point.candidate, self.network_of(point), turns=2 * self.config.turns)
        binds = self.budget.binds(self._points[point.candidate.key])
        self._keep_points()
        if binds:
            self._say(f"measured again it does not keep to the budget: {'; '.join(binds)}")
        return not binds

    def _learn(self, point: Point, stage: str, steps: int, runs: float) -> Point:
        """Let a shape learn, from where it is; of its candidates within the budget, the one that then loses least."""
        candidate, folder = point.candidate, self._stage(point.candidate, stage)
        done, settings = folder / "done.json", folder / "steps.json"
        if self._is_untaught(candidate) and not done.is_file():
            self._judge_shape(candidate, self._built(candidate), stage, 0)  # it knows all that there is to learn
            write_json(done, {"better": False})
        if not done.is_file():
            if settings.is_file():
                steps = int(json.loads(settings.read_text(encoding="utf-8"))["steps"])
            else:
                steps = self._steps_in_time(candidate, steps, runs)
                write_json(settings, {"steps": steps})
            model = self._built(candidate)
            if stage == "final":
                load_weights(model.network, best_weights(self._stage(candidate, "try")))
            sparsity = None if self.config.sparse is None else Sparsity(model.network, self.config.sparse)
            if sparsity is not None:
                self._say(sparsity.note())
                sparsity.apply()
            train = self._distil.train.model_copy(update={"steps": steps, "evaluate_every": max(1, steps // 3)})
            result = distil(
                model.network,
                model.preparation,
                self.teacher,
                self.records.learn,
                self.records.choose,
                self._distil.model_copy(update={"train": train}),
                folder,
                beside=self._beside,
                listeners=self._listeners,
                resume=True,
                after_step=None if sparsity is None else sparsity.apply,
                say=self._say,
            )
            if result.reason == "interrupted":
                raise KeyboardInterrupt
            self._held = (candidate.shape_key, stage, model)
            better = self._judge_shape(candidate, model, stage, steps)
            write_json(done, {"better": better})
        return min(self._of_shape(candidate), key=_best_first)

    def _judge_shape(self, candidate: Candidate, model: Model, stage: str, steps: int) -> bool:
        """Judge all of its candidates; whether they are better than they were before this stage."""
        self._fill(candidate, model)
        shape = self._of_shape(candidate)
        losses: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for each in shape:
            metrics[each.candidate.key] = self._figure(self._judge(each.candidate, model))
            losses[each.candidate.key] = self._loss_of(metrics[each.candidate.key])
        if stage == "final" and min(losses.values()) > min(_loss(point) for point in shape):
            return False
        before = max(point.steps for point in shape) if stage == "final" else 0
        for key, metric in metrics.items():
            point = self._points[key]
            self._say(self._put(point, metric=metric, loss=losses[key], steps=before + steps).in_words)
        return True

    def _fill(self, candidate: Candidate, model: Model) -> None:
        """Add a candidate of this shape for each engine whose layers have bits to choose, as this model needs them."""
        alike = [point for point in self._of_shape(candidate) if not self.budget.binds(point)]
        for name in sorted({point.candidate.engine for point in alike} - {EAGER}):
            fitting = [point.candidate.bits for point in alike if point.candidate.engine == name]
            if {} in fitting or {ALL: CHOICES[0]} in fitting:
                continue  # all that rounding could lose is kept
            times = [self.budget.latency_seconds] if self.budget.latency_seconds is not None else []
            if self.budget.speedup is not None:
                times.append(self.teacher_point.latency_seconds / self.budget.speedup)
            calibration = [self._seen_by(model, batch) for batch in self._calibration]
            room = (self.budget.size_bytes, min(times, default=None))
            try:
                bits = self._backends[name].fill(model, calibration, self._seen_by(model, self._probe), *room)
            except ConfigError as error:
                self._say(f"bits by layer on {name}: {error}")
                continue
            filled = candidate.model_copy(update={"engine": name, "bits": dict(bits)})
            if filled.key not in self._points:
                self._measure(filled, model)
                self._keep_points()

    def _judge(self, candidate: Candidate, model: Model) -> Evaluation:
        if candidate.engine == EAGER:
            return judge_on(model.network, self.records.choose, model.preparation)
        return judge_on(Asked(self._carried_out(candidate, model)), self.records.choose, model.preparation)

    def _of_shape(self, candidate: Candidate) -> list[Point]:
        """Candidates of the same shape, with the weights that it learnt, that keep to the budget."""
        fitting = [point for point in self._fitting() if not point.candidate.recovered]
        alike = [point for point in fitting if point.candidate.shape_key == candidate.shape_key]
        return alike or [self._points[candidate.key]]

    def _total_steps(self) -> int:
        steps = self.config.distil.train.steps
        if steps is None:
            raise ConfigError(
                "distil.train.steps is not given, and a search shares them out. Set it, for example to 400."
            )
        return steps

    def _steps_in_time(self, candidate: Candidate, steps: int, runs: float) -> int:
        """As many as there is time for, where it is limited, when so many runs like this are still to come."""
        each = self._step_seconds.get(candidate.shape_key)
        if self._limit is None or each is None:
            return steps
        left = self._limit * (1 - SPARED) - (time.perf_counter() - self._started)
        fit = int(left / runs / each)
        if fit < steps:
            self._say(f"time is short: {max(1, fit)} steps in place of {steps}")
        return max(1, min(steps, fit))

    # Figures ------------------------------------------------------------------------------------------------------

    def _figure(self, found: Evaluation) -> float:
        """The task's, or agreement with the teacher where answers are not known."""
        return found.metrics[self._metric.name] if self.records.labelled else agreement(found, self._told)

    def _loss_of(self, metric: float) -> float:
        before = self._figure(self._told)
        if self._metric.higher_is_better or not self.records.labelled:
            return before - metric
        return metric / before - 1 if before else metric

    def _teacher_point(self) -> Point:
        asked = EagerRunner(self.teacher)
        timed = interleaved({"teacher": lambda: asked(self._probe)}, turns=self.config.turns)["teacher"]
        return Point(
            candidate=Candidate(),
            num_parameters=sum(parameter.numel() for parameter in self.teacher.network.parameters()),
            size_bytes=weights_bytes(self.teacher.network),
            latency_seconds=timed.median,
            speedup=1.0,
            divergence=0.0,
            metric=self._figure(self._told),
            loss=0.0,
        )

    def _unmet(self, *, cost: bool) -> BudgetError:
        points = self._offered()
        if cost:
            closest = sorted(points, key=self.budget.excess)[:CLOSEST]
            binds = self.budget.binds(closest[0]) if closest else ["nothing could be drafted"]
            for place, bind in enumerate(binds if closest else []):
                part = self._heaviest if bind.startswith("size") else self._slowest
                binds[place] = f"{bind}, of which {part(closest[0].candidate)}"
        else:
            judged = [point for point in points if point.loss is not None]
            closest = sorted(judged, key=_loss)[:CLOSEST]
            binds = [f"max-loss: {_loss(closest[0]):.4f} against {self.budget.max_loss:g}"]
            if _loss(closest[0]) <= self.budget.max_loss:
                # Each lost little enough, and was found too slow when it was measured again.
                binds = self.budget.binds(closest[0]) or ["time: what was fast enough when drafted was not at the end"]
        said = f"; the closest is {closest[0].in_words}" if closest else ""
        lines = "; ".join(binds)
        advice = (
            "Allow more, or search other shapes by --set widths, layers or keeps."
            if cost
            else "Allow a larger --max-loss, a wider budget, or more --set distil.train.steps."
        )
        outcome = Outcome(self.teacher_point, points, None, tuple(closest), tuple(binds))
        return BudgetError(f"the budget cannot be met: {lines}{said}. {advice}", outcome)

    def _slowest(self, candidate: Candidate) -> str:
        """The modality without which an answer takes least, in words."""
        model = self._built(candidate)
        runner, probe = self._carried_out(candidate, model), self._seen_by(model, self._probe)
        calls = {"": functools.partial(runner, probe)}
        for name, media in probe.media.items() if len(probe.media) > 1 else ():
            absent = only_media(media._replace(present_B=torch.zeros_like(media.present_B), there_B=None))
            calls[name] = functools.partial(runner, Batch({**probe.media, name: absent}, None))
        timed = interleaved(calls, turns=self.config.turns, seed=self.config.seed)
        name = min(timed, key=lambda each: timed[each].median)
        return f"{max(0.0, 1 - timed[name].median / timed[''].median):.0%} is {name or 'all'}'s"

    def _heaviest(self, candidate: Candidate) -> str:
        """The part with most parameters, in words."""
        network = self._built(candidate).network
        counts: dict[str, int] = {}
        for name, weight in structure_of(network).weights(network).items():
            part = next((each for each in network.names if name.startswith(f"{each}.")), name.partition(".")[0])
            counts[part] = counts.get(part, 0) + weight.numel()
        part, most = max(counts.items(), key=lambda each: each[1])
        return f"{most / sum(counts.values()):.0%} is {part.strip('()')}'s"

    # What is kept -------------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> dict[str, Any]:
        """What this search is of; what is known of it is taken from its folder."""
        settings = self.folder / "search.json"
        wanted: dict[str, Any] = {
            "budget": self.budget.model_dump(mode="json"),
            "search": self.config.model_dump(mode="json"),
            "teacher": {name: each.sha256 for name, each in self.teacher.manifest.files.items()},
            "records": [self.records.learn.num_rows, self.records.choose.num_rows, self.records.judge.num_rows],
            "engines": list(self._backends),
        }
        wanted = json.loads(json.dumps(wanted))  # as it comes back from a file
        if settings.is_file():
            if not resume:
                raise RunError(
                    f"{self.folder.parent} holds a search already. Go on with it by --resume, or name another folder "
                    "by --out."
                )
            kept = json.loads(settings.read_text(encoding="utf-8"))
            other = [name for name in wanted if kept.get(name) != wanted[name]]
            if other:
                raise RunError(
                    f"{self.folder.parent} holds a search with another {other[0]}. Go on with the settings of that "
                    "one, or name another folder by --out."
                )
        elif resume:
            raise RunError(f"{self.folder.parent} holds no search to go on with. Start it without --resume.")
        points = self.folder / "points.json"
        if points.is_file():
            found = json.loads(points.read_text(encoding="utf-8"))
            self._points = {key: Point.model_validate(values) for key, values in found.items()}
        return wanted

    def _keep_points(self) -> None:
        values = {key: point.model_dump(mode="json") for key, point in self._points.items()}
        write_json(self.folder / "points.json", values)

    def _put(self, point: Point, **values: Any) -> Point:
        changed = self._points[point.candidate.key].model_copy(update=values)
        self._points[point.candidate.key] = changed
        self._keep_points()
        return changed

    def _stage(self, candidate: Candidate, stage: str) -> Path:
        return self.folder / "learn" / candidate.shape_key / stage

    def _built(self, candidate: Candidate) -> Model:
        """A candidate's model with the teacher's weights, before it has learnt anything."""
        shape = self.shape(candidate)
        signature = self.teacher.manifest.signature
        with random_state_kept():
            torch.manual_seed(derive_seed(self.config.seed, "student"))
            network, signature = build_student(self.teacher.network, signature, shape)
        inherit(self.teacher.network, network, shape, self._importance)
        return model_of(network, self.teacher)

    def shape(self, candidate: Candidate) -> Shape:
        """Exactly what stays of the teacher."""
        base = shape_of(candidate.student, self._structure, self._importance)
        return pruned_shape(
            self.teacher.network, self._structure, self._importance, base, candidate.keep, self.config.prune
        )

    def _batches(self, num_records: int, *, size: int = 64) -> list[Batch]:
        """Some records to learn from, as they are."""
        table = sample_table(self.records.learn, num_records, seed=self.config.seed)
        views = (View(keep=tuple(self.teacher.preparation.modalities)),)
        loader = Loader(table, self.teacher.preparation, LoaderConfig(batch_size=size, workers=0), views=views)
        return [to_tensors(arrays) for arrays in loader.one_pass() if len(arrays.row_B)]

    def _is_late(self, share: float) -> bool:
        return self._limit is not None and time.perf_counter() - self._started > self._limit * share

    def _left(self, done: int, total: int) -> str:
        spent = time.perf_counter() - self._started
        return f"about {spent / done * (total - done):.0f} s left of this part"


def model_of(network: Sandwich, teacher: Model) -> Model:
    """A student with what feeds it and what is known of it."""
    preparation = teacher.preparation
    if network.names != tuple(preparation.modalities):
        preparation = preparation.only(network.names)
    manifest = Manifest(
        name=f"{teacher.manifest.name}-compressed",
        signature=preparation.signature(),
        model=network.config.model_dump(mode="json"),
        provenance=dict(teacher.manifest.provenance),
    )
    return Model(network, preparation, manifest)


def fullest(batches: Sequence[Batch], count: int) -> Batch:
    """So many records, those that lack least: what an answer takes is asked of them."""
    rows: list[tuple[int, int, int]] = []
    for number, batch in enumerate(batches):
        here_B = torch.stack([media.present_B for media in batch.media.values()]).sum(dim=0)
        rows += [(-int(here), number, row) for row, here in enumerate(here_B.tolist())]
    (_, number, _), *_ = sorted(rows)
    batch = batches[number]  # records of one batch can be asked together
    chosen = sorted((lacks, row) for lacks, other, row in rows if other == number)[:count]
    return rows_of(batch, torch.tensor([row for _, row in chosen]))


def _loss(point: Point) -> float:
    return float("inf") if point.loss is None else point.loss


def _best_first(point: Point) -> tuple[float, float, str]:
    return _loss(point), point.latency_seconds, point.candidate.key
