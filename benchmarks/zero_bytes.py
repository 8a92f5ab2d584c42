"""What a rank holds where training is spread by the stages of ZeRO, against the formula (claim 7).

Here        bytes of weights, gradients and optimizer on 2, 4 and 8 ranks, with losses beside one process's; and what a
            step takes where the optimizer alone is spread, beside copies and beside weights gathered once a step.
Elsewhere   the formula (engine/planner/predict.py); counting (engine/memory/account.py); options and the written result
            (harness.py).
Promise     every rank is a process that trains, by gloo, with one thread; the rank that holds most is told. What is
            gathered for a while, and gradients before they are spread, are told apart from what is held, beside what
            copies have in their place. Times are interleaved, in an order drawn anew.

The model is a decoder of which nothing can be divided by 8, nor most by 4. zero2 and zero3 gather each block by itself,
as large models do; "by the step" is what becomes of either in a model this small where nothing else is asked for: there
all weights and gradients are held for a while until a step's end, and only then a part.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from harness import run
from paired import quartiles, ratio
from torch.multiprocessing.spawn import start_processes

from dougong.core.figures import Figure
from dougong.core.files import write_json
from dougong.core.signature import Signature, Target, TextInput
from dougong.data.position import WHOLE, Share
from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.planner.predict import BytesConfig, state_bytes
from dougong.engine.prepare import prepare_model
from dougong.engine.step import TrainParts, train_step
from dougong.model.decoder import DecoderConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.generation import words_loss

WORLDS: Final = (2, 4, 8)
STEPS: Final = 3
RECORDS: Final = 11
WORDS: Final = 2003
TOKENS: Final = 9
ROUNDS: Final = 11
TIMED: Final = 3
"""Steps of a turn."""


def plans(world: int) -> dict[str, PlanConfig]:
    return {
        "copies": PlanConfig(),
        "zero1": PlanConfig(shard=world, sharding="zero1"),
        "zero2": PlanConfig(shard=world, sharding="zero2", gathered_bytes=0),
        "zero3": PlanConfig(shard=world, sharding="zero3", gathered_bytes=0),
        "by the step": PlanConfig(shard=world, sharding="zero2"),
    }


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    if "bytes" in parts:
        alone, _ = trained(PlanConfig(), ALONE)
        for world in WORLDS[: 1 if quick else None]:
            yield from held(world, alone)
    if "steps" in parts:
        yield from steps(quick=quick)


def build() -> BlockStack[Any, Any]:
    torch.manual_seed(0)
    signature = Signature(
        inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=TOKENS)},
        target=Target(name="named", task="single_label", labels=("a", "b")),
    )
    config = DecoderConfig(width=254, num_layers=3, num_heads=5, latent_rank=63, hidden=1003, experts=None)
    return config.build(signature)


def batch_of(step: int, share: Share) -> Batch:
    """This rank's records of a step; of 11 records ranks have unequal parts."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(4, WORDS, (RECORDS, TOKENS), generator=generator)[share.of(RECORDS)]
    every_B = torch.arange(len(words))
    values = {"ids_UT": words, "mask_UT": torch.ones_like(words).bool()}
    return Batch({"words": MediaBatch(values, every_B, torch.ones_like(every_B).bool())}, every_B)


def prepared(plan: PlanConfig, ranks: Ranks) -> tuple[TrainParts, Share]:
    model = build().train()
    layout = prepare_model(model, plan, ranks)
    optimizer = OptimizerConfig().build(model)
    layout.share_out(optimizer)
    parts = TrainParts(
        model,
        lambda output, _: words_loss(output),
        optimizer,
        backward=layout.backward,
        reduce=None if ranks.group is None else layout.reduce,
        all_backward=layout.all_backward,
    )
    return parts, layout.mesh.share if ranks.group is not None else WHOLE


# Bytes ---------------------------------------------------------------------------------------------------------


