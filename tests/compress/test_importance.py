"""Holds importance.py to its promise: scores say what an answer rests on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dougong.compress.importance import Criterion, ImportanceConfig, measure_importance
from dougong.compress.structure import structure_of
from dougong.core.signature import Signature
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

Build = Callable[..., Sandwich]
CRITERIA: tuple[Criterion, ...] = ("magnitude", "first", "second")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_unit_that_nobody_reads_is_worth_nothing(
    build: Build, batch: Batch, signature: Signature, criterion: Criterion
) -> None:
    model = build()
    with torch.no_grad():
        model.get_submodule("blocks.0.layer.layer.output.dense").weight[:, 7] = 0.0
        model.get_submodule("blocks.1.layer.layer.attention.output.dense").weight[:, 4:8] = 0.0

    scores = measure_importance(
        model, structure_of(model), [batch], signature.target, ImportanceConfig(criterion=criterion)
    ).units

    channels, heads = scores["text.layers.0.channels"], scores["text.layers.1.heads"]
    assert channels[7] == 0
    assert (channels > 0).sum() == len(channels) - 1
    assert heads.tolist().index(0.0) == 1
    assert (heads > 0).sum() == 3


def test_a_switch_says_what_one_record_would_lose(build: Build, batch: Batch, signature: Signature) -> None:
    """First order: the slope at a switch on a head, against a small change of what reads that head."""
    model = build().double()
    whole = _doubled(batch)
    config = ImportanceConfig(criterion="first")
    found = measure_importance(model, structure_of(model), [whole], signature.target, config).units

    row = model.get_submodule("blocks.0.layer.layer.attention.output.dense").weight
    before = row.detach().clone()
    for head in range(4):
        slopes = []
        for record in range(4):
            with torch.no_grad():
                one = decision_loss_of(model, whole, record)
                row[:, 4 * head : 4 * head + 4] *= 1 + 1e-6
                slopes.append(abs(float(decision_loss_of(model, whole, record) - one)) / 1e-6)
                row.copy_(before)
        assert float(found["text.layers.0.heads"][head]) == pytest.approx(sum(slopes) / 4, rel=1e-3)


def test_a_channel_of_the_width_is_worth_what_all_weights_that_read_it_say(
    build: Build, batch: Batch, signature: Signature
) -> None:
    model = build().double()
    whole, structure = _doubled(batch), structure_of(model)
    config = ImportanceConfig(criterion="second")
    found = measure_importance(model, structure, [whole], signature.target, config).units
    loss = torch.stack([decision_loss_of(model, whole, record) for record in range(4)]).mean()
    loss.backward()
    weights = structure.weights(model)

    for name, axis in structure.axes.items():
        if axis.kind != "width":
            continue
        said = torch.zeros(axis.size, dtype=torch.float64)
        for weight, slots in structure.slots.items():
            for slot in slots:
                gradient = weights[weight].grad
                if slot.axis == name and slot.reads and gradient is not None:
                    product = (weights[weight].detach() * gradient).movedim(slot.dim, 0)
                    said += product.reshape(-1, axis.size, slot.unit, product[0].numel()).sum(dim=(0, 2, 3)) ** 2
        assert bool((said > 0).any())
        torch.testing.assert_close(found[name].double(), said, rtol=1e-3, atol=1e-9)


def test_one_weights_gradient_is_held_at_a_time(build: Build, batch: Batch, signature: Signature) -> None:
    model, held = build(), []
    weights = list(model.parameters())
    for weight in weights:
        weight.requires_grad_(True).register_post_accumulate_grad_hook(
            lambda _: held.append(sum(each.grad is not None for each in weights))
        )

    measure_importance(model, structure_of(model), [batch], signature.target, ImportanceConfig())

    assert len(held) > len(weights) / 2
    assert max(held) == 1


def decision_loss_of(model: Sandwich, batch: Batch, record: int) -> torch.Tensor:
    assert batch.target is not None
    output_BC = model(batch).output_BC
    # In double throughout: float32 in the loss itself would drown so small a change.
    return -output_BC.log_softmax(dim=-1)[record, batch.target[record]]


def _doubled(batch: Batch) -> Batch:
    media = {
        name: one._replace(values={k: v.double() if v.is_floating_point() else v for k, v in one.values.items()})
        for name, one in batch.media.items()
    }
    return Batch(media, batch.target)


def test_measuring_changes_nothing_and_repeats(build: Build, batch: Batch, signature: Signature) -> None:
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    unlabelled = batch._replace(target=None)

    first, again = (
        measure_importance(model, structure_of(model), [unlabelled], signature.target, ImportanceConfig())
        for _ in range(2)
    )

    assert all(torch.equal(first.units[axis], again.units[axis]) for axis in first.units)
    assert first.layers == again.layers
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", ["first", "second"])
def test_how_many_records_are_held_at_once_changes_nothing(
    build: Build, batch: Batch, signature: Signature, criterion: Criterion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build().double()
    config = ImportanceConfig(criterion=criterion)
    found = []
    kept = [torch.ones_like(weight) for weight in model.parameters()]
    for weight, gradient in zip(model.parameters(), kept, strict=True):
        weight.grad = gradient
    for at_once in (1, 3, 4):
        monkeypatch.setattr("dougong.compress.importance.AT_ONCE", at_once)
        scores = measure_importance(model, structure_of(model), [_doubled(batch)], signature.target, config)
        found.append(scores.units)

    for name, whole in found[-1].items():
        for other in found[:-1]:
            torch.testing.assert_close(other[name], whole, rtol=1e-5, atol=1e-12)
    for weight, gradient in zip(model.parameters(), kept, strict=True):
        assert weight.grad is gradient
        assert bool((gradient == 1).all())
