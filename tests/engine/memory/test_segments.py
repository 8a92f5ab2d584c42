"""Blocks compiled together train as blocks made anew one by one, and stand aside where they do not pay."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from ranks import run_ranks
from stacks import RECORDS, batches, build, loss_of
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.data.position import Share
from dougong.engine import prepare
from dougong.engine.memory.account import Alive
from dougong.engine.memory.allocated import most_allocated
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.memory.saved import SavedAs, apply_saved
from dougong.engine.memory.segments import apply_segments, check_segments, choose_segments, sizes_of
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.step import TrainParts, train_step
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

TRACED = "aot_eager"
"""Traces, cuts out what is made anew, and runs torch's own operations: all but the code that is generated."""


class Widen(nn.Module):
    """A block with dropout, and a buffer that moves in each forward."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("passes", torch.zeros(()))

    passes: Tensor

    def forward(self, x_BD: Tensor) -> Tensor:
        self.passes.add_(1)
        y_BD: Tensor = self.drop(self.narrow(torch.nn.functional.gelu(self.wide(self.norm(x_BD)))))
        return x_BD + y_BD


class Asks(Widen):
    """Decides from numbers, which no graph can."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return super().forward(x_BD) if x_BD.sum() < 1e9 else x_BD


class Stack(BlockStack[Tensor, Tensor]):
    embed_names = ()

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def embed(self, batch: Batch) -> Tensor:
        return batch.media["x"].values["x_BD"]

    def head(self, state: Tensor) -> Tensor:
        return state


def stack(num_blocks: int = 4, dropout: float = 0.0, kind: type[Widen] = Widen) -> Stack:
    torch.manual_seed(0)
    return Stack([kind(16, dropout) for _ in range(num_blocks)]).train()


def numbers(records: int = 32) -> Batch:
    x_BD = torch.randn(records, 16, generator=torch.Generator().manual_seed(records))
    every_B = torch.arange(records)
    return Batch({"x": MediaBatch({"x_BD": x_BD}, every_B, every_B >= 0)}, None)


def squares(output: Tensor, _: Batch) -> Tensor:
    return output.square().sum()


def gradients(model: BlockStack[Any, Any], batch: Batch, loss: Any = squares, dtype: Any = None) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        value = loss(model(batch), batch).float()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_segments_are_the_blocks_within_rounding(size: int) -> None:
    plain, model = stack(), stack()
    segments = apply_segments(model, size, backend=TRACED)
    assert list(model.state_dict()) == list(plain.state_dict())
    for records in (32, 7, 19):  # a first change of sizes makes them variable
        assert apart(gradients(model, numbers(records)), gradients(plain, numbers(records))) < 1e-5
    assert [block.passes.item() for block in model.blocks] == [3.0] * 4  # once each, not once more when made anew
    assert sum(segment.eager for segment in segments) == 0
    with torch.no_grad():
        assert torch.equal(model(numbers()), plain(numbers()))


@pytest.mark.parametrize("saved_as", ["same", pytest.param("bf16", marks=pytest.mark.slow)])
def test_what_a_segment_was_given_can_lie_on_the_disk(tmp_path: Path, saved_as: SavedAs) -> None:
    plain, model, batch = stack(), stack(), numbers(256)
    apply_segments(plain, 2, backend=TRACED)
    apply_segments(model, 2, backend=TRACED)
    counted = apply_saved(model, "disk", saved_as, folder=tmp_path, small_bytes=0)
    wanted = gradients(plain, batch)
    found = gradients(model, batch)
    assert torch.equal(found, wanted) if saved_as == "same" else apart(found, wanted) < 0.02
    # Of each of two segments, what it was given: the first has numbers that need no gradient.
    bytes_each = 4 * batch.media["x"].values["x_BD"].numel()
    assert counted.moved == (2 * bytes_each if saved_as == "same" else bytes_each)
    assert counted.rounded == (0 if saved_as == "same" else 2 * bytes_each)


def test_dropout_draws_the_same_when_made_anew() -> None:
    torch.manual_seed(0)
    drop = Stack([nn.Dropout(0.5), nn.Dropout(0.5)]).train()
    apply_segments(drop, 2, backend=TRACED)
    batch = numbers()
    x_BD = batch.media["x"].values["x_BD"].requires_grad_()
    y_BD = drop(batch)
    y_BD.sum().backward()
    assert 0.6 < (y_BD == 0).float().mean() < 0.9
    assert torch.allclose(x_BD.grad * x_BD, y_BD)


def test_only_what_a_segment_was_given_is_kept() -> None:
    model, batch = stack(8), numbers(256)
    apply_segments(model, 4, backend=TRACED)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch)
    weights = {p.data_ptr() for p in model.parameters()}
    assert len([x for x in kept if x.data_ptr() not in weights]) == 2  # of two segments


def test_what_cannot_be_compiled_is_made_anew_by_itself() -> None:
    plain, model = stack(), stack()
    for each in (plain, model):
        each.blocks[2] = stack(1, kind=Asks).blocks[0]
    segments = apply_segments(model, 4, backend=TRACED)
    with pytest.warns(UserWarning, match="a segment of Asks cannot be compiled and is made anew by itself"):
        found = gradients(model, numbers())
    assert apart(found, gradients(plain, numbers())) < 1e-5
    assert apart(gradients(model, numbers()), found) == 0  # and it is said once
    assert [segment.eager for segment in segments] == [1]
    assert [block.passes.item() for block in model.blocks] == [2.0] * 4


