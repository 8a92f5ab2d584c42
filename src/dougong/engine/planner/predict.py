"""What a step costs on a layout, before anything runs.

Here        Choice (a layout with its micro-batches), Prediction, `predict`; the formulas, for `--explain`.
Elsewhere   shapes (shape.py), devices (cluster.py), who waits for whom (engine/parallel/schedule.py), which layouts
            there are (search.py).
Promise     throughputs of published runs within 10 %, each left out when the constants were fitted
            (benchmarks/planner.py); waiting is not a formula but the schedule itself, carried out action by action.

Time    a matrix product: flops / (tensor x peak x efficiency). Between them: bytes / memory bandwidth. Inside a layer
        tensor ranks add up: 2 (t - 1) / t x bytes / bandwidth; a backward does twice the work of a forward and the same
        exchange. Gradients: 2 (d - 1) / d x bytes / bandwidth over d ranks, once a step; where weights are spread
        (d - 1) / d for each gathering and each spreading, in every micro-batch, and 2 x bytes / memory bandwidth to
        put what was gathered in its place. (Narayanan et al. 2021,
        arXiv:2104.04473; Rajbhandari et al. 2020, arXiv:1910.02054; Chan et al. 2007 for the exchanges.)
Memory  parameters x (weight + gradient + optimizer bytes) / shards, and where they are spread the weights gathered:
        zero3 one unit's (a few blocks) at a time, zero2 all. Activations: kept / t, kept whole (/ t where tokens are
        shared out) and what enters cut layers, of as many micro-batches as a rank has under way at once (1F1B:
        pipeline - its place); with recompute the states between blocks and all of one block. (Rajbhandari et al. 2020;
        Korthikanti et al. 2022, arXiv:2205.05198.) These leave out what lies between two operations and what is on its
        way: where it matters, a rank is rehearsed (rehearse.py), whose bytes are within 5 % of counted ones. Offloaded:
        no optimizer bytes, and (gradient + weight bytes) / host bandwidth a step. (Ren et al. 2021, arXiv:2101.06840.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from pydantic import Field

from dougong.core.config import Config
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
from dougong.engine.planner.shape import BlockShape, ModelShape

MOST_ACTIONS = 6_000
"""Up to so many a schedule is carried out; beyond, its bubble is by formula."""


class BytesConfig(Config):
    """What one parameter takes."""

    weight: float = 4.0
    gradient: float = 4.0
    optimizer: float = 8.0
    """AdamW's two means; with a copy of the weights in float32 beside 16-bit ones, 12."""

    activation: float = Field(default=1.0, gt=0)
    """Bytes of an activation for each that the shape counts: a half where that is of float32 and the run of bf16."""


class Choice(NamedTuple):
    """One way to carry out a step."""

    plan: PlanConfig
    micro_batches: int
    """Of every rank that shares out the records."""

    recompute: bool = False
    """Whether each block's activations are made anew in the backward, from its state alone."""

    offload: bool = False
    """Whether the optimizer, with what it keeps, is in the host's memory. Predicted; the engine cannot do it yet."""

    @property
    def can_be_carried_out(self) -> bool:
        """Whether the engine can do all of it."""
        return not (self.recompute or self.offload)


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

    @property
    def peak_bytes(self) -> float:
        return max(self.memory_bytes)


