"""What a step costs on a layout, before anything runs.

Here        Choice (a layout with its micro-batches), Activations, Offload, Prediction, `predict`, `predict_least`;
            BytesConfig, and `bytes_of` a model's weights; `state_bytes`, of the stages of ZeRO; the formulas, for
            `--explain`.
Elsewhere   shapes (shape.py), devices (cluster.py), who waits for whom (engine/parallel/schedule.py), which layouts
            there are (search.py).
Promise     throughputs of published runs within 10 %, each left out when the constants were fitted
            (benchmarks/planner.py); waiting is not a formula but the schedule itself, carried out action by action.

Time    a matrix product: flops / (tensor x peak x efficiency). Between them: bytes / memory bandwidth. Inside a layer
        tensor ranks add up: 2 (t - 1) / t x bytes / bandwidth; a backward does twice the work of a forward and the same
        exchange. Gradients: 2 (d - 1) / d x bytes / bandwidth over d ranks, once a step; where weights are spread
        (d - 1) / d for each gathering and each spreading, in every micro-batch, and 2 x bytes / memory bandwidth to
        put what was gathered in its place; where the optimizer alone is (zero1) one of each, once a step. What starting
        an operation takes is not in it: small models take longer than is said. (Narayanan et al. 2021,
        arXiv:2104.04473; Rajbhandari et al. 2020, arXiv:1910.02054; Chan et al. 2007 for the exchanges.)
Memory  parameters x (weight + gradient + optimizer bytes / shards) where the optimizer alone is spread (zero1),
        parameters x (weight + gradient + optimizer bytes) / shards where all is, and then the weights gathered: zero3
        one unit's (a few blocks) at a time, zero2 all. Activations: kept / t, kept whole (/ t where tokens are
        shared out) and what enters cut layers, of as many micro-batches as a rank has under way at once (1F1B:
        pipeline - its place). Of a block that keeps nothing, what it was given, and the rest of one such block (of a
        segment of blocks, where several are made anew as one) while it is made anew; of one that keeps products, those
        and what it was given. (Rajbhandari et al. 2020; Korthikanti et al. 2022, arXiv:2205.05198.) Made anew: a
        forward and its exchanges once more, or what lies between products and the exchanges. Saved in 16 bits, fp32
        activations of blocks are half as large; saved elsewhere, two blocks' are left, and a step takes no less than 2
        x their bytes / host or disk bandwidth. Weights of 16 bits: 2 bytes and 2 of gradient (4 where micro-batches are
        added up), and beside the means 4 for masters or 2 for Kahan's compensation; means of 8 or 4 bits with their
        scales. In bf16 activations are half as large, and fp32 weights have a copy of half their bytes from forward to
        backward. These leave out what lies between two operations and what is on its way: where it matters, a rank is
        rehearsed (rehearse.py), whose bytes are within 5 % of counted ones. Offloaded to the host: no optimizer bytes,
        and (gradient + weight bytes) / host bandwidth a step (Ren et al. 2021, arXiv:2101.06840). To the disk: two
        blocks' weights and one's gradients are left; a step takes no less than (2 x weight x micro-batches + gradient)
        / disk bandwidth beside the work, and then (2 x weight + 2 x optimizer + gradient) / disk bandwidth; the host
        holds two blocks' state (Rajbhandari et al. 2021, arXiv:2104.07857).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import Field
from torch import nn

from dougong.core.config import Config
from dougong.engine.memory.recompute import Keep
from dougong.engine.memory.saved import Saved, SavedAs
from dougong.engine.parallel.pipeline import stage_bounds
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.schedule import (
    Course,
    Kind,
    Schedule,
    Table,
    course_of,
    make_table,
    most_held,
    rank_of_stage,
    span_times,
)
from dougong.engine.parallel.shard import units_of
from dougong.engine.planner.cluster import ClusterConfig
from dougong.engine.planner.shape import BlockShape, ModelShape, skeleton
from dougong.engine.precision.choice import Chosen
from dougong.engine.precision.states import StateFormat, States
from dougong.engine.precision.weights import Weights, apply_weights

MOST_ACTIONS = 6_000
"""Up to so many a schedule is carried out; beyond, its bubble is by formula."""


class BytesConfig(Config):
    """What one parameter takes."""

    weight: float = 4.0
    gradient: float = 4.0
    optimizer: float = 8.0
    """AdamW's two means; with a copy of the weights in float32 beside 16-bit ones, 12."""

    activation: float = Field(default=1.0, gt=0)
    """Bytes of an activation for each that the shape counts."""

    cast: float = Field(default=0.0, ge=0)
    """Of its copy in the products' precision, which is there from the forward to the backward."""

    def in_precision(self, precision: Chosen) -> BytesConfig:
        """Of a shape counted in fp32, where products are computed in this; 16-bit weights need no copy for it."""
        if precision == "fp32":
            return self
        return self.model_copy(update={"activation": self.activation / 2, "cast": max(0.0, self.weight - 2.0)})


