"""What flows through a network in training: gradients, updates, activations, attention, inputs and targets.

Here        FlowConfig, FlowMeter, which measures some steps of any network and optimizer; FlowMeasured, the event of
            it.
Elsewhere   drawing it (watch/gradient_flow.py); saying what is wrong (watch/diagnose/); the loop (engine/trainer.py).
Promise     measuring changes no number of training: weights, gradients, buffers and random states are as they would
            have been. Between measured steps nothing is hooked but the beginning and end of the network's forward. A
            network and its optimizer as they are suffice: nothing need be known of how it is written.

Steps 1, 2, 4, 8 ... are measured, and every `every`-th. In a measured step each module tells what it makes, and calls
of attention, activations, dropout and cross entropy are listened to. In some of them the forward is done again with
one input's rows exchanged among records, or its tokens reordered: so it is seen what answer and loss hang on.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dougong.core.config import Config
from dougong.core.events import Event
from dougong.engine.random_state import random_state_kept
from dougong.nn.batch import Batch

MOST_PLACES: Final = 400
"""Modules that are told of one by one; of more, neighbours are told of together."""

SMALL: Final = 1e-12
FEW_RECORDS: Final = 4
"""Of which attention is looked at."""


class FlowConfig(Config):
    """When to measure. A measured step takes about twice as long as any other."""

    every: int = Field(default=100, gt=0)
    """Steps; those that are powers of 2 are measured besides."""

    probe_every: int = Field(default=400, gt=0)
    """Steps after which the forward is also done again with inputs exchanged; powers of 4 besides."""


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

    first_not_finite: dict[str, Any] | None
    """The module whose output first held a number that is not finite, and the records' places in the batch."""

    facts: dict[str, float]
    """Single figures: gradient norm, agreement of gradient and update, share of a gradient that is left from before."""

    seconds: float
    """What measuring took, besides listening."""


LossOf = Callable[[Any, Any], Tensor]
"""From a network's output and its first argument to the loss."""


