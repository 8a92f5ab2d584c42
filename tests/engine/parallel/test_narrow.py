"""Weights of 16 bits on many ranks: sums that are rounded once, every layout, and checkpoints of what each holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from stacks import batches, build, loss_of
from tiny_run import TinyModel
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.data.position import Share
from dougong.engine.checkpoint import RunState, latest_checkpoint, restore_checkpoint
from dougong.engine.memory.offload import OffloadConfig
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.collectives import begin_sum, scatter_sum
from dougong.engine.parallel.hierarchical import MEASURED_BYTES
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.replicate import add_up_gradients
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Weights
from dougong.engine.prepare import check_precision, prepare_model
from dougong.engine.saver import Saver
from dougong.engine.step import TrainParts, train_step

LENGTH = 1003


def contributions(world: int) -> Tensor:
    """Of each rank: beside 1, a 512th and a 1024th, which are lost in 16 bits one by one; then anything."""
    generator = torch.Generator().manual_seed(0)
    x_RN = torch.randn(world, LENGTH, generator=generator).bfloat16()
    x_RN[:, 0] = 2**-9
    x_RN[0, 0] = 1.0
    return x_RN


def sums() -> dict[str, Tensor]:
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    mine = contributions(world)[rank]
    ours, plain, part = mine.clone(), mine.clone(), mine.new_empty(7)
    begin_sum(ours, group).wait()
    dist.all_reduce(plain, group=group)
    scatter_sum(part, mine[: 7 * world].contiguous(), group)
    # Gradients of both formats, one of which a rank lacks.
    narrow, wide = nn.Parameter(mine.clone()), nn.Parameter(mine.float())
    narrow.grad, wide.grad = (None if rank else mine.clone()), mine.float()
    loss = add_up_gradients([narrow, wide], group, torch.tensor(1.0))
    assert loss.item() == world
    assert narrow.grad is not None
    assert wide.grad is not None
    return {"ours": ours, "plain": plain, "part": part, "narrow": narrow.grad, "wide": wide.grad}


@pytest.mark.parametrize("world", [2, 4])
def test_a_sum_over_ranks_is_rounded_once(world: int) -> None:
    exact = contributions(world).double().sum(dim=0)
    want = exact.bfloat16()
    found = run_ranks(sums, world=world)
    for rank, each in enumerate(found):
        assert torch.equal(each["ours"], want)
        assert torch.equal(each["part"], want[7 * rank :][:7])
        assert torch.equal(each["narrow"], contributions(world)[0])
        assert torch.allclose(each["wide"].double(), exact, rtol=1e-5, atol=1e-5)
    if world == 4:
        assert want[0] == 1 + 2**-7
        assert not torch.equal(found[0]["plain"], want)  # as torch adds them up


class Stepped(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Any]


def shared(kind: str, share: Share) -> list[Any]:
    return batches(kind, share)[:2]


def parts_of(layout: Layout, states: States = "fp32") -> TrainParts:
    config = OptimizerConfig(learning_rate=3e-3, states=states)
    return layout.parts(loss_of, config.build(layout.model, layout.narrowed), precision="bf16")


def laid_out(kind: str, plan: PlanConfig, how: Weights) -> Layout:
    ranks = Ranks(dist.group.WORLD if dist.is_initialized() else None)
    layout = prepare_model(build(kind), plan, ranks, accumulation=2, weights=how)
    if layout.hierarchy is not None:
        # Else chosen by time at each start, and another form adds up in another order.
        layout.hierarchy.choice = {MEASURED_BYTES[0]: "scatter"}
    return layout


def stepped(kind: str, layout: Layout, parts: TrainParts, count: int) -> Stepped:
    own = shared(kind, layout.mesh.share)
    reports = [train_step(parts, own, num_records=51) for _ in range(count)]
    held = {name: (p.local.float().numpy().copy(), p.offset) for name, p in layout.pieces().items()}
    return Stepped([r.loss for r in reports], [r.grad_norm for r in reports], held)


def gone_on(kind: str, plan: PlanConfig, other: PlanConfig, how: Weights, folder: Path, states: States) -> Any:
    """Three steps; the third again from a checkpoint, on this layout and on another."""
    layout = laid_out(kind, plan, how)
    parts = parts_of(layout, states)
    first = stepped(kind, layout, parts, 2)
    saver = Saver(folder, layout, parts.optimizer, None, keep=1)
    saver.begin(RunState(step=2, epoch=0, batch=0, batches_per_epoch=1, seed=0, precision="bf16", precision_ratio=None))
    saver.finish()
    layout.mesh.ranks.wait()
    last = stepped(kind, layout, parts, 1)
    found = []
    for again in (plan, other):
        fresh = laid_out(kind, again, how)
        resumed = parts_of(fresh, states)
        checkpoint = latest_checkpoint(folder).checkpoint
        assert checkpoint is not None
        restore_checkpoint(checkpoint, fresh.model, resumed.optimizer, None, fresh)
        found.append(stepped(kind, fresh, resumed, 1))
    return first, last, *found


CASES: dict[str, tuple[str, PlanConfig, PlanConfig, Weights, States]] = {
    "copies": ("sandwich", PlanConfig(), PlanConfig(tensor=2), "bf16-masters", "fp32"),
    "copies by nodes": (
        "sandwich",
        PlanConfig(reduction="hierarchical", per_node=2),
        PlanConfig(),
        "bf16-stochastic",
        "8bit",
    ),
    "tensor": ("sandwich", PlanConfig(tensor=2), PlanConfig(pipeline=2), "bf16-masters", "fp32"),
    "zero2": ("sandwich", PlanConfig(shard=4, sharding="zero2"), PlanConfig(), "bf16-kahan", "fp32"),
    "pipeline": ("sandwich", PlanConfig(pipeline=2), PlanConfig(), "bf16-kahan", "4bit"),
    "pipeline, backward cut": (
        "sandwich",
        PlanConfig(pipeline=2, chunks=2, schedule="zbv"),
        PlanConfig(pipeline=2),
        "bf16-stochastic",
        "fp32",
    ),
    "experts": ("decoder", PlanConfig(expert=2), PlanConfig(context=2), "bf16-masters", "fp32"),
}


QUICK = ("copies", "pipeline")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_a_layout_steps_as_one_process_and_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    kind, plan, other, how, states = CASES[name]
    alone = laid_out(kind, PlanConfig(), how)
    want = stepped(kind, alone, parts_of(alone, states), 3)
    found = run_ranks(gone_on, kind, plan, other, how, tmp_path, states, world=4)
    seen: dict[tuple[str, Any], Any] = {}
    for first, last, again, elsewhere in found:
        # 16 bits, in sums of another order, and steps as long whatever a gradient's size.
        np.testing.assert_allclose(first.losses + last.losses, want.losses, rtol=1e-2)
        np.testing.assert_allclose(first.norms + last.norms, want.norms, rtol=0.1)
        assert again.losses == last.losses
        np.testing.assert_allclose(elsewhere.losses, last.losses, rtol=1e-2)
        for weight, (value, offset) in again.weights.items():
            assert np.array_equal(value, last.weights[weight][0]), weight
            held = seen.setdefault((weight, (offset, value.shape)), value)
            assert np.array_equal(held, value), weight  # copies stay the same to the bit


def test_what_cannot_be_laid_out_is_said_before_anything_changes() -> None:
    plan = PlanConfig(shard=2)
    with pytest.raises(ConfigError, match=r"sharding=zero3 gathers .* train.weights=bf16-kahan .* Use sharding: zero2"):
        check_precision(plan, "bf16-kahan", "fp32")
    with pytest.raises(
        ConfigError, match=r"plan tensor=2 cuts weights, and the scales of .*states=4bit.*Use tensor: 1"
    ):
        check_precision(PlanConfig(tensor=2), "fp32", "4bit")
    with pytest.raises(ConfigError, match=r"sharding=zero1 steps rows of fp32 .* Use sharding: zero2"):
        check_precision(PlanConfig(shard=2, sharding="zero1"), "bf16-kahan", "fp32")
    disk = OffloadConfig(optimizer="disk")
    with pytest.raises(
        ConfigError, match=r"memory.offload lays fp32 .* train.weights=bf16-kahan is another format. Use"
    ):
        check_precision(PlanConfig(), "bf16-kahan", "fp32", disk)
    with pytest.raises(ConfigError, match=r"train.optimizer.states=8bit is another format. Use memory.offload: memory"):
        check_precision(PlanConfig(), "fp32", "8bit", disk)
    check_precision(PlanConfig(), "fp32", "fp32", disk)
    model = TinyModel()
    found = run_ranks(refused, world=2)
    assert all(message.startswith("plan sharding=zero3 gathers") and whole for message, whole in found)
    assert model.first.weight.dtype == torch.float32


def refused() -> tuple[str, bool]:
    model = build("sandwich")
    with pytest.raises(ConfigError) as found:
        prepare_model(model, PlanConfig(shard=2), Ranks(dist.group.WORLD), weights="bf16-masters")
    return str(found.value), all(p.dtype == torch.float32 for p in model.parameters())