def predict(model: ModelShape, cluster: ClusterConfig, choice: Choice, sizes: BytesConfig | None = None) -> Prediction:
    """What a step takes, in seconds and bytes. The layout must fit the cluster (search.py)."""
    sizes = sizes or BytesConfig()
    plan, recompute = choice.plan, choice.recompute
    if not model.tokens_shared:
        plan = plan.model_copy(update={"sequence": False})
    data = cluster.devices // (plan.tensor * plan.pipeline)
    parts = model.parts
    costs = [_forward(part, cluster, plan, sizes) for part in parts]
    stages = _stages(model, plan, costs)
    place = rank_of_stage(plan.schedule, plan.pipeline, plan.chunks) if plan.pipeline > 1 else [0]
    forwards = [sum(costs[n].work + costs[n].exchange for n in stage) for stage in stages]
    backwards = [
        sum((2 + recompute) * costs[n].work + (1 + recompute) * costs[n].exchange for n in stage) for stage in stages
    ]

    def cost(stage: int, kind: Kind) -> float:
        if kind == "forward":
            return forwards[stage]
        return backwards[stage] * (1.0 if kind == "backward" else 0.5)

    passed = [sizes.activation * parts[stage[-1]].passed for stage in stages]
    pipeline_seconds, waiting, held = _pipeline(cluster, choice, passed, place, cost)

    here = [[n for s, where in enumerate(place) if where == rank for n in stages[s]] for rank in range(plan.pipeline)]
    of_rank = [[parts[n] for n in numbers] for numbers in here]
    data_seconds = max(_data_exchange(each, cluster, plan, data, choice.micro_batches, sizes) for each in of_rank)
    # The optimizer reads and writes all of its own, the weights and the gradients.
    stepped = max(common / plan.shard + experts for common, experts in (_held(each, plan) for each in of_rank))
    each_parameter = 2 * (sizes.weight + sizes.optimizer) + sizes.gradient
    optimizer_seconds = stepped * each_parameter / cluster.memory_bandwidth
    if choice.offload:
        optimizer_seconds = (
            stepped * (sizes.gradient + sizes.weight) / (cluster.host_bandwidth * cluster.link_efficiency)
        )
    seconds = pipeline_seconds + data_seconds + optimizer_seconds

    held_sizes = sizes.model_copy(update={"optimizer": 0.0}) if choice.offload else sizes
    states = tuple(_state_bytes(each, plan, held_sizes) for each in of_rank)
    memory = []
    for rank, state in enumerate(states):
        own = [[parts[n] for n in stages[stage]] for stage, where in enumerate(place) if where == rank]
        one = [_activation_bytes(each, plan, recompute, sizes) for each in own]
        # Of what a rank has under way, each stage's share is as large as its part of the rank's stages.
        activations = held[rank] * sum(one) / len(one)
        if recompute:  # the block that is made anew has all of its own
            activations += max(_activation_bytes([part], plan, False, sizes) for part in of_rank[rank])
        memory.append(state + activations)
    busiest = max(range(plan.pipeline), key=lambda rank: sum(costs[n].work for n in here[rank]))
    return Prediction(
        choice=choice,
        seconds=seconds,
        records_per_second=model.num_records * choice.micro_batches * data / seconds,
        work_seconds=choice.micro_batches * (3 + recompute) * sum(costs[n].work for n in here[busiest]),
        tensor_seconds=choice.micro_batches * (2 + recompute) * sum(costs[n].exchange for n in here[busiest]),
        waiting_ratio=waiting,
        data_seconds=data_seconds,
        optimizer_seconds=optimizer_seconds,
        memory_bytes=tuple(memory),
        state_bytes=states,
    )


class _Forward(NamedTuple):
    work: float
    exchange: float


def _forward(part: BlockShape, cluster: ClusterConfig, plan: PlanConfig, sizes: BytesConfig) -> _Forward:
    tensor = plan.tensor
    shared = tensor if plan.sequence else 1
    touched = cluster.touched_factor * part.touched / shared + cluster.score_factor * part.scores / tensor
    work = part.flops / (tensor * cluster.flops * cluster.matmul_efficiency)
    work += sizes.activation * touched / cluster.memory_bandwidth
    if tensor == 1:
        return _Forward(work, 0.0)
    inside = cluster.inside_bandwidth if tensor <= cluster.per_node else cluster.across_bandwidth
    exchange = 2 * (tensor - 1) / tensor * sizes.activation * part.exchanged / (inside * cluster.link_efficiency)
    exchange += cluster.latency_seconds * 2 if part.exchanged else 0.0
    return _Forward(work, exchange * (1 - cluster.tensor_overlap))


def _stages(model: ModelShape, plan: PlanConfig, costs: list[_Forward]) -> list[list[int]]:
    """Which parts each stage has, by their place in `model.parts`; cut as the pipeline itself cuts."""
    count = len(model.blocks)
    if plan.pipeline == 1:
        return [list(range(count + 2))]
    middle = [sum(costs[n + 1]) for n in range(count)]
    middle[0] += sum(costs[0])
    middle[-1] += sum(costs[-1])
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


