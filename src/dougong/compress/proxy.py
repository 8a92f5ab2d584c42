"""A guess at how much a candidate would lose, before it has learnt.

Here        `diverges`: how far its answers are from the teacher's after a few steps; Proxy, that and a step's time.
Elsewhere   learning to the end (distil.py); who ranks by it (search.py).
Promise     it ranks and never decides; it leaves no trace in what is learnt later.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dougong.bundle.model import Model
from dougong.compress.distil import DistilConfig, Lessons, Teacher
from dougong.data.loader import Loader
from dougong.data.position import Position
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import evaluating
from dougong.engine.random_state import random_state_kept
from dougong.engine.step import TrainParts, train_step
from dougong.nn.batch import Batch
from dougong.objectives.distillation import distillation_loss


class Proxy(NamedTuple):
    """What was found of a candidate."""

    divergence: float
    """In nats a record; of numbers, squared."""

    step_seconds: float


def diverges(
    model: Model,
    teacher: Model,
    learn: Table,
    calibration: Sequence[Batch],
    config: DistilConfig,
    *,
    steps: int,
    seed: int,
) -> Proxy:
    """Let a model, which is changed, learn for a few steps, and hold its answers against the teacher's."""
    task = teacher.preparation.target.task
    everything = Teacher(teacher.network, tuple(teacher.preparation.modalities))
    lessons = Lessons(model.network, everything, (), config, task)
    parts = TrainParts(
        model.network.train(), lessons, config.train.optimizer.build(model.network), config.train.max_grad_norm
    )
    loader = Loader(
        learn,
        teacher.preparation,
        config.loader,
        seed=seed,
        train=True,
        views=config.views,
        one_view_a_batch=config.one_view_a_batch,
        withhold=config.withhold,
    )
    started, count = time.perf_counter(), 0
    with random_state_kept(), lessons.listening():
        torch.manual_seed(seed)
        for _, arrays in itertools.islice(loader.batches(Position()), steps):
            if len(arrays.row_B):
                train_step(parts, [to_tensors(arrays)], num_records=len(arrays.row_B))
                count += 1
    seconds = (time.perf_counter() - started) / max(1, count)
    total, records = 0.0, 0
    with torch.inference_mode(), evaluating(model.network):
        for batch in calibration:
            own = model.network(Batch({n: batch.media[n] for n in model.network.names}, None)).output_BC
            total += float(distillation_loss(own, teacher.network(batch).output_BC, task))
            records += batch.num_records
    return Proxy(total / max(1, records), seconds)
