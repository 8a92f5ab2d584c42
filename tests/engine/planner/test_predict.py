import math
from typing import get_args

import pytest
from stacks import RECORDS, batches, build, loss_of

from dougong.core.errors import ConfigError
from dougong.data.position import WHOLE
from dougong.engine.memory.account import Account
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.planner.cluster import KNOWN, ClusterConfig
from dougong.engine.planner.predict import Activations, BytesConfig, Choice, bytes_of, predict, predict_least
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.planner.search import SearchConfig, describe, find_layouts
from dougong.engine.planner.shape import BlockShape, ModelShape, measure_shape, transformer_shape
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Weights
from dougong.engine.prepare import prepare_model
from dougong.engine.step import train_step

BLOCK = BlockShape(
    flops=8e12, touched=0, scores=0, cut=1000, experts=0, whole=0, kept=4e6, kept_whole=1e6, exchanged=6e9, passed=1e6
)
NOTHING = BLOCK._replace(flops=0, cut=0, kept=0, kept_whole=0, exchanged=0)
MODEL = ModelShape(NOTHING, (BLOCK,) * 8, NOTHING, num_records=2, num_heads=8, num_experts=0, tokens_shared=True)
EVEN = ClusterConfig(
    devices=1,
    per_node=8,
    memory_bytes=1e9,
    flops=1e12,
    memory_bandwidth=1e15,
    inside_bandwidth=1e12,
    across_bandwidth=1e11,
    latency_seconds=0,
    matmul_efficiency=1,
    link_efficiency=1,
)


def on(devices: int, **changes: float) -> ClusterConfig:
    return EVEN.model_copy(update={"devices": devices, **changes})


def test_one_device_does_a_forward_and_twice_that_backward() -> None:
    found = predict(MODEL, on(1), Choice(PlanConfig(), 3))
    assert found.seconds == pytest.approx(3 * 8 * 8 * 3)
    assert found.records_per_second == pytest.approx(6 / 576)
    assert found.state_bytes == (16 * 8000,)
    assert found.memory_bytes == (16 * 8000 + 8 * 5e6,)


def test_recomputing_is_one_more_forward_and_keeps_states_and_one_block() -> None:
    found = predict(MODEL, on(1), Choice(PlanConfig(), 1, Activations("nothing")))
    assert found.seconds == pytest.approx(8 * 8 * 4)
    # What each of the eight was given, and the rest of one block's own.
    assert found.memory_bytes == (16 * 8000 + 8e6 + 4e6,)


def test_what_products_give_is_kept_and_what_lies_between_them_made_anew() -> None:
    block = BLOCK._replace(products=2e6, products_whole=5e5, touched=8e12)
    model, slow = MODEL._replace(blocks=(block,) * 8), on(1, memory_bandwidth=4e12)
    whole = predict(model, slow, Choice(PlanConfig(), 1))
    found = predict(model, slow, Choice(PlanConfig(), 1, Activations("products")))
    between = 8e12 / 4e12
    assert found.work_seconds == pytest.approx(8 * (3 * (8 + between) + between))
    assert found.memory_bytes == (16 * 8000 + 8 * (1e6 + 2.5e6) + 1.5e6,)
    assert whole.seconds < found.seconds < predict(model, slow, Choice(PlanConfig(), 1, Activations("nothing"))).seconds


def test_blocks_may_keep_different_things_and_be_made_anew_together() -> None:
    every_second = Activations(("nothing", "all") * 4)
    found = predict(MODEL, on(1), Choice(PlanConfig(), 1, every_second))
    assert found.seconds == pytest.approx(8 * (8 * 3 + 4))
    # When the seventh is made anew, the eighth is done with.
    assert found.memory_bytes == (16 * 8000 + 4 * 1e6 + 4 * 5e6,)
    assert describe(found.choice).endswith("1 micro-batch, recompute some blocks")
    pairs = predict(MODEL, on(1), Choice(PlanConfig(), 1, Activations("nothing", segment=2)))
    assert pairs.memory_bytes == (16 * 8000 + 4 * 1e6 + 2 * 5e6 - 1e6,)
    # The last segment is not full; when the one before it is made anew, it is done with.
    threes = predict(MODEL, on(1), Choice(PlanConfig(), 1, Activations("nothing", segment=3)))
    assert threes.memory_bytes == (16 * 8000 + 2 * 1e6 + 3 * 5e6 - 1e6,)


