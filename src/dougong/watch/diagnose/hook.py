"""Watching any PyTorch training, in three lines.

Here        `watch`, Watched: for a loop of one's own; `callback`, for transformers.Trainer.
Elsewhere   measuring (engine/listening.py); judging (rules.py). Runs of our own recipes have train.flow for it.
Promise     the training goes on as it would have without; nothing is written unless a folder is named; what was
            measured is then in its events.jsonl, which `dougong diagnose FOLDER` reads.

    watched = watch(model, optimizer, total_steps=1000)      # 1: before the loop
    ...
    watched.step(loss)                                       # 2: after each optimizer.step()
    ...
    print(watched)                                           # 3: what is wrong, and where
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.core.events import Evaluated, Event, EventFile, Listener, RunStarted, StepDone
from dougong.engine.examine import Examined
from dougong.engine.flow.inputs import named_inputs
from dougong.engine.flow.meter import FlowConfig
from dougong.engine.flow.step import FlowMeasured
from dougong.engine.listening import Listening
from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.diagnose.history import Failure, History
from dougong.watch.diagnose.rules import SURE, Finding, diagnose

EVENTS = "events.jsonl"


class Watched:
    """A training that is watched. As a context manager it also says why a forward failed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        folder: str | Path | None = None,
        *,
        total_steps: int | None = None,
        steps: int = 0,
        config: FlowConfig | None = None,
        listener: Listener | None = None,
    ) -> None:
        """See `watch`."""
        self._listener = listener
        self._listening = Listening(model, optimizer, config, steps=steps)
        self.meter = self._listening.meter
        self.history = History()
        self._file = None if folder is None else EventFile(Path(folder) / EVENTS)
        self._last = time.perf_counter()
        self._gradient_norm = 0.0
        self._optimizer = optimizer
        self.history.total_steps = total_steps
        if total_steps is not None:
            num = sum(p.numel() for p in model.parameters())
            began = RunStarted(
                step=steps, total_steps=total_steps, precision="fp32", num_parameters=num, resumed=steps > 0
            )
            self._add(began)

    def step(self, loss: float | Tensor) -> list[Finding]:
        """After each optimizer step, with its loss: what is known to be wrong so far, if this step was measured."""
        value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        measured, told = self._listening.step(value)
        if measured is not None:  # between, the last that was measured stands
            self._gradient_norm = measured.facts.get("gradient_norm", 0.0)
        now = time.perf_counter()
        self._add(
            StepDone(
                step=self.meter.steps,
                loss=value,
                grad_norm=self._gradient_norm,
                learning_rate=float(self._optimizer.param_groups[0]["lr"]),
                num_records=0,
                epoch=0,
                seconds=now - self._last,
                wait_seconds=0.0,
            )
        )
        self._last = now
        for each in told:
            self._add(each)
        return self.findings() if any(isinstance(each, FlowMeasured | Examined) for each in told) else []

    def judged(self, **metrics: float) -> list[Finding]:
        """After a validation, with its figures, like accuracy=0.9."""
        self._add(
            Evaluated(
                step=self.meter.steps, split="validation", condition="all", metrics=metrics, num_records=0, seconds=0.0
            )
        )
        return self.findings()

    def failed(self, error: BaseException) -> list[Finding]:
        """After an error in the forward or backward, which ends the training."""
        args, kwargs = self.meter.last_given
        given = named_inputs(self.meter.model, args, kwargs)
        absent = tuple(
            name for name, one in given.items() if one.present_B is not None and not bool(one.present_B.all())
        )
        missing = [n for n, value in kwargs.items() if value is None]
        inside = self.meter.forwards_begun > self.meter.forwards_ended
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.history.failure = Failure(self._where(error), (*absent, *missing) if inside else (), message[:200])
        return self.findings()

    @property
    def examining(self) -> bool:
        """Whether the first records are still being looked at."""
        return self._listening.examining

    def findings(self) -> list[Finding]:
        """What is wrong, the surest first."""
        return [finding for finding in diagnose(self.history) if finding.confidence >= SURE]

    def close(self) -> None:
        """Take the hooks away."""
        self._listening.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.failed(error)
        self.close()

    def __str__(self) -> str:
        return "\n".join(in_words(finding) for finding in self.findings()) or "nothing is known to be wrong"

    def _add(self, event: Event) -> None:
        self.history.add(event)
        if self._file is not None:
            self._file(event)
        if self._listener is not None:
            self._listener(event)

    def _where(self, error: BaseException) -> str:
        """The innermost module whose forward the error came through."""
        names = {id(module): name for name, module in self.meter.model.named_modules()}
        place, trace = "", error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                place = names.get(id(owner), place)
            trace = trace.tb_next
        return place


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    folder: str | Path | None = None,
    *,
    total_steps: int | None = None,
    steps: int = 0,
    config: FlowConfig | None = None,
) -> Watched:
    """Watch a training; see above. With `folder`, what is measured is kept in its events.jsonl. Where the training goes
    on from a checkpoint, `steps` have been taken before: then its first records are not looked at again."""
    return Watched(model, optimizer, folder, total_steps=total_steps, steps=steps, config=config)


def in_words(finding: Finding) -> str:
    """One line: what, where, why, and what would mend it."""
    known = CATALOGUE[finding.cause]
    return f"{known.title} ({finding.place}; {finding.confidence:.0%} sure): {finding.evidence}. {known.remedy}"


def callback(folder: str | Path | None = None) -> Any:
    """For transformers.Trainer: `trainer.add_callback(callback("watched"))`; afterwards ask its `watched`."""
    from transformers import TrainerCallback

    class WatchCallback(TrainerCallback):
        """Feeds a Watched from the trainer's own events."""

        def __init__(self) -> None:
            self.watched: Watched | None = None
            self._loss = 0.0
            self._handle: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            model, optimizer = known["model"], known["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self.watched = Watched(model, inner, folder, total_steps=state.max_steps)

            def heard(_: nn.Module, __: Any, output: Any) -> None:
                loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
                if isinstance(loss, Tensor) and torch.is_grad_enabled():
                    self._loss = float(loss.detach())

            self._handle = model.register_forward_hook(heard)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            if self.watched is not None:
                self.watched.step(self._loss)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **known: Any) -> None:
            if self.watched is not None and metrics:
                named = {str(k).removeprefix("eval_"): float(v) for k, v in metrics.items() if isinstance(v, float)}
                self.watched.judged(**named)

        def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            if self._handle is not None:
                self._handle.remove()
            if self.watched is not None:
                self.watched.close()

    return WatchCallback()