def _pipeline(
    cluster: ClusterConfig,
    choice: Choice,
    passed: list[float],
    place: list[int],
    cost: Callable[[int, Kind], float],
) -> tuple[float, float, list[int]]:
    """Seconds of all micro-batches, share of waiting, and stages' micro-batches that each rank holds at most.

    `passed` are bytes of each stage's state.
    """
    plan, num = choice.plan, choice.micro_batches
    if plan.pipeline == 1:
        return num * (cost(0, "forward") + cost(0, "backward")), 0.0, [1]

    def sent(stage: int, to: int) -> float:
        # All ranks of a tensor group send a part each, and stages stand in different nodes where those fill theirs.
        nodes = plan.tensor * plan.pipeline > cluster.per_node
        bandwidth = cluster.across_bandwidth if nodes else cluster.inside_bandwidth
        return cluster.latency_seconds + passed[min(stage, to)] / (bandwidth * cluster.link_efficiency * plan.tensor)

    fewer = max(2 * plan.pipeline, MOST_ACTIONS // (2 * len(place)))
    if num > fewer:
        # The same with so many micro-batches; all further ones take the pace of the slowest rank.
        pace = max(
            sum(cost(s, "forward") + cost(s, "backward") for s, where in enumerate(place) if where == rank)
            for rank in range(plan.pipeline)
        )
        seconds, waiting, held = _pipeline(cluster, choice._replace(micro_batches=fewer), passed, place, cost)
        whole = seconds + (num - fewer) * pace
        return whole, waiting * seconds / whole, held
    if plan.schedule == "zbv":  # its order depends on what things cost
        course, held = _carried_out(make_table("zbv", plan.pipeline, plan.chunks, num, cost), place)
    else:
        course, held = _known(plan.schedule, plan.pipeline, plan.chunks, num)
    starts, ends = span_times(course, cost, sent)
    seconds = max(ends)
    return seconds, 1.0 - (sum(ends) - sum(starts)) / (seconds * plan.pipeline), held


def _carried_out(table: Table, place: list[int]) -> tuple[Course, list[int]]:
    return course_of(table, place), [most_held(actions) for actions in table]


@functools.lru_cache(maxsize=64)
def _known(schedule: Schedule, num_ranks: int, chunks: int, num_batches: int) -> tuple[Course, list[int]]:
    """A schedule whose order depends on nothing else, and what each rank holds at most."""
    table = make_table(schedule, num_ranks, chunks, num_batches)
    return _carried_out(table, rank_of_stage(schedule, num_ranks, chunks))


def _held(parts: list[BlockShape], plan: PlanConfig) -> tuple[float, float]:
    """Parameters that a rank holds of these: copied or spread ones, and those of routed experts."""
    common = sum(part.cut / plan.tensor + part.whole for part in parts)
    return common, sum(part.experts / (plan.tensor * plan.expert) for part in parts)


def _state_bytes(parts: list[BlockShape], plan: PlanConfig, sizes: BytesConfig) -> float:
    """Weights, gradients and optimizer, at rest and at work: a block's whole weights beside, where they are spread."""
    common, experts = _held(parts, plan)
    each = sizes.weight + sizes.gradient + sizes.optimizer
    if plan.shard == 1:
        return each * (common + experts)
    units = _units(parts, plan, sizes)
    # zero2 keeps all gathered from forward to backward, zero3 one unit at a time, and its gradient.
    gathered = sum(units) if plan.sharding == "zero2" else max(units)
    return each * (common / plan.shard + experts) + sizes.weight * gathered + sizes.gradient * max(units)


def _units(parts: list[BlockShape], plan: PlanConfig, sizes: BytesConfig) -> list[float]:
    """Parameters that are gathered at a time; all of them once for a step, where that is one unit."""
    blocks = [part.cut / plan.tensor + part.whole for part in parts]
    if plan.pipeline > 1:
        return [sum(blocks)]
    units = units_of([sizes.weight * block for block in blocks], plan.gathered_bytes)
    return [sum(blocks[place] for place in unit) for unit in units]


def _activation_bytes(parts: list[BlockShape], plan: PlanConfig, recompute: bool, sizes: BytesConfig) -> float:
    """Of one micro-batch through these blocks."""
    shared = plan.tensor if plan.sequence else 1
    whole = [part.kept / plan.tensor + part.kept_whole / shared + part.entered for part in parts]
    if not recompute:
        return sizes.activation * sum(whole)
    return sizes.activation * sum(part.passed / shared for part in parts)


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