def bytes_of(model: nn.Module, weights: Weights, states: States, *, accumulation: int = 1) -> BytesConfig:
    """What a parameter of this model takes on average, weights kept and stepped so, counted and not computed.

    Raises:
        ConfigError: `states` needs what is not installed.
    """
    bare, kept = skeleton(model), StateFormat(states)
    narrowed = apply_weights(bare, weights, accumulation=accumulation)
    beside = {"bf16-masters": 4.0, "bf16-kahan": 2.0}.get(weights, 0.0)
    gradient = optimizer = 0.0
    for parameter in bare.parameters():
        if parameter.requires_grad:
            state: dict[str, Any] = {}
            kept.begin(state, "exp_avg", parameter)
            kept.begin(state, "exp_avg_sq", parameter)
            optimizer += sum(value.nbytes for value in state.values())
            optimizer += beside * parameter.numel() if parameter in narrowed.exact else 0.0
            gradient += parameter.numel() * (parameter.grad_dtype or parameter.dtype).itemsize
    count = max(1, sum(parameter.numel() for parameter in bare.parameters()))
    whole = sum(parameter.nbytes for parameter in bare.parameters())
    return BytesConfig(weight=whole / count, gradient=gradient / count, optimizer=optimizer / count)


Offload = Literal["none", "host", "disk"]


MIXED: Final = BytesConfig(weight=2, gradient=4, optimizer=12)
"""Weights in 16 bits, gradients added up in 32, AdamW with weights in 32."""


class Activations(NamedTuple):
    """What becomes of what blocks would keep for their backward."""

    keep: Keep | tuple[Keep, ...] = "all"
    """Of each block, or of all alike."""

    segment: int = 1
    """So many blocks in a row that keep nothing are made anew as one."""

    saved: Saved = "kept"
    saved_as: SavedAs = "same"

    def keeps(self, num_blocks: int) -> tuple[Keep, ...]:
        """By block."""
        return (self.keep,) * num_blocks if isinstance(self.keep, str) else self.keep

    @property
    def makes_anew(self) -> bool:
        return self.keep != "all" and set(self.keep) != {"all"}

    @property
    def in_words(self) -> list[str]:
        """For people; nothing where all is kept where it is."""
        known = {"all": [], "products": ["recompute all but products"], "nothing": ["recompute"]}
        words: list[str] = ["recompute some blocks"] if self.makes_anew else []
        if isinstance(self.keep, str):
            words = list(known[self.keep])
        if self.segment > 1:
            words.append(f"{self.segment} blocks a segment")
        if self.saved_as != "same":
            words.append(f"saved in {self.saved_as}")
        if self.saved != "kept":
            words.append("activations on the disk" if self.saved == "disk" else "activations in the host's memory")
        return words


KEEP_ALL: Final = Activations()


class Choice(NamedTuple):
    """One way to carry out a step."""

    plan: PlanConfig
    micro_batches: int
    """Of every rank that shares out the records."""

    activations: Activations = KEEP_ALL

    offload: Offload = "none"
    """host: the optimizer, with what it keeps, is in the host's memory, which is predicted alone. disk: weights,
    gradients and what the optimizer keeps are on the disk, but for the blocks at work."""

    precision: Chosen | None = None
    """Of products. None: as the cluster's `flops` and the bytes of activations say."""


