"""Each group of a model's modules in fp16 or in bf16, by the range that its numbers have had.

Here        AdaptiveConfig, `apply_adaptive`, AdaptivePrecision, Switch.
Elsewhere   the range (exponents.py); the scale of the loss (scaling.py); the step (engine/step.py), the trainer, which
            asks for a decision after every step.
Promise     fp16, whose numbers have three more bits, where what a group makes and its gradients fit its range; bf16
            where they do not. A group that does not fit leaves fp16 at once; it comes back only after having fitted
            with room to spare several times in a row. Every switch says why. Norms, softmax and losses are computed in
            fp32, as autocast has them. All ranks decide alike, and a resumed run as one that was not stopped.

A group is a block, the embedding, or the head. What is looked at, every few steps, are some thousand numbers of what a
group gives on, of the gradients that come back there, and of its weights' gradients. The loss is multiplied by one
scale for all. For each group there is an interval of scales at which its gradients neither overflow nor lose more than
a hundredth of themselves below fp16's smallest number; the scale is one that lies in the intervals of most weights, and
as large as these allow. What is to come is reckoned with: the largest gradients' growth goes on until the next
decision, and a spike is remembered for some hundred steps.

After Micikevicius et al. 2018 (arXiv:1710.03740), whose one scale rises until it overflows, and Zhao et al. 2021
(Adaptive loss scaling, arXiv:1910.12385), who compute scales from statistics, layer by layer; here the format is chosen
too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dougong.core.config import Config
from dougong.engine.precision.exponents import Exponents, has_broken, largest, quantile
from dougong.engine.precision.scaling import HistoryScale
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack

Format = Literal["fp16", "bf16"]
TYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}

LARGEST: Final = 15
"""Exponent of fp16's largest number."""

SMALLEST: Final = -24
"""And of its smallest."""

LOST: Final = 0.01
"""Share of a group's gradients that may be smaller."""


BEYOND: Final = 8
"""Exponents by which a number that was not finite is taken to have been too large; twice as many when one comes
again."""

AGAIN_STEPS: Final = 500
"""Within so many it has come again."""


class AdaptiveConfig(Config):
    """How numbers are watched, and when a format changes."""

    look_every: int = Field(default=4, gt=0)
    """Steps."""

    decide_every: int = Field(default=16, gt=0)
    """Steps; beside it after every step that was skipped."""

    room: int = Field(default=2, ge=0)
    """Exponents between the largest gradient that is reckoned with and what fp16 can hold."""

    formats: tuple[Format, ...] = ("fp16", "bf16")
    """That may be chosen between; of one alone, the scale is all that moves."""

    patience: int = Field(default=3, gt=0)
    """Decisions in a row for which a group must fit, with as much room again, before it comes back to fp16."""

    remember_steps: float = Field(default=32.0, gt=0)
    """For which a spike is remembered, for each exponent by which it stood out."""


class GroupState(Config):
    """What a resumed run needs of a group."""

    format: Format
    given_peak: float | None
    peak: float | None
    drift: float
    last: tuple[int, int] | None
    fitted: int
    overflows: int
    overflowed: int
    counts: tuple[dict[int, float], ...]
    """By place, those of the three histories that are not zero."""


class AdaptiveState(Config):
    """What a resumed run needs."""

    kind: Literal["adaptive"] = "adaptive"
    exponent: int
    overflows_in_a_row: int
    step: int
    met: int
    looking: bool
    groups: tuple[GroupState, ...]


class Switch(NamedTuple):
    """A group that has changed its format."""

    group: str
    modality: str
    """Empty where it is no modality's own."""

    before: Format
    after: Format
    reason: str


