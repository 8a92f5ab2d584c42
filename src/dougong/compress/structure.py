"""What of a sandwich must become smaller together: the dependency graph of its sizes.

Here        `structure_of`: every size of a model (an axis), and which dimension of which weight has it (a slot).
Elsewhere   which units of an axis matter (importance.py); a model with fewer of them (student.py, prune.py).
Promise     every dimension of every weight that could become smaller is in it; a model with a part that nobody knows
            is refused, so that none is ever cut wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.model.bridge import BottleneckBlock, CrossBlock, MergedBlock
from dougong.model.completion import Completion
from dougong.model.encoders.audio import AudioStem
from dougong.model.encoders.encoder import TransformerLayer
from dougong.model.encoders.image import ImageStem
from dougong.model.encoders.signal import SignalLayer, SignalStem
from dougong.model.encoders.table import TableLayer, TableStem
from dougong.model.encoders.text import TextStem
from dougong.model.encoders.vector import VectorStem
from dougong.model.heads import ContrastiveHead, DecisionHead
from dougong.model.narrow import inner_of
from dougong.model.sandwich import (
    AlignBlock,
    BridgeBlock,
    CompletionBlock,
    EncoderBlock,
    FinishBlock,
    JoinBlock,
    OwnBlock,
    Sandwich,
    TruthBlock,
)

MODALITIES: Final = "modalities"
VOTERS: Final = "voters"
WIDTH: Final = "width"
BRIDGE: Final = "(bridge)"
"""Names of axes, and of a stack of layers, beside the modalities' own."""

Kind = Literal["width", "stem", "heads", "channels", "fixed"]
"""width: channels that walk through many layers. stem: between two convolutions. heads, channels: inside one layer.
fixed: never cut by importance."""


class Axis(NamedTuple):
    """A size that many weights share."""

    kind: Kind
    size: int
    """Units of it."""

    channels: int = 1
    """Numbers of one unit, in what passes it on: of a head its channels."""


class Slot(NamedTuple):
    """One dimension of one weight: for each unit of `outer`, the units of `axis`, `unit` numbers of each."""

    dim: int
    axis: str
    unit: int = 1
    outer: str | None = None
    reads: bool = False
    """Whether the weight works on what the axis holds, and does not make it."""


class Stack(NamedTuple):
    """Layers behind each other that have the same shape outside: one may be left out."""

    name: str
    """A modality's, or BRIDGE."""

    num_layers: int


@dataclass
class Structure:
    """The sizes of one model. Weights have names that do not count other parts' layers: "image.layers.0.…"."""

    axes: dict[str, Axis] = field(default_factory=dict)
    slots: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    """By weight; one without any has no size that could change."""

    names: dict[str, str] = field(default_factory=dict)
    """By weight, its name in the model."""

    stacks: dict[str, Stack] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    """By axis inside a layer, the layer's name in the model."""

    modalities: tuple[str, ...] = ()
    grouped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """A convolution in groups, whose inputs and outputs are one axis: its name in the model, and the axis."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's weights by these names."""
        found = model.state_dict(keep_vars=True)
        return {weight: found[name] for weight, name in self.names.items()}

    def inner_axes(self) -> Iterator[str]:
        """Axes inside one layer."""
        return (name for name, axis in self.axes.items() if axis.kind in ("heads", "channels"))


def positions(slot: Slot, axes: Mapping[str, Axis], kept: Mapping[str, Tensor]) -> Tensor | None:
    """Which numbers of a dimension stay, when of each axis the units in `kept` do (None: all of an axis that is not in
    it); None where all stay."""
    if slot.axis not in kept and (slot.outer is None or slot.outer not in kept):
        return None
    size = axes[slot.axis].size
    unit_K = kept.get(slot.axis, torch.arange(size))
    place_KN = unit_K[:, None] * slot.unit + torch.arange(slot.unit)
    if slot.outer is None:
        return place_KN.flatten()
    outer_O = kept.get(slot.outer, torch.arange(axes[slot.outer].size))
    return (outer_O[:, None] * size * slot.unit + place_KN.flatten()).flatten()


def structure_of(model: Sandwich) -> Structure:
    """
    Raises:
        ConfigError: the model has a part whose sizes are not known.
    """
    return _Walk(model).structure


