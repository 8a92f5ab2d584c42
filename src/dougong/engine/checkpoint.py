"""What a run needs to go on after a kill, in one folder that is whole or absent.

Here        RunState, `save_checkpoint`, `latest_checkpoint`, `restore_checkpoint`, `load_weights`, `best_weights`.
Elsewhere   when to save (engine/trainer.py); whole folders (core/files.py); weights in files (engine/weights.py).
Promise     a folder that is not whole and unaltered is never loaded: every file's sha256 stands in its manifest;
            nothing is ever unpickled. What a resumed run computes is what an uninterrupted one would have.

A checkpoint is `RUN/checkpoints/step-00000123/` with model.safetensors, optimizer.safetensors, random.json,
state.json, where weights are averaged also average.safetensors, where several ranks trained also random-1.json and so
on for those after the first, and manifest.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.core.config import Config
from dougong.core.errors import CheckpointError
from dougong.core.files import inside, sha256_of, whole_folder, write_json
from dougong.core.seeds import derive_seed
from dougong.engine.average import WeightAverage
from dougong.engine.precision import Chosen
from dougong.engine.random_state import random_state, restore_random_state, seed_all
from dougong.engine.sampling import SamplingState
from dougong.engine.weights import distinct_weights, put_weights, read_weights, write_weights

FORMAT = 1
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
STATE, RANDOM, MANIFEST = "state.json", "random.json", "manifest.json"
NEEDED = (MODEL, OPTIMIZER, STATE, RANDOM)

_NAME = re.compile(r"step-(\d{8,})")


class RunState(Config):
    """The numbers of a run that are neither weights nor random states."""

    step: int
    epoch: int
    batch: int
    """With `epoch`, the loader's position."""

    batches_per_epoch: int
    """Of the loader; a position means nothing in another one."""

    seed: int
    precision: Chosen
    precision_ratio: float | None
    """How much faster bf16 was measured to be; None where it was not measured."""

    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_in_a_row: int = 0
    seen: int = 0
    """Distinct records met, bad ones included."""

    bad_rows: tuple[int, ...] = ()
    first_bad: tuple[dict[str, Any], ...] = ()

    sampling: SamplingState | None = None
    """The rates at which modalities are left out, where they move."""


class Checkpoint(NamedTuple):
    """A folder that was found whole."""

    folder: Path
    state: RunState


class Skipped(NamedTuple):
    """A folder that was not."""

    folder: Path
    reason: str


class Found(NamedTuple):
    """The newest whole checkpoint, if any, and the newer ones that were passed over."""

    checkpoint: Checkpoint | None
    skipped: tuple[Skipped, ...]


def save_checkpoint(
    folder: Path,
    state: RunState,
    model: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None = None,
    random_states: Sequence[dict[str, Any]] = (),
) -> Path:
    """Save under `folder` and return the checkpoint's own folder; `random_states` are all ranks', where there are
    several."""
    path = folder / f"step-{state.step:08d}"
    with whole_folder(path) as temporary:
        write_weights(temporary / MODEL, distinct_weights(model))
        write_weights(temporary / OPTIMIZER, _optimizer_tensors(model, optimizer))
        if average is not None:
            write_weights(temporary / AVERAGE, average.weights())
        write_json(temporary / STATE, state.model_dump(mode="json"))
        for rank, kept in enumerate(random_states or (random_state(),)):
            (temporary / _random_name(rank)).write_text(json.dumps(kept), encoding="utf-8")
        sums = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": sums})
    return path