class _Group:
    """What is known of one."""

    def __init__(self, name: str, modality: str, num_weights: int) -> None:
        self.name, self.modality, self.num_weights = name, modality, num_weights
        self.format: Format = "bf16"
        self.given, self.returned, self.weights = Exponents(), Exponents(), Exponents()
        self.given_peak: float | None = None
        """Exponent of the largest number given on that is reckoned with; falls slowly."""

        self.peak: float | None = None
        """The same of gradients."""

        self.drift = 0.0
        """Exponents by which the largest gradients grow in a step; not below 0."""

        self.last: tuple[int, int] | None = None
        """At which step they were last looked at, and how large they were."""

        self.fitted = 0
        """Decisions in a row."""

        self.overflows, self.overflowed = 0, -AGAIN_STEPS
        """How often it has come again, and at which step last."""

    @property
    def state(self) -> GroupState:
        counts = tuple({place: n for place, n in enumerate(history.counts.tolist()) if n} for history in self.histories)
        return GroupState(
            format=self.format,
            given_peak=self.given_peak,
            peak=self.peak,
            drift=self.drift,
            last=self.last,
            fitted=self.fitted,
            overflows=self.overflows,
            overflowed=self.overflowed,
            counts=counts,
        )

    @state.setter
    def state(self, state: GroupState) -> None:
        self.format, self.given_peak, self.peak = state.format, state.given_peak, state.peak
        self.drift, self.last, self.fitted = state.drift, state.last, state.fitted
        self.overflows, self.overflowed = state.overflows, state.overflowed
        for history, counts in zip(self.histories, state.counts, strict=True):
            history.counts.zero_()
            for place, n in counts.items():
                history.counts[place] = n

    @property
    def histories(self) -> tuple[Exponents, Exponents, Exponents]:
        return self.given, self.returned, self.weights

    def meet(self, step: int, scale: int, fresh: Sequence[Tensor], faded: float) -> None:
        """What all ranks have seen since the last time; peaks have faded by so much."""
        given, returned, weights = fresh
        for history, seen in zip(self.histories, fresh, strict=True):
            history.settle(seen)
        found = largest(given)
        self.given_peak = _higher(self.given_peak, faded, found)
        if has_broken(given) and self.format == "fp16":
            self.given_peak = _higher(self.given_peak, 0.0, LARGEST + BEYOND)
        gradients = returned + weights
        found = largest(gradients)
        self.peak = _higher(self.peak, faded, found)
        if has_broken(gradients) and self.format == "fp16":
            # How large it was nobody can see.
            self.overflows = self.overflows + 1 if step - self.overflowed < AGAIN_STEPS else 0
            self.overflowed = step
            self.peak = _higher(self.peak, 0.0, LARGEST + (BEYOND << min(self.overflows, 3)) - scale)
        if found is None:
            return
        if self.last is not None and step > self.last[0]:
            slope = (found - self.last[1]) / (step - self.last[0])
            self.drift = max(0.0, (self.drift + slope) / 2)
        self.last = step, found

    def scales(self, config: AdaptiveConfig, room: int) -> tuple[int, int] | None:
        """Exponents of the smallest and the largest scale at which it fits fp16; None where nothing is known. Where it
        fits at none, the first is above the second."""
        least = quantile(self.returned.counts + self.weights.counts, LOST)
        if self.peak is None or least is None:
            return None
        top = self.peak + self.drift * config.decide_every + room
        return SMALLEST - least, math.floor(LARGEST - top)

    def gives_too_much(self, room: int) -> bool:
        return self.given_peak is not None and self.given_peak + room > LARGEST


def _higher(peak: float | None, faded: float, found: int | None) -> float | None:
    if peak is not None:
        peak -= faded
    if found is None:
        return peak
    return float(found) if peak is None else max(peak, float(found))


