"""Fewer heads, channels, layers and bridge blocks, where they matter least.

Here        PruneConfig, `pruned_shape` (which units stay for so many parameters), `prune` (a smaller dense model, in
            rounds, with recovery in between), `count_parameters`; Sparsity: zeros in place, which make nothing smaller.
Elsewhere   what belongs together (structure.py); what matters (importance.py); the smaller model (student.py);
            recovery (distil.py).
Promise     a pruned model is a smaller dense model that its bundle rebuilds. What brings no speed says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor, nn

from dougong.compress.importance import Importance, ImportanceConfig, measure_importance
from dougong.compress.structure import MODALITIES, Structure, structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, inherit, shape_of
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature, Target
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

WIDTHS: Final = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the width that are tried in turn, where what layers have inside is not enough to leave out."""

WORTH: Final = 2**0.5
"""By so much less per weight than the least that stays must a layer be worth to be left out whole: leaving it out
changes what comes after it, which its units' scores do not see."""


class PruneConfig(Config):
    """How much is left out."""

    keep: float = 0.5
    """Share of the parameters that stays."""

    least: float = 0.1
    """Share of each layer's heads and channels that always stays."""

    layers: bool = True
    """Whether layers of an encoder and blocks of the bridge may be left out whole."""

    rounds: int = 1
    """Times that a part is left out, with recovery after each."""

    importance: ImportanceConfig = ImportanceConfig()

    @field_validator("keep", "least")
    @classmethod
    def _a_share(cls, share: float) -> float:
        if not 0 < share <= 1:
            raise ValueError(f"{share} must be a share, above 0 and at most 1.")
        return share

    @field_validator("rounds")
    @classmethod
    def _at_least_one(cls, rounds: int) -> int:
        if rounds < 1:
            raise ValueError(f"{rounds} must be at least 1.")
        return rounds


def pruned_shape(
    model: Sandwich, structure: Structure, importance: Importance, base: Shape, keep: float, config: PruneConfig
) -> Shape:
    """A shape with about `keep` of the parameters that `base` has.

    Heads and channels of all layers stand in one row, by their score per weight that leaving them out saves, and the
    last of it go. A layer whose units are all worth less per weight than the least that stays goes whole. Where that is
    not enough, the width goes down too.

    Raises:
        ConfigError: even the smallest shape has more.
    """
    if keep == 1:
        return base
    wanted = keep * count_parameters(model, structure, base)
    shape = base
    for share in WIDTHS:
        narrowed = shape_of(StudentConfig(width=share, heads=1.0, channels=1.0), structure, importance)
        units = {name: min(count, base.units.get(name, count)) for name, count in narrowed.units.items()}
        shape = _without_weakest(
            model, structure, importance, base.model_copy(update={"units": base.units | units}), wanted, config
        )
        if count_parameters(model, structure, shape) <= wanted * 1.005:
            return shape
    least = count_parameters(model, structure, shape) / count_parameters(model, structure, base)
    raise ConfigError(
        f"keep={keep:g} leaves fewer parameters than the smallest shape has, which is {least:.3f} of them. "
        f"Use {math.ceil(least * 1000) / 1000:g} or more."
    )


class _Unit(NamedTuple):
    """A head or a channel."""

    worth: float
    """Its score for each weight that goes with it."""

    axis: str
    cost: float


def _without_weakest(
    model: Sandwich, structure: Structure, importance: Importance, base: Shape, wanted: float, config: PruneConfig
) -> Shape:
    excess = count_parameters(model, structure, base) - wanted
    units = {name: base.units.get(name, axis.size) for name, axis in structure.axes.items()}
    row: list[_Unit] = []
    room: dict[str, int] = {}
    for axis in _inner(structure, base):
        cost = _cost(model, structure, axis, base)
        scores = importance.units[axis].sort(descending=True).values[: units[axis]].tolist()
        room[axis] = units[axis] - max(1, math.ceil(structure.axes[axis].size * config.least))
        row += [_Unit(score / cost, axis, cost) for score in scores]
    # All scores of an axis are compared; that only so many of them may go is seen to below.
    row.sort()
    cut, edge = dict.fromkeys(room, 0), 0.0
    for unit in row:
        if excess <= 0:
            break
        if cut[unit.axis] < room[unit.axis]:
            cut[unit.axis] += 1
            excess -= unit.cost
            edge = unit.worth
    left = {axis: units[axis] - count for axis, count in cut.items() if count}
    layers = dict(base.layers)
    if config.layers:
        layers |= _idle_layers(structure, importance, base, left, edge, model)
    return base.model_copy(update={"units": base.units | left, "layers": layers})


