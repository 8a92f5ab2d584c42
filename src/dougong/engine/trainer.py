"""The loop around the step.

Here        TrainConfig, Watch, TrainResult, `train`; `scaling_of`, by which a run scales its loss.
Elsewhere   one step (engine/step.py); what comes in (engine/intake.py); checkpoints (engine/checkpoint.py,
            engine/saver.py); showing what is announced (watch/).
Promise     the same seed gives the same losses; a run that was killed at any moment goes on to the losses that it
            would have had, bit for bit on a CPU, or within rounding where ranks add up in levels (plan.py). Evaluating,
            measuring and saving leave no trace in training. On many ranks the losses are those of one process up to
            rounding, where the model draws no random numbers; the first rank alone writes, and whatever depends on a
            clock, a signal or the disk is agreed on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from dougong.core.config import Config
from dougong.core.errors import CheckpointError, ConfigError, DougongError, RunError
from dougong.core.events import (
    Announcer,
    CheckpointSaved,
    CheckpointSkipped,
    Evaluated,
    EventFile,
    PrecisionSwitched,
    RecordsSetAside,
    RunFinished,
    RunStarted,
    SamplingChanged,
    StepDone,
    StepSkipped,
    StepTimed,
)
from dougong.core.seeds import derive_seed
from dougong.data.position import Loader, Position
from dougong.engine.average import WeightAverage
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import (
    Checkpoint,
    Found,
    RunState,
    check_checkpoint,
    checkpoints_of,
    clear_leftovers,
    latest_checkpoint,
    prune_checkpoints,
    restore_checkpoint,
    set_aside,
)
from dougong.engine.contribution import Probe
from dougong.engine.diagnosis import agree, diagnose
from dougong.engine.flow.meter import FlowConfig
from dougong.engine.intake import Intake, Tally
from dougong.engine.interrupt import Interruption, interruptible
from dougong.engine.listening import Listening
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.heartbeat import following
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.precision.adamw import NarrowAdamW
from dougong.engine.precision.adaptive import AdaptiveConfig, AdaptivePrecision, apply_adaptive
from dougong.engine.precision.choice import Chosen, Precision, PrecisionChoice, autocast, choose_precision
from dougong.engine.precision.scaling import OverflowScaling, Scaling
from dougong.engine.precision.weights import Weights, widen_weights
from dougong.engine.prepare import check_precision, prepare_model
from dougong.engine.random_state import random_state_kept, seed_all
from dougong.engine.sampling import ModalitySampler, SamplingConfig
from dougong.engine.saver import Saved, Saver
from dougong.engine.step import Backward, Loss, SummedLoss, train_step
from dougong.nn.block_stack import BlockStack

EVENTS = "events.jsonl"
TIMED_STEP = 2
"""The first step whose time on every rank is told; after it, those before an evaluation are."""

Reason = Literal["steps", "early", "interrupted"]


class TrainConfig(Config):
    """How a model is trained. The batches are the loader's affair."""

    epochs: float = 10.0
    """Passes over the records, where `steps` is not given."""

    steps: int | None = None
    """Optimizer steps. Where given, it alone decides."""

    accumulation: int = 1
    """Batches that make one step."""

    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to it. None: never."""

    precision: Precision = "auto"
    """auto measures once, and a resumed run keeps what was chosen; fp32 where a plan cuts the model, bf16 where weights
    are. Any other for runs that must repeat exactly. adaptive: fp16 or bf16 for each block, by the range that its
    numbers have had."""

    weights: Weights = "fp32"
    """bf16-...: matrices of 16 bits, gradients and activations too. A step smaller than their last bit counts as
    stochastic: up or down by chance; kahan: with what rounding took from the steps before, kept in 16 bits more;
    masters: in fp32 weights that the optimizer keeps beside."""

    loss_scale: Literal["history", "doubling"] = "history"
    """precision=fp16: the loss is multiplied by what the range of gradients asks for; or by twice as much after 2,000
    steps without overflow, by half after one (GradScaler's rule)."""

    evaluate_every: int | None = None
    """Steps. None: after each epoch. The last step is always followed by an evaluation."""

    checkpoint_every: int | None = None
    """Steps. None: by time alone."""

    checkpoint_seconds: float | None = 120.0
    """Most seconds of work that a kill can cost, and those that writing takes besides. None: by steps alone."""

    keep: int = 2
    """Last checkpoints that stay on the disk; the best one does besides."""

    patience: int | None = None
    """Evaluations without a gain after which training ends. None: never."""

    ema: float | None = None
    """Decay of a moving average of the weights, which is then judged and is the result. For example 0.999."""

    max_bad_share: float = 0.05
    """Share of records that cannot be used above which training refuses to go on."""

    max_skipped: int = 10
    """Steps in a row without a finite loss and gradient after which training gives up."""

    sampling: SamplingConfig | None = None
    """Modalities are left out of training records at rates that follow what is lost without each. None: none is."""

    flow: FlowConfig | None = None
    """Some steps are measured from within: gradients, updates, activations, attention, inputs (dougong diagnose and
    watch read them). None: none is."""

    optimizer: OptimizerConfig = OptimizerConfig()

    @field_validator("steps", "accumulation", "evaluate_every", "checkpoint_every", "keep", "patience", "max_skipped")
    @classmethod
    def _at_least_one(cls, count: int | None) -> int | None:
        if count is not None and count < 1:
            raise ValueError(f"{count} must be at least 1.")
        return count

    @field_validator("epochs", "max_grad_norm", "checkpoint_seconds")
    @classmethod
    def _above_zero(cls, value: float | None) -> float | None:
        if value is not None and not value > 0:
            raise ValueError(f"{value} must be above 0.")
        return value

    @field_validator("ema")
    @classmethod
    def _between(cls, ema: float | None) -> float | None:
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"{ema} must be between 0 and 1. Use for example 0.999, or null for no average.")
        return ema

    @field_validator("max_bad_share")
    @classmethod
    def _a_share(cls, share: float) -> float:
        if not 0 <= share <= 1:
            raise ValueError(f"{share} must be a share, from 0 to 1.")
        return share

    @model_validator(mode="after")
    def _a_scale_of_something(self) -> TrainConfig:
        if self.loss_scale != "history" and self.precision != "fp16":
            raise ValueError(
                f"loss_scale={self.loss_scale} has no effect with precision={self.precision}. Use precision: fp16."
            )
        return self

    @model_validator(mode="after")
    def _weights_of_products(self) -> TrainConfig:
        if self.weights != "fp32" and self.precision not in ("auto", "bf16"):
            raise ValueError(
                f"weights={self.weights} are multiplied in bf16, and precision={self.precision} is not. "
                "Use precision: bf16, or weights: fp32."
            )
        return self

    def total_steps(self, batches_per_epoch: int) -> int:
        """The steps of a whole run."""
        return self.steps or max(1, round(self.epochs * batches_per_epoch / self.accumulation))


