"""Measures some steps of any network and optimizer, while somebody else trains.

Here        FlowConfig, FlowMeter.
Elsewhere   what is measured of one step (step.py); drawing it (watch/gradient_flow.py); saying what is wrong
            (watch/diagnose/); the loop (engine/trainer.py).
Promise     measuring changes no number of training: weights, gradients, buffers and random states are as they would
            have been. Between measured steps nothing is hooked but the beginning and end of the network's forward. A
            network and its optimizer as they are suffice: nothing need be known of how it is written.

Steps 1, 2, 4, 8 ... are measured, and every `every`-th. In a measured step each module tells what it makes, and calls
of attention, activations, dropout and cross entropy are listened to. In some of them the forward is done again with
one input's rows exchanged among records, or its tokens reordered: so it is seen what answer and loss hang on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from dougong.core.config import Config
from dougong.engine.flow.inputs import inputs_told, named_inputs
from dougong.engine.flow.outputs import answer_of
from dougong.engine.flow.places import modalities_of, places_of
from dougong.engine.flow.probes import undisturbed
from dougong.engine.flow.step import FlowMeasured, LossOf, StepMeter, Subject
from dougong.engine.step import TermsOf


class FlowConfig(Config):
    """When to measure. A measured step takes about twice as long as any other."""

    every: int = Field(default=200, gt=0)
    """Steps; those that are powers of 2 are measured besides."""

    probe_every: int = Field(default=1600, gt=0)
    """Steps after which the forward is also done again with inputs exchanged; powers of 4 besides."""


class FlowMeter:
    """Call `step` after each optimizer step, `close` at the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: FlowConfig | None = None,
        *,
        steps: int = 0,
        loss_of: LossOf | None = None,
        terms_of: TermsOf | None = None,
    ) -> None:
        """`steps` have been taken before. `terms_of` are what the loss of a batch of ours is the sum of."""
        self.model, self.config = model, config or FlowConfig()
        self.subject = Subject(model, optimizer, places_of(model), modalities_of(model), loss_of, terms_of)
        self.steps = steps
        self.forwards_begun = self.forwards_ended = 0
        self._measuring: StepMeter | None = None
        self._wanted = False
        self._began: dict[str, Any] | None = None
        """Where a number that is not finite was first made, in a step that was not measured, until it is told."""

        self._bad_inputs: dict[str, dict[str, float]] = {}
        """How much of that step's inputs was not finite before anything was made of them."""

        self._judged: dict[str, dict[str, float]] = {}
        self._judging: dict[str, float] = {}
        self._last_rows: dict[str, set[int]] = {}
        self.last_given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """What the last forward was given, for whoever has to say why it failed."""

        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def close(self) -> None:
        """Take every hook away."""
        if self._measuring is not None:
            self._measuring.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def due(self, step: int) -> bool:
        """Whether the step that follows `step` steps is measured."""
        number = step + 1
        return self._wanted or number & (number - 1) == 0 or number % self.config.every == 0

    def _probed(self, step: int) -> bool:
        number = step + 1
        power = number & (number - 1) == 0 and number.bit_length() % 2 == 1
        return power or number % self.config.probe_every == 0

    def step(self, loss: float) -> FlowMeasured | None:
        """After an optimizer step, or one that was skipped: what was measured in it, if anything."""
        measuring, self._measuring = self._measuring, None
        self.steps += 1
        # Where a number is not finite, the next step is looked at, whatever its number.
        broken = not math.isfinite(loss)
        self._wanted = broken and (measuring is None or measuring.first_not_finite is None)
        if measuring is None:
            return None
        measured = measuring.finish(self.steps, loss)
        began, self._began = self._began, None
        bad, self._bad_inputs = self._bad_inputs, {}
        judged, self._judged = self._judged, {}
        inputs = {
            name: {**told, **bad.get(name, {}), **self._seen(name, measuring)} for name, told in measured.inputs.items()
        }
        return replace(
            measured,
            inputs={**inputs, **judged},
            first_not_finite=began or measured.first_not_finite,
            facts={**measured.facts, **{f"judged_{key}": value for key, value in self._judging.items()}},
        )

    def _seen(self, name: str, measuring: StepMeter) -> dict[str, float]:
        """How many of an input's rows differ, and how many of them the last measured step had too."""
        rows = measuring.rows.get(name)
        if not rows:
            return {}
        distinct, last = set(rows), self._last_rows.get(name)
        self._last_rows[name] = distinct
        return {
            "distinct": len(distinct) / len(rows),
            "seen_before": len(distinct & last) / len(distinct) if last else 0.0,
        }

    # Hooks ------------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.forwards_begun += 1
            self.last_given = (args, kwargs)
            if self._measuring is None and self.due(self.steps):
                self._measuring = StepMeter(self.subject, args, kwargs, self._probed(self.steps))
        elif self._measuring is None or not self._measuring.listening:
            # Judging: what goes in should look as in training, and no unit be dropped.
            self._judging["training"] = float(model.training)
            if not self._judged:
                told = inputs_told(named_inputs(model, args, kwargs))
                self._judged = {f"judged {name}": each for name, each in told.items()}

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.forwards_ended += 1
            if self._measuring is None and self._began is None:
                self._look_for_beginning(model, args, kwargs, output)
            if self._measuring is not None and self._measuring.output is None:
                self._measuring.forward_done(output)

    def _look_for_beginning(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """An answer that is not finite is asked for once more, before any weight has met it."""
        answer = answer_of(output)
        if answer is None or bool(answer.detach().isfinite().all()):
            return
        with torch.no_grad(), undisturbed(model):
            looking = StepMeter(self.subject, args, kwargs, probed=False)
            try:
                model(*args, **kwargs)
            finally:
                looking.stop()
        self._began = looking.first_not_finite or {"module": "", "kind": "", "rows": []}
        told = inputs_told(named_inputs(model, args, kwargs))
        shares = {name: each.get("not_finite", 0.0) for name, each in told.items()}
        self._bad_inputs = {name: {"not_finite": share} for name, share in shares.items() if share}
        self._wanted = True

    def _before_update(self, *_: Any) -> None:
        if self._measuring is not None:
            self._measuring.before_update()

    def _after_update(self, *_: Any) -> None:
        if self._measuring is not None:
            self._measuring.after_update()
