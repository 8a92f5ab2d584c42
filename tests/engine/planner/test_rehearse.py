"""What a rank will hold, said before there are ranks, against what is counted on them."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from ranks import run_ranks
from stacks import MICRO_BATCHES, RECORDS, batches, build, loss_of

from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.prepare import prepare_model
from dougong.engine.step import train_step

WORLD = 4
LAYOUTS = {
    "copies": PlanConfig(),
    "tensor 2 x data 2": PlanConfig(tensor=2),
    "pipeline 2 x data 2": PlanConfig(pipeline=2),
    "pipeline 2 zbv x data 2": PlanConfig(pipeline=2, chunks=2, schedule="zbv"),
    "zero3 over 4": PlanConfig(shard=4, gathered_bytes=0),
    "zero3 over 4, all gathered together": PlanConfig(shard=4),
    "zero1 over 4": PlanConfig(shard=4, sharding="zero1"),
    "hybrid 2 x 2": PlanConfig(shard=2, gathered_bytes=0),
    "context 2 x data 2": PlanConfig(context=2),
    "context 4, heads for tokens": PlanConfig(context=4, context_form="swap"),
}


def rehearsal(kind: str, *, unreal: bool = False) -> Rehearsal:
    return Rehearsal(
        build=lambda: build(kind),
        batches=lambda share: batches(kind, share),
        loss=loss_of,
        optimizer=OptimizerConfig().build,
        unreal=unreal,
    )


def counted(kind: str, plan: PlanConfig) -> StepBytes:
    """On a rank, in a step of the engine."""
    model = build(kind)
    layout = prepare_model(model, plan, Ranks(dist.group.WORLD), accumulation=MICRO_BATCHES)
    optimizer = OptimizerConfig().build(model)
    layout.share_out(optimizer)
    parts = layout.parts(loss_of, optimizer)
    own = batches(kind, layout.mesh.share)
    train_step(parts, own, num_records=RECORDS)
    account = Account(model, parts.optimizer)
    with account:
        train_step(parts, own, num_records=RECORDS)
    return account.bytes


QUICK = {
    ("decoder", "tensor 2 x data 2"),
    ("decoder", "context 2 x data 2"),
    ("decoder", "zero1 over 4"),
    ("sandwich", "copies"),
    ("sandwich", "zero3 over 4, all gathered together"),
    ("sandwich", "pipeline 2 zbv x data 2"),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
        for kind in ("decoder", "sandwich")
        for name, plan in LAYOUTS.items()
        if kind == "decoder" or plan.context == 1
    ],
)
def test_every_rank_holds_what_was_said_within_a_twentieth(kind: str, name: str) -> None:
    found = run_ranks(counted, kind, LAYOUTS[name], world=WORLD)

    for rank in (0, WORLD - 1):  # of the first stage and of the last
        said = rehearse(rehearsal(kind), LAYOUTS[name], WORLD, rank)
        assert found[rank].gradients == pytest.approx(found[rank].weights, rel=0.05)  # all of them have one
        for what in StepBytes._fields:
            assert getattr(said, what) == pytest.approx(getattr(found[rank], what), rel=0.05), (rank, what)


@pytest.mark.slow
def test_a_rank_of_512_is_rehearsed_without_numbers() -> None:
    plan = PlanConfig(pipeline=2)
    said = rehearse(rehearsal("decoder", unreal=True), plan, WORLD, WORLD - 1)
    assert said == pytest.approx(rehearse(rehearsal("decoder"), plan, WORLD, WORLD - 1), rel=0.01)

    one = rehearse(rehearsal("decoder", unreal=True), PlanConfig(tensor=4, pipeline=4), 512, 511)
    assert 0 < one.weights < said.weights / 2


def test_a_rank_cannot_rehearse() -> None:
    (told,) = run_ranks(rehearsed_on_a_rank, world=1)
    assert told == "a rank cannot rehearse: it has a process group of its own"


def rehearsed_on_a_rank() -> str:
    with pytest.raises(RuntimeError) as found:
        rehearse(rehearsal("sandwich"), PlanConfig(), WORLD, 0)
    return str(found.value)
