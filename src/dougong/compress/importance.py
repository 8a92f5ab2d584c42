"""Which units of a model its answers rest on.

Here        ImportanceConfig, `measure_importance`, Importance.
Elsewhere   what the units are (structure.py); leaving out the others (student.py, prune.py).
Promise     measuring changes nothing of the model; the same records give the same scores. Records need no target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.compress.sensitivity import rows_of
from dougong.compress.structure import BRIDGE, Slot, Structure
from dougong.core.config import Config
from dougong.core.signature import Target
from dougong.engine.evaluate import evaluating
from dougong.model.narrow import inner_of
from dougong.model.sandwich import BridgeBlock, EncoderBlock, Sandwich, SandwichState
from dougong.nn.batch import Batch
from dougong.objectives.decision import decision_loss

Criterion = Literal["magnitude", "first", "second"]
AT_ONCE: Final = 4
"""Records whose activations are held at a time: with all of a batch's, nothing else in compressing took as much."""


class ImportanceConfig(Config):
    """How units are ranked."""

    criterion: Criterion = "second"
    """Of what the loss would lose without a unit: second: by its curvature, the mean square of what one record's loss
    says of a switch on the unit (Fisher information of the switch). first: by its slope, the mean size of the same.
    magnitude: by the squares of the weights that use it, without any record."""

    num_records: int = Field(default=256, gt=0)
    """Records that are looked at."""


class Importance(NamedTuple):
    """Scores; of one axis they may be compared, and of axes inside layers also with each other."""

    units: dict[str, Tensor]
    """By axis, of each unit; no less than 0."""

    layers: dict[str, list[float]]
    """By stack, how far each layer moves what walks through it: 1 - cosine, 0 where it changes nothing."""


def measure_importance(
    model: Sandwich, structure: Structure, batches: Sequence[Batch], target: Target, config: ImportanceConfig
) -> Importance:
    """Look at some records.

    Inner units (heads, channels of a feed-forward) have a switch each, after Kwon et al. 2022 (arXiv:2204.09656), by
    medium or record. Channels that walk through many layers have none: they are scored by what all weights that read
    them say together, after Molchanov et al. 2019 (arXiv:1906.10771), by batch. Layers are scored as in ShortGPT
    (Men et al. 2024, arXiv:2403.03853), over all tokens and, in a bridge, all modalities.
    """
    weights = structure.weights(model)
    if config.criterion == "magnitude":
        squares = (
            (name, [_of_units(each.detach().square(), slot, structure) for slot in structure.slots[name]])
            for name, each in weights.items()
            if each.is_floating_point()
        )
        units = _by_axis(structure, squares)
        return Importance(units, _layer_scores(model, structure, batches))
    switches = _Switches(model, structure)
    units = {name: torch.zeros(axis.size) for name, axis in structure.axes.items() if axis.kind in ("width", "stem")}
    trained = [weight for weight in weights.values() if isinstance(weight, nn.Parameter)]
    slopes = _Slopes(structure, weights)
    own = [(weight.requires_grad, weight.grad) for weight in trained]
    power = 2 if config.criterion == "second" else 1
    try:
        for weight in trained:
            weight.grad = None
            weight.requires_grad_(True)
        with evaluating(model), switches.in_place(), slopes.in_place():
            for batch in batches:
                for first in range(0, batch.num_records, AT_ONCE):
                    row_B = torch.arange(first, min(first + AT_ONCE, batch.num_records))
                    target_B = None if batch.target is None else batch.target[row_B]
                    part = rows_of(batch, row_B)._replace(target=target_B)
                    loss = _loss(model(part).output_BC, part, target)
                    torch.autograd.backward(loss, inputs=[*trained, *switches.here()])
                    switches.see(power)
                for axis, score in slopes.taken(batch.num_records, power).items():
                    if axis in units:
                        units[axis] += score
    finally:
        for weight, (wanted, gradient) in zip(trained, own, strict=True):
            weight.requires_grad_(wanted)
            weight.grad = gradient
    return Importance({**units, **switches.scores()}, _layer_scores(model, structure, batches))


def _loss(output_BC: Tensor, batch: Batch, target: Target) -> Tensor:
    """Of the true answer; where it is not known, of what the model answers itself."""
    if batch.target is not None:
        return decision_loss(output_BC, batch.target, target.task, 0.0)
    told_BC = output_BC.detach()
    if target.task == "single_label":
        return decision_loss(output_BC, told_BC.argmax(dim=-1), target.task, 0.0)
    if target.task == "multi_label":
        return decision_loss(output_BC, (told_BC > 0).float(), target.task, 0.0)
    return decision_loss(output_BC, told_BC[:, 0] + 1.0, target.task, 0.0)  # its own answer would have no slope


def _by_axis(structure: Structure, scores: Iterable[tuple[str, Sequence[Tensor]]]) -> dict[str, Tensor]:
    """Add up, for each unit of each axis, the scores that the slots of weights that read it have."""
    found = {name: torch.zeros(axis.size) for name, axis in structure.axes.items()}
    made = {name: torch.zeros(axis.size) for name, axis in structure.axes.items()}
    read: set[str] = set()
    for weight, of_slots in scores:
        for slot, of_units in zip(structure.slots[weight], of_slots, strict=True):
            score = of_units.float().cpu()
            if slot.reads:
                found[slot.axis] += score
                read.add(slot.axis)
            else:
                made[slot.axis] += score
    return {name: found[name] if name in read else made[name] for name in found}


