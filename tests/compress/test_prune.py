"""Holds prune.py to its promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dougong
from dougong.bundle.model import Model
from dougong.compress.importance import ImportanceConfig, measure_importance
from dougong.compress.prune import PruneConfig, SparseConfig, Sparsity, count_parameters, prune, pruned_shape
from dougong.compress.structure import structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, shape_of
from dougong.compress.workshop import model_of
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

Build = Callable[..., Sandwich]


@pytest.mark.parametrize("keep", [0.7, 0.2])
def test_as_many_parameters_stay_as_were_asked_for(
    build: Build, batch: Batch, signature: Signature, keep: float
) -> None:
    model = build(fusion="bridge", own_heads="taught")
    before = sum(p.numel() for p in model.parameters())

    found = prune(model, signature, [batch], signature.target, PruneConfig(keep=keep))

    after = sum(p.numel() for p in found.network.parameters())
    assert 0.8 * keep < after / before <= keep * 1.01
    assert found.network(batch).output_BC.isfinite().all()


def test_what_matters_least_goes_first(build: Build, batch: Batch, signature: Signature) -> None:
    model = build()
    with torch.no_grad():
        model.get_submodule("blocks.2.layer.layer.output.dense").weight[:, 10:] *= 1e-4
    structure = structure_of(model)
    importance = measure_importance(model, structure, [batch], signature.target, ImportanceConfig())
    config = PruneConfig(layers=False)

    shape = pruned_shape(model, structure, importance, Shape(), 0.97, config)

    assert shape.units["text.layers.2.channels"] <= 20
    assert shape.units.get("text.layers.0.channels", 64) > 40


def test_of_a_narrowed_base_the_layer_that_matters_most_stays(build: Build, batch: Batch, signature: Signature) -> None:
    model = build()
    structure = structure_of(model)
    importance = measure_importance(
        model, structure, [batch], signature.target, ImportanceConfig(criterion="magnitude")
    )
    units = {}
    for axis, scores in importance.units.items():
        best = axis.startswith("text.layers.1.")
        worth = torch.linspace(1.3, 1.2, len(scores)) if best else torch.linspace(1.1, 0.9, len(scores))
        worth[len(scores) // 4 :] = 0.01  # what a base of a quarter of the width has left out
        units[axis] = worth
    base = shape_of(StudentConfig(width=0.25), structure, importance._replace(units=units))

    for keep in (0.9, 0.7):
        shape = pruned_shape(model, structure, importance._replace(units=units), base, keep, PruneConfig())
        assert 1 in shape.layers.get("text", (0, 1, 2)), (keep, shape.layers)


def test_parameters_are_counted_without_building(build: Build, batch: Batch, signature: Signature) -> None:
    model = build(own_heads="taught")
    structure = structure_of(model)
    importance = measure_importance(model, structure, [batch], signature.target, ImportanceConfig())
    for config in (
        StudentConfig(width=0.5),
        StudentConfig(heads=0.5, layers=0.5),
        StudentConfig(modalities=("text", "facts")),
    ):
        shape = shape_of(config, structure, importance)
        student, _ = build_student(model, signature, shape)
        # A picture's stem makes its channels of the width by a rule of its own, a convolution in groups other groups.
        built = sum(p.numel() for p in student.parameters())
        assert count_parameters(model, structure, shape) == pytest.approx(built, rel=0.05)


def test_a_pruned_model_is_a_bundle_like_any_other(
    colours: Model, tmp_path: Path, records: Callable[..., list]
) -> None:  # type: ignore[type-arg]
    rows = records(20, seed=5, missing=0.2)
    arrays, _ = colours.explain(rows)
    from dougong.engine.batches import to_tensors

    target = colours.preparation.target
    found = prune(
        colours.network, colours.manifest.signature, [to_tensors(arrays)], target, PruneConfig(keep=0.6, rounds=2)
    )
    small = model_of(found.network, colours)
    small.save(tmp_path / "small")

    again = dougong.load(tmp_path / "small")
    assert again.predict(rows) == small.predict(rows)
    assert again.network.config.sizes  # uneven ones
    assert sum(p.numel() for p in again.network.parameters()) < 0.62 * sum(
        p.numel() for p in colours.network.parameters()
    )


def test_too_few_parameters_are_refused(build: Build, batch: Batch, signature: Signature) -> None:
    with pytest.raises(
        ConfigError, match=r"keep=0.001 leaves fewer parameters than the smallest shape has, .* or more"
    ):
        prune(build(), signature, [batch], signature.target, PruneConfig(keep=0.001))


def test_zeros_stay_and_say_that_they_bring_no_speed(build: Build) -> None:
    model = build()
    whole = model.get_submodule("blocks.0.layer.layer.intermediate.dense").weight.detach().clone()
    two_of_four = Sparsity(model, SparseConfig())
    two_of_four.apply()

    weight = model.get_submodule("blocks.0.layer.layer.intermediate.dense").weight
    left = weight.detach().unflatten(1, (-1, 4))
    assert (left != 0).sum(dim=-1).eq(2).all()
    assert left.abs().sum() > whole.abs().sum() / 2
    assert two_of_four.zeros == 0.5
    with torch.no_grad():
        weight += 1.0
    two_of_four.apply()
    assert (weight.unflatten(1, (-1, 4)) != 0).sum(dim=-1).eq(2).all()
    if not torch.cuda.is_available():
        assert "50% of the weights are zero, which brings no speed and saves no bytes here" in two_of_four.note()

    free = Sparsity(build(), SparseConfig(kind="unstructured", share=0.8))
    assert free.zeros == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ConfigError, match="share=0.8 cannot take effect with kind 2:4"):
        Sparsity(build(), SparseConfig(share=0.8))
