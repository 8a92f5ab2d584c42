"""A smaller sandwich that begins with its teacher's weights.

Here        StudentConfig (how large, in shares), Shape (how large, exactly); `shape_of`; `build_student`, which makes
            the model; `inherit`, which fills it.
Elsewhere   which units matter (importance.py); choosing a shape by them (prune.py); learning on (distil.py).
Promise     a student is a sandwich like any other, and its settings alone rebuild it. A student as large as its teacher
            answers the same, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from pydantic import field_validator
from torch import Tensor, nn

from dougong.compress.importance import Importance
from dougong.compress.structure import (
    BRIDGE,
    MODALITIES,
    VOTERS,
    WIDTH,
    Axis,
    Slot,
    Structure,
    positions,
    structure_of,
)
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.encoder import TransformerConfig
from dougong.model.encoders.filterbank import PHASES
from dougong.model.encoders.signal import SignalEncoderConfig
from dougong.model.encoders.table import TableEncoderConfig
from dougong.model.encoders.vector import VectorEncoderConfig
from dougong.model.narrow import LayerSize, apply_sizes, inner_of
from dougong.model.sandwich import EncoderConfig, Sandwich, SandwichConfig

EVENLY: Final = 8
"""Widths are multiples of it where the teacher's are: products of other sizes run slower."""


class StudentConfig(Config):
    """How large a student is, in shares of its teacher."""

    width: float = 1.0
    """Of the channels of every encoder, of its stem, and of what the modalities share."""

    heads: float | None = None
    """Of each layer's attention heads, which stay as wide as they are. None: as `width`."""

    channels: float | None = None
    """Of the channels inside each feed-forward and head. None: as `width`."""

    layers: float = 1.0
    """Of each encoder's layers; one that has any keeps one."""

    blocks: float = 1.0
    """Of the bridge's blocks; one stays."""

    pool: dict[str, int] = {}
    """By modality, how many neighbouring tokens (of a picture: along each side) leave its encoder as one."""

    modalities: tuple[str, ...] | None = None
    """All that the student is to be asked with. None: what the teacher is."""

    @field_validator("width", "heads", "channels", "layers", "blocks")
    @classmethod
    def _a_share(cls, share: float | None) -> float | None:
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{share} must be a share of the teacher's, above 0 and at most 1.")
        return share

    @field_validator("pool")
    @classmethod
    def _whole(cls, pool: dict[str, int]) -> dict[str, int]:
        for name, count in pool.items():
            if count < 1:
                raise ValueError(f"{name}: {count} must be 1 or more: so many tokens become one.")
        return pool

    @property
    def is_whole(self) -> bool:
        """Whether it is the teacher's own shape."""
        return self == StudentConfig()


class Shape(Config):
    """How large a student is, exactly; what is not named is as the teacher's."""

    units: dict[str, int] = {}
    """By axis of the teacher (structure.py), how many units stay."""

    layers: dict[str, tuple[int, ...]] = {}
    """By stack, which of the teacher's layers stay, in order."""

    pool: dict[str, int] = {}
    modalities: tuple[str, ...] | None = None
    """These two as StudentConfig has them."""


def shape_of(config: StudentConfig, structure: Structure, importance: Importance) -> Shape:
    """The exact sizes of such a student. Of layers those stay that move most (importance.layers).

    Raises:
        ConfigError: it names no modality of the teacher.
    """
    _check_names(config.modalities or (), structure, "modalities")
    _check_names(config.pool, structure, "pool")
    units: dict[str, int] = {}
    for name, axis in structure.axes.items():
        if axis.kind == "fixed":
            continue
        share = config.width
        if axis.kind == "heads" and config.heads is not None:
            share = config.heads
        if (axis.kind == "channels" or name.endswith(".channels")) and config.channels is not None:
            share = config.channels
        if share < 1:
            units[name] = _rounded(axis, share)
    layers: dict[str, tuple[int, ...]] = {}
    for name, stack in structure.stacks.items():
        share = config.blocks if name == BRIDGE else config.layers
        count = max(1, round(stack.num_layers * share)) if stack.num_layers else 0
        if count < stack.num_layers:
            layers[name] = strongest(importance.layers[name], count)
    return Shape(units=units, layers=layers, pool=config.pool, modalities=config.modalities)