class FlowMeter:
    """Measures while somebody else trains. Call `step` after each optimizer step, `close` at the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: FlowConfig | None = None,
        *,
        steps: int = 0,
        loss_of: LossOf | None = None,
        modality_of: Mapping[nn.Parameter, str] | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config or FlowConfig()
        self.loss_of = loss_of
        self.modality_of = modality_of if modality_of is not None else _modalities(model)
        self.steps = steps
        self.forwards_begun = self.forwards_ended = 0
        self.places = _places(model)
        self._measuring: _Measuring | None = None
        self._wanted = False
        self._began: dict[str, Any] | None = None
        """Where a number that is not finite was first made, in a step that was not measured."""

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
        step, measuring = self.steps, self._measuring
        self.steps += 1
        # Where a number is not finite, the next step is looked at, whatever its number.
        broken = not math.isfinite(loss)
        self._wanted = broken and (measuring is None or measuring.first_not_finite is None)
        if measuring is None:
            return None
        self._measuring = None
        return measuring.finish(step + 1, loss, self._probed(step))

    # Hooks ------------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.forwards_begun += 1
            self.last_given = (args, kwargs)
            if self._measuring is None and self.due(self.steps):
                self._measuring = _Measuring(self, args, kwargs)
        elif self._measuring is None or not self._measuring.listening:
            # Judging: what goes in should look as in training, and no unit be dropped.
            self._judging["training"] = float(model.training)
            if not self._judged:
                told = _inputs_told(named_inputs(model, args, kwargs))
                self._judged = {f"judged {name}": each for name, each in told.items()}

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.forwards_ended += 1
            if self._measuring is None and self._began is None:
                self._look_for_beginning(model, args, kwargs, output)
            if self._measuring is not None and self._measuring.output is None:
                self._measuring.output = output
                self._measuring.forward_done()

    def _look_for_beginning(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """An answer that is not finite is asked for once more, before any weight has met it."""
        answer = _answer(output)
        if answer is None or bool(answer.detach().isfinite().all()):
            return
        with torch.no_grad(), random_state_kept(), _buffers_kept(model), _unhooked(model):
            looking = _Measuring(self, args, kwargs)
            try:
                model(*args, **kwargs)
            finally:
                looking.stop()
        self._began = looking.first_not_finite or {"module": "", "kind": "", "rows": []}
        self._wanted = True

    def _before_update(self, *_: Any) -> None:
        if self._measuring is not None:
            self._measuring.before_update()

    def _after_update(self, *_: Any) -> None:
        if self._measuring is not None:
            self._measuring.after_update()


class _Place(NamedTuple):
    name: str
    kind: str
    parameters: list[nn.Parameter]


def _places(model: nn.Module) -> list[_Place]:
    """Modules that hold weights themselves; of very many, those around them."""
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    found = [_Place(name, type(module).__name__, list(module.parameters(recurse=False))) for name, module in owners]
    depth = max((place.name.count(".") for place in found), default=0)
    while len(found) > MOST_PLACES and depth > 0:
        together: dict[str, list[nn.Parameter]] = {}
        for place in found:
            together.setdefault(".".join(place.name.split(".")[:depth]), []).extend(place.parameters)
        found = [_Place(name, "several", parameters) for name, parameters in together.items()]
        depth -= 1
    return found


def _modalities(model: nn.Module) -> dict[nn.Parameter, str]:
    """Whose own each parameter is, where the network says so."""
    parts = getattr(model, "parts", None)
    if not callable(parts):
        return {}
    return {parameter: name for name, parameters in parts().items() for parameter in parameters}


# One step ------------------------------------------------------------------------------------------------------------


@dataclass
class _Measuring:
    """One measured step, from the beginning of its forward to its update."""

    meter: FlowMeter
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    listening: bool = False
    first_not_finite: dict[str, Any] | None = None
    stack: list[str] = field(default_factory=list)
    activations: dict[str, dict[str, float]] = field(default_factory=dict)
    attention: list[dict[str, Any]] = field(default_factory=list)
    loss_terms: list[dict[str, Any]] = field(default_factory=list)
    loss_inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dropout: dict[str, float] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    gradients: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._handles: list[Any] = []
        self._before: list[Tensor] = []
        self._fresh: dict[int, Tensor] = {}
        self._backwards = 0
        self._mode: _Listening | None = None
        with torch.no_grad():
            self.inputs = _inputs_told(named_inputs(self.meter.model, self.args, self.kwargs))
            self.rows = _rows_of(named_inputs(self.meter.model, self.args, self.kwargs))
        for name, module in self.meter.model.named_modules():
            if not name:
                continue
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave(name)))
        self._follow_one_gradient()
        self._mode = _Listening(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch ships it without types
        self.listening = True

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, __: Any) -> None:
            self.stack.append(name)

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, _: Any, output: Any) -> None:
            if self.stack:
                self.stack.pop()
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._see(name, module, output)

        return leave

    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        weight_BM = getattr(output, "weight_BM", None)
        if isinstance(weight_BM, Tensor) and hasattr(output, "fused_BD") and not hasattr(output, "output_BC"):
            self._see_gate(weight_BM)
        for tensor in _tensors(output):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if self.first_not_finite is None and not bool(tensor.isfinite().all()):
                rows = tensor.flatten(1).isfinite().all(dim=1) if tensor.ndim > 1 else tensor.isfinite()
                bad = (~rows).nonzero()[:, 0][:8].tolist() if rows.ndim else []
                self.first_not_finite = {"module": name, "kind": type(module).__name__, "rows": bad}
            if next(module.children(), None) is None:  # what holds others is told of by them
                self.activations[name] = _spread(tensor)
            return

    def _see_gate(self, weight_BM: Tensor) -> None:
        names = list(getattr(self.meter.model, "names", range(weight_BM.shape[1])))
        for place, name in enumerate(names):
            self.gate[f"mean {name}"] = float(weight_BM[:, place].mean())
        self.gate["spread"] = float(weight_BM.std(dim=0).mean()) if len(weight_BM) > 1 else 0.0
        self.gate["saturated"] = float((weight_BM.max(dim=1).values > 0.99).float().mean())

    def _follow_one_gradient(self) -> None:
        """Of the smallest trained matrix, to see whether what the optimizer is given is this step's alone."""
        trained = [p for place in self.meter.places for p in place.parameters if p.requires_grad and p.ndim > 1]
        if not trained:
            return
        followed = min(trained, key=lambda p: p.numel())

        def fresh(gradient: Tensor) -> None:
            self._backwards += 1
            self._fresh[id(followed)] = gradient.detach().clone()

        self._followed = followed
        self._handles.append(followed.register_hook(fresh))  # type: ignore[no-untyped-call]  # torch ships it without types

    def forward_done(self) -> None:
        """The output is there; the loss is still to come, and is listened to."""
        self.stack.clear()

    def holders(self) -> list[str]:
        """The kinds of modules that are being called, the outermost first."""
        return [type(self.meter.model.get_submodule(name)).__name__ for name in self.stack]

    def stop(self) -> None:
        """Nothing is hooked any more."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch ships it without types
            self._mode = None
        self.listening = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_update(self) -> None:
        """Gradients are there, and weights as they were."""
        started = time.perf_counter()
        self._before_update()
        self.seconds += time.perf_counter() - started

    def _before_update(self) -> None:
        self.stop()
        parameters = [p for place in self.meter.places for p in place.parameters]
        self.gradients = _norms([torch.zeros(()) if p.grad is None else p.grad for p in parameters])
        self.weights = _norms([p.detach() for p in parameters])
        self.spreads = [_spread_of(place) for place in self.meter.places]
        self._before = [p.detach().clone() for p in parameters]
        self.facts["gradient_norm"] = math.sqrt(math.fsum(norm * norm for norm in self.gradients))
        self._see_leftover()
        self._see_target_of_update(parameters)

    def _see_leftover(self) -> None:
        if self._backwards != 1 or self._followed.grad is None:
            return
        fresh, whole = self._fresh[id(self._followed)].flatten(), self._followed.grad.flatten()
        if float(fresh.norm()) > SMALL and float(whole.norm()) > SMALL:
            # Clipping shortens a gradient, and does not turn it. In double: squares of small ones are soon nought.
            fresh, whole = fresh.double() / fresh.double().norm(), whole.double() / whole.double().norm()
            self.facts["gradient_is_fresh"] = float(fresh @ whole)

    def _see_target_of_update(self, parameters: Sequence[nn.Parameter]) -> None:
        self._descent = [None if p.grad is None else p.grad.detach().clone() for p in parameters]

    def after_update(self) -> None:
        """The step was taken."""
        parameters = [p for place in self.meter.places for p in place.parameters]
        moved = [p.detach() - before for p, before in zip(parameters, self._before, strict=True)]
        self.updates = _norms(moved)
        agree = norm = 0.0
        for move, gradient in zip(moved, self._descent, strict=True):
            if gradient is not None:
                agree -= float((move * gradient).sum())
                norm += 1.0
        if norm and self.facts.get("gradient_norm", 0.0) > SMALL:
            length = math.sqrt(math.fsum(update * update for update in self.updates))
            self.facts["downhill"] = agree / max(length * self.facts["gradient_norm"], SMALL)
        self._before, self._descent = [], []

    def finish(self, step: int, loss: float, probed: bool) -> FlowMeasured:
        """All that was seen; probes are carried out now, on the stepped weights."""
        started = time.perf_counter()
        self.stop()
        probes: dict[str, dict[str, float]] = {}
        if probed and self.output is not None and math.isfinite(loss):
            probes = probe_inputs(self.meter.model, self.args, self.kwargs, self._loss)
        rows, last = self.rows, self.meter._last_rows
        for name, own in rows.items():
            if name in self.inputs and own:
                distinct = set(own)
                self.inputs[name]["distinct"] = len(distinct) / len(own)
                seen = last.get(name)
                self.inputs[name]["seen_before"] = len(distinct & seen) / len(distinct) if seen else 0.0
                last[name] = distinct
        judged, self.meter._judged = self.meter._judged, {}
        facts = {**self.facts, "loss": loss, **{f"judged_{k}": v for k, v in self.meter._judging.items()}}
        group = self.meter.optimizer.param_groups[0]
        return FlowMeasured(
            step=step,
            places=self._places(),
            activations=self.activations,
            attention=self.attention,
            inputs={**self.inputs, **judged},
            output=_output_told(self.output, self.loss_inputs),
            targets={**_targets_told(self.loss_inputs), **self._follows()},
            gate=self.gate,
            loss_terms=self.loss_terms,
            dropout=self.dropout,
            optimizer={key: float(value) for key, value in _settings(group)},
            probes=probes,
            first_not_finite=self.meter._began or self.first_not_finite,
            facts=facts,
            seconds=self.seconds + time.perf_counter() - started,
        )

    def _follows(self) -> dict[str, float]:
        """Whether targets are an input's own next tokens, or the very same ones."""
        found: dict[str, float] = {}
        for _, target in self.loss_inputs[:1]:
            for one in named_inputs(self.meter.model, self.args, self.kwargs).values():
                ids = one.value
                if ids.ndim != 2 or ids.is_floating_point() or target.is_floating_point() or ids.shape[1] < 3:
                    continue
                rows, length = len(ids), target.numel() // max(1, len(ids))
                if target.numel() != rows * length or length not in (ids.shape[1], ids.shape[1] - 1):
                    continue
                wanted = target.reshape(rows, length)
                known = wanted >= 0
                known_next = known[:, : ids.shape[1] - 1]
                if bool(known_next.any()):
                    following = wanted[:, : ids.shape[1] - 1] == ids[:, 1:]
                    found["next"] = float(following[known_next].float().mean())
                    found["same"] = float((wanted == ids[:, :length])[known].float().mean())
        return found

    def _loss(self, output: Any) -> Tensor | None:
        """The loss of another output to the same records, where it can be told."""
        if self.meter.loss_of is not None:
            return self.meter.loss_of(output, self.args[0] if self.args else self.kwargs)
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        for logits, target in self.loss_inputs:
            for tensor in _tensors(output):
                if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[-1] != logits.shape[-1]:
                    continue
                if tensor.ndim == 3 and len(tensor) * (tensor.shape[1] - 1) == target.numel():
                    tensor = tensor[:, :-1]  # the last token's next one is not known
                if tensor.numel() == logits.numel():
                    return functional.cross_entropy(tensor.reshape(-1, tensor.shape[-1]), target.reshape(-1))
        return None

    def _places(self) -> list[dict[str, Any]]:
        held = {id(p) for group in self.meter.optimizer.param_groups for p in group["params"]}
        found, start = [], 0
        # Of a step that was skipped the weights are still as they were.
        spreads = self.spreads or [_spread_of(place) for place in self.meter.places]
        for place, spread in zip(self.meter.places, spreads, strict=True):
            end = start + len(place.parameters)
            largest = max(place.parameters, key=lambda p: p.numel())
            found.append(
                {
                    "name": place.name,
                    "modality": self.meter.modality_of.get(place.parameters[0], ""),
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


def _spread_of(place: _Place) -> float:
    """Of the largest of its weights."""
    largest = max(place.parameters, key=lambda p: p.numel())
    return float(largest.detach().float().std()) if largest.numel() > 1 else 0.0


def _settings(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        if isinstance(value, bool | int | float) and key != "foreach":
            yield key, value
        elif key == "betas":
            yield from (("beta1", value[0]), ("beta2", value[1]))


class _Listening(TorchFunctionMode):
    """Hears calls that say what a network does, and carries them out as they are."""

    def __init__(self, measuring: _Measuring) -> None:
        super().__init__()
        self._to = measuring

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hear = _HEARD.get(func)
        if hear is None:
            return func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._within(func, args, kwargs)
        output = func(*args, **kwargs)
        with torch.no_grad():
            hear(self._to, func, args, kwargs, output)
        return output

    def _within(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch's own attention layer calls fused attention where a mode no longer hears it."""
        fused = functional.scaled_dot_product_attention

        def heard(*given: Any, **named: Any) -> Any:
            output = fused(*given, **named)
            with torch.no_grad():
                _hear_attention(self._to, fused, given, named, output)
            return output

        functional.scaled_dot_product_attention = heard
        try:
            return func(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = fused


def _hear_attention(to: _Measuring, _: Any, args: Any, kwargs: Any, __: Any) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key = given["query"][:FEW_RECORDS].float(), given["key"][:FEW_RECORDS].float()
    if query.ndim != 4 or not query.numel() or not key.numel():
        return
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    usual = query.shape[-1] ** -0.5
    scale = usual if given.get("scale") is None else float(given["scale"])
    score = query @ key.transpose(-1, -2) * scale
    mask = given.get("attn_mask")
    allowed: Tensor | None = None
    if isinstance(mask, Tensor):
        mask = mask[:FEW_RECORDS] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        score = score.masked_fill(~allowed, -1e30) if mask.dtype == torch.bool else score + mask
    if given.get("is_causal"):
        allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        score = score.masked_fill(~allowed, -1e30)
    weight = score.softmax(dim=-1)
    reach = weight.shape[-1] if allowed is None else allowed.expand_as(weight).sum(dim=-1).clamp(min=1)
    most = torch.as_tensor(reach, dtype=torch.float32).log()
    entropy = -(weight * weight.clamp(min=1e-30).log()).sum(dim=-1)
    told: dict[str, Any] = {
        "place": to.stack[-1] if to.stack else "",
        "holders": to.holders(),
        "scale_ratio": scale / usual,
        "entropy": float((entropy / most.clamp(min=0.1)).clamp(max=1).mean()),
        "score_spread": float((query @ key.transpose(-1, -2) * scale).std()),
        "has_mask": allowed is not None,
        "forbidden": 0.0 if allowed is None else 1 - float(allowed.float().mean()),
        "num_keys": weight.shape[-1],
        "num_queries": weight.shape[-2],
    }
    if query.shape[-2] == key.shape[-2] and query.shape[-2] > 1:
        told["ahead"] = float(weight.triu(1).sum(dim=-1).mean())
    to.attention.append(told)


def _hear_activation(to: _Measuring, func: Any, _: Any, __: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.numel():
        return
    name = getattr(func, "__name__", "activation")
    flat = output.detach().flatten(0, -2) if output.ndim != 4 else output.detach().transpose(1, 3).flatten(0, 2)
    if name in ("sigmoid", "tanh"):
        low = 0.0 if name == "sigmoid" else -1.0
        edge = ((flat - low).abs() < 0.01 * (1 - low)) | ((1 - flat).abs() < 0.01 * (1 - low))
        told = {"saturated": float(edge.float().mean())}
    else:
        told = {
            "dead": float((flat.abs() < 1e-6).all(dim=0).float().mean()),
            "zero": float((flat.abs() < 1e-6).float().mean()),
        }
    told["spread"] = float(flat.float().std())
    place = to.stack[-1] if to.stack else ""
    to.activations[f"{place}:{name}"] = told


def _hear_softmax(to: _Measuring, _: Any, args: Any, kwargs: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 4:
        return
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else -1)
    place = to.stack[-1] if to.stack else ""
    to.attention.append({"place": place, "softmax_dim": int(dim) % 4 - 4, "num_keys": output.shape[-1]})


def _hear_loss(to: _Measuring, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return
    given, target = args[0].detach(), args[1].detach()
    told: dict[str, Any] = {"function": getattr(func, "__name__", "loss"), "inside": bool(to.stack)}
    if given.ndim >= 2 and given.shape[-1] > 1:
        rows = given.float()
        told["rows_sum_to_one"] = bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((rows >= 0).all())
        told["spread"] = float(rows.std())
    told["label_smoothing"] = float(kwargs.get("label_smoothing", 0.0))
    told["ignored"] = 0.0
    if not target.is_floating_point() and target.numel():
        told["ignored"] = float((target == kwargs.get("ignore_index", -100)).float().mean())
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    if isinstance(weight, Tensor):
        told["classes_without_weight"] = float((weight == 0).float().mean())
    value = output.detach().float().mean() if isinstance(output, Tensor) else torch.zeros(())
    told["value"] = float(value)
    to.loss_terms.append(told)
    if told["function"] in ("cross_entropy", "nll_loss"):
        # What is computed outside of all modules is what is learnt from; inside there may be another one besides.
        to.loss_inputs.insert(len(to.loss_inputs) if to.stack else 0, (given, target))


def _hear_dropout(to: _Measuring, func: Any, args: Any, kwargs: Any, _: Any) -> None:
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    place = to.stack[-1] if to.stack else ""
    to.dropout[place] = max(float(share) if training else 0.0, to.dropout.get(place, 0.0))


_HEARD: Final[dict[Any, Callable[..., None]]] = {
    functional.scaled_dot_product_attention: _hear_attention,
    **dict.fromkeys(
        (
            functional.relu, torch.relu, Tensor.relu, functional.gelu, functional.silu,
            functional.sigmoid, torch.sigmoid, Tensor.sigmoid, functional.tanh, torch.tanh, Tensor.tanh,
        ),
        _hear_activation,
    ),
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), _hear_softmax),
    **dict.fromkeys((functional.cross_entropy, functional.nll_loss, functional.mse_loss), _hear_loss),
    functional.dropout: _hear_dropout,
    functional.multi_head_attention_forward: _hear_dropout,  # never called: its own calls are heard
}  # fmt: skip


# Inputs --------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """One input of a network, of B records."""

    value: Tensor
    mask: Tensor | None = None
    """Which of its tokens are real."""

    present_B: Tensor | None = None


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Given]:
    """What a network is given, by name: modalities of our batches, keyword arguments, or the parameters' names."""
    if args and isinstance(args[0], Batch):
        found = {}
        for name, media in args[0].media.items():
            mask = media.values.get("mask_UT")
            value = next(v for key, v in media.values.items() if key != "mask_UT")
            found[name] = Given(value, mask, media.present_B)
        return found
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    flat: dict[str, Tensor] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif isinstance(value, Mapping):
            flat.update({str(key): each for key, each in value.items() if isinstance(each, Tensor)})
    masks = {name: value for name, value in flat.items() if "mask" in name and value.ndim >= 2}
    found = {}
    for name, value in flat.items():
        if name in masks or name in ("labels", "label", "targets", "target") or value.ndim < 1:
            continue
        mask = next((m for m in masks.values() if value.ndim >= 2 and m.shape == value.shape[: m.ndim]), None)
        found[name] = Given(value, None if mask is None else mask.bool())
    return found


def probe_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor | None]
) -> dict[str, dict[str, float]]:
    """How far answer and loss hang on each input: its rows exchanged among the records, its tokens reordered."""
    given = named_inputs(model, args, kwargs)
    modes = [(module, module.training) for module in model.modules()]
    found: dict[str, dict[str, float]] = {}
    model.eval()
    try:
        with torch.no_grad(), random_state_kept(), _buffers_kept(model), _unhooked(model):
            own = model(*args, **kwargs)
            own_loss, own_answer = loss(own), _answer(own)
            if own_answer is None:
                return {}
            usual = float((own_answer - own_answer.mean(dim=0)).abs().mean())
            for name, one in given.items():
                told: dict[str, float] = {"usual": usual}
                for what, changed in _changes(name, one, args, kwargs):
                    other = model(*changed[0], **changed[1])
                    answer, other_loss = _answer(other), loss(other)
                    if answer is not None and answer.shape == own_answer.shape:
                        told[f"{what}_moves"] = float((answer - own_answer).abs().mean()) / max(usual, 1e-6)
                    if own_loss is not None and other_loss is not None:
                        told[f"{what}_costs"] = float(other_loss - own_loss)
                        told["loss"] = float(own_loss)
                found[name] = told
    finally:
        for module, mode in modes:
            module.training = mode
    return found


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards as they were. One that nobody wrote to is not written to here either: a backward that is
    still to come may have saved it, as it does places of tokens."""
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, before in kept:
                if buffer._version != version:
                    buffer.copy_(before)


class _unhooked:  # noqa: N801, used like a function
    """A network whose own hooks are silent."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._kept = self._model._forward_pre_hooks, self._model._forward_hooks
        self._model._forward_pre_hooks, self._model._forward_hooks = type(self._kept[0])(), type(self._kept[1])()

    def __exit__(self, *_: object) -> None:
        self._model._forward_pre_hooks, self._model._forward_hooks = self._kept


Changed = tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]


def _changes(name: str, one: Given, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Changed]:
    num = args[0].num_records if args and isinstance(args[0], Batch) else len(one.value)
    if num < 2:
        return
    rolled = torch.arange(num).roll(max(1, num // 2))
    if args and isinstance(args[0], Batch):
        batch, media = args[0], args[0].media[name]
        exchanged = media._replace(index_B=media.index_B[rolled], present_B=media.present_B[rolled])
        yield "exchange", ((batch._replace(media={**batch.media, name: exchanged}), *args[1:]), dict(kwargs))
        reordered = _reordered(one.value, one.mask)
        if reordered is not None:
            key = next(k for k, v in media.values.items() if v is one.value)
            other = media._replace(values={**media.values, key: reordered})
            yield "reorder", ((batch._replace(media={**batch.media, name: other}), *args[1:]), dict(kwargs))
        return

    def put(value: Any) -> Any:
        if value is one.value:
            return replacement
        if isinstance(value, Mapping):
            return type(value)({key: put(each) for key, each in value.items()})  # type: ignore[call-arg]
        return value

    replacement = one.value[rolled.to(one.value.device)]
    yield "exchange", (tuple(put(each) for each in args), {key: put(each) for key, each in kwargs.items()})
    reordered = _reordered(one.value, one.mask)
    if reordered is not None:
        replacement = reordered
        yield "reorder", (tuple(put(each) for each in args), {key: put(each) for key, each in kwargs.items()})


def _reordered(value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Token ids of each row turned by half of the real ones; None for what is no sequence of ids."""
    if value.ndim != 2 or value.is_floating_point() or value.shape[1] < 4:
        return None
    lengths = torch.full((len(value),), value.shape[1]) if mask is None else mask.sum(dim=1).cpu()
    rows = [torch.cat([row[: int(n)].roll(int(n) // 2), row[int(n) :]]) for row, n in zip(value, lengths, strict=True)]
    return torch.stack(rows)


def _answer(output: Any) -> Tensor | None:
    for name in ("logits", "output_BC"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found.float()
    for tensor in _tensors(output):
        if tensor.is_floating_point() and tensor.ndim >= 1 and tensor.numel() > 1:
            return tensor.float()
    return None


def _inputs_told(given: Mapping[str, Given]) -> dict[str, dict[str, float]]:
    found = {}
    for name, one in given.items():
        told: dict[str, float] = {"rows": float(len(one.value))}
        if one.present_B is not None:
            told["present"] = float(one.present_B.float().mean())
        if one.mask is not None:
            told["masked"] = 1 - float(one.mask.float().mean())
            told["length"] = float(one.mask.shape[-1])
        if one.value.numel():
            value = one.value.detach()
            if value.is_floating_point():
                finite = value.isfinite()
                told["not_finite"] = 1 - float(finite.float().mean())
                kept = value[finite].float() if told["not_finite"] else value.float().flatten()
                if kept.numel():
                    told.update(
                        mean=float(kept.mean()), spread=float(kept.std(correction=0)), largest=float(kept.abs().max())
                    )
                if value.ndim == 4 and value.shape[1] <= 4:
                    for place, mean in enumerate(value.float().mean(dim=(0, 2, 3)).tolist()):
                        told[f"channel {place}"] = mean
                if value.ndim in (2, 3) and value.shape[-1] >= 16 and not told["not_finite"]:
                    told["pitch"] = _pitch(value.float())
            else:
                told.update(mean=float(value.float().mean()), spread=float(value.float().std(correction=0)))
                told["kinds"] = _kinds(value)
                if one.mask is not None and one.mask.shape == value.shape:
                    told["kinds_real"] = _kinds(value[one.mask])
                    told["kinds_hidden"] = _kinds(value[~one.mask])
            if len(value) > 1:
                same = (value == value[:1]).flatten(1).all(dim=1)
                told["all_alike"] = float(same.all())
        found[name] = told
    return found


def _kinds(value: Tensor) -> float:
    """How many values there are."""
    return float(torch.unique(value).numel())


def _pitch(value: Tensor) -> float:
    """The middle of the spectrum along the last axis, from 0 to 1: a wrong rate moves it."""
    power = torch.fft.rfft(value - value.mean(dim=-1, keepdim=True)).abs().square()
    place = torch.linspace(0, 1, power.shape[-1], device=power.device)
    return float((power * place).sum() / power.sum().clamp(min=SMALL))


def _rows_of(given: Mapping[str, Given]) -> dict[str, list[int]]:
    """A number of each row's content."""
    found = {}
    for name, one in given.items():
        if one.value.ndim < 1 or not one.value.numel():
            continue
        flat = one.value.detach().flatten(1) if one.value.ndim > 1 else one.value.detach()[:, None]
        weigh = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.float64).sin()
        sums = flat.double() @ weigh
        found[name] = [hash(round(number, 6)) for number in sums.nan_to_num().tolist()]
    return found


# Figures -------------------------------------------------------------------------------------------------------------


def _output_told(output: Any, loss_inputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    logits = loss_inputs[0][0] if loss_inputs else None
    answer = logits if logits is not None else _answer(output)
    if answer is None or not isinstance(answer, Tensor) or answer.ndim < 2 or answer.shape[-1] < 2:
        return {}
    rows = answer.detach().float().reshape(-1, answer.shape[-1])
    chances = rows.softmax(dim=-1)
    entropy = -(chances * chances.clamp(min=1e-30).log()).sum(dim=-1).mean() / math.log(rows.shape[-1])
    told = {
        "spread": float(rows.std()),
        "between_records": float(rows.std(dim=0).mean()) if len(rows) > 1 else 0.0,
        "entropy": float(entropy),
        "commonest": float(rows.argmax(dim=-1).bincount(minlength=rows.shape[-1]).max()) / len(rows),
        "classes": float(rows.shape[-1]),
    }
    if loss_inputs:
        target = loss_inputs[0][1].reshape(-1)
        if not target.is_floating_point() and target.numel() == len(rows):
            told["right"] = float((rows.argmax(dim=-1) == target).float().mean())
    return told


def _targets_told(loss_inputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    if not loss_inputs or loss_inputs[0][1].is_floating_point() or not loss_inputs[0][1].numel():
        return {}
    target = loss_inputs[0][1].reshape(-1)
    counts = target[target >= 0].bincount().tolist()
    return {"counts": counts[:64], "distinct": sum(count > 0 for count in counts), "number": len(target)}


def _spread(tensor: Tensor) -> dict[str, float]:
    flat = tensor.detach().float()
    return {"spread": float(flat.std(correction=0)), "largest": float(flat.abs().max())}


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors])
    found: list[float] = torch.stack(list(norms)).tolist()
    return found


def _together(norms: Sequence[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if norms else 0.0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