class _Walk:
    """Goes through a model once and writes down what it meets."""

    def __init__(self, model: Sandwich) -> None:
        self.structure = Structure(modalities=model.names)
        self.model = model
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.prefixes: list[tuple[str, str]] = []
        """Names in the model, and what stands in place of them."""

        self.found: dict[str, tuple[Slot, ...]] = {}
        self._axis(MODALITIES, Axis("fixed", len(model.names)))
        for name in model.names:
            self._stem(name, model.embedders[name])
        self._blocks()
        self._top()
        self._name_weights()

    # The parts of a sandwich ------------------------------------------------------------------------------------

    def _blocks(self) -> None:
        counts: dict[str, int] = {}
        for block in self.model.blocks:
            path = self.paths[id(block)]
            if isinstance(block, EncoderBlock | BridgeBlock):
                name = block.name if isinstance(block, EncoderBlock) else BRIDGE
                place = counts.get(name, 0)
                counts[name] = place + 1
                self.prefixes.append((path, f"{name}.layers.{place}"))
                if isinstance(block, EncoderBlock):
                    self._encoder_layer(f"{name}.layers.{place}", block.layer, _width_of(name))
                else:
                    self._bridge_block(f"{name}.layers.{place}", block.block)
            elif isinstance(block, FinishBlock):
                self.prefixes.append((path, f"{block.name}.finish"))
                self._finish(block)
            elif isinstance(block, AlignBlock):
                self.prefixes.append((path, f"{block.name}.align"))
                self._contrastive(block.name, block.contrastive)
            elif isinstance(block, OwnBlock):
                self.prefixes.append((path, f"{block.name}.own"))
                self._vector(block.norm, WIDTH)
                self._linear(block.pool.score, None, WIDTH)
                self._decision(f"{block.name}.own", block.decision, None)
            elif isinstance(block, CompletionBlock):
                self.prefixes.append((path, "(completion)"))
                for name in block.names:
                    self._completion(name, block.completions[name])
            elif not isinstance(block, JoinBlock | TruthBlock):
                raise _unknown(block)
        for name in (*self.model.names, BRIDGE):
            self.structure.stacks[name] = Stack(name, counts.get(name, 0))

    def _top(self) -> None:
        model = self.model
        for name in model.names if not model.only_votes else ():
            self._vector(model.norms[name], WIDTH)
            score: Any = model.pools[name].get_submodule("score")
            self._linear(score, None, WIDTH)
            self.prefixes += [
                (self.paths[id(model.norms[name])], f"{name}.norm"),
                (self.paths[id(model.pools[name])], f"{name}.pool"),
            ]
        if not model.late:
            self._linear(model.gate.score, MODALITIES, WIDTH, outer=MODALITIES)
            for place, quality in zip(model.gate.places, model.gate.quality, strict=True):
                self.prefixes.append((self.paths[id(quality)], f"{model.names[place]}.quality"))
        if not model.only_votes:
            self._decision("(decision)", model.decision, MODALITIES if model.late else None)
        if model.decide == "weighed":
            self._axis(VOTERS, Axis("fixed", len(model.names) + 1))
            self.found["votes.weight_V"] = (Slot(0, VOTERS),)

    def _decision(self, name: str, head: DecisionHead, outer: str | None) -> None:
        self._vector(head.norm, WIDTH, outer=outer)
        inner = f"{name}.channels"
        self._axis(inner, Axis("stem", head.hidden.out_features))  # one setting of the model for all its heads
        self._linear(head.hidden, inner, WIDTH, outer=outer)
        self._linear(head.out, None, inner)

    def _contrastive(self, name: str, head: nn.Module) -> None:
        if not isinstance(head, ContrastiveHead):
            raise _unknown(head)
        self._vector(head.norm, WIDTH)
        self._linear(head.pool.score, None, WIDTH)
        self._linear(head.project, WIDTH, WIDTH)

    def _finish(self, block: FinishBlock) -> None:
        own = _width_of(block.name)
        for module in block.finisher.modules():
            if isinstance(module, nn.LayerNorm):
                self._vector(module, own)
            elif list(module.parameters(recurse=False)):
                raise _unknown(module)
        self._linear(block.project, WIDTH, own)

    def _bridge_block(self, name: str, block: nn.Module) -> None:
        if not isinstance(block, CrossBlock | MergedBlock | BottleneckBlock):
            raise _unknown(block)
        if isinstance(block, BottleneckBlock):
            self.found[f"{self.paths[id(block)]}.bottleneck_ND"] = (Slot(1, WIDTH),)
        self._plain(name, block, WIDTH)

    def _completion(self, name: str, completion: nn.Module) -> None:
        if not isinstance(completion, Completion):
            raise _unknown(completion)
        path = self.paths[id(completion)]
        self.prefixes.append((path, f"(completion).{name}"))
        for weight, dim in (("question_KD", 1), ("source_MD", 1), ("mark_D", 0)):
            self.found[f"{path}.{weight}"] = (Slot(dim, WIDTH),)
        self._linear(completion.out, WIDTH, WIDTH)
        self._plain(f"(completion).{name}", completion, WIDTH, known=(completion.out,))

    # Encoders ---------------------------------------------------------------------------------------------------

    def _stem(self, name: str, stem: nn.Module) -> None:
        path, own = self.paths[id(stem)], _width_of(name)
        self.prefixes.append((path, f"{name}.stem"))
        if isinstance(stem, TextStem):
            words: Any = stem.embeddings
            for part in (words.word_embeddings, words.position_embeddings, words.token_type_embeddings):
                self._tensor(f"{self.paths[id(part)]}.weight", own, 1)
            self._vector(words.LayerNorm, own)
        elif isinstance(stem, ImageStem):
            patches: Any = stem.embeddings
            for weight in ("cls_token", "position_embeddings", "mask_token"):
                if getattr(patches, weight, None) is not None:
                    self._tensor(f"{self.paths[id(patches)]}.{weight}", own, 2)
            projection = patches.patch_embeddings.projection
            layers = list(projection) if isinstance(projection, nn.Sequential) else [projection]
            self._convolutions(name, layers, own)
        elif isinstance(stem, AudioStem):
            heard: Any = stem.features
            layers = [part for layer in heard.conv_layers for part in (layer.conv, getattr(layer, "layer_norm", None))]
            last = f"{name}.stem.{len(heard.conv_layers) - 1}"
            self._convolutions(name, [layer for layer in layers if layer is not None], last)
            to_width: Any = stem.projection
            self._vector(to_width.layer_norm, last)
            self._linear(to_width.projection, own, last)
            position: Any = stem.position
            conv = self.paths[id(position.conv)]
            self.structure.grouped[f"{name}.stem.position.conv"] = (conv, own)
            self._tensor(f"{conv}.bias", own, 0)
            if isinstance(stem.norm, nn.LayerNorm):
                self._vector(stem.norm, own)
        elif isinstance(stem, SignalStem):
            self._linear(stem.embed, own, None)
            self._tensor(f"{path}.place_ND", own, 1)
        elif isinstance(stem, TableStem):
            for weight in ("weight_ND", "bias_ND", "missing_ND", "categories.weight"):
                self._tensor(f"{path}.{weight}", own, 1)
        elif isinstance(stem, VectorStem):
            self._axis(own, Axis("fixed", stem.num_numbers))
        elif list(stem.parameters()):
            raise _unknown(stem)

    def _convolutions(self, name: str, layers: list[nn.Module], last: str) -> None:
        """Convolutions in a row, each with the norm behind it; `last` is the axis of what leaves."""
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv1d | nn.Conv2d)]
        before, place = None, -1
        for layer in layers:
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                place += 1
                after = last if place == len(convolutions) - 1 else f"{name}.stem.{place}"
                path = self.paths[id(layer)]
                self._axis(after, Axis(self._kind_of(after), layer.out_channels))
                reads = () if before is None else (Slot(1, before, reads=True),)
                self.found[f"{path}.weight"] = (Slot(0, after), *reads)
                if layer.bias is not None:
                    self.found[f"{path}.bias"] = (Slot(0, after),)
                before = after
            elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                assert before is not None
                self._vector(layer, before)
            elif list(layer.parameters()):
                raise _unknown(layer)

    def _encoder_layer(self, name: str, layer: nn.Module, own: str) -> None:
        if isinstance(layer, TransformerLayer | SignalLayer | TableLayer):
            self._plain(name, layer, own)
        else:
            raise _unknown(layer)

    def _plain(self, name: str, module: nn.Module, width: str, known: tuple[nn.Module, ...] = ()) -> None:
        """Norms as wide as what walks through, and layers with something inside."""
        done = {id(each) for each in known}
        for path, part in module.named_modules():
            inside = inner_of(part)
            if id(part) in done or (inside is None and not isinstance(part, nn.LayerNorm)):
                if inside is None and id(part) not in done and _has_weights(part) and path:
                    raise _unknown(part)
                continue
            if inside is None:
                self._vector(part, width)
                continue
            label = _without_places(".".join(filter(None, (name, path))))
            for kind, inner in (("heads", inside.heads), ("channels", inside.channels)):
                if inner is None:
                    continue
                axis = f"{label}.{kind}"
                self.structure.layers[axis] = self.paths[id(part)]
                self._axis(axis, Axis("heads" if kind == "heads" else "channels", inner.size, inner.channels))
                for each in inner.columns:
                    linear = part.get_submodule(each)
                    self._linear(linear, axis, width)
                    done.add(id(linear))
                for each in inner.rows:
                    linear = part.get_submodule(each)
                    self._linear(linear, width, axis)
                    done.add(id(linear))

    # Single weights ---------------------------------------------------------------------------------------------

    def _axis(self, name: str, axis: Axis) -> None:
        there = self.structure.axes.setdefault(name, axis)
        assert there == axis, f"{name} is {there} and {axis}"

    def _tensor(self, path: str, axis: str, dim: int) -> None:
        weight = self.model.state_dict()[path]
        self._axis(axis, Axis(self._kind_of(axis), weight.shape[dim]))
        self.found[path] = (Slot(dim, axis),)

    def _vector(self, norm: nn.Module, axis: str, outer: str | None = None) -> None:
        path = self.paths[id(norm)]
        for weight, value in norm.named_parameters():
            if outer is None:
                self._axis(axis, Axis(self._kind_of(axis), value.shape[0]))
            self.found[f"{path}.{weight}"] = (Slot(0, axis, outer=outer),)

    def _linear(self, linear: nn.Module, makes: str | None, reads: str | None, outer: str | None = None) -> None:
        assert isinstance(linear, nn.Linear)
        path, slots = self.paths[id(linear)], []
        if makes is not None:
            if makes not in self.structure.axes:
                self._axis(makes, Axis(self._kind_of(makes), linear.out_features))
            slots.append(Slot(0, makes, linear.out_features // self.structure.axes[makes].size))
        if linear.bias is not None:
            self.found[f"{path}.bias"] = tuple(slots)
        if reads is not None:
            if reads not in self.structure.axes:
                self._axis(reads, Axis(self._kind_of(reads), linear.in_features))
            units = self.structure.axes[reads].size * (self.structure.axes[outer].size if outer else 1)
            assert linear.in_features % units == 0, f"{path}: {linear.in_features} is no multiple of {units}"
            slots.append(Slot(1, reads, linear.in_features // units, outer, reads=True))
        self.found[f"{path}.weight"] = tuple(slots)

    @staticmethod
    def _kind_of(axis: str) -> Kind:
        return "width" if axis == WIDTH or axis.endswith(f".{WIDTH}") else "stem"

    def _name_weights(self) -> None:
        """Give each weight the name by which another model's is known."""
        prefixes = sorted(self.prefixes, key=lambda pair: -len(pair[0]))
        in_groups = {conv for conv, _ in self.structure.grouped.values()}
        for name in self.model.state_dict():
            if any(name.startswith(f"{conv}.") and not name.endswith(".bias") for conv in in_groups):
                continue
            weight = name
            for prefix, instead in prefixes:
                if name.startswith(f"{prefix}."):
                    weight = instead + name[len(prefix) :]
                    break
            weight = _without_places(weight)
            assert weight not in self.structure.names, weight
            self.structure.names[weight] = name
            self.structure.slots[weight] = self.found.get(name, ())


def _width_of(modality: str) -> str:
    return f"{modality}.{WIDTH}"


def _without_places(name: str) -> str:
    """Modules by a user's names begin with their place among them, which is another where one is left out."""
    return re.sub(r"(?<=\.)\d+_", "", name)


def _has_weights(module: nn.Module) -> bool:
    return bool(list(module.parameters(recurse=False)))


def _unknown(module: nn.Module) -> ConfigError:
    return ConfigError(
        f"the model has a part of kind {type(module).__name__}, whose sizes are not known here. Compress a model "
        "without it."
    )
