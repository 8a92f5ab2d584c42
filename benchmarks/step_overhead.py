"""What a training step costs beside the arithmetic: our trainer, a bare PyTorch loop, and transformers.Trainer.

Here        the three, in turns; the loader alone.
Elsewhere   options and the written result (harness.py).
Promise     paired: in each round every contender takes the same steps on the same batches in one process, in an order
            that turns about, and a figure is the median of the rounds' ratios with a bootstrapped 95% interval.

The model, its data and its optimizer's settings are the recipe vqa-demo's, in fp32. All contenders train one and the
same module, set back to the same weights before each turn; the first steps of a turn are not timed. Torch has one
thread: where the cores are shared with other work, two wait for each other and a step's time varies tenfold.

- The bare loop has the same optimizer as our trainer (the same parameter groups, fused), clips by
  `clip_grad_norm_`, and follows the same schedule by a LambdaLR. It and our trainer read ready-made batches.
- transformers.Trainer has the same AdamW settings, clipping and cosine with warm-up, its own default AdamW
  implementation, and no evaluation, logging, saving or progress bar. It reads the batches of our own Loader through
  an IterableDataset of ready batches, so decoding, collating and augmenting are shared, in the training process for
  both (`workers=0`, which is what the loader chooses on two cores). Beside it, our trainer reads a Loader of its own
  at the same position, so that neither finds media in its cache that the other one decoded.
- Our trainer runs as it does for users: events file, TensorBoard listener, a checkpoint every 120 seconds. A turn is
  too short for one, so the share of one is added to each step: what the checkpoint at the end of the turn took, over
  120 seconds.
- The loader alone reads a third Loader at the same position. Caches begin empty, which is its worst case.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import run
from paired import quartiles, ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dougong.core.events import Announcer, CheckpointSaved, Event, StepDone
from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.data.batch import BatchArrays
from dougong.data.loader import Loader
from dougong.data.position import Position
from dougong.data.preparation import fit_preparation
from dougong.engine.batches import to_tensors
from dougong.engine.trainer import TrainConfig, train
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.decision import decision_loss
from dougong.recipes.build import target_of
from dougong.recipes.known import vqa_demo
from dougong.recipes.tables import open_tables
from dougong.watch.tensorboard import TensorBoard

ROUNDS: Final = 15
STEPS: Final = 20
UNTIMED: Final = 3
FIRST_EPOCH: Final = 2
"""From here on the recipe shows both kinds of questions."""

Seconds = dict[str, float]


class Replay:
    """A loader of ready-made batches."""

    def __init__(self, batches: Sequence[BatchArrays]) -> None:
        self._batches = batches

    @property
    def batches_per_epoch(self) -> int:
        return len(self._batches)

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        epoch, first = start
        while True:
            for number in range(first, len(self._batches)):
                last = number + 1 == len(self._batches)
                yield Position(epoch + 1, 0) if last else Position(epoch, number + 1), self._batches[number]
            epoch, first = epoch + 1, 0

    def one_pass(self) -> Iterator[BatchArrays]:
        return iter(self._batches)


class From:
    """A loader that begins later."""

    def __init__(self, loader: Loader, position: Position) -> None:
        self._loader, self._position = loader, position

    @property
    def batches_per_epoch(self) -> int:
        return self._loader.batches_per_epoch

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        assert start == Position()
        return self._loader.batches(self._position)

    def one_pass(self) -> Iterator[BatchArrays]:
        return self._loader.one_pass()


class Bench:
    """The recipe's model and data, and a turn of each contender on them."""

    def __init__(self, steps: int) -> None:
        recipe = vqa_demo()
        tables = open_tables(recipe.data, seed=recipe.seed)
        target = target_of(recipe.data, tables)
        preparation = fit_preparation(tables.train, tables.roles, target, recipe.data.preparation)
        torch.manual_seed(derive_seed(recipe.seed, "model"))
        self.model: Sandwich = recipe.model.build(preparation.signature())
        self.weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.task = target.task
        self.total = UNTIMED + steps
        self.config: TrainConfig = recipe.train.model_copy(update={"steps": self.total})
        workers = recipe.data.loader.model_copy(update={"workers": 0})

        def loader() -> Loader:
            return Loader(
                tables.train,
                preparation,
                workers,
                seed=recipe.seed,
                train=True,
                views=recipe.data.views,
                one_view_a_batch=recipe.data.one_view_a_batch,
            )

        self.loader_of = {name: loader() for name in ("ready", "ours", "theirs", "alone")}
        self.saving: list[float] = []

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The sum over the records."""
        assert batch.target is not None
        return decision_loss(output.output_BC, batch.target, self.task)

    def ready(self, position: Position) -> list[BatchArrays]:
        found = self.loader_of["ready"].batches(position)
        return [next(found)[1] for _ in range(self.total)]

    def set_back(self) -> None:
        self.model.load_state_dict(self.weights)
        self.model.train()
        self.model.zero_grad(set_to_none=True)

    def bare(self, batches: Sequence[BatchArrays]) -> float:
        self.set_back()
        tensors = [to_tensors(each) for each in batches]
        settings = self.config.optimizer
        optimizer = settings.build(self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: settings.learning_rate_at(step, self.total) / settings.learning_rate
        )
        assert self.config.max_grad_norm is not None
        clock = Clock(self.total)
        for batch in tensors:
            optimizer.zero_grad()
            loss = self.loss(self.model(batch), batch) / batch.num_records
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            optimizer.step()
            schedule.step()
            clock.tick()
        return clock.seconds_per_step

    def ours(self, loader: Replay | From) -> float:
        self.set_back()
        clock = Clock(self.total)
        saved = 0.0

        def hear(event: Event) -> None:
            nonlocal saved
            if isinstance(event, StepDone):
                clock.tick()
            elif isinstance(event, CheckpointSaved):
                saved = time.perf_counter()

        with tempfile.TemporaryDirectory() as name, TensorBoard(Path(name) / "tensorboard") as curves:
            train(self.model, self.loss, loader, self.config, folder=Path(name), announce=Announcer(curves, hear))
        self.saving.append(saved - clock.ended)
        assert self.config.checkpoint_seconds is not None
        return clock.seconds_per_step * (1 + self.saving[-1] / self.config.checkpoint_seconds)

    def theirs(self, loader: From) -> float:
        self.set_back()
        clock = Clock(self.total)
        settings = self.config.optimizer
        assert self.config.max_grad_norm is not None
        with tempfile.TemporaryDirectory() as name:
            arguments = transformers.TrainingArguments(
                output_dir=name,
                max_steps=self.total,
                learning_rate=settings.learning_rate,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                weight_decay=settings.weight_decay,
                max_grad_norm=self.config.max_grad_norm,
                lr_scheduler_type="cosine",
                warmup_steps=round(settings.warmup_ratio * self.total),
                dataloader_num_workers=0,
                remove_unused_columns=False,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = ReadyTrainer(
                model=Wrapped(self.model, self.loss),
                args=arguments,
                train_dataset=Stream(loader, self.total),
                callbacks=[Ticking(clock)],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return clock.seconds_per_step

    def alone(self, position: Position) -> float:
        """Seconds per batch."""
        clock = Clock(self.total)
        for _, (_, arrays) in zip(range(self.total), self.loader_of["alone"].batches(position), strict=False):
            to_tensors(arrays)
            clock.tick()
        return clock.seconds_per_step


class Clock:
    """Times the steps after the first ones."""

    def __init__(self, total: int) -> None:
        self._total, self._steps = total, 0
        self._began = self.ended = math.nan

    def tick(self) -> None:
        self._steps += 1
        if self._steps == UNTIMED:
            self._began = time.perf_counter()
        if self._steps == self._total:
            self.ended = time.perf_counter()

    @property
    def seconds_per_step(self) -> float:
        assert not math.isnan(self.ended), "a turn took fewer steps than it was to"
        return (self.ended - self._began) / (self._total - UNTIMED)


class Wrapped(nn.Module):
    """The model as transformers.Trainer wants it: nested dicts in, the mean loss out."""

    def __init__(self, model: Sandwich, loss: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, media: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
        batch = Batch({name: MediaBatch(**each) for name, each in media.items()}, target)
        return {"loss": self.loss(self.model(batch), batch) / batch.num_records}


class Stream(IterableDataset[dict[str, Any]]):
    """Ready batches of a loader."""

    def __init__(self, loader: From, total: int) -> None:
        self._loader, self._total = loader, total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, (_, arrays) in zip(range(self._total), self._loader.batches(Position()), strict=False):
            batch = to_tensors(arrays)
            yield {"media": {name: each._asdict() for name, each in batch.media.items()}, "target": batch.target}


class ReadyTrainer(transformers.Trainer):
    """Takes the batches as they come."""

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert isinstance(self.train_dataset, Stream)
        return DataLoader(self.train_dataset, batch_size=None, num_workers=self.args.dataloader_num_workers)


class Ticking(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self._clock.tick()


def one_round(bench: Bench, number: int) -> Seconds:
    """A turn of each, seconds per step."""
    per_epoch = bench.loader_of["ready"].batches_per_epoch
    first = number * bench.total
    position = Position(FIRST_EPOCH + first // per_epoch, first % per_epoch)
    ready = bench.ready(position)
    turns: dict[str, Callable[[], float]] = {
        "bare": lambda: bench.bare(ready),
        "ours, ready": lambda: bench.ours(Replay(ready)),
        "alone": lambda: bench.alone(position),
        "ours": lambda: bench.ours(From(bench.loader_of["ours"], position)),
        "theirs": lambda: bench.theirs(From(bench.loader_of["theirs"], position)),
    }
    names = list(turns)[:: 1 if number % 2 else -1]
    return {name: turns[name]() for name in names}


def measure(quick: bool) -> list[Figure]:
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it ships so
    torch.set_num_threads(1)
    bench = Bench(steps=8 if quick else STEPS)
    num_rounds = 3 if quick else ROUNDS
    one_round(bench, 0)  # what is loaded late, by every contender
    bench.saving.clear()
    rounds = [one_round(bench, number) for number in range(1, num_rounds + 1)]

    def of(name: str) -> list[float]:
        return [each[name] for each in rounds]

    return [
        ratio("step over a bare PyTorch loop's, ready batches", of("ours, ready"), of("bare"), "<= 1.10"),
        ratio("step over transformers.Trainer's, same loader", of("ours"), of("theirs"), "<= 1.00"),
        ratio("records/s of the loader alone over the step's", of("ours, ready"), of("alone"), ">= 3"),
        quartiles("bare loop, ready batches", of("bare")),
        quartiles("our trainer, ready batches", of("ours, ready")),
        quartiles("our trainer, with the loader", of("ours")),
        quartiles("transformers.Trainer, with the loader", of("theirs")),
        quartiles("loader alone, a batch", of("alone")),
        quartiles("a checkpoint", bench.saving),
    ]


if __name__ == "__main__":
    run("step_overhead", "What a training step costs beside the arithmetic (vqa-demo, fp32).", measure)