class AdaptivePrecision:
    """A model's groups, in the formats that they have now."""

    def __init__(
        self,
        model: BlockStack[Any, Any],
        config: AdaptiveConfig,
        device_type: str,
        agree: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.config, self.device_type, self._agree = config, device_type, agree
        self.switches: list[Switch] = []
        """Since somebody last took them away."""

        self.overflow = ""
        """Which groups had a gradient that is not finite when they were last looked at."""

        self.scale = HistoryScale()
        self.step = 0
        self._looking = True
        self._met = 0
        self._undo: list[Callable[[], None]] = []
        owners: dict[nn.Parameter, str] = {p: name for name, owned in model.parts().items() for p in owned}
        self.groups: list[_Group] = []
        self._parameters: list[list[nn.Parameter]] = []
        embedding = set(model.embed_names or ())
        children = dict(model.named_children())
        embeds = [p for name in embedding if name in children for p in children[name].parameters()]
        rest = [p for name, child in children.items() if name not in {*embedding, "blocks"} for p in child.parameters()]
        self._format(model, "embed", self._add("embedding", embeds, owners))
        for place, block in enumerate(model.blocks):
            self._format(block, "forward", self._add(f"block {place}", list(block.parameters()), owners))
        self._format(model, "head", self._add("head", rest, owners))
        if agree is not None:  # ranks may have parts of the model
            sums = agree(torch.tensor([float(group.num_weights) for group in self.groups]))
            for group, num in zip(self.groups, sums.tolist(), strict=True):
                group.num_weights = round(num)

    def remove(self) -> None:
        """The model computes as it did before."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    @property
    def state(self) -> AdaptiveState:
        groups = tuple(group.state for group in self.groups)
        return AdaptiveState(
            exponent=self.scale.exponent,
            overflows_in_a_row=self.scale.overflows_in_a_row,
            step=self.step,
            met=self._met,
            looking=self._looking,
            groups=groups,
        )

    @state.setter
    def state(self, state: AdaptiveState) -> None:
        self.scale.exponent, self.scale.overflows_in_a_row = state.exponent, state.overflows_in_a_row
        self.step, self._met, self._looking = state.step, state.met, state.looking
        for group, kept in zip(self.groups, state.groups, strict=True):
            group.state = kept

    def _add(self, name: str, parameters: Sequence[nn.Parameter], owners: dict[nn.Parameter, str]) -> _Group:
        modalities = {owners.get(p, "") for p in parameters}
        modality = modalities.pop() if len(modalities) == 1 else ""
        self.groups.append(_Group(name, modality, sum(p.numel() for p in parameters)))
        self._parameters.append(list(parameters))
        self.groups[-1].format = self.config.formats[-1]
        return self.groups[-1]

    def _format(self, owner: nn.Module, name: str, group: _Group) -> None:
        own, part = name in vars(owner), getattr(owner, name)
        setattr(owner, name, self._formatted(group, part))
        self._undo.append(lambda: setattr(owner, name, part) if own else delattr(owner, name))

    def _formatted(self, group: _Group, part: Callable[..., Any]) -> Callable[..., Any]:
        def formatted(*given: Any) -> Any:
            # Neither of the two formats holds the other's numbers, and autocast refuses to put both together.
            given = tree_map(functools.partial(_widened, TYPES[group.format]), given)
            with torch.autocast(self.device_type, dtype=TYPES[group.format]):
                made = part(*given)
            if self._looking and torch.is_grad_enabled():
                self._look(group, given[0], made)
            return made

        return formatted

    # Looking -------------------------------------------------------------------------------------------------

    def _look(self, group: _Group, given: Any, made: Any) -> None:
        before = {id(tensor) for tensor in _tensors(given)}
        for tensor in _tensors(made):
            if id(tensor) in before or not tensor.is_floating_point() or not tensor.requires_grad:
                continue
            group.given.observe(tensor)
            shift = self.scale.exponent
            tensor.register_hook(functools.partial(_note, group.returned, shift))  # type: ignore[no-untyped-call]

    @property
    def exponent(self) -> int:
        return self.scale.exponent

    def see(self) -> None:
        """All gradients of this rank are there, times the scale."""
        if not self._looking:
            return
        for group, parameters in zip(self.groups, self._parameters, strict=True):
            for parameter in parameters:
                if parameter.grad is not None:
                    group.weights.observe(local_part(parameter.grad), self.scale.exponent)

    # Deciding ------------------------------------------------------------------------------------------------

    def after(self, *, finite: bool) -> None:
        """A step's gradients were finite, on all ranks, or it was skipped: decide for the next. All ranks call this."""
        self.step += 1
        before = self.scale.exponent
        self.scale.after(finite=finite)
        if not finite:
            self._find_broken()
        if self._looking or not finite:
            self._meet(before)
        if not finite or self.step == 1 or self.step % self.config.decide_every == 0:
            self.switches += self._decide(keep_scale=not finite)
        self._looking = not finite or self.step % self.config.look_every == 0

    def _find_broken(self) -> None:
        """Look at all numbers of what a skipped step has left, not at some of those of some steps."""
        for group, parameters in zip(self.groups, self._parameters, strict=True):
            if not all(local_part(p.grad).isfinite().all() for p in parameters if p.grad is not None):
                group.weights.observe(torch.tensor([torch.inf]))

    def _meet(self, scale: int) -> None:
        fresh = torch.stack([history.fresh for group in self.groups for history in group.histories])
        if self._agree is not None:
            fresh = self._agree(fresh)
        broken = [
            f"{group.name} ({group.modality})" if group.modality else group.name
            for group, (_, returned, weights) in zip(self.groups, torch.split(fresh, 3), strict=True)
            if has_broken(returned + weights)
        ]
        self.overflow = ""
        if broken:
            self.overflow = f"gradients of {', '.join(broken)} were not finite, the loss being multiplied by 2^{scale}"
        faded = (self.step - self._met) / self.config.remember_steps
        self._met = self.step
        for group, own in zip(self.groups, torch.split(fresh, 3), strict=True):
            group.meet(self.step, scale, list(own), faded)

    def _decide(self, *, keep_scale: bool) -> list[Switch]:
        room = self.config.room
        # Who has left fp16 must fit with as much room again.
        found = [group.scales(self.config, room if group.format == "fp16" else 2 * room) for group in self.groups]
        fitting = [
            scales is not None and scales[0] <= scales[1] and not group.gives_too_much(room)
            for group, scales in zip(self.groups, found, strict=True)
        ]
        able = [(group, scales) for group, scales, fits in zip(self.groups, found, fitting, strict=True) if fits]
        scale = _best_scale([(scales, group.num_weights) for group, scales in able if scales is not None])
        switches = []
        for group, scales, fits in zip(self.groups, found, fitting, strict=True):
            if scales is None:
                continue
            inside = scale is not None and fits and scales[0] <= scale <= scales[1]
            group.fitted = group.fitted + 1 if inside else 0
            wanted: Format = group.format
            if group.format == "fp16" and not inside:
                wanted = "bf16"
            elif group.format == "bf16" and (group.fitted >= self.config.patience or self.step == 1):
                wanted = "fp16" if inside else "bf16"
            if wanted != group.format and wanted in self.config.formats:
                switches.append(
                    Switch(group.name, group.modality, group.format, wanted, _reason(group, scales, scale, inside))
                )
                group.format = wanted
        if scale is not None and not (keep_scale and scale > self.scale.exponent):
            self.scale.aim(scale)
        return switches


def _widened(own: torch.dtype, given: Any) -> Any:
    """fp32, of a tensor in the other 16-bit format; all else as it is."""
    other = isinstance(given, Tensor) and given.dtype in TYPES.values() and given.dtype != own
    return given.float() if other else given


def _note(history: Exponents, shift: int, gradient: Tensor) -> None:
    history.observe(gradient, shift)


def _best_scale(groups: Sequence[tuple[tuple[int, int], int]]) -> int | None:
    """The largest of those that fit most weights; None where nothing fits."""
    best, weight = None, 0
    for candidate in sorted({scales[1] for scales, _ in groups}, reverse=True):
        fits = sum(num for (low, high), num in groups if low <= candidate <= high)
        if fits > weight:
            best, weight = candidate, fits
    return best


def _reason(group: _Group, scales: tuple[int, int], scale: int | None, inside: bool) -> str:
    if inside:
        return f"its gradients have fitted scales from 2^{scales[0]} to 2^{scales[1]}"
    if group.given_peak is not None and group.given_peak >= LARGEST:
        return f"it gives on numbers of up to 2^{group.given_peak:.0f}"
    if scales[0] > scales[1]:
        return (
            f"its gradients, of which the largest are reckoned to be 2^{group.peak:.0f}, span more than fp16: they "
            f"need a scale of 2^{scales[0]} or more and of 2^{scales[1]} or less"
        )
    told = "none" if scale is None else f"2^{scale}"
    return f"its gradients need a scale from 2^{scales[0]} to 2^{scales[1]}, and that of most weights is {told}"


def apply_adaptive(
    model: BlockStack[Any, Any],
    config: AdaptiveConfig | None = None,
    device_type: str = "cpu",
    agree: Callable[[Tensor], Tensor] | None = None,
) -> AdaptivePrecision:
    """Have each group computed in a format of its own, in place; all begin in bf16. `agree` adds up over ranks."""
    return AdaptivePrecision(model, config or AdaptiveConfig(), device_type, agree)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