def test_what_is_saved_elsewhere_leaves_two_blocks_and_takes_the_way_there_and_back() -> None:
    whole = predict(MODEL, on(1), Choice(PlanConfig(), 3))
    away = predict(MODEL, on(1, disk_bandwidth=1e5), Choice(PlanConfig(), 3, Activations(saved="disk")))
    assert away.memory_bytes == (16 * 8000 + 2 * 5e6,)
    assert (away.host_bytes, away.disk_bytes) == (0, 8 * 5e6)
    assert away.seconds == pytest.approx(3 * 2 * 8 * 5e6 / 1e5)
    hidden = predict(MODEL, on(1, disk_bandwidth=1e9), Choice(PlanConfig(), 3, Activations(saved="disk")))
    assert hidden.seconds == pytest.approx(whole.seconds)
    host = predict(MODEL, on(1), Choice(PlanConfig(), 1, Activations("nothing", saved="host")))
    assert (host.host_bytes, host.disk_bytes) == (8 * 1e6, 0)
    half = predict(MODEL, on(1), Choice(PlanConfig(), 1, Activations(saved_as="bf16")))
    assert half.memory_bytes == (16 * 8000 + 8 * 2.5e6,)
    assert describe(host.choice).endswith("recompute, activations in the host's memory")


def test_a_rank_that_holds_several_micro_batches_has_put_away_all_of_them() -> None:
    away = predict(MODEL, on(2), Choice(PlanConfig(pipeline=2, schedule="gpipe"), 4, Activations(saved="disk")))
    assert away.disk_bytes == 2 * 4 * 4 * 5e6  # both ranks are in one node
    assert away.memory_bytes[0] == 16 * 4000 + 2 * 5e6


@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize("states", get_args(States))
def test_bytes_of_a_parameter_are_those_that_a_step_holds(weights: Weights, states: States) -> None:
    for accumulation in (1, 2):
        model = build("decoder")
        said = bytes_of(model, weights, states, accumulation=accumulation)
        count = sum(p.numel() for p in model.parameters())
        layout = prepare_model(model, PlanConfig(), Ranks(None), accumulation=accumulation, weights=weights)
        optimizer = OptimizerConfig(states=states).build(model, layout.narrowed)
        parts = layout.parts(loss_of, optimizer, precision="bf16" if weights != "fp32" else "fp32")
        own = batches("decoder", layout.mesh.share)[:accumulation]
        train_step(parts, own, num_records=RECORDS)
        account = Account(model, optimizer)
        with account:
            train_step(parts, own, num_records=RECORDS)
        assert said.weight * count == pytest.approx(account.bytes.weights, rel=1e-3)
        assert said.gradient * count == pytest.approx(account.bytes.gradients, rel=1e-3)
        assert said.optimizer * count == pytest.approx(account.bytes.optimizer, rel=5e-3)


