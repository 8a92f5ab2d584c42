"""Trains a tiny model in forked processes and kills them with SIGKILL; run by test_kill.py.

Forked from here rather than started anew, since loading torch takes longer than the training.
`kill_and_resume.py FOLDER SEED` trains FOLDER/whole without a stop and FOLDER/killed with many, and prints as JSON
the step that each process got to before it was killed, and what stood in the checkpoints' folder after it. With `disk`
besides, the state of those that are killed lies on the disk, and that of the one which is not in memory.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tiny_run import Judged, TinyLoader, TinyModel, TinyOutput, losses_of, tiny_loss
from torch import Tensor

from dougong.engine.memory.offload import OffloadConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import ALONE
from dougong.engine.prepare import prepare_model
from dougong.engine.trainer import TrainConfig, Watch, train
from dougong.nn.batch import Batch

STEPS = 60


def run(folder: Path, before: Callable[[], None], *, averaged: bool = True, on_disk: bool = False) -> None:
    """Train to the end, or to the kill. Every source of chance has a part in the loss."""
    before()
    model = TinyModel()

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        return tiny_loss(output, batch) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))

    def judge() -> dict[str, Judged]:
        random.random()  # must leave no trace
        return {"all": Judged({"sum": float(model.last.weight.detach().sum())})}

    config = TrainConfig(
        steps=STEPS,
        accumulation=2,
        precision="fp32",
        checkpoint_every=4,
        evaluate_every=10,
        ema=0.9 if averaged else None,
        keep=2,
    )
    loader = TinyLoader(44, 8, bad={3}, delay=0.001)
    offload = OffloadConfig.model_validate("disk" if on_disk else {})
    layout = prepare_model(model, PlanConfig(), ALONE, accumulation=2, offload=offload, folder=folder / "offload")
    watch = Watch(judge, "sum")
    train(model, loss, loader, config, folder=folder, watch=watch, seed=5, resume=True, layout=layout)
    if layout.shelved is not None:
        layout.shelved.close()


def forked(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """How the process ended, as `os.waitpid` says."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def at_sync(number: int, name: Literal["fsync", "fdatasync"]) -> Callable[[], None]:
    """Die at the `number`th time that something is put on the disk: in the middle of a checkpoint (fsync), or while a
    block's state is written behind (fdatasync)."""

    def arm() -> None:
        count = 0

        def sync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, sync)

    return arm


def main() -> None:
    os.fsync = lambda handle: None  # a kill loses nothing that was written; only a power failure would
    os.fdatasync = lambda handle: None
    folder, seed, on_disk = Path(sys.argv[1]), int(sys.argv[2]), "disk" in sys.argv[3:]
    averaged = not on_disk  # an average would be in memory
    chance = random.Random(seed)
    torch.set_num_threads(1)
    whole, killed = folder / "whole", folder / "killed"
    run(folder / "warm-up", lambda: None, averaged=averaged)  # loads what torch loads late, once for every child
    started = time.perf_counter()
    assert forked(lambda: run(whole, lambda: None, averaged=averaged)) == 0
    seconds = time.perf_counter() - started
    go_on = functools.partial(run, killed, averaged=averaged, on_disk=on_disk)

    kills = []
    for number in range(40):
        if number % 2:
            status = forked(lambda: go_on(lambda: None), kill_after=chance.uniform(0.05, 0.4) * seconds)
        elif on_disk and number % 4:
            status = forked(functools.partial(go_on, at_sync(chance.randrange(1, 60), "fdatasync")))
        else:
            status = forked(functools.partial(go_on, at_sync(chance.randrange(1, 40), "fsync")))
        if status == 0:
            break
        assert status == signal.SIGKILL, f"the process ended with {status}"
        events = killed / "events.jsonl"
        kills.append(
            {
                "step": losses_of(killed)[-1][0] if events.exists() and losses_of(killed) else 0,
                "names": sorted(path.name for path in (killed / "checkpoints").glob("*")),
                "left": sorted(path.name for path in (killed / "offload").glob("*/*")),
            }
        )
    status = forked(lambda: go_on(lambda: None))
    assert status == 0, f"the last process ended with {status}"
    print(json.dumps(kills))


if __name__ == "__main__":
    main()
