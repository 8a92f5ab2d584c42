"""Finds the smallest loss within a budget, by measurement.

Here        SearchConfig; Search, which drafts candidates, ranks them by a proxy, lets the best of them learn, and
            decides; Outcome; BudgetError.
Elsewhere   what a candidate is, and what carries one out (candidate.py); learning (distil.py); from a bundle to a
            bundle (bundle.py).
Promise     real time on this machine decides, never the proxy. A search that was killed goes on where it was, and comes
            to the same candidates. A budget that cannot be met ends with the closest points, and what binds.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from pydantic import Field
from torch import nn

from dougong.bundle.model import Model
from dougong.compress.candidate import Backend, Budget, Candidate, Eager, EagerRunner, Point, Runner, weights_bytes
from dougong.compress.clock import interleaved
from dougong.compress.distil import DistilConfig, Lessons, Teacher, agreement, distil, judge_on
from dougong.compress.importance import Importance, ImportanceConfig, measure_importance
from dougong.compress.prune import PruneConfig, pruned_shape
from dougong.compress.records import Records
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

Say = Callable[[str], None]


class SearchConfig(Config):
    """What is tried, and how long."""

    widths: tuple[float, ...] = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)
    layers: tuple[float, ...] = (1.0, 0.5)
    blocks: tuple[float, ...] = (1.0, 0.5)
    keeps: tuple[float, ...] = (1.0, 0.6, 0.35)
    """Shares that are combined: of widths, of encoders' layers, of the bridge's blocks, and what pruning leaves."""

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
    distil: DistilConfig = DistilConfig()
    seed: int = 0


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
        return Outcome(self.teacher_point, tuple(self._points.values()), chosen, (), ())

    def network_of(self, point: Point) -> Model:
        """The model of a candidate that has learnt, with its best weights."""
        model = self._built(point.candidate)
        if point.candidate.is_teacher:
            return model
        done = self._stage(point.candidate, "final") / "done.json"
        better = done.is_file() and json.loads(done.read_text(encoding="utf-8"))["better"]
        stage = "final" if better else "try"
        load_weights(model.network, best_weights(self._stage(point.candidate, stage)))
        model.network.eval()
        return model

    def runner_of(self, point: Point, folder: Path) -> Runner:
        """The same, carried out by its engine, which may use the folder."""
        return self._carried_out(point.candidate, self.network_of(point), folder)

    def _carried_out(self, candidate: Candidate, model: Model, folder: Path | None = None) -> Runner:
        folder = folder or self.folder / "engines" / candidate.key
        shutil.rmtree(folder, ignore_errors=True)
        return self._backends[candidate.engine].carry_out(model, candidate.bits, self._calibration, folder)

    # Drafts: what each candidate costs ----------------------------------------------------------------------------

    def candidates(self) -> Iterator[Candidate]:
        """All shapes that are combined, the largest first; engines and bits are added to each by `_draft`."""
        config, stacks = self.config, self._structure.stacks
        layers = config.layers if any(s.num_layers > 1 for name, s in stacks.items() if name != BRIDGE) else (1.0,)
        blocks = config.blocks if stacks[BRIDGE].num_layers > 1 else (1.0,)
        pools: list[dict[str, int]] = [{}]
        if config.pool and (more := self._more_pooling()):
            pools.append(more)
        for width, depth, block, pool, keep in itertools.product(config.widths, layers, blocks, pools, config.keeps):
            yield Candidate(student=StudentConfig(width=width, layers=depth, blocks=block, pool=pool), keep=keep)

    def _more_pooling(self) -> dict[str, int]:
        """Each modality whose tokens may be put together, twice as many as now."""
        found: dict[str, int] = {}
        for name, encoder in self.teacher.network.config.encoders.items():
            if isinstance(encoder, ImageEncoderConfig):
                rows, columns = self.teacher.network.grids[name]
                if rows % 2 == 0 and columns % 2 == 0:
                    found[name] = 2 * encoder.pool
            elif isinstance(encoder, AudioEncoderConfig):
                found[name] = 2 * encoder.pool
        return found

    def _draft(self) -> list[Point]:
        """Measure what every candidate costs; those that keep to the budget."""
        wanted = list(self.candidates())
        done = 0
        for place, shape in enumerate(wanted):
            if self._is_late(DRAFTING) and done:
                self._say(f"time is short: {len(wanted) - place} shapes are not drafted")
                break
            known = [point for point in self._points.values() if point.candidate.shape_key == shape.shape_key]
            if known:
                done += 1
                continue
            try:
                model = self._built(shape)
            except ConfigError as error:
                self._say(f"{shape.in_words()} cannot be: {error}")
                continue
            for backend in self._backends.values():
                if shape.is_teacher and isinstance(backend, Eager):
                    continue  # nothing would become of it
                for bits in backend.options(model.network):
                    self._measure(shape.model_copy(update={"engine": backend.name, "bits": dict(bits)}), model)
            self._keep_points()
            done += 1
            if done % 6 == 0 or place + 1 == len(wanted):
                self._say(f"{place + 1} of {len(wanted)} shapes drafted, {self._left(place + 1, len(wanted))}")
        return [point for point in self._points.values() if not self.budget.binds(point)]

    def _measure(self, candidate: Candidate, model: Model, turns: int | None = None) -> None:
        """Size and time; what else is known of it stays."""
        runner = self._carried_out(candidate, model)
        asked = EagerRunner(self.teacher.network)
        timed = interleaved(
            {"teacher": lambda: asked(self._probe), "student": lambda: runner(self._seen_by(model))},
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

    def _seen_by(self, model: Model) -> Batch:
        return Batch({name: self._probe.media[name] for name in model.network.names}, self._probe.target)

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
        model, config, task = self._built(candidate), self.config.distil, self.teacher.preparation.target.task
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
        return sorted(tried, key=lambda point: (_loss(point), point.latency_seconds, point.candidate.key))

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
            if _loss(best) <= self.budget.max_loss and self._confirmed(best):
                return self._points[best.candidate.key]
            if point in good:
                break  # it lost little enough before, so others are not better
            self._say(f"it loses {_loss(best):.4f}, and may lose {self.budget.max_loss:g}")
        return next((self._points[point.candidate.key] for point in good if self._confirmed(point)), None)

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
        if candidate.is_teacher and not done.is_file():
            self._judge_shape(candidate, self._built(candidate), stage, 0)
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
            train = self.config.distil.train.model_copy(update={"steps": steps, "evaluate_every": max(1, steps // 3)})
            result = distil(
                model.network,
                model.preparation,
                self.teacher,
                self.records.learn,
                self.records.choose,
                self.config.distil.model_copy(update={"train": train}),
                folder,
                listeners=self._listeners,
                resume=True,
                say=self._say,
            )
            if result.reason == "interrupted":
                raise KeyboardInterrupt
            better = self._judge_shape(candidate, model, stage, steps)
            write_json(done, {"better": better})
        return min(self._of_shape(candidate), key=lambda each: (_loss(each), each.latency_seconds, each.candidate.key))

    def _judge_shape(self, candidate: Candidate, model: Model, stage: str, steps: int) -> bool:
        """Judge all of its candidates; whether they are better than they were before this stage."""
        judged: dict[str, float] = {}
        for each in self._of_shape(candidate):
            found = self._judge(each.candidate, model)
            judged[each.candidate.key] = self._figure(found)
        losses = {key: self._loss_of(metric) for key, metric in judged.items()}
        if stage == "final" and min(losses.values()) > min(_loss(self._points[key]) for key in losses):
            return False
        for key, metric in judged.items():
            point = self._points[key]
            before = point.steps if stage == "final" else 0
            self._say(self._put(point, metric=metric, loss=losses[key], steps=before + steps).in_words)
        return True

    def _judge(self, candidate: Candidate, model: Model) -> Evaluation:
        backend = self._backends[candidate.engine]
        if isinstance(backend, Eager):
            return judge_on(model.network, self.records.choose, model.preparation)
        return judge_on(Asked(self._carried_out(candidate, model)), self.records.choose, model.preparation)

    def _of_shape(self, candidate: Candidate) -> list[Point]:
        """Candidates of the same shape that keep to the budget."""
        alike = [point for point in self._points.values() if point.candidate.shape_key == candidate.shape_key]
        return [point for point in alike if not self.budget.binds(point)] or [self._points[candidate.key]]

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
        asked = EagerRunner(self.teacher.network)
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
        points = list(self._points.values())
        if cost:
            closest = sorted(points, key=self.budget.excess)[:3]
            binds = self.budget.binds(closest[0]) if closest else ["nothing could be drafted"]
            if closest and self.budget.size_bytes is not None and closest[0].size_bytes > self.budget.size_bytes:
                binds[0] += f", of which {self._heaviest(closest[0].candidate)}"
        else:
            judged = [point for point in points if point.loss is not None]
            closest = sorted(judged, key=_loss)[:3]
            binds = [f"max-loss: {_loss(closest[0]):.4f} against {self.budget.max_loss:g}"]
        said = f"; the closest is {closest[0].in_words}" if closest else ""
        lines = "; ".join(binds)
        advice = (
            "Allow more, or search other shapes by --set widths, layers or keeps."
            if cost
            else "Allow a larger --max-loss, a wider budget, or more --set distil.train.steps."
        )
        outcome = Outcome(self.teacher_point, tuple(points), None, tuple(closest), tuple(binds))
        return BudgetError(f"the budget cannot be met: {lines}{said}. {advice}", outcome)

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
    row_B = torch.tensor([row for _, row in chosen])
    media = {
        name: only_media(one._replace(index_B=one.index_B[row_B], present_B=one.present_B[row_B], there_B=None))
        for name, one in batch.media.items()
    }
    return Batch(media, None)


def _loss(point: Point) -> float:
    return float("inf") if point.loss is None else point.loss