def test_formulas_rank_what_blocks_may_keep_as_a_rehearsal_does() -> None:
    """And are no further from it than where all is kept: they leave out what lies between two operations."""
    for kind in ("decoder", "sandwich"):
        model = build(kind)
        shape = measure_shape(model, batches(kind, WHOLE)[0], loss_of)
        count = len(shape.blocks)
        said, held = [], []
        for how in (Activations(), Activations("products"), Activations("nothing")):
            found = predict(shape, on(1), Choice(PlanConfig(), 1, how))
            said.append(found.peak_bytes - found.state_bytes[0])
            what = Rehearsal(
                build=lambda kind=kind: build(kind),  # type: ignore[misc]
                batches=lambda share, kind=kind: batches(kind, share)[:1],  # type: ignore[misc]
                loss=loss_of,
                optimizer=OptimizerConfig().build,
                keep=how.keeps(count),
            )
            held.append(rehearse(what, PlanConfig(), 1, 0).activations)
        assert sorted(said, reverse=True) == said
        assert sorted(held, reverse=True) == held
        for ours, theirs in zip(said, held, strict=True):
            assert 0.55 < ours / theirs < 1.25, (kind, said, held)


def test_an_optimizer_in_the_hosts_memory_takes_none_here_and_the_way_there_and_back() -> None:
    big = MODEL._replace(blocks=tuple(block._replace(cut=10**9) for block in MODEL.blocks))
    here = predict(big, on(1), Choice(PlanConfig(), 1))
    away = predict(big, on(1, host_bandwidth=1e9), Choice(PlanConfig(), 1, offload="host"))
    assert here.state_bytes[0] - away.state_bytes[0] == 8 * 8e9
    assert away.optimizer_seconds == pytest.approx((4 + 4) * 8e9 / 1e9)
    assert not away.can_be_carried_out
    assert (away.host_bytes, away.disk_bytes) == (8 * 8e9, 0)


def test_state_on_the_disk_leaves_two_blocks_here_and_takes_the_disks_time() -> None:
    big = MODEL._replace(blocks=tuple(block._replace(cut=10**9) for block in MODEL.blocks))
    here = predict(big, on(1), Choice(PlanConfig(), 2))
    away = predict(big, on(1, disk_bandwidth=1e9, maps_files=True), Choice(PlanConfig(), 2, offload="disk"))
    each = sum(big.blocks[0][n] for n in (3, 5))
    assert away.state_bytes == pytest.approx((12 * each,))
    assert away.disk_bytes == here.state_bytes[0] == pytest.approx(16 * 8e9, rel=1e-3)
    assert away.host_bytes == pytest.approx(2 * 16 * each)
    # Weights twice for each micro-batch and gradients once beside the work, then all read, all but gradients written.
    streamed, stepped = (2 * 2 * 4 + 4) * 8.0, (2 * (4 + 8) + 4) * 8.0
    assert away.seconds == pytest.approx(max(streamed, here.seconds - here.optimizer_seconds) + stepped, rel=1e-3)
    assert away.can_be_carried_out
    assert not predict(big, on(1), Choice(PlanConfig(), 2, offload="disk")).can_be_carried_out


def test_tensor_ranks_share_the_work_and_exchange_what_they_add_up() -> None:
    found = predict(MODEL, on(4), Choice(PlanConfig(tensor=4), 1))
    exchange = 2 * 3 / 4 * 6e9 / 1e12
    assert found.seconds == pytest.approx(8 * (3 * 8 / 4 + 2 * exchange))
    assert found.memory_bytes[0] == 16 * 2000 + 8 * 5e6 / 4
    whole = predict(MODEL, on(4), Choice(PlanConfig(tensor=4, sequence=False), 1))
    assert whole.memory_bytes[0] == 16 * 2000 + 8 * (4e6 / 4 + 1e6)
    # What enters cut layers is put together on every rank, even where tokens are shared out.
    entering = MODEL._replace(blocks=tuple(block._replace(entered=3e6) for block in MODEL.blocks))
    again = predict(entering, on(4), Choice(PlanConfig(tensor=4), 1))
    assert again.memory_bytes[0] - found.memory_bytes[0] == 8 * 3e6


