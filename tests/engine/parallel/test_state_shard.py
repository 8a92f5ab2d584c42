"""The optimizer alone spread: how it is cut, what checkpoints make of it, and what a step leaves that does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from stacks import MICRO_BATCHES, RECORDS, batches, build, loss_of
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.engine.average import WeightAverage
from dougong.engine.checkpoint import RunState, check_checkpoint, checkpoints_of, restore_checkpoint
from dougong.engine.memory.account import num_bytes
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.state_shard import StateShard, cut_rows
from dougong.engine.prepare import check_model, prepare_model
from dougong.engine.saver import Saver
from dougong.engine.step import TrainParts, train_step

WORLD = 4
ZERO1 = PlanConfig(shard=4, sharding="zero1")
CHAINS = {
    "spread, cut and whole": (
        ZERO1,
        PlanConfig(shard=4),
        PlanConfig(shard=2, sharding="zero1", tensor=2),
        PlanConfig(),
    ),
    "whole, hybrid and stages": (
        PlanConfig(),
        PlanConfig(shard=2, sharding="zero1"),
        PlanConfig(pipeline=2, shard=2, sharding="zero1"),
        PlanConfig(tensor=2, pipeline=2),
        ZERO1,
    ),
}
"""Layouts that each go on from the checkpoint of the one before it."""


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_parts_are_even_within_a_row_and_every_row_is_in_one(parts: int) -> None:
    shapes = [(7, 5), (3,), (40, 2), (1, 11), (13,)]
    cuts = cut_rows(shapes, parts)

    held = [(place, row) for part in cuts for place, rows in part for row in rows]
    assert held == [(place, row) for place, shape in enumerate(shapes) for row in range(shape[0])]
    widths = [shape[1] if len(shape) > 1 else 1 for shape in shapes]
    sizes = [sum(widths[place] * len(rows) for place, rows in part) for part in cuts]
    mean = sum(sizes) / parts
    assert all(abs(size - mean) <= max(widths) for size in sizes)
    # Whole weights but for two: few large tensors to step.
    for part in cuts:
        assert all(len(rows) == shapes[place][0] for place, rows in part[1:-1])


def parts_of(layout: Layout) -> TrainParts:
    optimizer = OptimizerConfig().build(layout.model)
    layout.share_out(optimizer)
    return layout.parts(loss_of, optimizer)


def laid_out(plan: PlanConfig, seed: int) -> Layout:
    model = build("decoder")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * seed)
    return prepare_model(model, plan, Ranks(dist.group.WORLD), accumulation=MICRO_BATCHES)


def state_at(step: int) -> RunState:
    return RunState(step=step, epoch=0, batch=0, batches_per_epoch=1, seed=0, precision="fp32", precision_ratio=None)


def handed_on(name: str, folder: Path) -> None:
    """Each layout of the chain restores and saves; the first trains."""
    for place, plan in enumerate(CHAINS[name]):
        layout = laid_out(plan, seed=place)
        parts = parts_of(layout)
        average = WeightAverage(layout.model, 0.5)
        if place == 0:
            for step in (1, 2):
                train_step(parts, batches("decoder", layout.mesh.share), num_records=RECORDS)
                average.update(step)
        else:
            restored = check_checkpoint(checkpoints_of(folder) / f"step-{place - 1:08d}")
            restore_checkpoint(restored, layout.model, parts.optimizer, average, layout)
        saver = Saver(checkpoints_of(folder), layout, parts.optimizer, average, keep=9)
        saver.begin(state_at(place))
        saver.finish()


def whole_of(folder: Path, place: int) -> dict[str, Tensor]:
    """Weights, averages and optimizer, as one process reads them."""
    model = build("decoder")
    optimizer, average = OptimizerConfig().build(model), WeightAverage(model, 0.5)
    restore_checkpoint(check_checkpoint(checkpoints_of(folder) / f"step-{place:08d}"), model, optimizer, average)
    found = {f"model/{name}": weight for name, weight in model.state_dict().items()}
    found |= {f"average/{name}": weight for name, weight in average.weights().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "stages" in n else ()) for n in CHAINS])
def test_a_checkpoint_goes_from_any_layout_to_zero1_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    run_ranks(handed_on, name, tmp_path, world=WORLD, limit_seconds=120)

    first = whole_of(tmp_path, 0)
    assert {name.partition("/")[0] for name in first} == {"model", "average", "exp_avg", "exp_avg_sq", "step"}
    started = build("decoder").state_dict()
    assert any(not torch.equal(first[f"model/{name}"], weight) for name, weight in started.items())
    for place, plan in enumerate(CHAINS[name]):
        again = whole_of(tmp_path, place)
        assert again.keys() == first.keys()
        assert [each for each in first if not torch.equal(first[each], again[each])] == [], plan.in_words()


def stepped_badly() -> dict[str, Any]:
    """A step without a finite loss, between two that have one."""
    layout = laid_out(ZERO1, seed=0)
    parts = parts_of(layout)
    own = batches("decoder", layout.mesh.share)
    train_step(parts, own, num_records=RECORDS)
    before = [parameter.clone() for parameter in layout.model.parameters()]
    spoilt = TrainParts(
        layout.model,
        lambda output, batch: loss_of(output, batch) * (torch.inf if dist.get_rank() == 1 else 1.0),
        parts.optimizer,
        reduce=layout.reduce,
    )
    skipped = train_step(spoilt, own, num_records=RECORDS).skipped
    stayed = all(torch.equal(a, b) for a, b in zip(before, layout.model.parameters(), strict=True))
    left = any(parameter.grad is not None for parameter in layout.model.parameters())
    again = train_step(parts, own, num_records=RECORDS)
    moved = any(not torch.equal(a, b) for a, b in zip(before, layout.model.parameters(), strict=True))
    assert isinstance(layout.sharded, StateShard)
    state = [x for each in parts.optimizer.state.values() for name, x in each.items() if name != "step"]
    return {
        "skipped": (skipped, again.skipped),
        "stayed": stayed,
        "left": left,
        "moved": moved,
        "tensors": len(layout.sharded.stepped),
        "bytes": num_bytes(state),
        "all": len(before),
    }


def test_a_skipped_step_moves_nothing_and_each_rank_keeps_its_share_of_the_optimizer() -> None:
    found = run_ranks(stepped_badly, world=WORLD)

    whole = 8 * sum(parameter.numel() for parameter in build("decoder").parameters())
    for each in found:
        assert each["skipped"] == (True, False)
        assert each["stayed"]
        assert each["moved"]
        assert not each["left"]
        assert each["bytes"] == pytest.approx(whole / WORLD, rel=0.02)
    # A weight is cut in two at most between neighbours: few large tensors, not all of them on every rank.
    assert sum(each["tensors"] for each in found) < found[0]["all"] + WORLD


def test_what_cannot_take_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gathered_bytes=7 cannot take effect.* and sharding: zero2 or zero3"):
        PlanConfig(shard=2, sharding="zero1", gathered_bytes=7)
    with pytest.raises(ValueError, match="sharding=zero1 cannot take effect. Leave it out, or set shard: 2 or more"):
        PlanConfig(sharding="zero1")
    model = build("decoder")
    model.state_types = ()
    with pytest.raises(ConfigError, match="does not say what its states are made of. Use sharding: zero1, or shard: 1"):
        check_model(model, PlanConfig(shard=2))
    check_model(model, PlanConfig(shard=2, sharding="zero1"))
