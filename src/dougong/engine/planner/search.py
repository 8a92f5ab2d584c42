"""Every layout that a model and a cluster allow, the fastest first.

Here        SearchConfig, `find_layouts`, `describe`, `reason`; `divisors`.
Elsewhere   what one of them costs (predict.py).
Promise     what is found fits the memory, the model and the records of a step; where nothing does, the message says
            what is nearest.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

from pydantic import Field

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.parallel.plan import PlanConfig, Sharding
from dougong.engine.parallel.schedule import SCHEDULES, Schedule, check_schedule
from dougong.engine.planner.cluster import ClusterConfig
from dougong.engine.planner.predict import (
    KEEP_ALL,
    Activations,
    BytesConfig,
    Choice,
    Least,
    Offload,
    Prediction,
    predict,
    predict_least,
)
from dougong.engine.planner.shape import ModelShape
from dougong.engine.precision.choice import Chosen


class SearchConfig(Config):
    """What may be chosen among."""

    records: int = Field(gt=0)
    """Of a step, of all ranks."""

    micro_batches: tuple[int, ...] | None = None
    """Into how many a step may be cut, each shared out to all ranks that share out the records, as the engine does.
    None: the shape's micro-batch is one rank's, and a step has as many of them as its records make."""

    precisions: tuple[Chosen, ...] = ()
    """Of products, that may be chosen among. None of them: what the cluster and the bytes say."""

    activations: tuple[Activations, ...] = (KEEP_ALL,)
    """What may become of activations."""

    offload: tuple[Offload, ...] = ("none",)
    """Where state may be."""

    memory_share: float = Field(default=0.9, gt=0, le=1)
    """Of a device's memory, that may be planned with."""

    most: int = Field(default=10, gt=0)
    """Layouts that are told."""


class Found(NamedTuple):
    """What a search has found."""

    predictions: list[Prediction]
    """Those that fit, the fastest first."""

    considered: int


def find_layouts(
    model: ModelShape,
    cluster: ClusterConfig,
    search: SearchConfig,
    sizes: BytesConfig | None = None,
    check: Callable[[Choice], None] | None = None,
) -> Found:
    """All layouts, predicted. `check` raises ConfigError for those that cannot be carried out.

    A rank that has the most records of a micro-batch is what the others wait for: where they cannot be shared out
    evenly, time and memory are that rank's.

    Raises:
        ConfigError: none fits; the message says what is nearest.
    """
    possible = _possible(model, cluster, search, sizes, check)
    room = search.memory_share * cluster.memory_bytes
    fitting: list[Prediction] = []
    # Whose least is more than what the last of those that are told takes, cannot be told; nor can any after it.
    for each in sorted(possible, key=lambda each: each.least.seconds):
        if len(fitting) >= search.most and each.least.seconds > fitting[search.most - 1].seconds:
            break
        if each.least.bytes > room:
            continue
        found = each.predicted(cluster, search, sizes)
        if found.peak_bytes <= room:
            bisect.insort(fitting, found, key=lambda found: (found.seconds, found.peak_bytes))
    if not fitting:
        smallest = _smallest(possible, cluster, search, sizes)
        raise ConfigError(
            f"no layout of {cluster.devices} devices fits {room / 2**30:.3g} GiB each: the smallest takes "
            f"{smallest.peak_bytes / 2**30:.3g} GiB ({describe(smallest.choice)}). Use more devices, smaller "
            f"micro-batches{'' if any(each.makes_anew for each in search.activations) else ', or recompute'}."
        )
    return Found(fitting[: search.most], len(possible))


class _Possible(NamedTuple):
    """A layout that can be carried out."""

    choice: Choice
    shape: ModelShape
    """With one micro-batch, on the rank that has most of it."""

    least: Least

    def predicted(self, cluster: ClusterConfig, search: SearchConfig, sizes: BytesConfig | None) -> Prediction:
        found = predict(self.shape, cluster, self.choice, sizes)
        return found._replace(records_per_second=search.records / found.seconds)


def _possible(
    model: ModelShape,
    cluster: ClusterConfig,
    search: SearchConfig,
    sizes: BytesConfig | None,
    check: Callable[[Choice], None] | None,
) -> list[_Possible]:
    possible: list[_Possible] = []
    refused: ConfigError | None = None
    for choice, shape in _choices(model, cluster, search):
        try:
            if check is not None:
                check(choice)
        except ConfigError as error:
            refused = refused or error
            continue
        possible.append(_Possible(choice, shape, predict_least(shape, cluster, choice, sizes)))
    if not possible and refused is not None:
        raise ConfigError(f"no layout of {cluster.devices} devices can be carried out: {refused}")
    if not possible:
        raise ConfigError(
            f"{search.records} records a step cannot be shared out to {cluster.devices} devices in micro-batches of "
            f"{model.num_records:g}. Use a multiple of {model.num_records:g} records, or fewer devices."
        )
    return possible