def test_a_pipeline_waits_as_its_schedule_does_and_holds_what_is_under_way() -> None:
    found = predict(MODEL, on(4, inside_bandwidth=1e30), Choice(PlanConfig(pipeline=4), 8))
    # Two blocks to a stage: 8 micro-batches, and three more to fill and to empty.
    assert found.seconds == pytest.approx((8 + 3) * 2 * 8 * 3)
    assert found.waiting_ratio == pytest.approx(3 / 11)
    assert found.memory_bytes == tuple(16 * 2000 + held * 2 * 5e6 for held in (4, 3, 2, 1))


def test_gradients_of_copies_are_exchanged_once_and_spmapped_weights_gathered_twice() -> None:
    big = MODEL._replace(blocks=tuple(block._replace(cut=10**9) for block in MODEL.blocks))
    one = predict(big, on(1), Choice(PlanConfig(), 1)).seconds
    copies = predict(big, on(4), Choice(PlanConfig(), 1))
    assert copies.seconds - one == pytest.approx(2 * 3 / 4 * 4 * 8e9 / 1e12)
    spread = predict(big, on(4), Choice(PlanConfig(shard=4), 1))
    put = 2 * 2 * 4 * 8e9 / on(4).memory_bandwidth  # what was gathered, twice, is read and written
    assert spread.data_seconds == pytest.approx(3 * 3 / 4 * 4 * 8e9 / 1e12 + put)
    # Each micro-batch gathers and spreads anew, where copies exchange once a step.
    assert predict(big, on(4), Choice(PlanConfig(shard=4), 5)).data_seconds == pytest.approx(5 * spread.data_seconds)
    assert predict(big, on(4), Choice(PlanConfig(), 5)).data_seconds == copies.data_seconds
    assert spread.state_bytes[0] == 16 * 8e9 / 4 + 2 * 4 * 1e9
    # With the optimizer alone spread, gradients and weights go once a step each, as many bytes as copies exchange.
    first = predict(big, on(4), Choice(PlanConfig(shard=4, sharding="zero1"), 5))
    put = 2 * (4 + 4) * 8e9 / on(4).memory_bandwidth
    assert first.data_seconds == pytest.approx(copies.data_seconds + put)
    assert first.optimizer_seconds == pytest.approx(copies.optimizer_seconds / 4)
    assert first.state_bytes[0] == (4 + 4 + 8 / 4) * 8e9
    # Over two nodes all devices of a node send across together.
    far = predict(big, on(16), Choice(PlanConfig(), 1))
    assert far.data_seconds == pytest.approx(2 * 15 / 16 * 4 * 8e9 / (8 * 1e11))


def test_the_published_memory_of_zero() -> None:
    """Rajbhandari et al. 2020, table 1: 7.5 B parameters over 64 ranks, 16 bytes each, in gigabytes."""
    model = MODEL._replace(blocks=(BLOCK._replace(cut=7_500_000_000, kept=0, kept_whole=0),))
    mixed = BytesConfig(weight=2, gradient=2, optimizer=12)
    whole = predict(model, on(64), Choice(PlanConfig(), 1), mixed)
    assert whole.state_bytes[0] / 1e9 == pytest.approx(120)
    spread = predict(model, on(64), Choice(PlanConfig(shard=64), 1), mixed)
    # Beside what rests, what a block needs gathered while it works: here the whole model is one block.
    assert (spread.state_bytes[0] - 4 * 7.5e9) / 1e9 == pytest.approx(1.875)
    optimizer_alone = predict(model, on(64), Choice(PlanConfig(shard=64, sharding="zero1"), 1), mixed)
    assert optimizer_alone.state_bytes[0] / 1e9 == pytest.approx(31.4, abs=0.05)