def strongest(scores: list[float], count: int) -> tuple[int, ...]:
    """Places of the `count` highest scores, in order; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return tuple(sorted(order[:count]))


def _rounded(axis: Axis, share: float) -> int:
    if axis.kind == "width" and axis.size % EVENLY == 0:
        return max(EVENLY, round(axis.size * share / EVENLY) * EVENLY)
    return max(1, round(axis.size * share))


def build_student(teacher: Sandwich, signature: Signature, shape: Shape) -> tuple[Sandwich, Signature]:
    """A model of that shape with random weights, and the inputs that it reads.

    Raises:
        ConfigError: a size cannot be; the message says why.
    """
    structure = structure_of(teacher)
    if shape.modalities is not None:
        _check_names(shape.modalities, structure, "modalities")
        inputs = {name: given for name, given in signature.inputs.items() if name in shape.modalities}
        signature = signature.model_copy(update={"inputs": inputs})
    config = _student_config(teacher.config, structure, shape, signature)
    # What layers have inside is said last, when it is known what a layer of this width would have.
    student = config.model_copy(update={"sizes": {}}).build(signature)
    sizes = _sizes(structure, structure_of(student), student, shape)
    apply_sizes(student, sizes)
    student.config = student.config.model_copy(update={"sizes": sizes})
    return student, signature


def _student_config(config: SandwichConfig, structure: Structure, shape: Shape, signature: Signature) -> SandwichConfig:
    names = tuple(signature.inputs)
    width = shape.units.get(WIDTH, config.width)
    encoders: dict[str, EncoderConfig] = {}
    for name in names:
        encoders[name] = _encoder_config(config.encoders[name], name, structure, shape)
    values: dict[str, Any] = {
        **config.model_dump(),
        "width": width,
        "encoders": {name: encoder.model_dump() for name, encoder in encoders.items()},
        "head_ratio": _head_channels(structure, shape) / width,
        "sizes": {},
    }
    values["align"] = config.align if set(config.align) <= set(names) else ()
    if values["completion"] is not None and len(names) < len(structure.modalities):
        raise ConfigError(
            f"the teacher completes {', '.join(structure.modalities)} from each other, and a student of "
            f"{', '.join(names)} alone could not learn that from it. Keep all modalities, or take a teacher without "
            "completion."
        )
    blocks = len(shape.layers.get(BRIDGE, range(config.bridge.num_blocks)))
    values["bridge"] |= {"num_blocks": blocks, "num_heads": _fitting(width, config.bridge.num_heads)}
    if values["completion"] is not None:
        values["completion"]["num_heads"] = _fitting(width, values["completion"]["num_heads"])
    return SandwichConfig.model_validate(values)


def _head_channels(structure: Structure, shape: Shape) -> int:
    """Of all heads, which one setting of the model says."""
    name = next(name for name, axis in structure.axes.items() if axis.kind == "stem" and name.endswith(".channels"))
    return shape.units.get(name, structure.axes[name].size)


def _encoder_config(config: EncoderConfig, name: str, structure: Structure, shape: Shape) -> EncoderConfig:
    if isinstance(config, VectorEncoderConfig):
        return config  # its width is the vector's
    values = config.model_dump()
    whole = structure.axes[f"{name}.{WIDTH}"].size
    width = shape.units.get(f"{name}.{WIDTH}", whole)
    layers = len(shape.layers.get(name, range(structure.stacks[name].num_layers)))
    conv_dim: list[int] = []
    if isinstance(config, AudioEncoderConfig):
        conv_dim = _conv_dim(config, name, structure, shape)
    if isinstance(config, TransformerConfig) and config.architecture is not None:
        architecture = dict(config.architecture)
        heads = _fitting(width, int(architecture["num_attention_heads"]))
        architecture |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        architecture.pop("head_dim", None)
        if conv_dim:
            groups = int(architecture["num_conv_pos_embedding_groups"])
            architecture |= {"conv_dim": conv_dim, "num_conv_pos_embedding_groups": math.gcd(groups, width)}
        values["architecture"] = architecture
    else:
        values |= {"width": width, "num_layers": layers}
        if not isinstance(config, TableEncoderConfig):
            assert isinstance(config, TransformerConfig | SignalEncoderConfig)
            values["num_heads"] = _fitting(width, config.num_heads)
        if conv_dim:
            values["conv_dim"] = tuple(conv_dim)
    if name in shape.pool:
        if "pool" not in values:
            raise ConfigError(f"pool names {name!r}, whose tokens have no neighbours to be put together with.")
        values["pool"] = shape.pool[name]
    return type(config).model_validate(values)


def _conv_dim(config: AudioEncoderConfig, name: str, structure: Structure, shape: Shape) -> list[int]:
    axes = [axis for axis in structure.axes if re.fullmatch(rf"{re.escape(name)}\.stem\.\d+", axis)]
    sizes = [shape.units.get(axis, structure.axes[axis].size) for axis in axes]
    if config.first_filters == "gabor":
        sizes[0] = max(PHASES, sizes[0] // PHASES * PHASES)
    return sizes


def _fitting(width: int, heads: int) -> int:
    """The most heads that share out the width; what a layer has inside is then said by itself (`sizes`)."""
    return next(count for count in range(heads, 0, -1) if width % count == 0)


def _sizes(teacher: Structure, student: Structure, model: Sandwich, shape: Shape) -> dict[str, LayerSize]:
    """What each layer of the student has inside, where it is not what its width would give it."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, int]] = {}
    for axis in student.inner_axes():
        origin = origin_of(axis, shape)
        wanted, channels = shape.units.get(origin, teacher.axes[origin].size), teacher.axes[origin].channels
        layer = student.layers[axis]
        inside = inner_of(modules[layer])
        assert inside is not None
        if student.axes[axis].kind == "channels":
            assert inside.channels is not None
            if inside.channels.size != wanted:
                found.setdefault(layer, {})["channels"] = wanted
        else:
            assert inside.heads is not None
            if (inside.heads.size, inside.heads.channels) != (wanted, channels):
                found.setdefault(layer, {}).update(heads=wanted, head_channels=channels)
    return {layer: LayerSize(**size) for layer, size in found.items()}