class Prediction(NamedTuple):
    """A step of one choice."""

    choice: Choice
    seconds: float
    records_per_second: float
    work_seconds: float
    """Of the busiest rank: matrix products and what is between them."""

    tensor_seconds: float
    """Of it, exchanges inside layers."""

    waiting_ratio: float
    """Share of all ranks' time in the pipeline in which they wait."""

    data_seconds: float
    """The exchange of gradients and weights, as far as it is not hidden."""

    optimizer_seconds: float
    memory_bytes: tuple[float, ...]
    """By rank of the pipeline, at most."""

    state_bytes: tuple[float, ...]
    """Of it, weights, gradients and optimizer."""

    host_bytes: float
    """Of a node's processor memory, for what is not on its devices."""

    disk_bytes: float
    """Of a node's disk."""

    can_be_carried_out: bool
    """Whether the engine can do all of it on such devices."""

    @property
    def peak_bytes(self) -> float:
        return max(self.memory_bytes)


def predict(model: ModelShape, cluster: ClusterConfig, choice: Choice, sizes: BytesConfig | None = None) -> Prediction:
    """What a step takes, in seconds and bytes. The layout must fit the cluster (search.py)."""
    costs = _costs_of(model, cluster, choice, sizes or BytesConfig())
    plan, num = choice.plan, choice.micro_batches
    pipeline_seconds, waiting, held = _pipeline(
        plan.schedule, plan.pipeline, plan.chunks, num, costs.forwards, costs.backwards, costs.sent
    )
    # Weights and activations come, and gradients and activations go, while blocks work.
    pipeline_seconds = max(pipeline_seconds, costs.streamed_seconds)
    seconds = pipeline_seconds + costs.data_seconds + costs.optimizer_seconds
    put_away = max(count * each for count, each in zip(held, costs.elsewhere, strict=True))
    data = cluster.devices // (plan.tensor * plan.pipeline)
    busiest = max(costs.of_rank, key=lambda here: sum(part.whole_work for part in here))
    return Prediction(
        choice=choice,
        seconds=seconds,
        records_per_second=model.num_records * num * data / seconds,
        work_seconds=num * sum(part.whole_work for part in busiest),
        tensor_seconds=num * sum((2 + part.anew) * part.exchange for part in busiest),
        waiting_ratio=waiting,
        data_seconds=costs.data_seconds,
        optimizer_seconds=costs.optimizer_seconds,
        memory_bytes=costs.memory(held),
        state_bytes=costs.states,
        host_bytes=costs.host_bytes + (put_away if choice.activations.saved == "host" else 0.0),
        disk_bytes=costs.disk_bytes + (put_away if choice.activations.saved == "disk" else 0.0),
        can_be_carried_out=choice.offload == "none" or (choice.offload == "disk" and cluster.maps_files),
    )


class Least(NamedTuple):
    """What a step takes at least."""

    seconds: float
    bytes: float


def predict_least(model: ModelShape, cluster: ClusterConfig, choice: Choice, sizes: BytesConfig | None = None) -> Least:
    """No more than `predict` says, and said at once: nobody waits for others, and one micro-batch is under way."""
    costs = _costs_of(model, cluster, choice, sizes or BytesConfig())
    ranks = range(choice.plan.pipeline)
    busiest = max(
        sum(f + b for f, b, where in zip(costs.forwards, costs.backwards, costs.place, strict=True) if where == rank)
        for rank in ranks
    )
    streamed = max(choice.micro_batches * busiest, costs.streamed_seconds)
    seconds = streamed + costs.data_seconds + costs.optimizer_seconds
    return Least(seconds, max(costs.memory([1 for _ in ranks])))


class _Part(NamedTuple):
    """Seconds of one part of the model with one micro-batch."""

    work: float
    exchange: float
    between: float
    """Of its work, what is not in products."""

    keep: Keep = "all"

    @property
    def anew(self) -> bool:
        return self.keep != "all"

    @property
    def whole_work(self) -> float:
        """Forward, what is made anew, and backward."""
        return 3 * self.work + {"all": 0.0, "products": self.between, "nothing": self.work}[self.keep]

    @property
    def backward(self) -> float:
        return self.whole_work - self.work + (1 + self.anew) * self.exchange


