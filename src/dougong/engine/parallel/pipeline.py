"""A model whose blocks are spread over several ranks, that pass its state on.

Here        `apply_pipeline`, Pipeline; cutting a model into stages of about equal cost.
Elsewhere   the order of work (schedule.py); sending (parcel.py); the step (engine/step.py).
Promise     a step gives every rank the gradients of its own blocks that one process would have, within rounding, under
            every schedule, of micro-batches of any sizes and with any modality absent in any of them. A model so cut is
            called as before: every rank gets the whole answer.

Ours runs its own tables rather than torch.distributed.pipelining's stages, which want every micro-batch to have the
same shapes: here a micro-batch without pictures is a shorter message, and its encoders' stage does nothing for it.
Cutting a backward in two is torch's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from dougong.core.errors import ConfigError
from dougong.engine.parallel.clock import Clock, Doing
from dougong.engine.parallel.parcel import Parcel, Post, fresh, pack, unpack
from dougong.engine.parallel.schedule import (
    Action,
    Kind,
    Schedule,
    even_cost,
    make_table,
    messages,
    rank_of_stage,
)
from dougong.engine.precision.choice import autocast
from dougong.engine.precision.weights import add_gradient
from dougong.engine.step import TrainParts
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

_DOING: Final[dict[Kind, Doing]] = {
    "forward": "forward",
    "backward": "backward",
    "input": "backward",
    "weight": "weights",
}


class Stage(NamedTuple):
    """Consecutive blocks that live on one rank."""

    number: int
    blocks: list[nn.Module]
    embeds: bool
    """Whether it makes the state."""

    decides: bool
    """Whether it reads the answer from the state."""

    names: tuple[str, ...]
    """Of its parameters in the model: what else is done to the model may replace them."""


class Elsewhere(nn.Module):
    """What stands in for a part that lives on another rank."""

    def forward(self, *_: Any) -> Any:
        raise RuntimeError("this part of the model lives on another rank")


class _Passed(NamedTuple):
    """One micro-batch's way through one stage, until its backward."""

    inputs: list[Tensor]
    """Those that need a gradient."""

    outputs: list[Tensor]
    """Those that have one: of the state, or the loss alone."""


