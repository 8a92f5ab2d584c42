"""What a step holds, moment by moment, is what the account counts, and each byte is somebody's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stacks import batches, build, loss_of
from torch import Tensor, nn

from dougong.data.position import Share
from dougong.engine.memory.account import Account
from dougong.engine.memory.recompute import KEEPS, Keep, apply_recompute
from dougong.engine.memory.timeline import Series, Timeline, fewer_moments, moments_in_time, timeline_of
from dougong.engine.memory.visits import Visit, parts_of, timed_visits, visits_told
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.step import Backward, TrainParts, train_step
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

STEPS: list[tuple[str, Keep]] = [
    ("decoder", "products"),
    ("sandwich", "all"),
    ("sandwich", "nothing"),
    *(("convnet", keep) for keep in KEEPS),
]


class Subject(NamedTuple):
    parts: TrainParts
    step: Callable[[TrainParts], Any]


def subject(
    kind: str, keep: Keep = "all", precision: Any = "fp32", backward: Backward | None = None, num_batches: int = 2
) -> Subject:
    """After a first step."""
    model = build(kind).train()
    apply_recompute(model, [keep] * len(model.blocks))
    parts = TrainParts(model, loss_of, OptimizerConfig().build(model), precision=precision, backward=backward)
    own = batches(kind, Share())[:num_batches]
    step = functools.partial(train_step, batches=own, num_records=sum(batch.num_records for batch in own))
    torch.manual_seed(0)
    step(parts)
    return Subject(parts, step)


class Logged(Account):
    """Every change of what is there."""

    def __init__(self, parts: TrainParts) -> None:
        super().__init__(parts.model, parts.optimizer)
        self.changes: list[int] = [0]
        self.logging = True

    def _changed(self, storage: torch.UntypedStorage, by: int) -> None:
        super()._changed(storage, by)
        self.changes.append(self.now)

    def _gone(self, key: int) -> None:
        super()._gone(key)
        if self.logging:
            self.changes.append(self.now)


def without_repeats(values: Sequence[int]) -> list[int]:
    return [values[0], *(after for before, after in pairwise(values) if after != before)]


@pytest.mark.parametrize(("kind", "keep"), STEPS)
def test_the_series_add_up_to_what_is_there_at_every_moment(kind: str, keep: Keep) -> None:
    num_batches = 1 if kind == "decoder" else 2
    counted, followed = (subject(kind, keep, num_batches=num_batches) for _ in range(2))
    account = Logged(counted.parts)
    with account:
        counted.step(counted.parts)
    account.logging = False

    found = timeline_of(followed.step, followed.parts)

    held = account.bytes
    assert found.held == held
    assert int(found.total.max()) == held.peak
    assert (found.bytes >= 0).all()
    there = found.total - held.weights - held.optimizer
    assert without_repeats(there.tolist()) == without_repeats(account.changes)


class Exponential(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD.exp()


class Tiny(BlockStack[Tensor, Tensor]):
    """(B, D) times a weight for each channel; its exponential; summed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.full((32,), 0.1))
        self.blocks = nn.ModuleList([Exponential()])

    def embed(self, batch: Batch) -> Tensor:
        y_BD = batch.media["x"].values["x_UD"] * self.weight_D
        twice_BD = y_BD.detach() * 2
        del twice_BD  # the last that happens here
        return y_BD

    def head(self, state: Tensor) -> Tensor:
        return state.sum(dim=1)


def test_a_tiny_model_holds_what_can_be_reckoned_by_hand() -> None:
    model, every_B = Tiny().train(), torch.arange(8)
    media = MediaBatch({"x_UD": torch.ones(8, 32)}, every_B, torch.ones(8).bool())
    parts = TrainParts(model, lambda output, _: output.sum(), OptimizerConfig().build(model), max_grad_norm=None)
    step = functools.partial(train_step, batches=[Batch({"x": media}, None)], num_records=8)
    step(parts)

    found = timeline_of(step, parts)

    state, weight = 8 * 32 * 4, 32 * 4
    most = {series: int(row.max()) for series, row in zip(found.series, found.bytes, strict=True)}
    assert [part.label for part in found.parts] == ["embedding", "block 0", "head"]
    assert most[Series("parameters")] == weight
    assert most[Series("optimizer")] == 2 * weight + 4  # two means, and a count of steps
    assert most[Series("gradients")] == weight
    assert most[Series("activations", 0)] == state  # without what is twice as much
    assert most[Series("activations", 1)] == state
    # The loss before and after it is divided, and the 1 that its backward begins with.
    assert most[Series("activations", 2)] == 3 * 4
    # The gradient of what the block was given, until the embedding's backward has used it.
    assert most[Series("passed back")] == state
    # What the exponential is of goes when the block has been left: its backward needs its result alone.
    _, before_block, before_head = [begun for visit, begun in found.visits if visit.phase == "forward"]
    embedding, block = (found.bytes[found.series.index(Series("activations", place))] for place in (0, 1))
    assert (embedding[before_block], block[before_block]) == (state, 0)
    assert (embedding[before_head], block[before_head]) == (0, state)
    assert embedding[-1] == block[-1] == 0


