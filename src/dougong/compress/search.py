"""Finds the smallest loss within a budget, by measurement.

Here        Search, which drafts candidates, ranks them by a proxy, lets the best of them learn, and decides.
Elsewhere   its settings (search_config.py); what a candidate is, and what carries one out (candidate.py); making one
            (workshop.py); what each costs (draft.py), and what is known so far (known.py); the proxy (proxy.py); what
            it comes to (outcome.py), also where nothing fits (shortfall.py); learning (distil.py); from a bundle to a
            bundle (run.py).
Promise     real time on this machine decides, never the proxy. A search that was killed goes on where it was, and comes
            to the same candidates. A budget that cannot be met ends with the closest points, and what binds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

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
from dougong.compress.distil import agreement, distil, judge_on, teacher_beside
from dougong.compress.draft import Drafting, Say, TimeLimit
from dougong.compress.known import Known
from dougong.compress.outcome import Outcome, best_first, loss_of
from dougong.compress.plan import CHOICES
from dougong.compress.proxy import Proxy, diverges
from dougong.compress.prune import Sparsity
from dougong.compress.records import Records
from dougong.compress.search_config import SearchConfig
from dougong.compress.shortfall import Shortfall
from dougong.compress.workshop import Asked, Workshop
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Listener
from dougong.core.files import write_json
from dougong.core.seeds import derive_seed
from dougong.data.collate import View
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.evaluate import Evaluation
from dougong.engine.metrics import primary_metric

RANKING: Final = 0.45
"""Share of a time limit after which ranking makes do with what it has."""

STEPS: Final = "steps.json"
SPARED: Final = 0.05
"""Share of a time limit that is kept for judging and writing at the end."""


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
        self._limit = TimeLimit(time_limit)
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
        self._known = Known(folder / "points.json", budget, self._backends)
        self.workshop = Workshop(teacher, records.learn, config, folder, self._backends)
        self._drafting = Drafting(self.workshop, self._known, budget, config, self._limit, say)
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
        fitting = self._drafting.run()
        if not fitting:
            raise self._shortfall().of_cost()
        ranked = self._rank(fitting)
        tried = self._try(ranked)
        chosen = self._finish(tried)
        if chosen is None:
            raise self._shortfall().of_loss()
        return Outcome(self.teacher_point, self._known.offered(), chosen, (), ())

    def _shortfall(self) -> Shortfall:
        return Shortfall(self.workshop, self._known.offered(), self.budget, self.teacher_point, self.config)

    def network_of(self, point: Point) -> Model:
        """The model of a candidate that has learnt, with its best weights; it is not to be changed."""
        return self.workshop.network_of(point)

    def runner_of(self, point: Point) -> Runner:
        """The same, carried out by its engine."""
        return self.workshop.runner_of(point)

    # Drafts: what each candidate costs ----------------------------------------------------------------------------

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
            if self._known.of(point.candidate).divergence is None:
                if self._limit.is_late(RANKING) and place:
                    self._say(f"time is short: {len(chosen) - place} candidates are not ranked")
                    break
                self._known.put(point, **self._proxy(point.candidate)._asdict())
            self._say(f"ranked {place + 1} of {len(chosen)}, {self._limit.left(place + 1, len(chosen))}")
        found = [self._known.of(point.candidate) for point in chosen]
        known = [(point.divergence, point.candidate.key, point) for point in found if point.divergence is not None]
        return [point for *_, point in sorted(known, key=lambda each: each[:2])]

    def _proxy(self, candidate: Candidate) -> Proxy:
        shop = self.workshop
        return diverges(
            shop.built(candidate),
            self.teacher,
            self.records.learn,
            shop.calibration,
            self._distil,
            steps=self.config.proxy_steps,
            seed=derive_seed(self.config.seed, "proxy"),
        )

    # Learning -----------------------------------------------------------------------------------------------------

    def _try(self, ranked: list[Point]) -> list[Point]:
        """The best of these learn for a while; the best first."""
        steps = max(1, round(self._total_steps() * self.config.try_share))
        chosen = ranked[: self.config.tried]
        tried: list[Point] = []
        for place, point in enumerate(chosen):
            if self._limit.is_late(1 - SPARED) and tried:
                self._say(f"time is short: {len(chosen) - place} candidates are not tried")
                break
            # As much time for each of those to come, and as much again for the one that goes on.
            runs = len(chosen) - place + (1 - self.config.try_share) / self.config.try_share
            self._say(f"learning, {place + 1} of {len(chosen)} for a while: {point.candidate.in_words()}")
            tried.append(self._learn(point, "try", steps, runs))
        return sorted(tried, key=best_first)

    def _finish(self, tried: list[Point]) -> Point | None:
        """The first that loses no more than it may, after it has learnt to the end, and still is fast enough."""
        good = [point for point in tried if loss_of(point) <= self.budget.max_loss]
        rest = round(self._total_steps() * (1 - self.config.try_share))
        for point in tried[: self.config.finished] if rest else []:
            if self._limit.is_late(1 - SPARED):
                self._say("time is short: what has learnt so far decides")
                break
            self._say(f"learning on to the end: {point.candidate.in_words()}")
            best = self._learn(point, "final", rest, 1.0)
            if (confirmed := self._confirmed_of(best)) is not None:
                return confirmed
            if point in good:
                break  # it lost little enough before, so others are not better
            self._say(f"it loses {loss_of(best):.4f}, and may lose {self.budget.max_loss:g}")
        return next((found for point in good if (found := self._confirmed_of(point)) is not None), None)

    def _confirmed_of(self, point: Point) -> Point | None:
        """Of its shape's candidates, the one that loses least of those that keep to all when measured once more."""
        for each in sorted(self._known.of_shape(point.candidate), key=best_first):
            if loss_of(each) <= self.budget.max_loss and self._confirmed(each):
                return self._known.of(each.candidate)
        recovered = self._recovered(point.candidate)
        if recovered is not None and loss_of(recovered) <= self.budget.max_loss and self._confirmed(recovered):
            return self._known.of(recovered.candidate)
        return None

    def _recovered(self, candidate: Candidate) -> Point | None:
        """Of this shape, what has bits and loses least, taught to live with them; None where rounding is not what costs
        too much, where nothing can be taught, or where time is short."""
        rounded = [point for point in self._known.of_shape(candidate) if point.candidate.bits]
        if self.config.recover is None or not rounded or min(map(loss_of, rounded)) <= self.budget.max_loss:
            return None
        point = min(rounded, key=best_first)
        known = point.candidate.model_copy(update={"recovered": True})
        if known in self._known and self._known.of(known).loss is not None:
            return self._known.of(known)
        model = self.workshop.network_of(point)
        exact = self._loss_of(self._figure(judge_on(model.network, self.records.choose, model.preparation)))
        if exact > self.budget.max_loss or self._limit.is_late(1 - SPARED):
            return None
        self._say(f"rounding costs {loss_of(point) - exact:.4f}: teaching {point.candidate.in_words()} to live with it")
        calibration = [self.workshop.seen_by(model, batch) for batch in self.workshop.calibration]
        try:
            taught = self._backends[known.engine].recover(model, known.bits, calibration, self.config.recover)
        except ConfigError as error:
            self._say(f"not recovered: {error}")
            return None
        self.workshop.keep_recovered(known, taught)
        model = self.workshop.network_of(point.model_copy(update={"candidate": known}))
        self._drafting.measure(known, model)
        metric = self._figure(self._judge(known, model))
        recovered = self._known.put(self._known.of(known), metric=metric, loss=self._loss_of(metric), steps=point.steps)
        self._say(recovered.in_words)
        return recovered

    def _confirmed(self, point: Point) -> bool:
        """Whether it keeps to the budget when measured once more, as it is shipped."""
        self._drafting.measure(point.candidate, self.workshop.network_of(point), turns=2 * self.config.turns)
        binds = self.budget.binds(self._known.of(point.candidate))
        if binds:
            self._say(f"measured again it does not keep to the budget: {'; '.join(binds)}")
        return not binds

    def _learn(self, point: Point, stage: str, steps: int, runs: float) -> Point:
        """Let a shape learn, from where it is; of its candidates within the budget, the one that then loses least."""
        candidate, folder = point.candidate, self.workshop.stage(point.candidate, stage)
        done, settings = folder / "done.json", folder / STEPS
        if self.workshop.is_untaught(candidate) and not done.is_file():
            # It knows all that there is to learn.
            self._judge_shape(candidate, self.workshop.built(candidate), stage, 0)
            write_json(done, {"better": False})
        if not done.is_file():
            if settings.is_file():
                steps = self._steps_of(candidate, stage)
            else:
                steps = self._steps_in_time(candidate, steps, runs)
                write_json(settings, {"steps": steps})
            model = self.workshop.built(candidate)
            if stage == "final":
                load_weights(model.network, best_weights(self.workshop.stage(candidate, "try")))
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
            self.workshop.hold(candidate, stage, model)
            better = self._judge_shape(candidate, model, stage, steps)
            write_json(done, {"better": better})
        return min(self._known.of_shape(candidate), key=best_first)

    def _judge_shape(self, candidate: Candidate, model: Model, stage: str, steps: int) -> bool:
        """Judge all of its candidates; whether they are better than they were before this stage."""
        self._fill(candidate, model)
        shape = self._known.of_shape(candidate)
        metrics = [self._figure(self._judge(each.candidate, model)) for each in shape]
        losses = [self._loss_of(metric) for metric in metrics]
        if stage == "final" and min(losses) > min(loss_of(point) for point in shape):
            return False
        before = self._steps_of(candidate, "try") if stage == "final" else 0
        for point, metric, loss in zip(shape, metrics, losses, strict=True):
            self._say(self._known.put(point, metric=metric, loss=loss, steps=before + steps).in_words)
        return True

    def _steps_of(self, candidate: Candidate, stage: str) -> int:
        """That it was to learn for; none where it knew all."""
        if not (self.workshop.stage(candidate, stage) / STEPS).is_file():
            return 0
        return int(json.loads((self.workshop.stage(candidate, stage) / STEPS).read_text(encoding="utf-8"))["steps"])

    def _fill(self, candidate: Candidate, model: Model) -> None:
        """Add a candidate of this shape for each engine whose layers have bits to choose, as this model needs them."""
        alike = [point for point in self._known.of_shape(candidate) if not self.budget.binds(point)]
        for name in sorted({point.candidate.engine for point in alike} - {EAGER}):
            fitting = [point.candidate.bits for point in alike if point.candidate.engine == name]
            if {} in fitting or {ALL: CHOICES[0]} in fitting:
                continue  # all that rounding could lose is kept
            times = [self.budget.latency_seconds] if self.budget.latency_seconds is not None else []
            if self.budget.speedup is not None:
                times.append(self.teacher_point.latency_seconds / self.budget.speedup)
            calibration = [self.workshop.seen_by(model, batch) for batch in self.workshop.calibration]
            room = (self.budget.size_bytes, min(times, default=None))
            try:
                probe = self.workshop.seen_by(model, self.workshop.probe)
                bits = self._backends[name].fill(model, calibration, probe, *room)
            except ConfigError as error:
                self._say(f"bits by layer on {name}: {error}")
                continue
            filled = candidate.model_copy(update={"engine": name, "bits": dict(bits)})
            if filled not in self._known:
                self._drafting.measure(filled, model)

    def _judge(self, candidate: Candidate, model: Model) -> Evaluation:
        if candidate.engine == EAGER:
            return judge_on(model.network, self.records.choose, model.preparation)
        return judge_on(Asked(self.workshop.carried_out(candidate, model)), self.records.choose, model.preparation)

    def _total_steps(self) -> int:
        steps = self.config.distil.train.steps
        assert steps is not None, "SearchConfig refuses that"
        return steps

    def _steps_in_time(self, candidate: Candidate, steps: int, runs: float) -> int:
        """As many as there is time for, where it is limited, when so many runs like this are still to come."""
        each = self._known.step_seconds(candidate)
        left = self._limit.seconds_left(1 - SPARED)
        if left is None or each is None:
            return steps
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
        timed = interleaved({"teacher": lambda: asked(self.workshop.probe)}, turns=self.config.turns)["teacher"]
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

    # What is kept -------------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> dict[str, Any]:
        """What this search is of, if its folder holds no other one."""
        settings = self.folder / "search.json"
        wanted: dict[str, Any] = {
            "budget": self.budget.model_dump(mode="json"),
            "search": self.config.model_dump(mode="json"),
            "teacher": {name: each.sha256 for name, each in self.teacher.manifest.files.items()},
            "records": self.records.identity(self.teacher.preparation.target.name),
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
        return wanted