def _of_units(value: Tensor, slot: Slot, structure: Structure) -> Tensor:
    """The sum over each unit's numbers."""
    size = structure.axes[slot.axis].size
    outer = 1 if slot.outer is None else structure.axes[slot.outer].size
    first = value.movedim(slot.dim, 0).reshape(outer, size, slot.unit, -1)
    return first.sum(dim=(0, 2, 3))


class _Slopes:
    """What a loss says of each unit of each weight: sums of weight times gradient, for each weight and slot.

    A gradient is let go of as soon as it is made: all of them at once would be as large as the model.
    """

    def __init__(self, structure: Structure, weights: Mapping[str, Tensor]) -> None:
        self._structure = structure
        self._names: dict[nn.Parameter, str] = {}
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                self._names.setdefault(weight, name)
        self._sums: dict[str, list[Tensor]] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for weight in self._names:
                hook = weight.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            yield

    def _see(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        name = self._names[weight]
        product = weight.detach() * weight.grad
        weight.grad = None
        found = [_of_units(product, slot, self._structure) for slot in self._structure.slots[name]]
        before = self._sums.get(name)
        self._sums[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    def taken(self, num_records: int, power: int) -> dict[str, Tensor]:
        """By axis, of the records since the last time."""
        scores = {name: [(each / num_records).abs() ** power for each in sums] for name, sums in self._sums.items()}
        self._sums.clear()
        return _by_axis(self._structure, scores.items())


class _Switches:
    """A factor of 1 on every unit of every axis inside a layer, for each row of a batch."""

    def __init__(self, model: Sandwich, structure: Structure) -> None:
        modules = dict(model.named_modules())
        self._readers: list[tuple[str, nn.Module, int]] = []
        for axis in structure.inner_axes():
            layer = modules[structure.layers[axis]]
            inside = inner_of(layer)
            assert inside is not None
            inner = inside.heads if structure.axes[axis].kind == "heads" else inside.channels
            assert inner is not None
            (row,) = inner.rows
            self._readers.append((axis, layer.get_submodule(row), inner.channels))
        self._sums = {axis: torch.zeros(structure.axes[axis].size) for axis, _, _ in self._readers}
        self._rows = dict.fromkeys(self._sums, 0)
        self._now: list[tuple[str, Tensor]] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for axis, reader, channels in self._readers:
                hook = functools.partial(self._multiply, axis, channels)
                stack.callback(reader.register_forward_pre_hook(hook).remove)
            yield

    def _multiply(self, axis: str, channels: int, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTN: Tensor = given[0]
        switch_BU = x_BTN.new_ones(x_BTN.shape[0], x_BTN.shape[-1] // channels, requires_grad=True)
        self._now.append((axis, switch_BU))
        return (x_BTN * switch_BU.repeat_interleave(channels, dim=1)[:, None], *given[1:])

    def here(self) -> list[Tensor]:
        return [switch_BU for _, switch_BU in self._now]

    def see(self, power: int) -> None:
        for axis, switch_BU in self._now:
            if switch_BU.grad is not None:
                # What stands for a modality that is not there has no say, and does not count.
                self._rows[axis] += int((switch_BU.grad != 0).any(dim=1).sum())
                self._sums[axis] += (switch_BU.grad.abs() ** power).sum(dim=0).float().cpu()
        self._now.clear()

    def scores(self) -> dict[str, Tensor]:
        return {axis: total / max(1, self._rows[axis]) for axis, total in self._sums.items()}


@torch.no_grad()
def _layer_scores(model: Sandwich, structure: Structure, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """1 - cosine between what goes into each layer and what comes out, over real tokens."""
    sums: dict[str, list[list[float]]] = {
        name: [[] for _ in range(s.num_layers)] for name, s in structure.stacks.items()
    }
    places: dict[int, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for block in model.blocks:
        if isinstance(block, EncoderBlock | BridgeBlock):
            name = block.name if isinstance(block, EncoderBlock) else BRIDGE
            places[id(block)] = (name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1

    def look(block: nn.Module, given: tuple[Any, ...], made: SandwichState) -> None:
        before: SandwichState = given[0]
        name, place = places[id(block)]
        for modality in before.tokens if isinstance(block, BridgeBlock) else [name]:
            if modality not in before.tokens:
                continue
            mask_UT = before.masks[modality]
            x, y = before.tokens[modality][mask_UT], made.tokens[modality][mask_UT]
            if len(x):
                moved = 1.0 - nn.functional.cosine_similarity(x, y, dim=-1)
                sums[name][place].append(float(moved.mean()))

    with evaluating(model), ExitStack() as stack:
        for block in model.blocks:
            if id(block) in places:
                stack.callback(block.register_forward_hook(look).remove)
        for batch in batches:
            model(batch)
    return {name: [sum(each) / len(each) if each else 0.0 for each in layers] for name, layers in sums.items()}