def trained(plan: PlanConfig, ranks: Ranks) -> tuple[list[float], StepBytes]:
    """The losses of some steps, and what this rank held in the last."""
    parts, share = prepared(plan, ranks)
    losses = [train_step(parts, [batch_of(step, share)], num_records=RECORDS).loss for step in range(STEPS - 1)]
    with Account(parts.model, parts.optimizer) as account:
        losses.append(train_step(parts, [batch_of(STEPS - 1, share)], num_records=RECORDS).loss)
    return losses, account.bytes


def held(world: int, alone: Sequence[float]) -> Iterator[Figure]:
    found: list[dict[str, Any]] = on_ranks(count, world)
    parameters = sum(parameter.numel() for parameter in build().parameters())
    copies = max(StepBytes(*each["copies"][1]).activations for each in found)
    for name, plan in plans(world).items():
        counted = [StepBytes(*each[name][1]) for each in found]
        formula = state_bytes(parameters, plan, BytesConfig())
        most = max(counted, key=lambda each: each.weights + each.gradients + each.optimizer)
        said = f"{name} on {world} ranks"
        for what in formula._fields:
            yield Figure(
                name=f"{said}, {what}",
                value=getattr(most, what) / 2**20,
                unit="MiB",
                baseline=getattr(formula, what) / 2**20,
            )
        error = (most.weights + most.gradients + most.optimizer) / sum(formula) - 1
        yield Figure(name=f"{said}: all three, error of the formula", value=abs(error), unit="", asked="<= 0.02")
        yield Figure(
            name=f"{said}: all else at its most (activations, gathered, on its way)",
            value=max(each.activations for each in counted) / 2**20,
            unit="MiB",
            baseline=copies / 2**20,
        )
        apart = max(abs(a - b) for each in found for a, b in zip(each[name][0], alone, strict=True))
        yield Figure(name=f"{said}: losses apart from one process's", value=apart, unit="", asked="<= 1e-05")


def count(rank: int, store: str, folder: str, world: int) -> None:
    """On a rank: its losses with each stage, and what it holds."""
    with_others(rank, store, world)
    ranks = Ranks(dist.group.WORLD)
    write_json(Path(folder) / f"{rank}.json", {name: trained(plan, ranks) for name, plan in plans(world).items()})
    dist.destroy_process_group()


# Steps ---------------------------------------------------------------------------------------------------------


def steps(*, quick: bool) -> Iterator[Figure]:
    world = 2
    seconds: dict[str, list[float]] = {}
    found: list[dict[str, list[float]]] = on_ranks(time_quickly if quick else time_steps, world)
    for name in found[0]:
        seconds[name] = [max(turn) for turn in zip(*(each[name] for each in found), strict=True)]
        yield quartiles(f"a step of {name} on {world} ranks", seconds[name])
    for other in ("copies", "by the step", "zero2", "zero3"):
        yield ratio(f"a step of zero1 over {other} on {world} ranks", seconds["zero1"], seconds[other], None)


def time_steps(rank: int, store: str, folder: str, world: int, rounds: int = ROUNDS) -> None:
    """On a rank: seconds of a step with each stage, by round."""
    with_others(rank, store, world)
    ready = {name: prepared(plan, Ranks(dist.group.WORLD)) for name, plan in plans(world).items()}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for place in np.random.default_rng(number).permutation(len(ready)):
            name = list(ready)[place]
            parts, share = ready[name]
            batch = batch_of(number, share)
            dist.barrier()
            started = time.perf_counter()
            for _ in range(TIMED):
                train_step(parts, [batch], num_records=RECORDS)
            if number:  # in the first, each makes what it keeps
                seconds[name].append((time.perf_counter() - started) / TIMED)
    write_json(Path(folder) / f"{rank}.json", seconds)
    dist.destroy_process_group()


def time_quickly(rank: int, store: str, folder: str, world: int) -> None:
    time_steps(rank, store, folder, world, rounds=3)


def with_others(rank: int, store: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def on_ranks(work: Callable[..., None], world: int) -> list[Any]:
    """What each of so many processes writes of its work."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (f"{folder}/store", folder, world), nprocs=world)  # type: ignore[no-untyped-call]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


if __name__ == "__main__":
    about = "Bytes of a rank by the stages of ZeRO, against the formula, with losses beside one process's."
    run("zero_bytes", about, measure, parts=("bytes", "steps"))
