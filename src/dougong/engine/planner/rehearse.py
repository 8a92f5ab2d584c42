"""One rank of a layout, carried out alone: what it holds, before any other rank exists.

Here        `rehearse`, Rehearsal.
Elsewhere   counting (account.py); the engine that is rehearsed, line for line (engine/prepare.py and engine/step.py).
Promise     the bytes of each rank within 5 % of what is counted on real ranks (tests/engine/planner/test_rehearse.py,
            benchmarks/planner.py). No number that comes of it is the model's.

The engine's own step runs on torch's fake process group, whose exchanges return what this rank has given. What comes
from another stage of a pipeline was made before, by walking through the whole model once. With `unreal`, tensors have
sizes and no numbers (FakeTensorMode): a rank of 512 fits a laptop. A model whose work depends on the numbers (which
modality a record has) must be rehearsed with numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dougong.data.position import Share
from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.memory.recompute import Keep
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.mesh import share_of
from dougong.engine.parallel.parcel import Parcel, Post, fresh, pack, places_of, unpack
from dougong.engine.parallel.pipeline import Pipeline
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.schedule import Action, messages
from dougong.engine.precision.choice import Chosen, autocast
from dougong.engine.precision.weights import Narrowed, Weights
from dougong.engine.prepare import prepare_model
from dougong.engine.step import Loss, train_step
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class Rehearsal(NamedTuple):
    """What is to be carried out."""

    build: Callable[[], BlockStack[Any, Any]]
    batches: Callable[[Share], Sequence[Batch]]
    """A rank's share of each micro-batch of a step."""

    loss: Loss
    optimizer: Callable[[BlockStack[Any, Any], Narrowed], Optimizer]
    """As OptimizerConfig.build."""

    costs: Sequence[float] | None = None
    """Of embedding, each block and the head, by which a pipeline is cut."""

    precision: Chosen = "fp32"
    keep: Sequence[Keep] | None = None
    """What each block keeps for its backward; None: all."""

    weights: Weights = "fp32"
    """In what format they are, and how they are stepped."""

    unreal: bool = False


def rehearse(what: Rehearsal, plan: PlanConfig, world: int, rank: int) -> StepBytes:
    """What this rank of so many holds in a step.

    Raises:
        ConfigError: the model cannot be laid out so.
        RuntimeError: this process is a rank already.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if what.unreal else None
    states = _walk(what, plan, world, rank, mode) if plan.pipeline > 1 else []
    with _alone(world, rank) as ranks:
        with _numbers(mode):
            batches = what.batches(share_of(plan, ranks))
        layout = _laid_out(what, plan, ranks, mode, len(batches))
        pipeline = layout.pipeline
        if pipeline is not None:
            group = layout.mesh.group("pipeline")
            assert group is not None
            pipeline.post = _Prepared(group, pipeline, states)
        optimizer = what.optimizer(layout.model, layout.narrowed)
        layout.share_out(optimizer)
        parts = layout.parts(what.loss, optimizer, precision=what.precision)
        num_records = layout.mesh.share.world * max(1, sum(batch.num_records for batch in batches))
        account = Account(layout.model, optimizer)
        with _numbers(mode):
            # In the first step the optimizer makes what it keeps; how much was to be done for it does not matter.
            train_step(parts, batches if pipeline is not None else batches[:1], num_records=num_records)
            with account:
                train_step(parts, batches, num_records=num_records)
        return account.bytes


def _laid_out(
    what: Rehearsal, plan: PlanConfig, ranks: Ranks, mode: FakeTensorMode | None, num_batches: int = 1
) -> Layout:
    with _numbers(mode):
        model = what.build().train()
    return prepare_model(
        model, plan, ranks, accumulation=num_batches, costs=what.costs, keep=what.keep, weights=what.weights
    )


class _Left(NamedTuple):
    """What leaves a block."""

    state: Parcel
    returned: list[bool]
    """Which of its tensors get a gradient."""


def _walk(what: Rehearsal, plan: PlanConfig, world: int, rank: int, mode: FakeTensorMode | None) -> list[list[_Left]]:
    """After every block, of every micro-batch of this rank's share."""
    flat = plan.model_copy(update={"pipeline": 1, "chunks": 1, "schedule": "1f1b", "shard": 1, "sharding": "zero3"})
    fewer = world // plan.pipeline
    with _alone(fewer, rank % fewer) as ranks:
        layout = _laid_out(what, flat, ranks, mode)
        with _numbers(mode):
            return [_there_and_back(what, layout, batch) for batch in what.batches(layout.mesh.share)]


