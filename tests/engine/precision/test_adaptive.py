"""Formats and scale follow the range of gradients: in regimes that are made, and on models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stacks import RECORDS, batches, build, loss_of
from torch import Tensor

from dougong.data.position import Share
from dougong.engine.precision.adaptive import AdaptiveConfig, AdaptivePrecision, apply_adaptive
from dougong.engine.precision.scaling import MOST, HistoryScale, OverflowScaling
from dougong.engine.step import StepReport, TrainParts, train_step


def parts_of(
    kind: str, factor: Any = None, config: AdaptiveConfig | None = None
) -> tuple[TrainParts, AdaptivePrecision]:
    """A model whose loss is multiplied by `factor(step)` and its learning rate divided."""
    model = build(kind).train()
    adaptive = apply_adaptive(model, config)

    def loss(output: Any, batch: Any) -> Tensor:
        return loss_of(output, batch) * (1.0 if factor is None else factor(adaptive.step))

    # So small that gradients of any scale step alike; not 0: where one is exactly 0, as fp16 makes some, that is 0 / 0.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-30)
    return TrainParts(model, loss, optimizer, precision="bf16", scaling=adaptive, max_grad_norm=None), adaptive


def steps(parts: TrainParts, kind: str, count: int) -> list[StepReport]:
    given = batches(kind, Share())[:1]
    return [train_step(parts, given, num_records=RECORDS) for _ in range(count)]


def test_the_usual_range_fits_fp16_and_nothing_is_skipped() -> None:
    parts, adaptive = parts_of("sandwich")
    reports = steps(parts, "sandwich", 20)
    assert not any(report.skipped for report in reports)
    assert {group.format for group in adaptive.groups if group.last is not None} == {"fp16"}
    assert reports[-1].loss < reports[0].loss
    # The loss and the norm that are told are those of no scale.
    model = build("sandwich").train()
    plain = TrainParts(model, loss_of, torch.optim.SGD(model.parameters(), lr=0.1))
    whole = train_step(plain, batches("sandwich", Share())[:1], num_records=RECORDS)
    assert reports[0].loss == pytest.approx(whole.loss, rel=0.02)
    assert reports[0].grad_norm == pytest.approx(whole.grad_norm, rel=0.05)


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_the_scale_brings_any_gradients_into_range_at_once(exponent: int) -> None:
    parts, adaptive = parts_of("convnet", lambda step: 2.0**exponent)
    reports = steps(parts, "convnet", 6)
    assert not any(report.skipped for report in reports)
    peak = max(group.peak for group in adaptive.groups if group.peak is not None)
    assert 15 - 2 * 16 <= peak + adaptive.exponent <= 15 or adaptive.exponent == MOST


def test_a_drift_is_met_before_it_overflows() -> None:
    parts, _ = parts_of("convnet", lambda step: 2.0 ** (0.1 * step))
    assert sum(report.skipped for report in steps(parts, "convnet", 120)) == 0


def test_spikes_cost_a_step_or_two_and_are_remembered() -> None:
    parts, adaptive = parts_of("convnet", lambda step: 2.0**24 if step % 20 == 19 else 1.0)
    reports = steps(parts, "convnet", 100)
    skipped = [step for step, report in enumerate(reports) if report.skipped]
    assert skipped in ([19], [19, 39])
    assert {group.format for group in adaptive.groups[1:-1]} == {"bf16"}


def test_a_group_that_spans_too_much_is_in_bf16_and_the_switch_says_why() -> None:
    parts, adaptive = parts_of("convnet")
    steps(parts, "convnet", 4)
    group = adaptive.groups[1]
    assert group.format == "fp16"
    group.weights.observe(torch.tensor([2.0**-30, 2.0**30]).repeat(2000))
    adaptive.switches.clear()
    steps(parts, "convnet", 16)
    assert group.format == "bf16"
    (told, *_) = [each for each in adaptive.switches if each.group == group.name]
    assert (told.before, told.after) == ("fp16", "bf16")
    assert "span more than fp16" in told.reason


@pytest.mark.parametrize("kind", ["decoder", "sandwich"])
@pytest.mark.parametrize("first", [0, 1])
def test_groups_next_to_each_other_may_have_different_formats(kind: str, first: int) -> None:
    """One modality's blocks in bf16 and another's in fp16 meet in a bridge of either."""
    parts, adaptive = parts_of(kind)
    model, batch = parts.model, batches(kind, Share())[0]
    for place, group in enumerate(adaptive.groups):
        group.format = ("fp16", "bf16")[(place + first) % 2]
    mixed = loss_of(model(batch), batch)
    mixed.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    adaptive.remove()
    assert float(mixed.detach()) == pytest.approx(float(loss_of(model(batch), batch).detach()), rel=0.02)


def test_a_group_comes_back_only_after_it_has_fitted_several_times() -> None:
    config = AdaptiveConfig(look_every=1, decide_every=1, patience=4)
    parts, adaptive = parts_of("convnet", config=config)
    steps(parts, "convnet", 2)
    group = adaptive.groups[1]
    group.format = "bf16"
    group.fitted = 0
    steps(parts, "convnet", 3)
    assert group.format == "bf16"
    steps(parts, "convnet", 1)
    assert group.format == "fp16"


def test_modalities_name_groups_and_what_overflowed_is_named() -> None:
    parts, adaptive = parts_of("sandwich")
    assert {"photo", "words"} <= {group.modality for group in adaptive.groups}
    steps(parts, "sandwich", 2)
    adaptive.scale.exponent = 40
    (report,) = steps(parts, "sandwich", 1)
    assert report.skipped
    assert adaptive.overflow.endswith("were not finite, the loss being multiplied by 2^40")
    assert "(photo)" in adaptive.overflow
    before = copy.deepcopy(dict(parts.model.state_dict()))
    assert adaptive.exponent < 40
    (report,) = steps(parts, "sandwich", 1)
    assert not report.skipped
    assert any(not torch.equal(before[name], value) for name, value in parts.model.state_dict().items())


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_a_scaled_step_moves_the_weights_as_an_unscaled_one(max_grad_norm: float | None) -> None:
    """By plain gradient descent: AdamW would hide a scale that was left in the gradients."""
    stepped = []
    for scaling in (None, OverflowScaling(exponent=12)):
        model = build("sandwich").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = TrainParts(model, loss_of, optimizer, max_grad_norm=max_grad_norm, scaling=scaling)
        train_step(parts, batches("sandwich", Share())[:2], num_records=RECORDS)
        stepped.append(model.state_dict())
    start = build("sandwich").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in stepped[0].items())
    for name, value in stepped[0].items():
        torch.testing.assert_close(stepped[1][name], value, rtol=0, atol=1e-7)


def test_the_doubling_rule_is_gradscalers() -> None:
    ours, theirs = OverflowScaling(growth_interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, True, True, True, False, True, False, False, True, True, True):
        theirs.scale(weight.sum() * (1.0 if finite else torch.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.after(finite=finite)
        assert 2.0**ours.exponent == theirs.get_scale()


def test_a_scale_steps_further_back_after_each_overflow() -> None:
    scale = HistoryScale(30)
    found = []
    for finite in (False, False, True, False):
        scale.after(finite=finite)
        found.append(scale.exponent)
    assert found == [22, 6, 6, -2]