def origin_of(name: str, shape: Shape) -> str:
    """The teacher's weight or axis that a student's comes from: that of the layer it was."""
    for stack, kept in shape.layers.items():
        prefix = f"{stack}.layers."
        if name.startswith(prefix):
            place, _, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{kept[int(place)]}.{rest}"
    return name


@torch.no_grad()
def inherit(teacher: Sandwich, student: Sandwich, shape: Shape, importance: Importance) -> None:
    """Give the student, in place, its teacher's weights: of each axis those units that matter most, in their order.

    After Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), who take layers, with channels and heads taken too.
    """
    own, origin = structure_of(student), structure_of(teacher)
    kept = _kept(origin, own, shape, importance)
    weights = origin.weights(teacher)
    for weight, given in own.weights(student).items():
        source = weights[origin_of(weight, shape)]
        slots = tuple(_of_teacher(slot, shape) for slot in own.slots[weight])
        given.copy_(_taken(source, slots, origin, kept))
    modules, teachers = dict(student.named_modules()), dict(teacher.named_modules())
    for weight, (path, axis) in own.grouped.items():
        chosen = kept.get(axis)
        _inherit_grouped(teachers[origin.grouped[weight][0]], modules[path], chosen)


def _of_teacher(slot: Slot, shape: Shape) -> Slot:
    return slot._replace(axis=origin_of(slot.axis, shape))


def _kept(teacher: Structure, student: Structure, shape: Shape, importance: Importance) -> dict[str, Tensor]:
    """By axis of the teacher, which units stay."""
    kept: dict[str, Tensor] = {}
    for name, axis in student.axes.items():
        origin = origin_of(name, shape)
        whole = teacher.axes[origin]
        if axis.kind != "fixed" and axis.size != whole.size:
            kept[origin] = torch.tensor(strongest(importance.units[origin].tolist(), axis.size))
    if teacher.modalities != student.modalities:
        places = [teacher.modalities.index(name) for name in student.modalities]
        kept[MODALITIES] = torch.tensor(places)
        kept[VOTERS] = torch.tensor([*places, len(teacher.modalities)])
    return kept


def _taken(source: Tensor, slots: tuple[Slot, ...], structure: Structure, kept: Mapping[str, Tensor]) -> Tensor:
    for slot in slots:
        place_K = positions(slot, structure.axes, kept)
        if place_K is not None:
            source = source.index_select(slot.dim, place_K.to(source.device))
    return source


def _inherit_grouped(teacher: nn.Module, student: nn.Module, chosen: Tensor | None) -> None:
    """Of a convolution in groups: what lies inside the student's groups; the bias is a weight like others."""
    assert isinstance(teacher, nn.Conv1d)
    assert isinstance(student, nn.Conv1d)
    if chosen is None:
        student.load_state_dict({**teacher.state_dict(), "bias": student.state_dict()["bias"]})
        return
    whole = _ungrouped(teacher.weight, teacher.groups).index_select(0, chosen).index_select(1, chosen)
    size = len(whole) // student.groups
    parts = [whole[start : start + size, start : start + size] for start in range(0, len(whole), size)]
    student.weight = torch.cat(parts)  # the parametrization takes any tensor apart


def _ungrouped(weight_OIK: Tensor, groups: int) -> Tensor:
    """The same convolution in one group."""
    out = len(weight_OIK) // groups
    whole = weight_OIK.new_zeros(len(weight_OIK), weight_OIK.shape[1] * groups, weight_OIK.shape[2])
    for group, block in enumerate(weight_OIK.chunk(groups)):
        inputs = block.shape[1]
        whole[group * out : (group + 1) * out, group * inputs : (group + 1) * inputs] = block
    return whole


def _check_names(names: Mapping[str, int] | tuple[str, ...], structure: Structure, setting: str) -> None:
    strange = [name for name in names if name not in structure.modalities]
    if strange:
        known = ", ".join(structure.modalities)
        raise ConfigError(f"student.{setting} names {strange[0]!r}, which is no modality here. Use some of {known}.")
