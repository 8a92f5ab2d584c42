"""Which part of a model a step is at, told while it goes on.

Here        `visits_told`, `parts_of`; StepPart, Visit; `timed_visits`, how long a step stays where.
Elsewhere   what is held meanwhile (timeline.py); each part by itself, with other things kept (blocks.py).
Promise     the step is the engine's own, and its numbers are those of a step that nobody follows.

Parts are the embedding, each modality's piece of it, every block, and the head with the loss. A backward goes through
them in the order of autograd, which is the forward's turned around: a part's has begun when one of the tensors that it
made gets its gradient. What a block makes anew is a part of its backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dougong.engine.parallel.heartbeat import modalities_of_blocks
from dougong.engine.step import TrainParts, one_by_one
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

Phase = Literal["begin", "forward", "backward", "optimizer"]
"""begin: what is before the first forward. optimizer: all that comes when every gradient is there."""


class StepPart(NamedTuple):
    """A part of a model."""

    name: str
    modality: str
    """Empty where it is no modality's own."""

    kind: str
    """What its code calls it; empty where it is no module."""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.modality})" if self.modality else self.name


class Visit(NamedTuple):
    """A step is somewhere, until it is somewhere else."""

    phase: Phase
    part: int | None = None
    """By its place among the parts; None at the step's beginning and end."""


Tell = Callable[[Visit], None]


class Stay(NamedTuple):
    """How long a step was there."""

    visit: Visit
    seconds: float


def parts_of(model: BlockStack[Any, Any]) -> list[StepPart]:
    """In the order of the forward."""
    embeds = [StepPart("embedding", name, type(module).__name__) for name, module in _embedders(model)]
    blocks = [
        StepPart(f"block {place}", modality, type(block).__name__)
        for place, (block, modality) in enumerate(zip(model.blocks, modalities_of_blocks(model), strict=True))
    ]
    return [StepPart("embedding", "", ""), *embeds, *blocks, StepPart("head", "", "")]


@contextlib.contextmanager
def visits_told(parts: TrainParts, tell: Tell) -> Iterator[TrainParts]:
    """What to step with, so that `tell` hears of every visit. The model must be in one piece."""
    model = parts.model
    embedders = _embedders(model)
    last = 1 + len(embedders) + len(model.blocks)
    follower = _Follower(tell)
    undo: list[Callable[[], None]] = []
    try:
        undo.append(_replaced(model, "embed", follower.around(model.embed, 0)))
        for place, (_, module) in enumerate(embedders, start=1):
            undo += follower.hooked(module, place, inside=0)
        for place, block in enumerate(model.blocks, start=1 + len(embedders)):
            undo += follower.hooked(block, place)
        undo.append(_replaced(model, "head", follower.around(model.head, last)))
        all_backward = parts.all_backward or one_by_one

        def loss(output: Any, batch: Batch) -> Tensor:
            made = parts.loss(output, batch)
            follower.expect_gradient(made, output, last)
            return made

        def backward(given: TrainParts, batches: Sequence[Batch], num_records: float) -> Tensor:
            total = all_backward(given, batches, num_records)
            follower.at(Visit("optimizer"))
            return total

        follower.at(Visit("begin"))
        yield dataclasses.replace(parts, loss=loss, all_backward=backward)
    finally:
        for each in undo:
            each()


def timed_visits(step: Callable[[TrainParts], Any], parts: TrainParts) -> list[Stay]:
    """Carry a step out, with the parts that it is given, and say how long it was where."""
    device_type = next(parts.model.parameters()).device.type
    moments: list[tuple[Visit, float]] = []

    def note(visit: Visit) -> None:
        if device_type != "cpu":
            torch.accelerator.synchronize()
        moments.append((visit, time.perf_counter()))

    with visits_told(parts, note) as told:
        step(told)
        note(Visit("begin"))  # of a next step
    return [Stay(visit, after - at) for (visit, at), (_, after) in itertools.pairwise(moments)]


def _embedders(model: BlockStack[Any, Any]) -> list[tuple[str, nn.Module]]:
    """Pieces of the embedding that are one modality's own."""
    owner = {parameter: name for name, owned in model.parts().items() for parameter in owned}
    children = dict(model.named_children())
    found = []
    for name in model.embed_names or ():
        for module in children[name].children():
            owners = {owner.get(parameter, "") for parameter in module.parameters()}
            if len(owners) == 1 and "" not in owners:
                found.append((owners.pop(), module))
    return found


def _replaced(owner: nn.Module, name: str, value: Callable[..., Any]) -> Callable[[], None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if own else delattr(owner, name)


class _Follower:
    """Tells of each visit once, however many tensors say that it has begun."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._visit: Visit | None = None
        self._inside: list[Tensor] = []
        """What pieces of the embedding that is under way have made."""

    def at(self, visit: Visit) -> None:
        if visit != self._visit:
            self._visit = visit
            self._tell(visit)

    def around(self, part: Callable[[Any], Any], place: int) -> Callable[[Any], Any]:
        def followed(given: Any) -> Any:
            self.at(Visit("forward", place))
            made = part(given)
            self.expect_gradient(made, (given, self._inside), place)
            self._inside.clear()
            return made

        return followed

    def hooked(self, module: nn.Module, place: int, inside: int | None = None) -> list[Callable[[], None]]:
        """`inside`: the part that it is a piece of, where the step is again when it has left the module."""

        def entered(_: nn.Module, __: Any) -> None:
            self.at(Visit("forward", place))

        def left(_: nn.Module, given: Any, made: Any) -> None:
            self.expect_gradient(made, given, place)
            if inside is not None:
                self._inside += [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
                self.at(Visit("forward", inside))

        return [module.register_forward_pre_hook(entered).remove, module.register_forward_hook(left).remove]

    def expect_gradient(self, made: Any, given: Any, place: int) -> None:
        """The part's backward has begun when something that it made gets its gradient."""
        before = {id(leaf) for leaf in tree_leaves(given)}
        visit = Visit("backward", place)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in before:
                tensor.register_hook(lambda _: self.at(visit))  # type: ignore[no-untyped-call]
