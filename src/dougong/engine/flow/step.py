"""One step of training, measured from the beginning of its forward to its update.

Here        StepMeter; Subject (what is measured), FlowMeasured, the event of a step.
Elsewhere   which steps (meter.py); calls between modules (calls.py); inputs, outputs, probes and conflicts beside this
            file.
Promise     that of meter.py: no number of training is changed. Everything is unhooked before the update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from dougong.core.events import Event
from dougong.engine.flow.calls import Calls, Heard
from dougong.engine.flow.conflict import conflicts_told
from dougong.engine.flow.inputs import SMALL, follows, inputs_told, named_inputs, rows_of
from dougong.engine.flow.outputs import output_told, targets_told, tensors_of
from dougong.engine.flow.places import SHARED, Place, sides_of
from dougong.engine.flow.probes import probe_inputs
from dougong.engine.precision.exponents import LOWEST, counted
from dougong.engine.step import TermsOf


@dataclass(frozen=True, kw_only=True)
class FlowMeasured(Event):
    """One step from within."""

    places: list[dict[str, Any]]
    """Of each module with weights: name, modality, kind, how many, weight, gradient and update norms, whether trained
    and whether the optimizer holds it."""

    activations: dict[str, dict[str, float]]
    """Of what each module makes: spread, largest, dead (share of units that are 0 for every record and token)."""

    attention: list[dict[str, Any]]
    """Of each call: where, its scale over 1/sqrt(width), entropy as a share of the most, mass above the diagonal, mass
    on what the mask forbids, and whether a mask was given."""

    inputs: dict[str, dict[str, float]]
    """Of each input, in training; those seen while judging have `judged ` before their names."""

    output: dict[str, float]
    targets: dict[str, Any]
    gate: dict[str, float]
    loss_terms: list[dict[str, Any]]
    """Of each call of cross entropy or the like."""

    dropout: dict[str, float]
    optimizer: dict[str, float]
    probes: dict[str, dict[str, float]]
    """Of each input: how far the answer moves (share of its spread), and the loss, where its rows are exchanged, or
    its tokens reordered."""

    conflicts: list[dict[str, Any]]
    """Of each pair of modalities, and of each pair of the loss's terms, that ask something of shared weights: `of`,
    `one`, `other`, the cosine of what they ask, and how long each gradient is."""

    exponents: dict[str, dict[str, dict[str, Any]]]
    """Of activations, gradients and weights, by modality or `shared`: how many numbers have each exponent of 2
    (`counts`, from `lowest`), how many are `zeros` and how many `not_finite`, of a sample. Like probes and conflicts,
    of some of the measured steps."""

    first_not_finite: dict[str, Any] | None
    """The module whose output first held a number that is not finite, and the records' places in the batch."""

    facts: dict[str, float]
    """Single figures: gradient norm, agreement of gradient and update, share of a gradient that is left from before."""

    seconds: float
    """What measuring took, besides listening."""


LossOf = Callable[[Any, Any], Tensor]
"""From a network's output and its first argument to the loss."""


class Subject(NamedTuple):
    """What is measured."""

    model: nn.Module
    optimizer: Optimizer
    places: list[Place]
    modality_of: Mapping[nn.Parameter, str]
    loss_of: LossOf | None
    """None: the loss of another output to the same records is made like the one that was heard, where it can be."""

    terms_of: TermsOf | None
    """What the loss is the sum of."""