def _smallest(
    possible: list[_Possible], cluster: ClusterConfig, search: SearchConfig, sizes: BytesConfig | None
) -> Prediction:
    smallest: Prediction | None = None
    for each in sorted(possible, key=lambda each: each.least.bytes):
        if smallest is not None and each.least.bytes >= smallest.peak_bytes:
            break
        found = each.predicted(cluster, search, sizes)
        if smallest is None or found.peak_bytes < smallest.peak_bytes:
            smallest = found
    assert smallest is not None
    return smallest


def _choices(model: ModelShape, cluster: ClusterConfig, search: SearchConfig) -> Iterator[tuple[Choice, ModelShape]]:
    for tensor in divisors(min(cluster.devices, cluster.per_node)):
        if model.num_heads % tensor or cluster.devices % tensor:
            continue
        for pipeline in divisors(cluster.devices // tensor):
            data = cluster.devices // (tensor * pipeline)
            for micro_batches, shape in _micro_batches(model, search, data):
                for plan in _plans(model, tensor, pipeline, data, micro_batches):
                    for precision, activations, offload in itertools.product(
                        search.precisions or (None,),
                        search.activations,
                        search.offload,
                    ):
                        if offload != "disk" or plan.shard == 1:  # what is spread is gathered in memory
                            yield Choice(plan, micro_batches, activations, offload, precision), shape


def _micro_batches(model: ModelShape, search: SearchConfig, data: int) -> Iterator[tuple[int, ModelShape]]:
    """How many, each with the model's shape on the rank that has most of one."""
    if search.micro_batches is None:
        step = round(model.num_records) * data
        if search.records % step == 0:
            yield search.records // step, model
        return
    for count in search.micro_batches:
        yield count, model.of_records(math.ceil(search.records / count / data))


def _plans(model: ModelShape, tensor: int, pipeline: int, data: int, micro_batches: int) -> Iterator[PlanConfig]:
    experts = [n for n in divisors(data) if n == 1 or (model.num_experts and model.num_experts % n == 0)]
    for expert in experts:
        common = {"tensor": tensor, "expert": expert}
        if pipeline == 1:
            yield PlanConfig(**common)
            for shard in divisors(data)[1:]:
                for sharding in get_args(Sharding):
                    yield PlanConfig(**common, shard=shard, sharding=sharding)
            continue
        for schedule, chunks in _schedules(model, pipeline, micro_batches):
            staged = {**common, "pipeline": pipeline, "schedule": schedule, "chunks": chunks}
            yield PlanConfig(**staged)
            for shard in divisors(data)[1:]:
                for sharding in ("zero1", "zero2"):
                    yield PlanConfig(**staged, shard=shard, sharding=sharding)


def _schedules(model: ModelShape, pipeline: int, micro_batches: int) -> Iterator[tuple[Schedule, int]]:
    for schedule in SCHEDULES:
        options = (1,) if schedule in ("gpipe", "1f1b") else (2,) if schedule != "interleaved" else (2, 3, 4)
        for chunks in options:
            if pipeline * chunks > len(model.blocks):
                continue
            try:
                check_schedule(schedule, pipeline, chunks, micro_batches)
            except ConfigError:
                continue
            yield schedule, chunks


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def describe(choice: Choice) -> str:
    """A layout in a few words."""
    words = [choice.plan.in_words()]
    words.append("1 micro-batch" if choice.micro_batches == 1 else f"{choice.micro_batches} micro-batches")
    if choice.precision is not None:
        words.append(choice.precision)
    words += choice.activations.in_words
    if choice.offload != "none":
        words.append("optimizer in the host's memory" if choice.offload == "host" else "state on the disk")
    return ", ".join(words)


def reason(found: Found) -> str:
    """Why the first is before the second, in one sentence."""
    first = found.predictions[0]
    if len(found.predictions) < 2:
        return f"{describe(first.choice)} is the only layout that fits."
    second = found.predictions[1]
    terms = {
        "work": first.work_seconds - second.work_seconds,
        "exchange inside layers": first.tensor_seconds - second.tensor_seconds,
        "waiting in the pipeline": first.waiting_ratio * first.seconds - second.waiting_ratio * second.seconds,
        "exchange of gradients and weights": first.data_seconds - second.data_seconds,
        "optimizer": first.optimizer_seconds - second.optimizer_seconds,
    }
    gain = second.seconds - first.seconds
    most = min(terms, key=lambda name: terms[name])
    if gain <= 1e-3 * second.seconds:
        return f"{describe(first.choice)} and {describe(second.choice)} take as long; the first takes no more memory."
    return (
        f"{describe(first.choice)} saves {1e3 * gain:.3g} ms a step over {describe(second.choice)}, "
        f"most of all in {most} ({1e3 * -terms[most]:.3g} ms)."
    )