def test_what_is_found_fits_and_the_fastest_comes_first() -> None:
    model = transformer_shape(width=4096, num_layers=32, num_heads=32, vocabulary=32000, tokens=2048, records=1)
    cluster = KNOWN["a100-80g"].model_copy(update={"devices": 16})
    found = find_layouts(model, cluster, SearchConfig(records=64), BytesConfig(weight=2, gradient=4, optimizer=12))
    seconds = [each.seconds for each in found.predictions]
    assert seconds == sorted(seconds)
    assert all(each.peak_bytes <= 0.9 * 80e9 for each in found.predictions)
    assert len(found.predictions) == 10 < found.considered
    for each in found.predictions:
        plan = each.choice.plan
        shares = 16 // (plan.tensor * plan.pipeline)
        assert each.choice.micro_batches * shares == 64
    assert "micro-batches" in describe(found.predictions[0].choice)


def test_what_is_not_looked_at_would_not_have_been_told() -> None:
    """Most layouts are left out by what they take at least: what is told is what looking at all of them tells."""
    model = transformer_shape(width=1024, num_layers=8, num_heads=8, vocabulary=32000, tokens=512, records=1)
    cluster = KNOWN["a100-80g"].model_copy(update={"devices": 8, "memory_bytes": 3e9})
    search = SearchConfig(
        records=32,
        micro_batches=(1, 4, 32),
        precisions=("bf16",),
        activations=(Activations("products"), Activations("nothing", segment=2)),
        offload=("none", "host", "disk"),
        most=7,
    )
    few, all_of_them = (find_layouts(model, cluster, search.model_copy(update={"most": n})) for n in (7, 100_000))
    assert few.predictions == all_of_them.predictions[:7]
    assert few.considered == all_of_them.considered > len(all_of_them.predictions) > 100
    spread = {
        (p.sharding, p.pipeline > 1) for p in (each.choice.plan for each in all_of_them.predictions) if p.shard > 1
    }
    assert spread == {("zero1", False), ("zero2", False), ("zero3", False), ("zero1", True), ("zero2", True)}
    for each in all_of_them.predictions:
        shares = 8 // (each.choice.plan.tensor * each.choice.plan.pipeline)
        shape = model.of_records(math.ceil(32 / each.choice.micro_batches / shares))
        least = predict_least(shape, cluster, each.choice)
        assert least.seconds <= each.seconds * (1 + 1e-9)
        assert least.bytes <= each.peak_bytes * (1 + 1e-9)


def test_bf16_has_its_own_pace_half_the_activations_and_copies_of_the_weights() -> None:
    cluster = on(1, fp32_flops=2.5e11)
    half = predict(MODEL, cluster, Choice(PlanConfig(), 1, precision="bf16"))
    whole = predict(MODEL, cluster, Choice(PlanConfig(), 1, precision="fp32"))
    assert whole.seconds == pytest.approx(4 * half.seconds)
    assert whole.memory_bytes == (16 * 8000 + 8 * 5e6,)
    assert half.memory_bytes == (16 * 8000 + 2 * 8000 + 8 * 5e6 / 2,)


def test_the_rank_with_most_records_sets_the_pace() -> None:
    search = SearchConfig(records=10, micro_batches=(2,), most=1000)
    found = find_layouts(MODEL, on(4), search).predictions
    copies = next(each for each in found if each.choice.plan == PlanConfig())
    # Five records on four ranks: one has two.
    assert copies.seconds == pytest.approx(predict(MODEL, on(4), Choice(PlanConfig(), 2)).seconds)
    assert copies.records_per_second == pytest.approx(10 / copies.seconds)


def test_too_little_memory_names_the_smallest_layout() -> None:
    model = transformer_shape(width=4096, num_layers=32, num_heads=32, vocabulary=32000, tokens=2048, records=1)
    with pytest.raises(ConfigError, match=r"no layout of 2 devices fits 0\.0838 GiB each: the smallest takes"):
        find_layouts(model, on(2, memory_bytes=1e8), SearchConfig(records=8))
    with pytest.raises(ConfigError, match="7 records a step cannot be shared out to 2 devices in micro-batches of 2"):
        find_layouts(MODEL, on(2), SearchConfig(records=7))
