"""Holds student.py, structure.py and model/narrow.py to their promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dougong.compress.importance import Importance, ImportanceConfig, measure_importance
from dougong.compress.structure import BRIDGE, WIDTH, structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, inherit, shape_of
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature
from dougong.engine.weights import distinct_weights, put_weights
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch

Build = Callable[..., Sandwich]

LATE: dict[str, Any] = {"fusion": "late"}
SETTINGS = [
    {},
    pytest.param(
        {"bridge": {"kind": "merged", "num_blocks": 2}, "own_heads": "taught", "align": ("text", "sound")},
        marks=pytest.mark.slow,
    ),
    {"bridge": {"kind": "bottleneck"}, "completion": {"num_layers": 2}, "decide": "weighed"},
    pytest.param(LATE, marks=pytest.mark.slow),
    pytest.param(LATE | {"decide": "mean"}, marks=pytest.mark.slow),
]


def ranked(model: Sandwich, batch: Batch, signature: Signature) -> Importance:
    config = ImportanceConfig(criterion="magnitude")
    return measure_importance(model, structure_of(model), [batch], signature.target, config)


def made(teacher: Sandwich, signature: Signature, shape: Shape, importance: Importance) -> tuple[Sandwich, Signature]:
    student, signature = build_student(teacher, signature, shape)
    inherit(teacher, student, shape, importance)
    return student.eval(), signature


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_student_as_large_as_its_teacher_answers_the_same(
    build: Build, batch: Batch, signature: Signature, settings: dict[str, Any]
) -> None:
    teacher = build(**settings)
    student, _ = made(teacher, signature, Shape(), ranked(teacher, batch, signature))

    assert student.config == teacher.config
    assert torch.equal(student(batch).output_BC, teacher(batch).output_BC)
    every_size_that_could_change_is_known(teacher)


def every_size_that_could_change_is_known(model: Sandwich) -> None:
    """A weight that nobody knows would keep its size, and could not be copied."""
    structure = structure_of(model)

    unknown = {name for name, _ in model.named_parameters()} - set(structure.names.values())
    grouped = tuple(path for path, _ in structure.grouped.values())
    assert all(name.startswith(grouped) for name in unknown)
    for weight, tensor in structure.weights(model).items():
        for slot in structure.slots[weight]:
            outer = 1 if slot.outer is None else structure.axes[slot.outer].size
            assert tensor.shape[slot.dim] == structure.axes[slot.axis].size * slot.unit * outer, weight


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_student_of_any_shape_is_rebuilt_by_its_settings_alone(
    build: Build, batch: Batch, signature: Signature, settings: dict[str, Any]
) -> None:
    teacher = build(**settings)
    structure, importance = structure_of(teacher), ranked(teacher, batch, signature)
    config = StudentConfig(width=0.5, heads=0.5, channels=0.7, layers=0.5, blocks=0.5, pool={"image": 2})
    student, _ = made(teacher, signature, shape_of(config, structure, importance), importance)

    again = parse(SandwichConfig, student.config.model_dump(mode="json"), where="model").build(signature).eval()
    put_weights(again, distinct_weights(student), where="here")

    assert torch.equal(again(batch).output_BC, student(batch).output_BC)
    sizes = structure_of(student).axes
    assert sizes[WIDTH].size == 16
    assert sizes["text.layers.0.heads"].size == 2
    assert sizes["text.layers.0.heads"].channels == structure.axes["text.layers.0.heads"].channels
    assert sizes["text.layers.0.channels"].size == round(64 * 0.7)
    assert structure_of(student).stacks["text"].num_layers == 2
    student(batch).output_BC.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())


@pytest.mark.parametrize(
    "kind",
    ["cross", pytest.param("merged", marks=pytest.mark.slow), pytest.param("bottleneck", marks=pytest.mark.slow)],
)
def test_units_that_do_nothing_can_go_and_nothing_changes(
    build: Build, batch: Batch, signature: Signature, kind: str
) -> None:
    """Uneven ones too: other heads and channels go in each layer."""
    teacher = build(bridge={"kind": kind, "num_blocks": 2})
    structure = structure_of(teacher)
    units: dict[str, int] = {}
    weights = structure.weights(teacher)
    generator = torch.Generator().manual_seed(3)
    for place, axis in enumerate(structure.inner_axes()):
        size = structure.axes[axis].size
        left = max(1, size - 1 - place % 2)
        idle = torch.randperm(size, generator=generator)[left:]
        units[axis] = left
        for weight, slots in structure.slots.items():
            for slot in slots:
                if slot.axis == axis and slot.reads:
                    with torch.no_grad():
                        weights[weight].unflatten(1, (size, slot.unit))[:, idle] = 0.0

    student, _ = made(teacher, signature, Shape(units=units), ranked(teacher, batch, signature))

    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    torch.testing.assert_close(student(batch).output_BC, teacher(batch).output_BC, rtol=1e-5, atol=1e-5)


def test_a_layer_that_does_nothing_can_go_and_nothing_changes(build: Build, batch: Batch, signature: Signature) -> None:
    teacher = build()
    names = structure_of(teacher).names
    second = ("image.layers.1.", f"{BRIDGE}.layers.1.")
    idle = (".attention.", ".fc2.", ".narrow.")
    with torch.no_grad():
        for name, place in names.items():
            if name.startswith(second) and any(part in name for part in idle):
                teacher.get_parameter(place).zero_()
    importance = ranked(teacher, batch, signature)

    assert importance.layers["image"][1] == pytest.approx(0.0, abs=1e-6)
    shape = shape_of(StudentConfig(layers=0.67, blocks=0.5), structure_of(teacher), importance)
    shape = shape.model_copy(update={"layers": {"image": shape.layers["image"], BRIDGE: shape.layers[BRIDGE]}})
    assert shape.layers == {"image": (0,), BRIDGE: (0,)}
    student, _ = made(teacher, signature, shape, importance)
    torch.testing.assert_close(student(batch).output_BC, teacher(batch).output_BC, rtol=1e-5, atol=1e-5)


# A late head's norm counts an absent modality's zeros in.
@pytest.mark.parametrize("settings", [each for place, each in enumerate(SETTINGS) if place != 3])
def test_a_student_without_a_modality_answers_as_the_teacher_without_it(
    build: Build, batch: Batch, signature: Signature, settings: dict[str, Any]
) -> None:
    teacher = build(**(settings | {"completion": None}))
    names = ("text", "facts", "pulse")
    student, fewer = made(teacher, signature, Shape(modalities=names), ranked(teacher, batch, signature))

    absent = torch.zeros(4, dtype=torch.bool)
    media = {n: one if n in names else one._replace(present_B=absent) for n, one in batch.media.items()}
    assert tuple(fewer.inputs) == names
    # Sums over fewer slots, in another order.
    torch.testing.assert_close(student(batch).output_BC, teacher(Batch(media, None)).output_BC, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused_in_one_line(build: Build, batch: Batch, signature: Signature) -> None:
    teacher = build()
    structure, importance = structure_of(teacher), ranked(teacher, batch, signature)
    with pytest.raises(ConfigError, match=r"student.modalities names 'smell', which is no modality here. Use some of"):
        shape_of(StudentConfig(modalities=("smell",)), structure, importance)
    with pytest.raises(ConfigError, match="pool names 'facts', whose tokens have no neighbours"):
        build_student(teacher, signature, Shape(pool={"facts": 2}))
    with pytest.raises(ConfigError, match=r"width: 0.0 must be a share of the teacher's, above 0 and at most 1"):
        parse(StudentConfig, {"width": 0.0}, where="student")
    with pytest.raises(ConfigError, match=r"model.sizes names 'blocks.99', which is no layer here"):
        parse(SandwichConfig, {"sizes": {"blocks.99": {"heads": 1}}}, where="model").build(signature)
    with pytest.raises(ConfigError, match="says neither heads, head_channels nor channels"):
        parse(SandwichConfig, {"sizes": {"blocks.0": {}}}, where="model")