def _idle_layers(
    structure: Structure, importance: Importance, base: Shape, left: dict[str, int], edge: float, model: Sandwich
) -> dict[str, tuple[int, ...]]:
    """Of each stack the layers that stay, where some are worth less than all that stays elsewhere."""
    found: dict[str, tuple[int, ...]] = {}
    for name, stack in structure.stacks.items():
        kept = base.layers.get(name, tuple(range(stack.num_layers)))
        worth: dict[int, float] = {}
        for place in kept:
            axes = [axis for axis in structure.inner_axes() if axis.startswith(f"{name}.layers.{place}.")]
            # Where nothing was cut now, as many as the base has: it may have left out some before.
            stays = {axis: left.get(axis, base.units.get(axis, structure.axes[axis].size)) for axis in axes}
            total = sum(
                float(importance.units[axis].sort(descending=True).values[:count].sum())
                for axis, count in stays.items()
            )
            cost = sum(_cost(model, structure, axis, base) * count for axis, count in stays.items())
            worth[place] = total / cost if cost else math.inf
        stay = tuple(place for place in kept if worth[place] * WORTH >= edge)
        if kept and not stay:
            stay = (max(kept, key=lambda place: worth[place]),)
        if stay != kept:
            found[name] = stay
    return found


def _inner(structure: Structure, shape: Shape) -> list[str]:
    """Axes inside layers that the shape has."""
    return [axis for axis in structure.inner_axes() if _has(axis, structure, shape)]


def _has(name: str, structure: Structure, shape: Shape) -> bool:
    """Whether a weight or axis is of a layer, and a modality, that stays."""
    for stack, kept in shape.layers.items():
        prefix = f"{stack}.layers."
        if name.startswith(prefix) and int(name.removeprefix(prefix).partition(".")[0]) not in kept:
            return False
    if shape.modalities is not None:
        gone = [each for each in structure.modalities if each not in shape.modalities]
        return not any(name.startswith(f"{each}.") or f".{each}." in name for each in gone)
    return True


def count_parameters(model: Sandwich, structure: Structure, shape: Shape) -> float:
    """How many numbers a model of that shape has, without building it; stems that follow from the width by a rule of
    their own may differ a little. Of one modality alone it counts a bridge's attention, which would not be there."""
    total = 0.0
    for name, weight in structure.weights(model).items():
        if isinstance(weight, nn.Parameter) and _has(name, structure, shape):
            share = 1.0
            for slot in structure.slots[name]:
                share *= _left(structure, slot.axis, shape)
                share *= 1.0 if slot.outer is None else _left(structure, slot.outer, shape)
            total += weight.numel() * share
    for conv, axis in structure.grouped.values():
        if _has(axis, structure, shape):
            numbers = sum(parameter.numel() for parameter in model.get_submodule(conv).parameters())
            total += numbers * _left(structure, axis, shape)
    return total


def _left(structure: Structure, axis: str, shape: Shape) -> float:
    size = structure.axes[axis].size
    if axis == MODALITIES and shape.modalities is not None:
        return len(shape.modalities) / size
    return shape.units.get(axis, size) / size


def _cost(model: Sandwich, structure: Structure, axis: str, shape: Shape) -> float:
    """Numbers that go with one unit."""
    total = 0.0
    for name, weight in structure.weights(model).items():
        slots = structure.slots[name]
        if any(slot.axis == axis for slot in slots):
            share = 1.0
            for slot in slots:
                share *= 1 / structure.axes[axis].size if slot.axis == axis else _left(structure, slot.axis, shape)
            total += weight.numel() * share
    return total