def _there_and_back(what: Rehearsal, layout: Layout, batch: Batch) -> list[_Left]:
    model, steps = layout.model, []
    with autocast(what.precision, layout.device.type):
        given = fresh(pack(model.embed(batch)))
        for block in model.blocks:
            made = pack(block(unpack(given, model.state_types)))
            given = fresh(made)
            steps.append((made, given))
        loss = what.loss(model.head(unpack(given, model.state_types)), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    row = []
    for made, given in reversed(steps):
        pairs = [(to, of.grad) for to, of in zip(made.tensors, given.tensors, strict=True) if of.grad is not None]
        torch.autograd.backward([to for to, _ in pairs], [gradient for _, gradient in pairs])
        row.append(_Left(given, [tensor.grad is not None for tensor in given.tensors]))
        for tensor in given.tensors:
            tensor.grad = None
    return row[::-1]


@contextlib.contextmanager
def _alone(world: int, rank: int) -> Iterator[Ranks]:
    """A process group of so many, of which this process is one and the only one there is."""
    if dist.is_initialized():
        raise RuntimeError("a rank cannot rehearse: it has a process group of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _numbers(mode: FakeTensorMode | None) -> Iterator[None]:
    """Tensors have numbers, or, in this mode, sizes alone."""
    with mode or contextlib.nullcontext(), _AllWell():
        yield


class _AllWell(TorchFunctionMode):
    """What a step asks of its numbers, whether they are finite and some rank has a gradient: they are, and it has.
    What a model asks of numbers that are not there, whether all tokens are: yes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and is_fake(args[0]):
            return True
        if func is Tensor.tolist and args[0].is_floating_point():
            return _ones(tuple(args[0].shape))
        if func is Tensor.item and is_fake(args[0]) and args[0].is_floating_point():
            return 1.0
        return func(*args, **(kwargs or {}))


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class _Prepared(Post):
    """Has what other ranks would send. What it is given to send it holds until the step's end, as gloo does, whose
    sends do not say when they are done."""

    def __init__(self, group: dist.ProcessGroup, pipeline: Pipeline, states: list[list[_Left]]) -> None:
        super().__init__(group, pipeline.device)
        # By micro-batch, then by the stage that they leave.
        self._leaving = [[row[bound - 1] for bound in pipeline.bounds[1:-1]] for row in states]
        self._messages = [
            (sender, action)
            for sender, to, action in messages(pipeline.table(len(states)), pipeline.place)
            if to == pipeline.rank
        ]
        self._held: list[tuple[Tensor, Tensor]] = []
        self.settle()

    def settle(self) -> None:
        self._held.clear()
        self._expected: dict[int, list[Action]] = {}
        for sender, action in self._messages:
            self._expected.setdefault(sender, []).append(action)

    def send(self, parcel: Parcel, to: int) -> None:
        self._held.append(self._written(parcel))

    def receive(self, source: int) -> Parcel:
        kind, stage, batch = self._expected[source].pop(0)
        if kind == "forward":
            return self._arrived(self._leaving[batch][stage - 1].state)
        state, returned = self._leaving[batch][stage]
        found = [t.detach() if has else None for t, has in zip(state.tensors, returned, strict=True) if t.requires_grad]
        return self._arrived(pack(found), of=0.0)

    def _arrived(self, parcel: Parcel, of: float | None = None) -> Parcel:
        """In one piece of memory, as what has been received; `of`: with these numbers instead."""
        places = places_of([0, *(tensor.nbytes for tensor in parcel.tensors)])
        content = torch.empty(places[-1], dtype=torch.uint8, device=self._device)
        tensors = []
        for tensor, place in zip(parcel.tensors, places[1:], strict=False):
            part = content[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if of is None:
                part.copy_(tensor.detach())
            else:
                part.fill_(of)
            tensors.append(part.requires_grad_(tensor.requires_grad))
        return Parcel(parcel.outline, tensors)
