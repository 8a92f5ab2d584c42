"""How long training stands still for a checkpoint: copied and written beside it, or written at once.

Here        both ways, in turns, on one model of about 40 million parameters and its AdamW state.
Elsewhere   options and the written result (harness.py).
Promise     both save the same tensors to the same disk, and call none done before it is there. Figures are medians; the
            interval is from the first to the third quartile.

The pause is what the training thread spends in saving: `pause_seconds` of our trainer's own CheckpointSaved, and the
duration of `save_checkpoint`, which is how it saved before. A step that comes while a checkpoint is written has fewer
cores: the steps' own time is shown with and without one under way. The first checkpoint, which asks for the memory that
all others use again, has a row of its own. Records are made up; what a step computes is small beside its weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from harness import run
from paired import quartiles
from torch import Tensor, nn

from dougong.core.events import Announcer, CheckpointSaved, Event, StepDone
from dougong.core.figures import Figure
from dougong.data.batch import BatchArrays, MediaArrays
from dougong.data.position import Position
from dougong.engine.checkpoint import RunState, save_checkpoint
from dougong.engine.trainer import TrainConfig, train
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

WIDTH: Final = 1024
BLOCKS: Final = 38
RECORDS: Final = 64
EVERY: Final = 16


class Output(NamedTuple):
    output_BC: Tensor


class Deep(BlockStack[Tensor, Output]):
    """Square layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS))
        self.last = nn.Linear(WIDTH, 3)

    def embed(self, batch: Batch) -> Tensor:
        x: Tensor = self.first(batch.media["x"].values["numbers_UN"])
        return x

    def head(self, state: Tensor) -> Output:
        return Output(self.last(state))


class Made:
    """A loader of one batch, again and again."""

    batches_per_epoch = 1000

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        every = np.arange(RECORDS, dtype=np.int64)
        media = MediaArrays(
            {"numbers_UN": random.standard_normal((RECORDS, 8)).astype(np.float32)}, every, np.ones(RECORDS, np.bool_)
        )
        self._batch = BatchArrays({"x": media}, random.integers(0, 3, RECORDS), every, ())

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        for number in range(start.batch, self.batches_per_epoch):
            yield Position(start.epoch, number + 1), self._batch

    def one_pass(self) -> Iterator[BatchArrays]:
        yield self._batch


def loss(output: Output, batch: Batch) -> Tensor:
    assert batch.target is not None
    return nn.functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def beside(model: Deep, folder: Path, saves: int) -> tuple[list[CheckpointSaved], list[float], list[float]]:
    """Our trainer's checkpoints, and its steps' seconds with one under way and without."""
    saved: list[CheckpointSaved] = []
    busy: list[float] = []
    free: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event)
        elif isinstance(event, StepDone) and event.step > EVERY:
            under_way = len(saved) < (event.step - 1) // EVERY
            (busy if under_way else free).append(event.seconds)

    config = TrainConfig(
        steps=EVERY * saves + EVERY - 1, precision="fp32", checkpoint_every=EVERY, checkpoint_seconds=None, keep=1
    )
    train(model, loss, Made(), config, folder=folder, announce=Announcer(hear))
    return saved[:-1], busy, free  # the last one is waited for


def at_once(model: Deep, folder: Path, saves: int) -> list[float]:
    """Seconds of each save, of the same state."""
    optimizer = TrainConfig().optimizer.build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    seconds = []
    for step in range(1, saves + 1):
        state = RunState(
            step=step, epoch=0, batch=step, batches_per_epoch=1000, seed=0, precision="fp32", precision_ratio=None
        )
        began = time.perf_counter()
        path = save_checkpoint(folder, state, model, optimizer)
        seconds.append(time.perf_counter() - began)
        for file in path.iterdir():
            file.unlink()
    return seconds


def measure(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)
    saves, rounds = (2, 1) if quick else (4, 2)
    first: list[float] = []
    later: list[float] = []
    waits: list[float] = []
    busy: list[float] = []
    free: list[float] = []
    stops: list[float] = []
    for _ in range(rounds):
        model = Deep()
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            saved, with_one, without = beside(model, Path(name), saves)
        first.append(saved[0].pause_seconds)
        later += [each.pause_seconds - each.wait_seconds for each in saved[1:]]
        waits += [each.wait_seconds for each in saved]
        busy += with_one
        free += without
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            stops += at_once(model, Path(name), saves)

    return [
        quartiles("pause for a checkpoint", later, baseline=statistics.median(stops) * 1000),
        quartiles("pause for the first checkpoint", first),
        quartiles("pause where it is written at once", stops),
        quartiles("of a pause, waiting for the one before", waits),
        quartiles("a step, nothing under way", free),
        quartiles("a step, a checkpoint under way", busy),
    ]


if __name__ == "__main__":
    run("checkpoint_pause", "What a checkpoint of 40 million parameters costs training (AdamW, fp32).", measure)