@dataclass
class StepMeter:
    """Hooks a network until its update, and says what was seen."""

    subject: Subject
    args: tuple[Any, ...]
    """What the forward is given."""

    kwargs: dict[str, Any]
    probed: bool
    """Whether to ask the network again as well, and count exponents, which takes as long as some steps."""

    output: Any = None
    first_not_finite: dict[str, Any] | None = None
    gate: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    gradients: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.heard = Heard(self.subject.model)
        self._handles: list[Any] = []
        self._before: list[Tensor] = []
        self._fresh: dict[int, Tensor] = {}
        self._backwards = 0
        self._exponents: dict[tuple[str, str], Tensor] = {}
        self._sides = sides_of(self.subject.model, self.subject.modality_of) if self.probed else {}
        with torch.no_grad():
            given = named_inputs(self.subject.model, self.args, self.kwargs)
            self.inputs = inputs_told(given)
            self.rows = rows_of(given)
        for name, module in self.subject.model.named_modules():
            if not name:
                continue
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave(name)))
        self._follow_one_gradient()
        self._calls: Calls | None = Calls(self.heard)
        self._calls.__enter__()  # type: ignore[no-untyped-call]  # torch ships it without types

    @property
    def listening(self) -> bool:
        """Whether the network is hooked still."""
        return self._calls is not None

    # Forward and loss -------------------------------------------------------------------------------------------

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, __: Any) -> None:
            self.heard.stack.append(name)

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, _: Any, output: Any) -> None:
            if self.heard.stack:
                self.heard.stack.pop()
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._see(name, module, output)

        return leave

    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        weight_BM = getattr(output, "weight_BM", None)
        if isinstance(weight_BM, Tensor) and hasattr(output, "fused_BD") and not hasattr(output, "output_BC"):
            self._see_gate(weight_BM)
        for tensor in tensors_of(output):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            spread = _spread(tensor) if next(module.children(), None) is None else None
            if self.first_not_finite is None and not _all_finite(tensor, spread):
                rows = tensor.flatten(1).isfinite().all(dim=1) if tensor.ndim > 1 else tensor.isfinite()
                bad = (~rows).nonzero()[:, 0][:8].tolist() if rows.ndim else []
                self.first_not_finite = {"module": name, "kind": type(module).__name__, "rows": bad}
            if spread is not None:  # what holds others is told of by them
                self.heard.activations[name] = spread
                if self.probed:
                    self._count("activations", self._sides[name], tensor)
            return

    def _see_gate(self, weight_BM: Tensor) -> None:
        names = list(getattr(self.subject.model, "names", range(weight_BM.shape[1])))
        for place, name in enumerate(names):
            self.gate[f"mean {name}"] = float(weight_BM[:, place].mean())
        self.gate["spread"] = float(weight_BM.std(dim=0).mean()) if len(weight_BM) > 1 else 0.0
        self.gate["saturated"] = float((weight_BM.max(dim=1).values > 0.99).float().mean())

    def _count(self, what: str, side: str, tensor: Tensor) -> None:
        found = counted(tensor).cpu()
        before = self._exponents.get((what, side))
        self._exponents[what, side] = found if before is None else before + found

    def _follow_one_gradient(self) -> None:
        """Of the smallest trained matrix, to see whether what the optimizer is given is this step's alone."""
        trained = [p for place in self.subject.places for p in place.parameters if p.requires_grad and p.ndim > 1]
        if not trained:
            return
        followed = min(trained, key=lambda p: p.numel())

        def fresh(gradient: Tensor) -> None:
            self._backwards += 1
            self._fresh[id(followed)] = gradient.detach().clone()

        self._followed = followed
        self._handles.append(followed.register_hook(fresh))  # type: ignore[no-untyped-call]  # torch ships it without types

    def forward_done(self, output: Any) -> None:
        """The loss is still to come, and is listened to."""
        self.output = output
        self.heard.stack.clear()

    def stop(self) -> None:
        """Nothing is hooked any more."""
        if self._calls is not None:
            self._calls.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch ships it without types
            self._calls = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Update -----------------------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """Gradients are there, and weights as they were."""
        started = time.perf_counter()
        self.stop()
        parameters = [p for place in self.subject.places for p in place.parameters]
        self.gradients = _norms([torch.zeros(()) if p.grad is None else p.grad for p in parameters])
        self.weights = _norms([p.detach() for p in parameters])
        self.spreads = [_spread_of(place) for place in self.subject.places]
        self._before = [p.detach().clone() for p in parameters]
        self._descent = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
        self.facts["gradient_norm"] = _together(self.gradients)
        self._see_leftover()
        for parameter in parameters if self.probed else ():
            side = self.subject.modality_of.get(parameter, SHARED)
            self._count("weights", side, parameter)
            if parameter.grad is not None:
                self._count("gradients", side, parameter.grad)
        self.seconds += time.perf_counter() - started

    def _see_leftover(self) -> None:
        if self._backwards != 1 or self._followed.grad is None:
            return
        fresh, whole = self._fresh[id(self._followed)].flatten(), self._followed.grad.flatten()
        if float(fresh.norm()) > SMALL and float(whole.norm()) > SMALL:
            # Clipping shortens a gradient, and does not turn it. In double: squares of small ones are soon nought.
            fresh, whole = fresh.double() / fresh.double().norm(), whole.double() / whole.double().norm()
            self.facts["gradient_is_fresh"] = float(fresh @ whole)

    def after_update(self) -> None:
        """The step was taken."""
        parameters = [p for place in self.subject.places for p in place.parameters]
        moved = [p.detach() - before for p, before in zip(parameters, self._before, strict=True)]
        self.updates = _norms(moved)
        pairs = [(move, g) for move, g in zip(moved, self._descent, strict=True) if g is not None]
        if pairs and self.facts.get("gradient_norm", 0.0) > SMALL:
            agree = -sum(float((move * gradient).sum()) for move, gradient in pairs)
            self.facts["downhill"] = agree / max(_together(self.updates) * self.facts["gradient_norm"], SMALL)
        self._before, self._descent = [], []

    # What was seen ----------------------------------------------------------------------------------------------

    def finish(self, step: int, loss: float) -> FlowMeasured:
        """All of it; what asks the network again is carried out now, on the stepped weights."""
        started = time.perf_counter()
        self.stop()
        probes: dict[str, dict[str, float]] = {}
        conflicts: list[dict[str, Any]] = []
        if self.probed and self.output is not None and math.isfinite(loss):
            probes = probe_inputs(self.subject.model, self.args, self.kwargs, self._loss)
            if self.subject.terms_of is not None:
                conflicts = conflicts_told(self.subject.model, self.args[0], self.subject.terms_of)
        heard = self.heard
        return FlowMeasured(
            step=step,
            places=self._places(),
            activations=heard.activations,
            attention=heard.attention,
            inputs=self.inputs,
            output=output_told(self.output, heard.loss_inputs),
            targets={**targets_told(heard.loss_inputs), **self._follows()},
            gate=self.gate,
            loss_terms=heard.loss_terms,
            dropout=heard.dropout,
            optimizer={key: float(value) for key, value in _settings(self.subject.optimizer.param_groups[0])},
            probes=probes,
            conflicts=conflicts,
            exponents=self._exponents_told(),
            first_not_finite=self.first_not_finite,
            facts={**self.facts, "loss": loss},
            seconds=self.seconds + time.perf_counter() - started,
        )

    def _follows(self) -> dict[str, float]:
        given = named_inputs(self.subject.model, self.args, self.kwargs).values()
        return follows(given, self.heard.loss_inputs[0][1]) if self.heard.loss_inputs else {}

    def _exponents_told(self) -> dict[str, dict[str, dict[str, Any]]]:
        told: dict[str, dict[str, dict[str, Any]]] = {}
        for (what, side), counts in self._exponents.items():
            *bins, zeros, not_finite = (int(count) for count in counts.tolist())
            places = [place for place, count in enumerate(bins) if count]
            first, last = (places[0], places[-1]) if places else (0, -1)
            told.setdefault(what, {})[side] = {
                "lowest": LOWEST + first,
                "counts": bins[first : last + 1],
                "zeros": zeros,
                "not_finite": not_finite,
            }
        return told

    def _loss(self, output: Any) -> Tensor | None:
        """The loss of another output to the same records, where it can be told."""
        if self.subject.loss_of is not None:
            return self.subject.loss_of(output, self.args[0] if self.args else self.kwargs)
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        for logits, target in self.heard.loss_inputs:
            for tensor in tensors_of(output):
                if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[-1] != logits.shape[-1]:
                    continue
                if tensor.ndim == 3 and len(tensor) * (tensor.shape[1] - 1) == target.numel():
                    tensor = tensor[:, :-1]  # the last token's next one is not known
                if tensor.numel() == logits.numel():
                    return functional.cross_entropy(tensor.reshape(-1, tensor.shape[-1]), target.reshape(-1))
        return None

    def _places(self) -> list[dict[str, Any]]:
        held = {id(p) for group in self.subject.optimizer.param_groups for p in group["params"]}
        found, start = [], 0
        # Of a step that was skipped the weights are still as they were.
        spreads = self.spreads or [_spread_of(place) for place in self.subject.places]
        for place, spread in zip(self.subject.places, spreads, strict=True):
            end = start + len(place.parameters)
            largest = max(place.parameters, key=lambda p: p.numel())
            found.append(
                {
                    "name": place.name,
                    "modality": self.subject.modality_of.get(place.parameters[0], ""),
                    "kind": place.kind,
                    "count": sum(p.numel() for p in place.parameters),
                    "weight": _together(self.weights[start:end]),
                    "gradient": _together(self.gradients[start:end]),
                    "update": _together(self.updates[start:end]),
                    "spread": spread,
                    "dims": largest.ndim,
                    "fan_in": largest[0].numel() if largest.ndim > 1 else 0,
                    "bits": 8 * largest.element_size(),
                    "trained": all(p.requires_grad for p in place.parameters),
                    "held": all(id(p) in held for p in place.parameters),
                    "without_gradient": sum(p.grad is None for p in place.parameters),
                }
            )
            start = end
        return found


def _spread_of(place: Place) -> float:
    """Of the largest of its weights."""
    largest = max(place.parameters, key=lambda p: p.numel())
    return float(largest.detach().float().std()) if largest.numel() > 1 else 0.0


def _settings(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        if isinstance(value, bool | int | float) and key != "foreach":
            yield key, value
        elif key == "betas":
            yield from (("beta1", value[0]), ("beta2", value[1]))


def _spread(tensor: Tensor) -> dict[str, float]:
    flat = tensor.detach().float()
    least, most = flat.aminmax()
    return {"spread": float(flat.std(correction=0)), "largest": max(-float(least), float(most))}


def _all_finite(tensor: Tensor, spread: dict[str, float] | None) -> bool:
    """One pass that allocates nothing tells of nearly all; only a sum that is not finite leaves it open, since finite
    numbers can have that too."""
    told = float(tensor.sum()) if spread is None else spread["spread"]
    return math.isfinite(told) or bool(tensor.isfinite().all())


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors])
    found: list[float] = torch.stack(list(norms)).tolist()
    return found


def _together(norms: Sequence[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if norms else 0.0