class Pruned(NamedTuple):
    """What is left."""

    network: Sandwich
    signature: Signature
    shape: Shape
    """Of the last round, in units of the model before it."""


def prune(
    model: Sandwich,
    signature: Signature,
    batches: Sequence[Batch],
    target: Target,
    config: PruneConfig,
    recover: Callable[[Sandwich, int], None] | None = None,
) -> Pruned:
    """A smaller dense model, which begins with the weights of what stays. The model itself stays as it is.

    `batches` are records to look at; `recover` trains the model of a round, in place, and is told which round.

    Raises:
        ConfigError: so few parameters cannot be.
    """
    found = Pruned(model, signature, Shape())
    for place in range(config.rounds):
        structure = structure_of(found.network)
        importance = measure_importance(found.network, structure, batches, target, config.importance)
        keep = config.keep ** (1 / config.rounds)
        shape = pruned_shape(found.network, structure, importance, Shape(), keep, config)
        student, signature = build_student(found.network, signature, shape)
        inherit(found.network, student, shape, importance)
        found = Pruned(student.eval(), signature, shape)
        if recover is not None:
            recover(student, place)
    return found


class SparseConfig(Config):
    """Weights that become zero where they are."""

    kind: Literal["2:4", "unstructured"] = "2:4"
    """2:4: of four weights in a row the two smallest. unstructured: the smallest of each layer."""

    share: float = 0.5
    """Of the weights of each layer that become zero; of kind 2:4 always half."""

    @field_validator("kind", mode="before")
    @classmethod
    def _as_written(cls, kind: object) -> object:
        return "2:4" if kind == 124 else kind  # YAML takes 2:4 for 2 x 60 + 4

    @field_validator("share")
    @classmethod
    def _a_share(cls, share: float) -> float:
        if not 0 < share < 1:
            raise ValueError(f"{share} must be a share, above 0 and below 1.")
        return share


class Sparsity:
    """Zeros in the linear layers of a model, by magnitude (2:4 as in Mishra et al. 2021, arXiv:2104.08378). They stay
    zero if `apply` is called after each step."""

    def __init__(self, model: nn.Module, config: SparseConfig) -> None:
        if config.kind == "2:4" and config.share != 0.5:
            raise ConfigError(f"share={config.share} cannot take effect with kind 2:4, which is half. Leave it out.")
        self.config = config
        self._masks: list[tuple[nn.Parameter, Tensor]] = []
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features % 4 == 0:
                weight = module.weight
                assert isinstance(weight, nn.Parameter)
                self._masks.append((weight, _mask(weight.detach(), config)))

    @torch.no_grad()
    def apply(self) -> None:
        """Set them to zero, in place."""
        for weight, stays in self._masks:
            weight.mul_(stays)

    @property
    def zeros(self) -> float:
        """Share of the layers' weights."""
        total = sum(stays.numel() for _, stays in self._masks)
        return 1 - sum(int(stays.sum()) for _, stays in self._masks) / max(1, total)

    def note(self) -> str:
        """Whether it brings any speed here."""
        if self.config.kind == "2:4" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
            return "2:4: this GPU can skip the zeros in 16 and 8 bits, with torch's semi-structured weights alone"
        return (
            f"{self.config.kind}: {self.zeros:.0%} of the weights are zero, which brings no speed and saves no bytes "
            "here: this device multiplies by zeros as by any number. Prune heads and channels for speed"
        )


def _mask(weight_OI: Tensor, config: SparseConfig) -> Tensor:
    """Which weights stay."""
    if config.kind == "2:4":
        weight_OG4 = weight_OI.abs().reshape(len(weight_OI), -1, 4)
        strongest_OG2 = weight_OG4.topk(2, dim=-1).indices
        return torch.zeros_like(weight_OG4).scatter_(-1, strongest_OG2, 1.0).flatten(1)
    count = round(weight_OI.numel() * config.share)
    order = weight_OI.abs().flatten().argsort(stable=True)
    stays = torch.ones(weight_OI.numel(), dtype=weight_OI.dtype, device=weight_OI.device)
    stays[order[:count]] = 0.0
    return stays.view_as(weight_OI)
