"""Gradients that go out while the backward is under way, beside those that go out after it."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import SGD

from dougong.data.position import Share
from dougong.engine.parallel import early
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.step import TrainParts, train_step
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

RECORDS = 8


class Deep(BlockStack[Any, Tensor]):
    """Six layers; the third has no part in an answer to records without `extra`, the last never has."""

    def __init__(self, gathers: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(7))
        self.blocks = nn.ModuleList()
        self.gathers = gathers
        self.sent: list[int] = []

    def embed(self, batch: Batch) -> Any:
        return batch

    def head(self, state: Any) -> Tensor:
        media = state.media["extra"]
        x = state.media["x"].values["x"]
        for place in (0, 1, 3, 4, 5):
            x = torch.tanh(self.layers[place](x))
            if place == 1 and bool(media.present_B.any()):
                x = x + self.layers[2](x) * media.present_B[:, None]
            if place == 0 and self.gathers:  # after what some ranks lack, as a backward goes
                x = _Gathered.apply(x)  # type: ignore[no-untyped-call]
        return x


class _Gathered(torch.autograd.Function):
    """An exchange of all ranks within the backward, as a loss may have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if dist.is_initialized():
            total = gradient.sum(dim=0)
            dist.all_reduce(total)
        return gradient.clone()


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    return (output - 0.5).square().sum()


def batch_of(number: int, extra: str, share: Share) -> Batch:
    """`extra` has a letter for each record: y or n."""
    x_BD = torch.randn(RECORDS, 16, generator=torch.Generator().manual_seed(number))[share.of(RECORDS)]
    there_B = torch.tensor([letter == "y" for letter in extra])[share.of(RECORDS)]
    index_B = torch.arange(len(x_BD))
    media = {
        "x": MediaBatch({"x": x_BD}, index_B, torch.ones_like(there_B)),
        "extra": MediaBatch({"x": x_BD}, index_B, there_B),
    }
    return Batch(media, None)


def stepped(extras: list[str], gathers: bool, bucket_bytes: int) -> tuple[Any, ...]:
    """Two steps over two micro-batches for each pattern: weights, losses, norms, and how many buckets had been sent
    when the backward ended."""
    group = dist.group.WORLD if dist.is_initialized() else None
    share = Share() if group is None else Share(dist.get_rank(), dist.get_world_size())
    model = Deep(gathers)
    sent: list[int] = []
    if group is None:
        parts = TrainParts(model, loss_of, SGD(model.parameters(), lr=0.05))
    else:
        with mock.patch.object(early, "EARLY_BYTES", bucket_bytes):  # ranks go on to other tests
            layout = prepare_model(model, PlanConfig(), Ranks(group), accumulation=2)
        parts = layout.parts(loss_of, SGD(model.parameters(), lr=0.05))
        assert (layout.early is None) == (bucket_bytes > 2**20)
        if layout.early is not None:
            settle = layout.early.settle

            def counted(loss: Tensor) -> Tensor:
                assert layout.early is not None
                sent.append(layout.early.num_sent)
                return settle(loss)

            layout.early.settle = counted  # type: ignore[method-assign]
    reports = [
        train_step(parts, [batch_of(turn, extra, share), batch_of(turn + 9, extra, share)], num_records=2 * RECORDS)
        for extra in extras
        for turn in range(2)
    ]
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    return model.state_dict(), [(r.loss, r.grad_norm) for r in reports], sent, without


LAYERS = 16 * 16 * 4 + 64
"""Bytes of one."""


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_steps_are_those_of_one_process_whatever_each_rank_lacks(world: int, gathers: bool) -> None:
    extras = ["yyyyyyyy", "yyyynnnn", "nnnnnnnn", "nnyyyyyy"]
    weights, figures, _, without = stepped(extras, gathers, 0)

    found = run_ranks(stepped, extras, gathers, LAYERS, world=world)

    for name, value in weights.items():
        for own, *_ in found:
            torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)
            assert torch.equal(own[name], found[0][0][name])
    for _, reported, _, lacking in found:
        for one, wanted in zip(reported, figures, strict=True):
            assert one == pytest.approx(wanted, rel=1e-5)
        assert lacking == without == ["layers.6.weight", "layers.6.bias"]


def test_most_have_left_before_the_backward_ends() -> None:
    for _, _, sent, _ in run_ranks(stepped, ["yyyyyyyy"], False, LAYERS, world=2):
        # The last layer never has a gradient: only after the first step is that known, and it is not waited for.
        assert sent == [0, 7]


def test_a_model_of_one_bucket_is_added_up_afterwards() -> None:
    (_, figures, sent, _), _ = run_ranks(stepped, ["yyyyyyyy"], False, 2**22, world=2)
    assert sent == []
    assert figures[0] == pytest.approx(stepped(["yyyyyyyy"], False, 0)[1][0], rel=1e-5)