def stage_bounds(costs: Sequence[float], ranks: Sequence[int]) -> list[int]:
    """Where each stage begins, and the end: contiguous parts, none of them empty. `ranks` says who has each stage.

    Where each rank has one stage, the largest sum is the least there is. Where ranks have several, what a rank has
    altogether is evened out from there on, as far as moving one bound at a time comes.

    Raises:
        ConfigError: there are fewer parts than stages.
    """
    num_stages = len(ranks)
    if len(costs) < num_stages:
        raise ConfigError(
            f"a pipeline of {num_stages} stages needs as many blocks, and the model has {len(costs)}. "
            f"Use {len(costs)} stages or fewer."
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    count = len(costs)
    # best[k][n]: the least largest sum of the first n blocks in k stages.
    best = [[float("inf")] * (count + 1) for _ in range(num_stages + 1)]
    begin = [[0] * (count + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for n in range(k, count + 1):
            for first in range(k - 1, n):
                worst = max(best[k - 1][first], sums[n] - sums[first])
                if worst < best[k][n]:
                    best[k][n], begin[k][n] = worst, first
    bounds = [count]
    for k in range(num_stages, 0, -1):
        bounds.append(begin[k][bounds[-1]])
    bounds.reverse()
    return bounds if len(set(ranks)) == num_stages else _evened(bounds, sums, ranks)


def _evened(bounds: list[int], sums: Sequence[float], ranks: Sequence[int]) -> list[int]:
    def loads(tried: Sequence[int]) -> list[float]:
        found = dict.fromkeys(ranks, 0.0)
        for rank, (first, last) in zip(ranks, itertools.pairwise(tried), strict=True):
            found[rank] += sums[last] - sums[first]
        return sorted(found.values(), reverse=True)

    least = loads(bounds)
    moved = True
    while moved:  # each time to something less, of which there is an end
        moved = False
        for place in range(1, len(bounds) - 1):
            for bound in range(bounds[place - 1] + 1, bounds[place + 1]):
                tried = [*bounds[:place], bound, *bounds[place + 1 :]]
                if (found := loads(tried)) < least:
                    bounds, least, moved = tried, found, True
    return bounds


def block_seconds(model: BlockStack[Any, Any], batch: Batch, repeats: int = 3) -> list[float]:
    """How long embedding, each block and the head take, forward and backward, the least of a few times.

    Random states, buffers and gradients are changed: measure before training.
    """
    found: list[list[float]] = []
    for _ in range(repeats):
        times, state = [], None
        for part in [model.embed, *model.blocks, model.head]:
            started = time.perf_counter()
            given = batch if state is None else state
            state = part(given)
            outputs = [t for t in pack(state).tensors if t.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            state = unpack(fresh(pack(state)), model.state_types)
            times.append(time.perf_counter() - started)
        found.append(times)
    model.zero_grad(set_to_none=True)
    return [min(times) for times in zip(*found, strict=True)]


def apply_pipeline(
    model: BlockStack[Any, Any],
    group: dist.ProcessGroup,
    schedule: Schedule,
    *,
    stages_per_rank: int = 1,
    costs: Sequence[float] | None = None,
) -> Pipeline:
    """Keep this rank's blocks, in place; all others become empty. Names of parameters stay as they are.

    `costs` are of embedding, each block and the head; None: a block costs what it has parameters, the rest nothing.

    Raises:
        ConfigError: the model cannot be cut so; the message says why.
    """
    return Pipeline(model, group, schedule, stages_per_rank, costs)


class Pipeline:
    """One rank's part of a model in stages."""

    def __init__(
        self,
        model: BlockStack[Any, Any],
        group: dist.ProcessGroup,
        schedule: Schedule,
        stages_per_rank: int,
        costs: Sequence[float] | None,
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.schedule, self.stages_per_rank = schedule, stages_per_rank
        self.place = rank_of_stage(schedule, self.num_ranks, stages_per_rank)
        self.model, self.types = model, model.state_types
        parts = model.parts()
        device = next(model.parameters()).device
        costs = list(costs) if costs is not None else [0.0, *map(_size, model.blocks), 0.0]
        if len(costs) != len(model.blocks) + 2:
            raise ValueError(f"{len(costs)} costs for {len(model.blocks)} blocks, embedding and head")
        middle = costs[1:-1]
        if middle:
            middle[0] += costs[0]
            middle[-1] += costs[-1]
        self.bounds = stage_bounds(middle, self.place)
        self.stage_costs = [sum(middle[a:b]) for a, b in itertools.pairwise(self.bounds)]
        self.stages = self._cut(model)
        self.device = device
        self.post = Post(group, device)
        self.clock = Clock()
        self.undivided: set[int] = set()
        """Stages whose backward is not cut in two: what is made anew for the inputs' gradients would have to be made
        once more for the weights'."""

        self._tables: dict[int, list[list[Action]]] = {}
        # What the model is called by from now on; and its parts, as far as they are here.
        model.forward = self.answer  # type: ignore[method-assign]
        names = {parameter: name for name, parameter in model.named_parameters()}
        kept = {part: [names[p] for p in each if p in names] for part, each in parts.items()}

        def parts_here() -> dict[str, list[nn.Parameter]]:
            now = dict(model.named_parameters())  # what else is done to the model may have replaced them
            return {part: [now[name] for name in each] for part, each in kept.items()}

        model.parts = parts_here  # type: ignore[method-assign]

    # Cutting -------------------------------------------------------------------------------------------------

    def _cut(self, model: BlockStack[Any, Any]) -> dict[int, Stage]:
        if model.embed_names is None:
            raise ConfigError(
                f"{type(model).__name__} does not say what it embeds with, and cannot be cut into stages."
            )
        count = len(self.place)
        whole = dict(model.named_children())
        embedding = [whole[name] for name in model.embed_names if name in whole]
        deciding = [child for name, child in whole.items() if name not in (*model.embed_names, "blocks")]
        blocks = list(model.blocks)
        parts = [
            Stage(
                index,
                blocks[self.bounds[index] : self.bounds[index + 1]],
                index == 0,
                index == count - 1,
                (),
            )
            for index in range(count)
        ]
        owners: dict[nn.Parameter, int] = {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        stages = {}
        for stage in parts:
            modules = [*stage.blocks, *(embedding if stage.embeds else []), *(deciding if stage.decides else [])]
            own = [p for module in modules for p in module.parameters()]
            if stage.decides:
                own += [p for name, p in model.named_parameters(recurse=False)]
            for parameter in own:
                if owners.setdefault(parameter, stage.number) != stage.number:
                    raise ConfigError(
                        f"{type(model).__name__} uses one weight in several blocks, which stages "
                        f"{owners[parameter]} and {stage.number} would both have. Use fewer stages."
                    )
            if self.place[stage.number] == self.rank:
                stages[stage.number] = stage._replace(names=tuple(names[parameter] for parameter in own))
        here = {place for index in stages for place in range(self.bounds[index], self.bounds[index + 1])}
        for place in range(len(blocks)):
            if place not in here:
                model.blocks[place] = Elsewhere()
        for name in whole:
            if name == "blocks":
                continue
            needed = 0 if name in model.embed_names else count - 1
            if needed not in stages:
                setattr(model, name, Elsewhere())
        if count - 1 not in stages:
            for name, _ in list(model.named_parameters(recurse=False)):
                setattr(model, name, None)
        return stages

    # A step --------------------------------------------------------------------------------------------------

    def backward(self, parts: TrainParts, batches: Sequence[Batch], num_records: float) -> Tensor:
        """Add the gradients of all micro-batches to this rank's parameters, and return their loss, where it is known:
        on the rank of the last stage, 0 elsewhere."""
        table = self.table(len(batches))
        step = _Step(self, parts, batches, num_records, table)
        step.run()
        self.post.settle()
        return step.loss

    def table(self, num_batches: int) -> list[list[Action]]:
        """What every rank does for so many micro-batches."""
        if num_batches not in self._tables:
            self._tables[num_batches] = make_table(
                self.schedule, self.num_ranks, self.stages_per_rank, num_batches, self._cost
            )
        return self._tables[num_batches]

    def _cost(self, stage: int, kind: Kind) -> float:
        return even_cost(stage, kind) * self.stage_costs[stage]

    # An answer -----------------------------------------------------------------------------------------------

    def answer(self, batch: Batch) -> Any:
        """What the whole model says, on every rank. Without gradients through other ranks."""
        state: Any = None
        for index, rank in enumerate(self.place):
            if rank != self.rank:
                continue
            if index and self.place[index - 1] != self.rank:
                state = unpack(self.post.receive(self.place[index - 1]), self.types)
            state = self.through(self.stages[index], batch, state)
            if index + 1 < len(self.place) and self.place[index + 1] != self.rank:
                self.post.send(fresh(pack(state)), self.place[index + 1])
        last = self.place[-1]
        found = self.post.spread(fresh(pack(state)) if self.rank == last else None, last)
        self.post.settle()
        return unpack(found, self.types)

    def through(self, stage: Stage, batch: Batch, state: Any) -> Any:
        """One stage of the model, and the head where it is the last."""
        if stage.embeds:
            state = self.model.embed(batch)
        for block in stage.blocks:
            state = block(state)
        return self.model.head(state) if stage.decides else state


class _Step:
    """All micro-batches through this rank's stages, both ways."""

    def __init__(
        self,
        pipeline: Pipeline,
        parts: TrainParts,
        batches: Sequence[Batch],
        num_records: float,
        table: list[list[Action]],
    ) -> None:
        self.pipeline, self.parts, self.batches, self.num_records = pipeline, parts, batches, num_records
        self.actions = table[pipeline.rank]
        self.loss = torch.zeros((), device=pipeline.device)
        self.passed: dict[tuple[int, int], _Passed] = {}
        self.cut: dict[tuple[int, int], Callable[[], None]] = {}
        self.arrived: dict[Action, Parcel] = {}
        # In the order in which each other rank sends: what comes early waits here for its turn.
        self.expected: dict[int, list[Action]] = {}
        for source, to, action in messages(table, pipeline.place):
            if to == pipeline.rank:
                self.expected.setdefault(source, []).append(action)

    def run(self) -> None:
        clock = self.pipeline.clock
        carry_out = {
            "forward": self._forward,
            "backward": self._backward,
            "input": self._input,
            "weight": self._weight,
        }
        for action in self.actions:
            began = clock.now()
            parcel = self._awaited(action)
            if parcel is not None:
                began = clock.note("wait", began, action.stage, action.batch)
            carry_out[action.kind](action.stage, action.batch, parcel)
            clock.note(_DOING[action.kind], began, action.stage, action.batch)

    def _awaited(self, action: Action) -> Parcel | None:
        """What another stage has for this action, or None where it needs nothing."""
        kind, stage, batch = action
        place = self.pipeline.place
        if kind == "weight" or (kind == "forward" and stage == 0) or (kind != "forward" and stage == len(place) - 1):
            return None
        key = Action("forward" if kind == "forward" else "backward", stage, batch)
        source = place[stage - 1 if kind == "forward" else stage + 1]
        while key not in self.arrived:
            self.arrived[self.expected[source].pop(0)] = self.pipeline.post.receive(source)
        return self.arrived.pop(key)

    def _pass_on(self, action: Action, parcel: Parcel) -> None:
        to = self.pipeline.place[action.stage]
        if to == self.pipeline.rank:
            self.arrived[action] = parcel
        else:
            self.pipeline.post.send(parcel, to)

    def _forward(self, index: int, place: int, parcel: Parcel | None) -> None:
        stage, batch = self.pipeline.stages[index], self.batches[place]
        state = None if parcel is None else unpack(parcel, self.pipeline.types)
        inputs = [] if parcel is None else [t for t in parcel.tensors if t.requires_grad]
        with autocast(self.parts.precision, self.parts.device_type):
            found = self.pipeline.through(stage, batch, state)
            if stage.decides:
                found = self.parts.loss(found, batch).float() / self.num_records
        if stage.decides:
            self.loss = self.loss + found.detach()
            self.passed[index, place] = _Passed(inputs, [found] if found.requires_grad else [])
            return
        made = pack(found)
        # A state may hold what came in as it was; as an output it must be a tensor of its own.
        made = made._replace(
            tensors=[t.clone() if t.requires_grad and (t.is_leaf or t._is_view()) else t for t in made.tensors]
        )
        self.passed[index, place] = _Passed(inputs, [t for t in made.tensors if t.requires_grad])
        self._pass_on(Action("forward", index + 1, place), fresh(made))

    def _gradients(self, index: int, outputs: list[Tensor], parcel: Parcel | None) -> list[Tensor | None]:
        if parcel is None:
            return [torch.ones_like(output) for output in outputs]
        given: list[Tensor | None] = unpack(parcel, ())
        return given

    def _backward(self, index: int, place: int, parcel: Parcel | None) -> None:
        inputs, outputs = self.passed.pop((index, place))
        _backward_both(outputs, self._gradients(index, outputs, parcel))
        self._return(index, place, [each.grad for each in inputs])

    def _input(self, index: int, place: int, parcel: Parcel | None) -> None:
        inputs, outputs = self.passed.pop((index, place))
        gradients = self._gradients(index, outputs, parcel)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        if not inputs:
            # Nobody waits for this one: all of it can be put off.
            self.cut[index, place] = lambda: _backward_both(outputs, gradients)
            return
        if index in self.pipeline.undivided:
            _backward_both(outputs, gradients)
            self.cut[index, place] = lambda: None
            self._return(index, place, [each.grad for each in inputs])
            return
        named = dict(self.pipeline.model.named_parameters())
        weights = [w for name in self.pipeline.stages[index].names if (w := named[name]).requires_grad]
        self.cut[index, place] = _backward_input(pairs, inputs, weights)
        self._return(index, place, [each.grad for each in inputs])

    def _weight(self, index: int, place: int, parcel: Parcel | None) -> None:
        self.cut.pop((index, place))()

    def _return(self, index: int, place: int, gradients: list[Tensor | None]) -> None:
        if index:
            self._pass_on(Action("backward", index - 1, place), pack(gradients))


def _size(block: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in block.parameters()))


def _is_shared(x: Tensor) -> bool:
    """Whether it cannot be detached in place: an input, a weight or a view."""
    return x.is_leaf or x._is_view()


def _backward_both(outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _backward_input(
    pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor], weights: list[nn.Parameter]
) -> Callable[[], None]:
    """Give the inputs their gradients, and return what gives the weights theirs.

    torch's cut leaves out weights whose way to the outputs does not meet the inputs' way; they are given theirs whole.
    """
    if not pairs:
        return lambda: None
    outputs, gradients = [o for o, _ in pairs], [g for _, g in pairs]
    # It detaches the outputs in place; the graph is asked for the others before.
    others = _not_met(outputs, inputs, weights)
    found: list[Tensor | None] = []
    if others:
        found = list(torch.autograd.grad(outputs, others, gradients, retain_graph=True, allow_unused=True))
    left = set(others)
    _, groups = stage_backward_input(outputs, gradients, inputs, iter([w for w in weights if w not in left]))

    def give() -> None:
        stage_backward_weight(iter([w for w in weights if w not in left]), groups)
        for weight, gradient in zip(others, found, strict=False):
            if gradient is not None:
                add_gradient(weight, gradient)

    return give


def _not_met(outputs: list[Tensor], inputs: list[Tensor], weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """Weights that lead to the outputs without meeting what the inputs lead to."""
    following: dict[Any, list[Any]] = {}
    todo = [output.grad_fn for output in outputs]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node is None:
            continue
        for before, _ in node.next_functions:
            if before is None:
                continue
            following.setdefault(before, []).append(node)
            if before not in seen:
                seen.add(before)
                todo.append(before)

    def reached(starts: list[Any], stop: set[Any]) -> tuple[set[Any], bool]:
        found, todo, met = set(starts), list(starts), False
        while todo:
            for node in following.get(todo.pop(), ()):
                if node in stop:
                    met = True
                elif node not in found:
                    found.add(node)
                    todo.append(node)
        return found, met

    of_inputs, _ = reached([node for each in inputs if (node := _node(each)) in seen], set())
    return [w for w in weights if (node := _node(w)) in seen and not reached([node], of_inputs)[1]]


def _node(leaf: Tensor) -> Any:
    """Where a leaf's gradient is added up."""
    edge = leaf.view_as(leaf).grad_fn
    return edge.next_functions[0][0] if edge is not None else None