def test_gradients_that_are_put_there_by_hand_are_gradients() -> None:
    def by_hand(parts: TrainParts, batch: Batch, num_records: float) -> Tensor:
        loss = parts.loss(parts.model(batch), batch) / num_records
        own = [p for p in parts.model.parameters() if p.requires_grad]
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
            parameter.grad = gradient
        return loss.detach()

    found = subject("sandwich", backward=by_hand, num_batches=1)
    timeline = timeline_of(found.step, found.parts)

    gradients = timeline.bytes[timeline.series.index(Series("gradients"))]
    assert gradients[-1] == timeline.held.gradients > 0
    # They are known as such when the backward is over.
    (optimizer,) = [begun for visit, begun in timeline.visits if visit.phase == "optimizer"]
    assert gradients[optimizer] == timeline.held.gradients


def test_each_part_is_visited_forwards_and_then_backwards() -> None:
    found = subject("sandwich", num_batches=1)
    model = found.parts.model
    visits: list[Visit] = []
    in_loss: list[Visit] = []

    def loss(output: Any, batch: Batch) -> Tensor:
        twice_BC = 2 * output.output_BC
        twice_BC.register_hook(lambda _: in_loss.append(visits[-1]))
        return loss_of(output._replace(output_BC=twice_BC), batch)

    with visits_told(dataclasses.replace(found.parts, loss=loss), visits.append) as told:
        found.step(told)

    labels = [part.label for part in parts_of(model)]
    assert labels[:4] == ["embedding", "embedding (words)", "embedding (photo)", "block 0 (words)"]
    last = len(labels) - 1
    forward = [visit.part for visit in visits if visit.phase == "forward"]
    assert forward == [0, 1, 0, 2, 0, *range(3, last + 1)]
    assert [visit.part for visit in visits if visit.phase == "backward"] == list(range(1, last + 1))[::-1]
    assert [visits[0], visits[-1]] == [Visit("begin"), Visit("optimizer")]
    assert in_loss == [Visit("backward", last)]  # the loss is the head's


@pytest.mark.parametrize("keep", KEEPS)
def test_a_step_that_is_followed_is_the_same_step(keep: Keep) -> None:
    alone, followed, timed = (subject("convnet", keep, "bf16") for _ in range(3))
    torch.manual_seed(1)
    want = alone.step(alone.parts)
    reports = []
    torch.manual_seed(1)
    timeline = timeline_of(lambda parts: reports.append(followed.step(parts)), followed.parts)
    torch.manual_seed(1)
    stays = timed_visits(lambda parts: reports.append(timed.step(parts)), timed.parts)

    assert reports == [want, want]
    for name, value in alone.parts.model.state_dict().items():
        assert torch.equal(value, followed.parts.model.state_dict()[name])
        assert torch.equal(value, timed.parts.model.state_dict()[name])
    assert [stay.visit for stay in stays] == [visit for visit, _ in timeline.visits]
    for model in (followed.parts.model, timed.parts.model):  # nothing is left on it
        assert not {"embed", "head"} & set(vars(model))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_moments_get_the_times_of_their_visits_and_few_still_show_the_most() -> None:
    total = np.array([[1, 2, 9, 2, 1, 5, 0]])
    visits = ((Visit("begin"), 0), (Visit("forward", 0), 2), (Visit("optimizer"), 6))
    timeline = Timeline((), (Series("temporary"),), total, visits, None)  # type: ignore[arg-type]

    times = moments_in_time(timeline, [1.0, 4.0, 2.0])

    # The last visit has no moment: nothing was made or went in it.
    assert times == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert timeline.peak_moment == 2
    assert timeline.visit_at(2) == Visit("forward", 0)
    assert fewer_moments(timeline.total, times, 2) == [0, 2, 5, 6]