class Judgement(Protocol):
    """What the trainer reads of an evaluation; engine/evaluate.py's Evaluation is one."""

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def num_records(self) -> int: ...


@dataclass(frozen=True)
class Watch:
    """What a run is steered by."""

    judge: Callable[[], Mapping[str, Judgement]]
    """Evaluates the model as it stands, under one condition or several, by name."""

    metric: str
    """The best weights are those whose mean of it over the conditions is best."""

    higher_is_better: bool = True
    split: str = "validation"

    probe: Probe | None = None
    """Some records of the split, to measure on after each evaluation what `sampling` follows."""


class TrainResult(NamedTuple):
    """How a run ended."""

    reason: Reason
    step: int
    best_metric: float | None
    best_step: int | None
    precision: PrecisionChoice


def train(
    model: BlockStack[Any, Any],
    loss: Loss,
    loader: Loader,
    config: TrainConfig,
    *,
    folder: Path,
    watch: Watch | None = None,
    announce: Announcer | None = None,
    seed: int = 0,
    resume: bool = False,
    backward: Backward | None = None,
    ranks: Ranks = ALONE,
    layout: Layout | None = None,
) -> TrainResult:
    """Train `model`, in place, and keep `folder/checkpoints` and `folder/events.jsonl`.

    The model ends with its last weights, in fp32; `best_weights(folder)` says where the best are. `backward` takes the
    gradients in another way than the plain one.
    With `resume`, go on from the newest whole checkpoint, or start where there is none.

    With `ranks`, all of them call this, each with a loader of its share and a folder that all can read; `watch` must
    judge to the same figures on each. Listeners hear of the run on the first alone. How many ranks there are, and how
    they are laid out, may change from one resumption to the next.

    `layout` is how the model has been laid out on these ranks (engine/prepare.py); None: each is to have all of it. The
    loader's share is then the layout's.

    Raises:
        RunError: the folder holds a run and `resume` is not asked for.
        CheckpointError: the checkpoint is of another model, loader or seed.
        ConfigError: the watched metric is not among those that were judged, or patience has nothing to watch.
        DataError: too many records cannot be used.
        DougongError: the loss is not finite, step after step.
    """
    if config.patience is not None and watch is None:
        raise ConfigError(f"patience={config.patience} has nothing to watch. Give validation records, or use null.")
    found = latest_checkpoint(checkpoints_of(folder)) if ranks.first else Found(None, ())
    start = _agreed_start(found, folder, ranks, resume=resume)
    announcer = Announcer(*(announce.listeners if announce is not None and ranks.first else ()))
    with interruptible() as interruption, following(model, ranks.heartbeat):
        # Before anything on the disk changes: a run that is refused stays as it was.
        laid_out = layout or prepare_model(
            model, PlanConfig(), ranks, accumulation=config.accumulation, weights=config.weights
        )
        if laid_out.narrowed.how != config.weights:
            raise ConfigError(
                f"train.weights={config.weights}, and the model was laid out with {laid_out.narrowed.how}. "
                "Lay it out by prepare_model with the same."
            )
        check_precision(laid_out.mesh.plan, config.weights, config.optimizer.states)
        run = _Run(model, loss, loader, config, folder, watch, announcer, seed, start, interruption, backward, laid_out)
        ranks.wait()  # all have read what the first may now change
        if not ranks.first:
            with contextlib.closing(run.intake):
                return run.train()
        clear_leftovers(checkpoints_of(folder))
        events = EventFile(folder / EVENTS, resume_at=None if start is None else run.step)
        announcer.listeners.insert(0, events)
        with contextlib.closing(events), contextlib.closing(run.intake):
            for skipped in found.skipped:
                set_aside(skipped)
                announcer(CheckpointSkipped(step=run.step, path=str(skipped.folder), reason=skipped.reason))
            prune_checkpoints(checkpoints_of(folder), config.keep)  # a kill may have come before it
            return run.train()