class _Costs(NamedTuple):
    """Of one choice, all that does not depend on who waits for whom."""

    place: list[int]
    """Each stage's rank."""

    of_rank: list[list[_Part]]
    """By rank of the pipeline, its parts of the model."""

    forwards: tuple[float, ...]
    """Seconds, by stage, with one micro-batch."""

    backwards: tuple[float, ...]
    sent: tuple[float, ...]
    """Seconds that each stage's state is on its way."""

    data_seconds: float
    optimizer_seconds: float
    streamed_seconds: float
    """What the disk takes for weights and gradients, or disk and host for activations, beside the work."""

    states: tuple[float, ...]
    """Bytes, by rank, of weights, gradients and optimizer."""

    host_bytes: float
    disk_bytes: float

    activations: list[float]
    """Bytes, by rank, of one micro-batch in one of its stages."""

    elsewhere: list[float]
    """Bytes of a node, by rank, of what a stage has put away with one micro-batch."""

    anew: list[float]
    """Bytes, by rank, of what is made anew, or has come back, at a time."""

    def memory(self, held: Sequence[int]) -> tuple[float, ...]:
        """By rank, where it holds so many micro-batches' stages at most."""
        each = zip(self.states, self.activations, self.anew, held, strict=True)
        return tuple(state + count * one + anew for state, one, anew, count in each)


def _costs_of(model: ModelShape, cluster: ClusterConfig, choice: Choice, sizes: BytesConfig) -> _Costs:
    if choice.precision is not None:
        cluster, sizes = cluster.in_precision(choice.precision), sizes.in_precision(choice.precision)
    plan = choice.plan
    if not model.tokens_shared:
        plan = plan.model_copy(update={"sequence": False})
    parts = model.parts
    each = _parts(model, cluster, plan, choice.activations, sizes)
    stages = _stages(model, plan, each)
    place = rank_of_stage(plan.schedule, plan.pipeline, plan.chunks) if plan.pipeline > 1 else [0]
    stages_of = [[stages[s] for s, where in enumerate(place) if where == rank] for rank in range(plan.pipeline)]
    of_rank = [[parts[n] for stage in own for n in stage] for own in stages_of]
    # The optimizer reads and writes all of its own, the weights and the gradients.
    stepped = max(common / plan.shard + experts for common, experts in (_held(own, plan) for own in of_rank))
    moved, bandwidth = 2 * (sizes.weight + sizes.optimizer) + sizes.gradient, cluster.memory_bandwidth
    states = tuple(_state_bytes(own, plan, sizes) for own in of_rank)
    here, away, streamed, at_work = states, 0.0, 0.0, 0.0
    in_node = min(cluster.per_node, cluster.devices)
    if choice.offload == "host":
        moved, bandwidth = sizes.gradient + sizes.weight, cluster.host_bandwidth * cluster.link_efficiency
        here = tuple(_state_bytes(own, plan, sizes.model_copy(update={"optimizer": 0.0})) for own in of_rank)
        away = max(sizes.optimizer * sum(_held(own, plan)) for own in of_rank) / plan.shard
    elif choice.offload == "disk":
        bandwidth = cluster.disk_bandwidth
        streamed = stepped * (2 * choice.micro_batches * sizes.weight + sizes.gradient) / bandwidth
        largest = max(sum(_held([part], plan)) for own in of_rank for part in own)
        # The block at work, and the one that is on its way.
        here = tuple((2 * sizes.weight + sizes.gradient) * largest for _ in of_rank)
        away, at_work = max(states), 2 * largest * (sizes.weight + sizes.gradient + sizes.optimizer)
    held = [_Activation.of(model, own, plan, choice, sizes) for own in stages_of]
    moving = {
        "kept": math.inf,
        "host": cluster.host_bandwidth * cluster.link_efficiency,
        "disk": cluster.disk_bandwidth,
    }
    passing = max(one.elsewhere * len(own) for one, own in zip(held, stages_of, strict=True))
    streamed += 2 * choice.micro_batches * passing / moving[choice.activations.saved]
    data = cluster.devices // (plan.tensor * plan.pipeline)
    # All ranks of a tensor group send a part each, and stages stand in different nodes where those fill theirs.
    nodes = plan.tensor * plan.pipeline > cluster.per_node
    way = cluster.across_bandwidth if nodes else cluster.inside_bandwidth
    way *= cluster.link_efficiency * plan.tensor
    return _Costs(
        place=place,
        of_rank=[[each[n] for stage in own for n in stage] for own in stages_of],
        forwards=tuple(sum(each[n].work + each[n].exchange for n in stage) for stage in stages),
        backwards=tuple(sum(each[n].backward for n in stage) for stage in stages),
        sent=tuple(cluster.latency_seconds + sizes.activation * parts[s[-1]].passed / way for s in stages),
        data_seconds=max(_data_exchange(own, cluster, plan, data, choice.micro_batches, sizes) for own in of_rank),
        optimizer_seconds=stepped * moved / bandwidth,
        streamed_seconds=streamed,
        states=here,
        host_bytes=in_node * (at_work if choice.offload == "disk" else away),
        disk_bytes=in_node * (away if choice.offload == "disk" else 0.0),
        elsewhere=[in_node * one.elsewhere for one in held],
        activations=[one.under_way for one in held],
        anew=[one.at_once for one in held],
    )