def check_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`.

    Raises:
        CheckpointError: it is not whole and unaltered; the message says what is amiss.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        found_format, sums = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or damaged") from None
    if found_format != FORMAT:
        raise CheckpointError(f"{folder}: its format is {found_format!r}, this version reads {FORMAT}")
    # Averages or random states that the manifest does not know would be loaded unseen.
    unlisted = [file.name for file in (folder / AVERAGE, *folder.glob("random-*.json")) if file.exists()]
    for name in dict.fromkeys([*NEEDED, *sums, *unlisted]):
        file = inside(folder, name)
        if file is None or not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if sha256_of(file) != sums.get(name):
            raise CheckpointError(f"{folder}: {name} differs from its sha256 sum")
    try:
        return Checkpoint(folder, RunState.model_validate_json((folder / STATE).read_bytes()))
    except ValidationError as error:
        raise CheckpointError(f"{folder}: {STATE} is of another version ({error.error_count()} errors)") from None


def latest_checkpoint(folder: Path) -> Found:
    """The newest whole checkpoint under `folder`."""
    skipped: list[Skipped] = []
    for path in reversed(_checkpoints(folder)):
        try:
            return Found(check_checkpoint(path), tuple(skipped))
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
    return Found(None, tuple(skipped))


def restore_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None = None,
    rank: int = 0,
) -> None:
    """Put weights, optimizer and random states back. A rank that had no part in that run draws numbers of its own.

    Raises:
        CheckpointError: it is of another model, or of a run that averaged its weights where this one does not.
    """
    folder = checkpoint.folder
    if (average is not None) != (folder / AVERAGE).exists():
        here, there = ("with", "without") if average is not None else ("without", "with")
        raise CheckpointError(
            f"{folder} was saved {there} averaged weights and this run is {here} them. Set ema as in that run."
        )
    put_weights(model, read_weights(folder / MODEL), where=str(folder))
    _restore_optimizer(model, optimizer, read_weights(folder / OPTIMIZER), where=str(folder))
    if average is not None:
        average.restore(read_weights(folder / AVERAGE))
    random = folder / _random_name(rank)
    if random.exists():
        restore_random_state(json.loads(random.read_bytes()))
    else:
        seed_all(derive_seed(checkpoint.state.seed, "train", "rank", rank, "from", checkpoint.state.step))


def load_weights(model: nn.Module, checkpoint_folder: Path) -> None:
    """Put a checkpoint's result into the model: its averaged weights if it has them, else its weights.

    Raises:
        CheckpointError: the folder is damaged, or of another model.
    """
    check_checkpoint(checkpoint_folder)
    average = checkpoint_folder / AVERAGE
    put_weights(
        model, read_weights(average if average.exists() else checkpoint_folder / MODEL), where=str(checkpoint_folder)
    )


def best_weights(run: Path) -> Path:
    """The checkpoint folder to use of a run: the best evaluated one, or the last where nothing was evaluated.

    Raises:
        CheckpointError: there is none, or the best one is damaged.
    """
    found = latest_checkpoint(checkpoints_of(run)).checkpoint
    if found is None:
        raise CheckpointError(f"{run} has no whole checkpoint. Train it first, or give another run.")
    if found.state.best_step is None:
        return found.folder
    return check_checkpoint(found.folder.parent / f"step-{found.state.best_step:08d}").folder


def checkpoints_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` and those that one of these names its best."""
    paths = _checkpoints(folder)
    kept = set(paths[-keep:])
    for path in paths[-keep:]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged older one names no best
            kept.add(folder / f"step-{json.loads((path / STATE).read_bytes())['best_step'] or 0:08d}")
    for path in paths:
        if path not in kept:
            # Its name goes first: a kill midway leaves a leftover, not a damaged checkpoint.
            leftover = path.with_name(f".{path.name}.pruned")
            path.rename(leftover)
            shutil.rmtree(leftover)


def clear_leftovers(folder: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def set_aside(skipped: Skipped) -> None:
    """Rename a damaged checkpoint, so that it is neither found nor counted again."""
    target = skipped.folder.with_name(f"{skipped.folder.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    skipped.folder.rename(target)


def _random_name(rank: int) -> str:
    return f"random-{rank}.json" if rank else RANDOM


def _checkpoints(folder: Path) -> list[Path]:
    """From the oldest to the newest."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, each tensor by what it is and the name of its parameter."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], *, where: str) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        by_name.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unknown = by_name.keys() - {names[parameter] for parameter in ordered}
    if unknown:
        raise CheckpointError(
            f"{where} trained {sorted(unknown)[0]!r} and this run does not. Freeze the same parameters as that run."
        )
    state = {index: by_name[names[p]] for index, p in enumerate(ordered) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