def scaling_of(
    config: TrainConfig,
    precision: Chosen,
    model: BlockStack[Any, Any],
    device_type: str,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> AdaptivePrecision | OverflowScaling | None:
    """What scales the loss of a new run that is computed in this precision; the model's groups then have formats of
    their own, in place. `agree` adds up over ranks."""
    if precision not in ("fp16", "adaptive"):
        return None
    if precision == "fp16" and config.loss_scale == "doubling":
        return OverflowScaling()
    adaptive = AdaptiveConfig(formats=("fp16",)) if precision == "fp16" else AdaptiveConfig()
    return apply_adaptive(model, adaptive, device_type, agree)


def _agreed_start(found: Found, folder: Path, ranks: Ranks, *, resume: bool) -> Checkpoint | None:
    """The checkpoint that the first rank has found."""

    def choose() -> str | None:
        if not resume and (found.checkpoint is not None or found.skipped):
            raise RunError(f"{folder} holds a run already. Go on with it by resume, or name another folder.")
        return None if found.checkpoint is None else found.checkpoint.folder.name

    name = ranks.first_says(choose)
    if name is None or ranks.first:
        return found.checkpoint
    return check_checkpoint(checkpoints_of(folder) / name)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: BlockStack[Any, Any],
        loss: Loss,
        loader: Loader,
        config: TrainConfig,
        folder: Path,
        watch: Watch | None,
        announce: Announcer,
        seed: int,
        start: Checkpoint | None,
        interruption: Interruption,
        backward: Backward | None,
        layout: Layout,
    ) -> None:
        self.config, self.folder, self.watch, self.announce, self.seed = config, folder, watch, announce, seed
        self.interruption, self.layout = interruption, layout
        self.ranks = ranks = layout.mesh.ranks
        self.batches_per_epoch = loader.batches_per_epoch
        self.total_steps = config.total_steps(self.batches_per_epoch)
        self.device = layout.device
        self.started = self.last_saved = time.perf_counter()
        self.resumed = start is not None

        self.step = 0
        self.best_metric: float | None = None
        self.best_step: int | None = None
        self.evaluations_without_gain = 0
        self.skipped_in_a_row = 0
        self.waited = 0.0
        """Seconds for the next step's batches, so far."""

        self.tally = Tally()
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        if layout.shelved is not None and config.ema is not None:
            raise ConfigError(
                f"train.ema={config.ema} keeps all weights in memory once more, and memory.offload is to save it. Use "
                "ema: null."
            )
        if backward is not None and layout.shelved is not None:
            raise ConfigError(
                "gradients are taken in a way of their own (objective.balance), which memory.offload does not know. "
                "Use balance: none, or no offload."
            )
        if backward is not None and not layout.is_whole:
            raise ConfigError(
                "gradients are taken in a way of their own (objective.balance), which needs the whole model on every "
                "rank. Use plan tensor, pipeline, shard and expert of 1, or balance: null."
            )
        if config.sampling is not None and ranks.world > 1:
            raise ConfigError(
                f"train.sampling draws for whole batches, and {ranks.world} ranks share each out. "
                "Train in one process, or use data.withhold."
            )
        if config.sampling is not None and config.sampling.moves and (watch is None or watch.probe is None):
            raise ConfigError(
                "train.sampling follows what is lost without each modality, and there are no records to measure it on. "
                "Give the watch a probe, or leave sampling out."
            )
        figures = watch.probe.quality_names if watch is not None and watch.probe is not None else {}
        self.sampler = None if config.sampling is None else ModalitySampler(config.sampling, seed, figures=figures)
        if config.flow is not None and (ranks.world > 1 or layout.shelved is not None):
            raise ConfigError(
                "train.flow looks into one process that holds the whole model, and this run has ranks or offloads. "
                "Use flow: null."
            )

        model.train()
        optimizer = config.optimizer.build(model, layout.narrowed, seed=seed)
        layout.share_out(optimizer)
        self.saver = Saver(checkpoints_of(folder), layout, optimizer, self.average, keep=config.keep)
        if start is not None:
            self._go_on(start, model, optimizer)
        terms_of = loss.terms if isinstance(loss, SummedLoss) else None
        self.listening = (
            None
            if config.flow is None
            else Listening(model, optimizer, config.flow, steps=self.step, terms_of=terms_of)
        )
        self.intake = Intake(
            loader,
            self.tally,
            max_bad_share=config.max_bad_share,
            on_more_bad=self._announce_set_aside,
            ranks=layout.data_ranks,
        )
        if start is None:
            # Each rank drops other channels, of other records; those that have the same records, the same.
            place = layout.mesh.share.rank
            seed_all(derive_seed(seed, "train", *(("rank", place) if place else ())))
            self.precision = self._choose_precision(model, loss)
        self.adaptive: AdaptivePrecision | None = None
        self.scaled: AdaptivePrecision | OverflowScaling | None = None
        scaling = self._scaling(model, start)
        own = {} if backward is None else {"backward": backward}
        self.parts = layout.parts(
            loss,
            optimizer,
            max_grad_norm=config.max_grad_norm,
            precision=self.precision.precision,
            device_type=self.device.type,
            scaling=scaling,
            **own,
        )

    def _scaling(self, model: BlockStack[Any, Any], start: Checkpoint | None) -> Scaling | None:
        """What keeps gradients in fp16's range, where one is to."""
        agree = self.ranks.added_up if self.ranks.group is not None else None
        scaling = scaling_of(self.config, self.precision.precision, model, self.device.type, agree)
        if scaling is None:
            return None
        self.adaptive = scaling if isinstance(scaling, AdaptivePrecision) else None
        if start is not None and start.state.scaling is not None:
            if start.state.scaling.kind != scaling.state.kind:
                raise CheckpointError(f"{start.folder} has another train.loss_scale. Resume with that run's settings.")
            scaling.state = start.state.scaling
        self.scaled = scaling
        return scaling

    def train(self) -> TrainResult:
        """Step until there is a reason to stop. After an error, what was being saved is whole or absent."""
        try:
            return self._train()
        except BaseException:
            self._announce_saved(self.saver.close())
            raise
        finally:
            if self.listening is not None:
                self.listening.close()
            if self.adaptive is not None:
                self.adaptive.remove()
            optimizer = self.parts.optimizer
            if isinstance(optimizer, NarrowAdamW):
                widen_weights(optimizer.exact_weights())

    def _train(self) -> TrainResult:
        self.announce(
            RunStarted(
                step=self.step,
                total_steps=self.total_steps,
                precision=self.precision.precision,
                num_parameters=sum(math.prod(shape) for shape in self.layout.shapes.values()),
                resumed=self.resumed,
            )
        )
        stepped = improved = False
        while True:
            interrupted, due = self._agree()
            reason = self._reason(interrupted)
            if stepped and (improved or due or reason is not None):
                self._save()
            if reason is not None:
                break
            epoch = self.tally.position.epoch
            self._step()
            stepped, improved = True, False
            if self._evaluation_due(epoch):
                improved = self._evaluate()
                self._move_rates()
        self._announce_saved(self.saver.finish())
        self.ranks.mark("finishing")
        self.announce(
            RunFinished(
                step=self.step,
                reason=reason,
                best_metric=self.best_metric,
                best_step=self.best_step,
                seconds=time.perf_counter() - self.started,
            )
        )
        self.ranks.wait()  # the last checkpoint is whole
        return TrainResult(reason, self.step, self.best_metric, self.best_step, self.precision)

    def _reason(self, interrupted: bool) -> Reason | None:
        if self.step >= self.total_steps:
            return "steps"
        if self.config.patience is not None and self.evaluations_without_gain >= self.config.patience:
            return "early"
        return "interrupted" if interrupted else None

    def _agree(self) -> tuple[bool, bool]:
        """Whether some rank wants to stop, and whether some rank's clock says that a checkpoint is due.

        What the ranks have read for the next step rides along: every exchange is a wait for the slowest rank.
        """
        started = time.perf_counter()
        self.ranks.mark("reading", self.step + 1)
        over = self._reason(interrupted=False) is not None
        ahead = self.intake.read_ahead(0 if over else self.config.accumulation)
        self.waited = time.perf_counter() - started
        flags = (self.interruption.wanted, self._checkpoint_due(), self.saver.busy, self.saver.failed)
        sums = self.ranks.sums(*map(int, flags), *ahead.counts())
        interrupted, due, writing, failed = (count > 0 for count in sums[: len(flags)])
        # Ranks of a pipeline, a context or a tensor group have all counted the same records.
        alike = self.ranks.world // self.layout.mesh.share.world
        self.intake.meet(ahead, [count // alike for count in sums[len(flags) :]])
        self._announce_saved(self.saver.look(writing, failed))
        return interrupted, due

    # A step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter() - self.waited
        epoch = self.tally.position.epoch
        taking = time.perf_counter()
        arrays, num_records = self.intake.take(self.config.accumulation)
        waited = self.waited + time.perf_counter() - taking
        self.ranks.mark("working")
        learning_rate = self.config.optimizer.learning_rate_at(self.step, self.total_steps)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = learning_rate * group["multiplier"]

        batches = [to_tensors(each, self.device) for each in arrays]
        if self.sampler is not None:
            batches = [self.sampler(batch, step=self.step, part=part) for part, batch in enumerate(batches)]
        self.layout.clock.begin()
        report = train_step(self.parts, batches, num_records=num_records)
        self.step += 1
        if self.average is not None and not report.skipped:
            self.average.update(self.step)
        self.announce(
            StepDone(
                step=self.step,
                loss=report.loss,
                grad_norm=report.grad_norm,
                learning_rate=learning_rate,
                num_records=num_records,
                epoch=epoch,
                seconds=time.perf_counter() - started,
                wait_seconds=waited,
            )
        )
        for heard in () if self.listening is None else self.listening.step(report.loss)[1]:
            self.announce(heard)
        self._announce_switches()
        if self.ranks.world > 1 and (self.step == TIMED_STEP or self._evaluation_due(epoch)):
            told = self.ranks.tell([list(spent) for spent in self.layout.clock.spent])
            self.announce(StepTimed(step=self.step, ranks=told))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        last = self.skipped_in_a_row >= self.config.max_skipped
        if self.skipped_in_a_row == 1 or last:
            rows = [each.row_B.tolist() for each in arrays]
            again = last and self.layout.has_whole_model
            began = agree(diagnose(self.parts, batches, rows, num_records=num_records, again=again), self.ranks)
            if not last:
                reason = began.reason
                if not began.ranks and self.adaptive is not None and self.adaptive.overflow:
                    reason = self.adaptive.overflow
                self.announce(StepSkipped(step=self.step, ranks=began.ranks, modality=began.modality, reason=reason))
                return
            advice = (
                "Mend the records, or leave them out."
                if began.mend_records
                else "Use a lower optimizer.learning_rate, a longer optimizer.warmup_ratio, or precision fp32."
            )
            raise DougongError(
                f"step {self.step}: the loss was {report.loss} and the gradient's norm {report.grad_norm}, and no "
                f"step of the last {self.skipped_in_a_row} was finite. Looked at again: {began.reason}. {advice}"
            )

    def _announce_switches(self) -> None:
        if self.adaptive is None:
            return
        for switch in self.adaptive.switches:
            self.announce(PrecisionSwitched(step=self.step, scale_exponent=self.adaptive.exponent, **switch._asdict()))
        self.adaptive.switches.clear()

    def _announce_set_aside(self, tally: Tally) -> None:
        # Of the step that is being taken: after a kill it is met, and told, again.
        step = self.step + 1
        self.announce(
            RecordsSetAside(step=step, count=len(tally.bad_rows), seen=tally.seen, first=list(tally.first_bad))
        )

    # Evaluation ----------------------------------------------------------------------------------------------

    def _evaluation_due(self, epoch_before: int) -> bool:
        if self.watch is None:
            return False
        if self.step == self.total_steps:
            return True
        if self.config.evaluate_every is None:
            return self.tally.position.epoch > epoch_before
        return self.step % self.config.evaluate_every == 0

    def _evaluate(self) -> bool:
        """Judge and announce; whether it is the best so far."""
        assert self.watch is not None
        self.ranks.mark("judging")
        started = time.perf_counter()
        with random_state_kept():
            if self.average is None:
                judgements = self._judge(self.watch)
            else:
                with self.average.in_place():
                    judgements = self._judge(self.watch)
        seconds = (time.perf_counter() - started) / max(1, len(judgements))
        self.parts.model.train()

        values: list[float] = []
        for condition, judgement in judgements.items():
            self.announce(
                Evaluated(
                    step=self.step,
                    split=self.watch.split,
                    condition=condition,
                    metrics=judgement.metrics,
                    num_records=judgement.num_records,
                    seconds=seconds,
                )
            )
            if self.watch.metric not in judgement.metrics:
                there = ", ".join(judgement.metrics) or "none, since no record could be judged"
                raise ConfigError(
                    f"the watched metric {self.watch.metric!r} is not among those of {self.watch.split} "
                    f"({condition}): {there}. Watch another one, or judge other records."
                )
            values.append(judgement.metrics[self.watch.metric])
        value = sum(values) / len(values)
        best = self.best_metric
        better = best is None or (value > best if self.watch.higher_is_better else value < best)
        self.evaluations_without_gain = 0 if better else self.evaluations_without_gain + 1
        # Of weights that are judged the same, the longer trained; NaN is never the best, nor equal to it.
        if value != value or not (better or value == best):
            return False
        self.best_metric, self.best_step = value, self.step
        return True

    def _judge(self, watch: Watch) -> Mapping[str, Judgement]:
        with autocast(self.parts.precision, self.device.type):
            return watch.judge()

    def _move_rates(self) -> None:
        """Measure what is lost without each modality and let the sampler follow, where it is to and steps are left."""
        if self.sampler is None or not self.sampler.config.moves or self.step >= self.total_steps:
            return
        assert self.watch is not None
        assert self.watch.probe is not None
        probe, started = self.watch.probe, time.perf_counter()
        with random_state_kept(), autocast(self.parts.precision, self.device.type):
            found = probe.removals()
        merits = self.sampler.merits(probe.batch)
        change = self.sampler.update(found, merits)
        self.announce(
            SamplingChanged(
                step=self.step,
                before=change.before,
                after=change.after,
                with_all=found.with_all,
                without=found.without,
                with_none=found.with_none,
                quality=merits,
                reason=change.reason,
                seconds=time.perf_counter() - started,
            )
        )

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every, seconds = self.config.checkpoint_every, self.config.checkpoint_seconds
        if every is not None and self.step % every == 0:
            return True
        return seconds is not None and time.perf_counter() - self.last_saved >= seconds

    def _save(self) -> None:
        self.ranks.mark("saving")
        tally = self.tally
        state = RunState(
            step=self.step,
            epoch=tally.position.epoch,
            batch=tally.position.batch,
            batches_per_epoch=self.batches_per_epoch,
            seed=self.seed,
            precision=self.precision.precision,
            precision_ratio=self.precision.ratio,
            weights=self.config.weights,
            states=self.config.optimizer.states,
            best_metric=self.best_metric,
            best_step=self.best_step,
            evaluations_without_gain=self.evaluations_without_gain,
            skipped_in_a_row=self.skipped_in_a_row,
            seen=tally.seen,
            bad_rows=tuple(sorted(tally.bad_rows)),
            first_bad=tuple(tally.first_bad),
            sampling=None if self.sampler is None else self.sampler.state,
            scaling=None if self.scaled is None else self.scaled.state,
        )
        self._announce_saved(self.saver.begin(state))
        self.last_saved = time.perf_counter()

    def _announce_saved(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self.announce(
            CheckpointSaved(
                step=saved.state.step,
                path=str(saved.path),
                best=saved.state.best_step == saved.state.step,
                pause_seconds=saved.pause_seconds,
                wait_seconds=saved.wait_seconds,
            )
        )

    def _go_on(self, start: Checkpoint, model: BlockStack[Any, Any], optimizer: torch.optim.Optimizer) -> None:
        state = start.state
        for what, there, here in (
            ("seed", state.seed, self.seed),
            ("number of batches in an epoch", state.batches_per_epoch, self.batches_per_epoch),
            ("precision", state.precision, self.config.precision),
            ("format of weights", state.weights, self.config.weights),
            ("format of the optimizer's state", state.states, self.config.optimizer.states),
        ):
            if here not in (there, "auto"):
                raise CheckpointError(
                    f"{start.folder} has another {what}: {there} there, {here} here. Resume with the settings and "
                    "records of that run, or begin another one."
                )
        if (state.sampling is None) != (self.sampler is None):
            was, wants = ("without", "with") if state.sampling is None else ("with", "without")
            raise CheckpointError(
                f"{start.folder} was saved {was} moving rates of modalities and this run is {wants} them. "
                "Set sampling as in that run."
            )
        restore_checkpoint(start, model, optimizer, self.average, self.layout)
        self.step = state.step
        if self.sampler is not None and state.sampling is not None:
            self.sampler.state = state.sampling
        self.best_metric, self.best_step = state.best_metric, state.best_step
        self.evaluations_without_gain = state.evaluations_without_gain
        self.skipped_in_a_row = state.skipped_in_a_row
        self.precision = PrecisionChoice(state.precision, state.precision_ratio)
        self.tally = Tally(Position(state.epoch, state.batch), state.seen, set(state.bad_rows), list(state.first_bad))

    def _choose_precision(self, model: BlockStack[Any, Any], loss: Loss) -> PrecisionChoice:
        wanted = "bf16" if self.config.weights != "fp32" else self.config.precision
        if wanted == "auto" and not self.layout.has_whole_model:
            return PrecisionChoice("fp32", None)
        if wanted != "auto":
            return PrecisionChoice(wanted, None)
        arrays = self.intake.peek()
        if arrays is None:
            return PrecisionChoice("fp32", None)  # taking the first batch will say what is wrong
        return choose_precision(model, loss, to_tensors(arrays, self.device), agree=self.ranks.every)