def _parts(
    model: ModelShape, cluster: ClusterConfig, plan: PlanConfig, activations: Activations, sizes: BytesConfig
) -> list[_Part]:
    keeps = activations.keeps(len(model.blocks))
    middle = [
        _part(block, cluster, plan, sizes)._replace(keep=keep) for block, keep in zip(model.blocks, keeps, strict=True)
    ]
    return [_part(model.embed, cluster, plan, sizes), *middle, _part(model.head, cluster, plan, sizes)]


def _part(part: BlockShape, cluster: ClusterConfig, plan: PlanConfig, sizes: BytesConfig) -> _Part:
    tensor = plan.tensor
    shared = tensor if plan.sequence else 1
    touched = cluster.touched_factor * part.touched / shared + cluster.score_factor * part.scores / tensor
    between = sizes.activation * touched / cluster.memory_bandwidth
    work = part.flops / (tensor * cluster.flops * cluster.matmul_efficiency) + between
    if tensor == 1:
        return _Part(work, 0.0, between)
    inside = cluster.inside_bandwidth if tensor <= cluster.per_node else cluster.across_bandwidth
    exchange = 2 * (tensor - 1) / tensor * sizes.activation * part.exchanged / (inside * cluster.link_efficiency)
    exchange += cluster.latency_seconds * 2 if part.exchanged else 0.0
    return _Part(work, exchange * (1 - cluster.tensor_overlap), between)


def _stages(model: ModelShape, plan: PlanConfig, costs: list[_Part]) -> list[list[int]]:
    """Which parts each stage has, by their place in `model.parts`; cut as the pipeline itself cuts."""
    count = len(model.blocks)
    if plan.pipeline == 1:
        return [list(range(count + 2))]
    forward = [part.work + part.exchange for part in costs]
    middle = forward[1:-1]
    middle[0] += forward[0]
    middle[-1] += forward[-1]
    largest = max(middle)
    ranks = rank_of_stage(plan.schedule, plan.pipeline, plan.chunks)
    bounds = _cut(tuple(round(each / largest, 6) for each in middle), tuple(ranks))
    stages = [list(range(first + 1, last + 1)) for first, last in itertools.pairwise(bounds)]
    stages[0].insert(0, 0)
    stages[-1].append(count + 1)
    return stages


@functools.cache
def _cut(costs: tuple[float, ...], ranks: tuple[int, ...]) -> list[int]:
    return stage_bounds(costs, ranks)


