"""A model, a loader and a loss that train in milliseconds, and still draw random numbers in every step."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.events import Announcer, Event, Listener, StepDone, read_events
from dougong.core.seeds import derive_seed
from dougong.core.signature import Target
from dougong.data.batch import BadRecord, BatchArrays, MediaArrays
from dougong.data.position import Position
from dougong.engine.batches import to_tensors
from dougong.engine.trainer import TrainConfig, TrainResult, Watch, train
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

TARGET = Target(name="kind", task="single_label", labels=("a", "b", "c"))
WIDTH = 6


class TinyLoader:
    """Records 0 to `num_records`, shuffled in each epoch; `bad` ones are set aside."""

    def __init__(
        self,
        num_records: int = 40,
        batch_size: int = 8,
        *,
        seed: int = 0,
        bad: set[int] | None = None,
        delay: float = 0.0,
    ) -> None:
        random = np.random.default_rng(7)
        self.x_ND = random.standard_normal((num_records, WIDTH)).astype(np.float32)
        self.y_N = self.x_ND[:, :3].argmax(axis=1)
        self.batch_size, self.seed, self.bad, self.delay = batch_size, seed, bad or set(), delay

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.x_ND) // self.batch_size)

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        epoch, first = start
        while True:
            order = np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(len(self.x_ND))
            for number in range(first, self.batches_per_epoch):
                time.sleep(self.delay)
                last = number + 1 == self.batches_per_epoch
                yield Position(epoch + 1, 0) if last else Position(epoch, number + 1), self.collate(order, number)
            epoch, first = epoch + 1, 0

    def one_pass(self) -> Iterator[BatchArrays]:
        for number in range(self.batches_per_epoch):
            yield self.collate(np.arange(len(self.x_ND)), number)

    def collate(self, order: np.ndarray[Any, Any], number: int) -> BatchArrays:
        rows = order[number * self.batch_size :][: self.batch_size]
        good = np.array([row for row in rows if row not in self.bad], np.int64)
        media = MediaArrays(
            {"numbers_UN": self.x_ND[good]}, np.arange(len(good), dtype=np.int64), np.ones(len(good), np.bool_)
        )
        bad = tuple(BadRecord(int(row), "x", "not a number") for row in rows if row in self.bad)
        return BatchArrays({"x": media}, self.y_N[good], good, bad)

    def all_tensors(self) -> Batch:
        whole = TinyLoader(len(self.x_ND), len(self.x_ND))
        return to_tensors(whole.collate(np.arange(len(self.x_ND)), 0))


class TinyOutput(NamedTuple):
    output_BC: Tensor
    weight_BM: Tensor


class TinyModel(BlockStack[Tensor, TinyOutput]):
    def __init__(self, *, seed: int = 0, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(WIDTH, 16)
        layers: list[nn.Module] = [nn.Linear(16, 16), nn.GELU(), nn.Dropout(dropout)]
        if norm:
            layers.append(nn.BatchNorm1d(16))  # has buffers
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])
        self.last = nn.Linear(16, 3)

    def embed(self, batch: Batch) -> Tensor:
        x: Tensor = self.first(batch.media["x"].values["numbers_UN"])
        return x

    def head(self, state: Tensor) -> TinyOutput:
        return TinyOutput(self.last(state), torch.ones(len(state), 1))


def tiny_loss(output: TinyOutput, batch: Batch) -> Tensor:
    assert batch.target is not None
    return functional.cross_entropy(output.output_BC.float(), batch.target, reduction="sum")


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(folder / "events.jsonl") if e["kind"] == "StepDone"]


def kinds_of(folder: Path) -> list[str]:
    return [event["kind"] for event in read_events(folder / "events.jsonl")]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same_weights(left: nn.Module | dict[str, Tensor], right: nn.Module | dict[str, Tensor]) -> bool:
    a = left if isinstance(left, dict) else left.state_dict()
    b = right if isinstance(right, dict) else right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_tiny(
    folder: Path,
    *,
    model: TinyModel | None = None,
    loader: TinyLoader | None = None,
    loss: Callable[[TinyOutput, Batch], Tensor] = tiny_loss,
    watch: Watch | None = None,
    hear: Listener | None = None,
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> tuple[TrainResult, TinyModel]:
    """Train for 20 steps, four epochs, unless told otherwise."""
    model = model or TinyModel()
    config = TrainConfig(**{"steps": 20, "precision": "fp32", "checkpoint_every": 4, **settings})
    announce = Announcer(*([hear] if hear is not None else []))
    result = train(
        model,
        loss,
        loader or TinyLoader(),
        config,
        folder=folder,
        watch=watch,
        announce=announce,
        seed=seed,
        resume=resume,
    )
    return result, model


def interrupt_at(step: int) -> Listener:
    """Ctrl-C in the middle of a run."""

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return hear


@dataclass(frozen=True)
class Judged:
    """An evaluation of which only the figures matter."""

    metrics: dict[str, float]
    num_records: int = 1


def watch_scores(*scores: float, higher_is_better: bool = True) -> Watch:
    """Each evaluation finds the next of these scores."""
    left = iter(scores)
    return Watch(lambda: {"all": Judged({"score": next(left)})}, "score", higher_is_better=higher_is_better)
