"""Every layout that a model and a cluster allow, the fastest first.

Here        SearchConfig, `find_layouts`, `describe`, `reason`.
Elsewhere   what one of them costs (predict.py).
Promise     what is found fits the memory, the model and the records of a step; where nothing does, the message says
            what is nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import Field

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.schedule import SCHEDULES, Schedule, check_schedule
from dougong.engine.planner.cluster import ClusterConfig
from dougong.engine.planner.predict import BytesConfig, Choice, Prediction, predict
from dougong.engine.planner.shape import ModelShape


class SearchConfig(Config):
    """What may be chosen among."""

    records: int = Field(gt=0)
    """Of a step, of all ranks."""

    micro_batches: int | None = Field(default=None, gt=0)
    """Of a step, each shared out to all ranks that share out the records, as the engine does. None: the shape's
    micro-batch is one rank's, and a step has as many of them as its records make."""

    recompute: bool = False
    """Whether activations may be made anew in the backward."""

    offload: bool = False
    """Whether the optimizer may be in the host's memory."""

    memory_share: float = Field(default=0.9, gt=0, le=1)
    """Of a device's memory, that may be planned with."""

    most: int = Field(default=10, gt=0)
    """Layouts that are told."""


class Found(NamedTuple):
    """What a search has found."""

    predictions: list[Prediction]
    """Those that fit, the fastest first."""

    considered: int
    too_large: Prediction | None
    """Of those that do not fit the memory, the smallest; None where none was left out for it."""


def find_layouts(
    model: ModelShape,
    cluster: ClusterConfig,
    search: SearchConfig,
    sizes: BytesConfig | None = None,
    check: Callable[[PlanConfig], None] | None = None,
) -> Found:
    """All layouts, predicted. `check` raises ConfigError for those that cannot be carried out.

    Raises:
        ConfigError: none fits; the message says what is nearest.
    """
    fitting: list[Prediction] = []
    too_large: Prediction | None = None
    considered = 0
    refused: ConfigError | None = None
    for choice, shape in _choices(model, cluster, search):
        try:
            if check is not None:
                check(choice.plan)
        except ConfigError as error:
            refused = refused or error
            continue
        considered += 1
        found = predict(shape, cluster, choice, sizes)
        if found.peak_bytes <= search.memory_share * cluster.memory_bytes:
            fitting.append(found)
        elif too_large is None or found.peak_bytes < too_large.peak_bytes:
            too_large = found
    if not considered and refused is not None:
        raise ConfigError(f"no layout of {cluster.devices} devices can be carried out: {refused}")
    if not considered:
        raise ConfigError(
            f"{search.records} records a step cannot be shared out to {cluster.devices} devices in micro-batches of "
            f"{model.num_records:g}. Use a multiple of {model.num_records:g} records, or fewer devices."
        )
    if not fitting:
        assert too_large is not None
        room, least = search.memory_share * cluster.memory_bytes / 2**30, too_large.peak_bytes / 2**30
        raise ConfigError(
            f"no layout of {cluster.devices} devices fits {room:.3g} GiB each: the smallest takes {least:.3g} GiB "
            f"({describe(too_large.choice)}). Use more devices, smaller micro-batches"
            f"{'' if search.recompute else ', or recompute'}."
        )
    fitting.sort(key=lambda found: (found.seconds, found.peak_bytes))
    return Found(fitting[: search.most], considered, too_large)


def _choices(model: ModelShape, cluster: ClusterConfig, search: SearchConfig) -> Iterator[tuple[Choice, ModelShape]]:
    for tensor in _divisors(min(cluster.devices, cluster.per_node)):
        if model.num_heads % tensor or cluster.devices % tensor:
            continue
        for pipeline in _divisors(cluster.devices // tensor):
            data = cluster.devices // (tensor * pipeline)
            shape, micro_batches = model, search.micro_batches
            if micro_batches is not None:
                shape = model.of_records(search.records / micro_batches / data)
            else:
                step = round(model.num_records) * data
                if search.records % step:
                    continue
                micro_batches = search.records // step
            for plan in _plans(model, tensor, pipeline, data, micro_batches):
                for recompute in (False, True) if search.recompute else (False,):
                    for offload in (False, True) if search.offload else (False,):
                        yield Choice(plan, micro_batches, recompute, offload), shape


def _plans(model: ModelShape, tensor: int, pipeline: int, data: int, micro_batches: int) -> Iterator[PlanConfig]:
    experts = [n for n in _divisors(data) if n == 1 or (model.num_experts and model.num_experts % n == 0)]
    for expert in experts:
        common = {"tensor": tensor, "expert": expert}
        if pipeline == 1:
            yield PlanConfig(**common)
            for shard in _divisors(data)[1:]:
                for sharding in ("zero2", "zero3"):
                    yield PlanConfig(**common, shard=shard, sharding=sharding)
            continue
        for schedule, chunks in _schedules(model, pipeline, micro_batches):
            yield PlanConfig(**common, pipeline=pipeline, schedule=schedule, chunks=chunks)


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


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def describe(choice: Choice) -> str:
    """A layout in a few words."""
    words = [choice.plan.in_words()]
    words.append("1 micro-batch" if choice.micro_batches == 1 else f"{choice.micro_batches} micro-batches")
    if choice.recompute:
        words.append("recompute")
    if choice.offload:
        words.append("optimizer in the host's memory")
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
