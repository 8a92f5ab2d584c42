"""What a training step costs on 1, 2 and 4 ranks: our engine beside bare PyTorch and other frameworks.

Here        the contenders, in turns in the same processes; what is made of their times.
Elsewhere   one process with a real recipe's data (step_overhead.py); options and the written result (harness.py).
Promise     paired: in each round every contender takes the same steps on the same batches from the same weights, in an
            order drawn anew; a step's time is the slowest rank's, a figure the median of the rounds' ratios with
            a bootstrapped 95 % interval. All must have come to the same loss, or nothing is told. Processes are started
            several times: where each contender's weights come to lie in memory is a few percent of its step, and stays
            so until the process ends.

The model is a small sandwich (pictures and words, 7 blocks, 0.5 million parameters) in fp32, on made-up records that
lack nothing, since other frameworks need special settings where a modality is absent. All clip to norm 1 and have a
fused AdamW; DeepSpeed its own way of it. Where a framework says nothing about the size of buckets, its own is kept.

- copies: bare DistributedDataParallel; `accelerate` and Lightning Fabric, which put it around the model; DeepSpeed 0.
- state spread (ZeRO-2): FSDP2 that keeps gathered weights until the backward; DeepSpeed 2 (and 1, for its step alone).
- all spread (ZeRO-3): FSDP2 around each block; Fabric around FSDP2; DeepSpeed 3. `accelerate` is not among them: on a
  CPU its FSDP2 plugin silently trains copies.

Batches come as arrays, as from a loader's processes, and every contender makes tensors of them in its step. Our trainer
runs as it does for users: events file, agreement on stopping at each step, records counted. What is not installed is
left out and said (`pip install accelerate lightning-fabric deepspeed`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from harness import run
from paired import as_ranks, quartiles, ratio

from dougong.core.figures import Figure

WORLDS: Final = (1, 2, 4)
STARTS: Final = 4
ROUNDS: Final = 4
"""Of each start."""

STEPS: Final = 12
UNTIMED: Final = 3
RECORDS: Final = 32
"""Of a step, on all ranks."""

KINDS: Final[dict[int, dict[str, tuple[str, ...]]]] = {
    1: {"alone": ("bare loop", "accelerate", "Fabric")},
    2: {
        "copies": ("DDP", "accelerate", "Fabric", "DeepSpeed 0"),
        "zero1": ("DeepSpeed 1",),
        "zero2": ("FSDP2 kept", "DeepSpeed 1", "DeepSpeed 2"),
        "zero3": ("FSDP2", "Fabric FSDP2", "DeepSpeed 3"),
    },
}
"""Whom ours of each kind is held against; from 2 ranks on."""


def measure(quick: bool) -> Iterator[Figure]:
    for world in WORLDS[:2] if quick else WORLDS:
        found: dict[str, list[float]] = {}
        for _ in range(1 if quick else STARTS):
            for name, took in run_ranks(world, rounds=ROUNDS).items():
                found.setdefault(name, []).extend(took)
        for kind, names in KINDS[min(world, 2)].items():
            yield from _figures(found, kind, names, world)


def _figures(found: dict[str, list[float]], kind: str, names: Sequence[str], world: int) -> Iterator[Figure]:
    where = "1 rank" if world == 1 else f"{world} ranks, {kind}"
    ours = found[f"ours {kind}"]
    there = {name: found[name] for name in names if name in found}
    best = min(there, key=lambda name: float(np.median(there[name])))
    if world == 1:
        yield ratio(f"{where}: our step over the bare loop's", ours, found["bare loop"], "<= 1.02")
    asked = None if world == 1 else "<= 1.00"
    yield ratio(f"{where}: our step over the best other's ({best})", ours, there[best], asked)
    for name, took in {"ours": ours, **there}.items():
        yield quartiles(f"{where}: {name}", took)


def run_ranks(world: int, *, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every contender, by round."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [
        {
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_CPU": "true",
            "TORCHELASTIC_RUN_ID": "bench",  # by which Fabric knows that ranks are started already
            "DOUGONG_ROUNDS": str(rounds),
        }
        for rank in range(world)
    ]
    found: dict[str, list[float]] = as_ranks(Path(__file__), environments)
    return found


# A rank --------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one contender did in its turn."""

    seconds_per_step: float
    losses: list[float]
    """This rank's mean loss of each step."""