@functools.lru_cache(maxsize=1024)  # how weights are spread changes nothing here
def _pipeline(
    schedule: Schedule,
    num_ranks: int,
    chunks: int,
    num: int,
    forwards: tuple[float, ...],
    backwards: tuple[float, ...],
    passing: tuple[float, ...],
) -> tuple[float, float, tuple[int, ...]]:
    """Seconds of all micro-batches, share of waiting, and stages' micro-batches that each rank holds at most."""

    def cost(stage: int, kind: Kind) -> float:
        if kind == "forward":
            return forwards[stage]
        return backwards[stage] * (1.0 if kind == "backward" else 0.5)

    if num_ranks == 1:
        return num * (cost(0, "forward") + cost(0, "backward")), 0.0, (1,)

    def sent(stage: int, to: int) -> float:
        return passing[min(stage, to)]

    place = rank_of_stage(schedule, num_ranks, chunks)
    fewer = max(2 * num_ranks, MOST_ACTIONS // (2 * len(place)))
    if num > fewer:
        # The same with so many micro-batches; all further ones take the pace of the slowest rank.
        pace = max(
            sum(cost(s, "forward") + cost(s, "backward") for s, where in enumerate(place) if where == rank)
            for rank in range(num_ranks)
        )
        seconds, waiting, held = _pipeline(schedule, num_ranks, chunks, fewer, forwards, backwards, passing)
        whole = seconds + (num - fewer) * pace
        return whole, waiting * seconds / whole, held
    if schedule == "zbv":  # its order depends on what things cost
        course, held = _carried_out(make_table("zbv", num_ranks, chunks, num, cost), place)
    else:
        course, held = _known(schedule, num_ranks, chunks, num)
    starts, ends = span_times(course, cost, sent)
    seconds = max(ends)
    return seconds, 1.0 - (sum(ends) - sum(starts)) / (seconds * num_ranks), held


def _carried_out(table: Table, place: list[int]) -> tuple[Course, tuple[int, ...]]:
    return course_of(table, place), tuple(most_held(actions) for actions in table)


@functools.lru_cache(maxsize=64)
def _known(schedule: Schedule, num_ranks: int, chunks: int, num_batches: int) -> tuple[Course, tuple[int, ...]]:
    """A schedule whose order depends on nothing else, and what each rank holds at most."""
    table = make_table(schedule, num_ranks, chunks, num_batches)
    return _carried_out(table, rank_of_stage(schedule, num_ranks, chunks))


def _held(parts: list[BlockShape], plan: PlanConfig) -> tuple[float, float]:
    """Parameters that a rank holds of these: copied or spread ones, and those of routed experts."""
    common = sum(part.cut / plan.tensor + part.whole for part in parts)
    return common, sum(part.experts / (plan.tensor * plan.expert) for part in parts)


class StateBytes(NamedTuple):
    """What a rank holds at the end of a backward, beside what is gathered for a while and gradients of that."""

    weights: float
    gradients: float
    optimizer: float


def state_bytes(parameters: float, plan: PlanConfig, sizes: BytesConfig) -> StateBytes:
    """Of so many parameters that a rank's copies begin with: by the stages of ZeRO, of which the first spreads the
    optimizer, and the second and third spread all three. (The second of the paper has all weights at rest too; ours
    gathers them for each step.)"""
    spread = parameters / plan.shard
    held = parameters if plan.sharding == "zero1" else spread
    return StateBytes(sizes.weight * held, sizes.gradient * held, sizes.optimizer * spread)


def _state_bytes(parts: list[BlockShape], plan: PlanConfig, sizes: BytesConfig) -> float:
    """Weights, gradients and optimizer, at rest and at work: a block's whole weights beside, where they are spread."""
    common, experts = _held(parts, plan)
    each = sizes.weight + sizes.gradient + sizes.optimizer
    held = sum(state_bytes(common, plan, sizes)) + each * experts
    if plan.shard == 1 or plan.sharding == "zero1":
        return held
    units = _units(parts, plan, sizes)
    # zero2 keeps all gathered from forward to backward, zero3 one unit at a time, and its gradient.
    gathered = sum(units) if plan.sharding == "zero2" else max(units)
    return held + sizes.weight * gathered + sizes.gradient * max(units)


def _units(parts: list[BlockShape], plan: PlanConfig, sizes: BytesConfig) -> list[float]:
    """Parameters that are gathered at a time; all of them once for a step, where that is one unit."""
    blocks = [part.cut / plan.tensor + part.whole for part in parts]
    if plan.pipeline > 1:
        return [sum(blocks)]
    units = units_of([sizes.weight * block for block in blocks], plan.gathered_bytes)
    return [sum(blocks[place] for place in unit) for unit in units]


class _Activation(NamedTuple):
    """Bytes of a rank's activations with one micro-batch."""

    under_way: float
    """From a stage's forward to its backward: the mean of its stages, since a rank may have several under way."""

    at_once: float
    """Beside them at their most, of a block that is at work in its backward."""

    elsewhere: float
    """On the host or the disk meanwhile; the mean of its stages."""

    @classmethod
    def of(
        cls, model: ModelShape, stages: list[list[int]], plan: PlanConfig, choice: Choice, sizes: BytesConfig
    ) -> _Activation:
        how, parts = choice.activations, model.parts
        keeps = ("all", *how.keeps(len(model.blocks)), "all")
        ends = (0, len(parts) - 1)
        narrower = 0.5 if how.saved_as != "same" and choice.precision in (None, "fp32") else 1.0

        def whole(n: int) -> float:
            part = parts[n]
            size = sizes.activation * (part.kept / plan.tensor + part.kept_whole / _sharing(plan) + part.entered)
            return size + sizes.cast * sum(_held([part], plan))

        def given(n: int) -> float:
            return sizes.activation * parts[n - 1].passed / _sharing(plan)

        def products(n: int) -> float:
            return sizes.activation * (parts[n].products / plan.tensor + parts[n].products_whole / _sharing(plan))

        def kept(n: int) -> float:
            if keeps[n] == "all":
                return whole(n)
            if keeps[n] == "products":
                return given(n) + products(n)
            return 0.0 if (n - 1) % how.segment else given(n)

        def at_work(n: int) -> float:
            """What is there while it works in the backward, beyond what was kept."""
            if n == ends[1]:
                return whole(n) if how.makes_anew else 0.0
            if keeps[n] == "all":
                return 0.0 if how.saved == "kept" or n in ends else 2 * narrower * whole(n)
            if keeps[n] == "products":
                return max(0.0, whole(n) - kept(n))
            first = n - (n - 1) % how.segment
            return sum(whole(m) for m in range(first, min(first + how.segment, ends[1]))) - kept(first)

        def left(n: int) -> tuple[float, float]:
            """From its forward to its backward: here, and elsewhere."""
            if n == ends[1] and how.makes_anew:
                return 0.0, 0.0  # its backward comes at once, and it is gone before any block is made anew
            if n in ends:
                return kept(n), 0.0
            size = narrower * kept(n)
            return (size, 0.0) if how.saved == "kept" else (0.0, size)

        # While a block works in its backward, what later ones have kept is gone.
        at_once = max(at_work(n) - sum(left(m)[0] for m in stage if m > n) for stage in stages for n in stage)
        here, elsewhere = (sum(left(n)[place] for stage in stages for n in stage) / len(stages) for place in (0, 1))
        return cls(here, at_once, elsewhere)


def _sharing(plan: PlanConfig) -> int:
    """How many ranks share out tokens between layers."""
    return plan.tensor if plan.sequence else 1


def _data_exchange(
    parts: list[BlockShape], cluster: ClusterConfig, plan: PlanConfig, data: int, micro_batches: int, sizes: BytesConfig
) -> float:
    """Seconds of it that are not hidden."""
    common, experts = _held(parts, plan)

    def ring(ranks: int, num_bytes: float, times: float, messages: int = 1) -> float:
        """So many halves of an all-reduce, in so many messages each."""
        if ranks == 1:
            return 0.0
        beside = plan.tensor  # ranks of a node that are in other groups
        here = max(1, cluster.per_node // beside)  # of a group, in one node: they send across together
        spans_nodes = ranks > here
        bandwidth = cluster.across_bandwidth * min(here, ranks) if spans_nodes else cluster.inside_bandwidth
        seconds: float = times * (ranks - 1) / ranks * num_bytes / (bandwidth * cluster.link_efficiency)
        return seconds + times * messages * cluster.latency_seconds * math.log2(ranks)

    copies = data // plan.shard
    seconds = ring(data // plan.expert, experts * sizes.gradient, 2)
    if plan.shard == 1:
        seconds += ring(data, common * sizes.gradient, 2)
        return seconds * (1 - cluster.data_overlap)
    if plan.sharding == "zero1":
        seconds += ring(plan.shard, common * sizes.gradient, 1) + ring(plan.shard, common * sizes.weight, 1)
        # Both are put in a row before they are sent, and what comes is put in its place.
        seconds += 2 * common * (sizes.gradient + sizes.weight) / cluster.memory_bandwidth
    else:
        # Of every micro-batch, and each unit by itself; one alone is gathered for the whole step.
        units = len(_units(parts, plan, sizes))
        times = micro_batches if units > 1 else 1
        gathers = times * (2 if units > 1 and plan.sharding == "zero3" else 1)
        seconds += ring(plan.shard, common * sizes.gradient, times, units)
        seconds += ring(plan.shard, common * sizes.weight, gathers, units)
        # What has been gathered lies by rank, and is read and written once to be weights.
        seconds += gathers * 2 * common * sizes.weight / cluster.memory_bandwidth
    seconds += ring(copies, common / plan.shard * sizes.gradient, 2)
    # What has a gradient, and the norm of all, are agreed on apart: two all-reduces of next to nothing.
    seconds += ring(data, 0.0, 4)
    return seconds * (1 - cluster.data_overlap)