def test_too_many_kinds_of_shapes_are_made_anew_block_by_block() -> None:
    class Pick(nn.Module):
        def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.sin() for name, x in state.items()}

    class Picks(Stack):
        given = 1

        def embed(self, batch: Batch) -> Any:
            x_BD = batch.media["x"].values["x_BD"].requires_grad_()
            return {f"{place}": x_BD for place in range(self.given)}

        def head(self, state: Any) -> Tensor:
            return sum(state.values())

    model = Picks([Pick(), Pick()]).train()
    apply_segments(model, 2, backend=TRACED)

    def go_through(numbers_given: list[int]) -> None:
        for given in numbers_given:
            model.given = given
            batch = numbers()
            assert torch.allclose(model(batch), given * batch.media["x"].values["x_BD"].sin().sin())

    with pytest.warns(UserWarning, match="a segment of Pick comes in more than 8 kinds of shapes") as told:
        go_through([*range(1, 12), 3])
    assert len(told) == 1


def test_a_block_called_by_itself_does_its_own_work() -> None:
    plain, model = stack(), stack()
    apply_segments(model, 2, backend=TRACED)
    x_BD = torch.randn(3, 16)
    assert torch.equal(model.blocks[1](x_BD), plain.blocks[1](x_BD))


@pytest.mark.parametrize("kind", ["sandwich", "decoder"])
@pytest.mark.filterwarnings("ignore:memory.segments. a segment of JoinBlock cannot be compiled")
@pytest.mark.slow
def test_models_of_every_kind(kind: str) -> None:
    losses = []
    own = batches(kind, Share())[:1]
    for size in (None, 2):
        model = build(kind).train()
        if size is not None:
            apply_segments(model, size, backend=TRACED)
        parts = TrainParts(model, loss_of, OptimizerConfig().build(model))
        losses.append([train_step(parts, own, num_records=RECORDS).loss for _ in range(3)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_stages_have_segments_of_their_own() -> None:
    run_ranks(as_blocks_on_ranks, world=2)


def as_blocks_on_ranks() -> None:
    traced = functools.partial(apply_segments, backend=TRACED)
    for plan in (PlanConfig(), PlanConfig(pipeline=2), PlanConfig(pipeline=2, chunks=2, schedule="zbv")):
        losses = []
        for size in (None, 4):
            model = stack(8)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prepare, "apply_segments", traced)
                layout = prepare.prepare_model(model, plan, Ranks(dist.group.WORLD), accumulation=2, segments=size)
            parts = layout.parts(squares, OptimizerConfig().build(model))
            losses.append([train_step(parts, [numbers(6), numbers(9)], num_records=15).loss for _ in range(3)])
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), plan


@pytest.mark.slow
def test_generated_code_is_right_in_both_formats() -> None:
    plain, model = stack(2), stack(2)
    apply_segments(model, 2)
    exact = gradients(plain, numbers())
    assert apart(gradients(model, numbers()), exact) < 1e-5
    rounded = apart(gradients(plain, numbers(), dtype=torch.bfloat16), exact)
    assert apart(gradients(model, numbers(), dtype=torch.bfloat16), exact) < 1.5 * rounded


def test_what_is_handed_out_is_what_operations_make() -> None:
    model, batch = build("sandwich").train(), batches("sandwich", Share())[0]

    def run() -> None:
        loss_of(model(batch), batch).backward()

    run()
    model.zero_grad()
    alive = Alive(model.parameters())
    with alive:
        run()
    model.zero_grad()
    assert most_allocated(run) == pytest.approx(alive.peak, rel=0.01)


def test_a_choice_leaves_no_trace_and_is_off_where_nothing_pays() -> None:
    model = stack(8, dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    choice = choose_segments(model, squares, numbers(256), sizes=(8,), pairs=1, backend=TRACED)
    (tried,) = choice.tried
    assert tried.bytes > choice.bytes  # of all blocks' activations at once, not one block's
    assert tried.ratio is None  # so that its time does not count
    assert choice.size is None
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all("forward" not in vars(block) for block in model.blocks)
    assert all(p.grad is None for p in model.parameters())


def test_sizes_that_are_tried() -> None:
    assert sizes_of(1) == (1,)
    assert sizes_of(8) == (1, 2, 4, 8)
    assert sizes_of(11) == (1, 2, 4, 8, 11)


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert MemoryConfig(recompute="blocks", segments="auto").segments == "auto"
    with pytest.raises(ValidationError, match=r"segments=2 makes all blocks anew, and recompute=none"):
        MemoryConfig(segments=2)
    with pytest.raises(ValidationError, match=r"with every=2 does not"):
        MemoryConfig(recompute="blocks", every=2, segments=2)
    with pytest.raises(ValidationError, match=r"segments=0 must be at least 1 block"):
        MemoryConfig(recompute="blocks", segments=0)
    check_segments(PlanConfig(pipeline=2))
    with pytest.raises(ConfigError, match=r"with plan tensor=2 ranks exchange something"):
        check_segments(PlanConfig(tensor=2))