def as_rank() -> None:
    """One rank's part; the first one writes the result."""
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    contenders = _contenders(world)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = int(os.environ["DOUGONG_ROUNDS"])
    for number in range(rounds + 1):
        batches = _batches(number)
        turns = {}
        for place in np.random.default_rng(number).permutation(len(contenders)):
            name = list(contenders)[place]
            dist.barrier()
            turns[name] = contenders[name](batches)
        losses = torch.tensor([turn.losses for turn in turns.values()])
        dist.all_reduce(losses)
        apart = (losses - losses[0]).abs().max().item() / world
        if apart > 1e-3:
            named = dict(zip(turns, (losses[:, -1] / world).tolist(), strict=True))
            raise RuntimeError(f"the contenders do not train the same: losses up to {apart} apart, at last {named}")
        seconds = torch.tensor([turn.seconds_per_step for turn in turns.values()])
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if number:  # in the first, each loads what it loads late
            for name, took in zip(turns, seconds.tolist(), strict=True):
                found[name].append(took)
    if dist.get_rank() == 0:
        Path(os.environ["DOUGONG_RESULT"]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


Contender = Callable[[Sequence[Any]], Turn]
"""Takes a step on each of this rank's batches, from the first weights."""


def _contenders(world: int) -> dict[str, Contender]:
    if world == 1:
        made: dict[str, Contender | None] = {"bare loop": _bare(), "ours alone": _ours({})}
    else:
        made = {
            "DDP": _ddp(),
            "ours copies": _ours({}),
            "FSDP2": _fsdp2(kept=False),
            "ours zero3": _ours({"shard": world}),
            "FSDP2 kept": _fsdp2(kept=True),
            "ours zero2": _ours({"shard": world, "sharding": "zero2"}),
            "ours zero1": _ours({"shard": world, "sharding": "zero1"}),
            "Fabric FSDP2": _fabric(spread=True),
            **{f"DeepSpeed {stage}": _deepspeed(stage) for stage in range(4)},
        }
    made |= {"accelerate": _accelerate(), "Fabric": _fabric(spread=False)}
    return {name: contender for name, contender in made.items() if contender is not None}


def _model() -> Any:
    """The same weights on every rank and for every contender."""
    import torch

    from dougong.core.signature import ImageInput, Signature, Target, TextInput
    from dougong.model.bridge import BridgeConfig
    from dougong.model.encoders.image import ImageEncoderConfig
    from dougong.model.encoders.text import TextEncoderConfig
    from dougong.model.sandwich import SandwichConfig

    torch.manual_seed(0)
    signature = Signature(
        inputs={"words": TextInput(vocabulary_size=200, max_tokens=16), "photo": ImageInput(height=32, width=32)},
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )
    return SandwichConfig(
        width=64,
        bridge=BridgeConfig(num_blocks=3, num_heads=4, dropout=0.0),
        encoders={
            "photo": ImageEncoderConfig(width=64, num_layers=2, num_heads=4, dropout=0.0),
            "words": TextEncoderConfig(width=64, num_layers=2, num_heads=4, dropout=0.0),
        },
    ).build(signature)


def _batches(number: int) -> list[Any]:
    """This rank's records of each step, as arrays."""
    import torch.distributed as dist

    from dougong.data.batch import BatchArrays, MediaArrays

    drawn = np.random.default_rng((number, dist.get_rank()))
    count = RECORDS // dist.get_world_size()
    every_B, there_B = np.arange(count), np.ones(count, dtype=bool)
    made = []
    for _ in range(UNTIMED + STEPS):
        words = drawn.integers(4, 200, (count, 12))
        media = {
            "words": MediaArrays({"ids_UT": words, "mask_UT": np.ones_like(words, dtype=bool)}, every_B, there_B),
            "photo": MediaArrays(
                {"pixels_UCHW": drawn.standard_normal((count, 3, 32, 32), dtype=np.float32)}, every_B, there_B
            ),
        }
        made.append(BatchArrays(media, drawn.integers(3, size=count), every_B, ()))
    return made


def _loss(output: Any, batch: Any) -> Any:
    """The sum over the records."""
    import torch

    return torch.nn.functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def _wrapped(model: Any) -> Any:
    """A module from a batch to its mean loss: what all other frameworks can take."""
    from torch import nn

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Any:
            return _loss(self.model(batch), batch) / batch.num_records

    return Whole()


class _SetBack:
    """Puts the first weights and an empty optimizer state back, in place, whatever holds them."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters = list(parameters)
        self.first = [parameter.detach().clone() for parameter in self.parameters]

    def __call__(self) -> None:
        import torch

        with torch.no_grad():
            for parameter, first in zip(self.parameters, self.first, strict=True):
                parameter.copy_(first)


LEARNING_RATE: Final = 1e-3


def _adam(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)


def _timed(batches: Sequence[Any], step: Callable[[Any], Any]) -> Turn:
    from dougong.engine.batches import to_tensors

    losses = []
    began = 0.0
    for number, arrays in enumerate(batches):
        if number == UNTIMED:
            began = time.perf_counter()
        losses.append(float(step(to_tensors(arrays))))
    return Turn((time.perf_counter() - began) / STEPS, losses)


def _loop(module: Any, parameters: Sequence[Any], clip: Callable[[], Any]) -> Contender:
    """The loop that everyone writes, around a module from a batch to its loss."""
    set_back = _SetBack(parameters)

    def turn(batches: Sequence[Any]) -> Turn:
        set_back()
        optimizer = _adam(module.parameters())

        def step(batch: Any) -> Any:
            optimizer.zero_grad()
            loss = module(batch)
            loss.backward()
            clip()
            optimizer.step()
            return loss.detach()

        return _timed(batches, step)

    return turn


def _bare() -> Contender:
    from torch import nn

    module = _wrapped(_model())
    parameters = list(module.parameters())
    return _loop(module, parameters, lambda: nn.utils.clip_grad_norm_(parameters, 1.0))


def _ddp() -> Contender:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel(_wrapped(_model()))
    parameters = list(module.parameters())
    return _loop(module, parameters, lambda: nn.utils.clip_grad_norm_(parameters, 1.0))


def _spread_by_fsdp2(module: Any, *, kept: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in module.model.blocks:
        fully_shard(block, reshard_after_forward=not kept)
    fully_shard(module, reshard_after_forward=False)


def _fsdp2(*, kept: bool) -> Contender:
    from torch import nn

    module = _wrapped(_model())
    _spread_by_fsdp2(module, kept=kept)
    parameters = list(module.parameters())
    return _loop(module, parameters, lambda: nn.utils.clip_grad_norm_(parameters, 1.0))


def _accelerate() -> Contender | None:
    if importlib.util.find_spec("accelerate") is None:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = accelerator.prepare(_wrapped(_model()))
    set_back = _SetBack(list(module.parameters()))

    def turn(batches: Sequence[Any]) -> Turn:
        set_back()
        optimizer = accelerator.prepare_optimizer(_adam(module.parameters()))

        def step(batch: Any) -> Any:
            optimizer.zero_grad()
            loss = module(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return _timed(batches, step)

    return turn


def _fabric(*, spread: bool) -> Contender | None:
    if importlib.util.find_spec("lightning_fabric") is None:
        return None
    import torch.distributed as dist
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    world = dist.get_world_size()
    strategy: Any = "ddp" if world > 1 else "auto"
    if spread:

        def parallelize(module: Any, mesh: Any) -> Any:
            _spread_by_fsdp2(module, kept=False)
            return module

        strategy = ModelParallelStrategy(parallelize)
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    module = fabric.setup_module(_wrapped(_model()))
    set_back = _SetBack(list(module.parameters()))

    def turn(batches: Sequence[Any]) -> Turn:
        set_back()
        optimizer = fabric.setup_optimizers(_adam(module.parameters()))

        def step(batch: Any) -> Any:
            optimizer.zero_grad()
            loss = module(batch)
            fabric.backward(loss)
            fabric.clip_gradients(module, optimizer, max_norm=1.0)
            optimizer.step()
            return loss.detach()

        return _timed(batches, step)

    return turn


def _deepspeed(stage: int) -> Contender | None:
    if importlib.util.find_spec("deepspeed") is None:
        return None
    import logging

    import deepspeed
    import torch.distributed as dist

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    count = RECORDS // dist.get_world_size()

    def turn(batches: Sequence[Any]) -> Turn:
        # Anew in each turn: its weights cannot be set back from outside in every stage.
        module = _wrapped(_model())
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=list(module.parameters()),
            config={
                "train_micro_batch_size_per_gpu": count,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 1.0,
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": LEARNING_RATE, "weight_decay": 0.01, "torch_adam": True, "fused": True},
                },
            },
        )

        def step(batch: Any) -> Any:
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            return loss.detach()

        found = _timed(batches, step)
        engine.destroy()
        return found

    return turn


def _ours(plan: dict[str, Any]) -> Contender:
    import torch.distributed as dist

    from dougong.core.events import Announcer, Event, StepDone
    from dougong.data.position import Position
    from dougong.engine.optimizer import OptimizerConfig
    from dougong.engine.parallel.plan import PlanConfig
    from dougong.engine.parallel.ranks import ALONE, Ranks
    from dougong.engine.prepare import prepare_model
    from dougong.engine.trainer import TrainConfig, train

    model = _model()
    world = dist.get_world_size()
    ranks = Ranks(dist.group.WORLD) if world > 1 else ALONE
    layout = prepare_model(model, PlanConfig(**plan), ranks)
    set_back = _SetBack(list(model.parameters()))
    config = TrainConfig(
        steps=UNTIMED + STEPS,
        precision="fp32",
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.999), schedule="constant", warmup_ratio=0.0
        ),
    )

    class Ready:
        batches_per_epoch = UNTIMED + STEPS

        def __init__(self, batches: Sequence[Any]) -> None:
            self._batches = batches

        def batches(self, start: Position) -> Iterator[tuple[Position, Any]]:
            for number, each in enumerate(self._batches, start=1):
                yield Position(0, number) if number < len(self._batches) else Position(1, 0), each

        def one_pass(self) -> Iterator[Any]:
            return iter(self._batches)

    def turn(batches: Sequence[Any]) -> Turn:
        set_back()
        model.zero_grad(set_to_none=True)
        ticks, losses = [], []

        def hear(event: Event) -> None:
            if isinstance(event, StepDone):
                ticks.append(time.perf_counter())
                losses.append(event.loss)

        folder = Path(ranks.first_says(lambda: tempfile.mkdtemp(prefix="frameworks-")))
        train(
            model,
            _loss,
            Ready(batches),
            config,
            folder=folder,
            announce=Announcer(hear),
            ranks=ranks,
            layout=layout,
        )
        if ranks.first:
            shutil.rmtree(folder)
        # Listeners hear of the run on the first rank alone; a step ends on all ranks together.
        told = ranks.first_says(lambda: {"took": [(ticks[-1] - ticks[UNTIMED - 1]) / STEPS], "losses": losses})
        return Turn(told["took"][0], told["losses"])

    return turn


if __name__ == "__main__":
    if "--as-rank" in sys.argv:
        as_rank()
    else:
        run("frameworks", "What a training step costs on 1, 2 and 4 ranks, beside other frameworks.", measure)
