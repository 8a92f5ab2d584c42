"""What a run needs to go on after a kill, in one folder that is whole or absent.

Here        RunState, `save_checkpoint` and its parts, `latest_checkpoint`, `restore_checkpoint`, `load_weights`,
            `best_weights`.
Elsewhere   when to save (engine/trainer.py), and doing so beside training (engine/saver.py); whole folders
            (core/files.py); weights in files (engine/weights.py).
Promise     a folder that is not whole and unaltered is never loaded: every file's sha256 stands in its manifest;
            nothing is ever unpickled. What a resumed run computes is what an uninterrupted one would have.

A checkpoint is `RUN/checkpoints/step-00000123/` with model.safetensors, optimizer.safetensors, random.json,
state.json, where weights are averaged also average.safetensors, where several ranks trained also random-1.json and so
on for those after the first, and manifest.json. Where no rank holds the whole model, each writes what it holds of all
three into pieces-0000.safetensors and so on, and pieces.json says where what lies: any layout can read it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.core.config import Config
from dougong.core.errors import CheckpointError
from dougong.core.files import as_json, finish_folder, inside, sha256_of, sync_file, write_json
from dougong.core.seeds import derive_seed
from dougong.engine.average import WeightAverage
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.pieces import Piece, PieceReader, all_of, index_of, own_pieces, told
from dougong.engine.precision.adaptive import AdaptiveState
from dougong.engine.precision.choice import Chosen
from dougong.engine.precision.scaling import OverflowState
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Weights
from dougong.engine.random_state import random_state, restore_random_state, seed_all
from dougong.engine.sampling import SamplingState
from dougong.engine.staging import Staging
from dougong.engine.weights import distinct_weights, local_part, mapped_weights, put_weights, write_weights

FORMAT = 2
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
STATE, RANDOM, MANIFEST = "state.json", "random.json", "manifest.json"
PIECES = "pieces.json"
NEEDED, NEEDED_OF_PIECES = (MODEL, OPTIMIZER, STATE, RANDOM), (PIECES, STATE, RANDOM)

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
    weights: Weights = "fp32"
    states: States = "fp32"
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

    scaling: AdaptiveState | OverflowState | None = None
    """By what the loss is multiplied, and formats, where gradients must fit fp16."""


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


class Copied(NamedTuple):
    """What one rank writes of a checkpoint, as it was at one step."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By file."""

    texts: dict[str, str]
    """By file."""


def save_checkpoint(
    folder: Path,
    state: RunState,
    model: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None = None,
    random_states: Sequence[dict[str, Any]] = (),
) -> Path:
    """Save under `folder` at once, and return the checkpoint's own folder; `random_states` are all ranks', where there
    are several."""
    copied = copy_whole(state, model, optimizer, average, random_states, Staging())
    discard(folder, state.step)
    try:
        return publish(folder, state.step, write_copied(folder, copied))
    except BaseException:
        discard(folder, state.step)
        raise


def copy_whole(
    state: RunState,
    model: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None,
    random_states: Sequence[dict[str, Any]],
    staging: Staging | None,
) -> Copied:
    """All of a checkpoint of a model that this rank holds whole. Without `staging` it is not copied, and must be
    written before anything changes."""
    tensors = {MODEL: distinct_weights(model), OPTIMIZER: _optimizer_tensors(model, optimizer)}
    if average is not None:
        tensors[AVERAGE] = average.weights()
    texts = {STATE: as_json(state.model_dump(mode="json"))}
    for rank, kept in enumerate(random_states or (random_state(),)):
        texts[_random_name(rank)] = json.dumps(kept)
    return Copied(state.step, tensors if staging is None else staging.copy(tensors), texts)


def copy_pieces(
    state: RunState, layout: Layout, optimizer: Optimizer, average: WeightAverage | None, staging: Staging | None
) -> Copied:
    """This rank's part of a checkpoint of a model that no rank holds whole, copied or not as above. All ranks call
    this."""
    ranks = layout.mesh.ranks
    if layout.sharded is not None:
        layout.sharded.let_go()
    held = _held(layout, optimizer, average)
    index = index_of(ranks.tell(told(held)))
    texts = {}
    if ranks.first:
        texts = {STATE: as_json(state.model_dump(mode="json")), PIECES: as_json(index)}
    if layout.mesh.place("tensor") == layout.mesh.place("pipeline") == 0:  # those beside it draw the same numbers
        texts[_random_name(layout.mesh.share.rank)] = json.dumps(random_state())
    tensors = {_pieces_name(ranks.rank): own_pieces(held, index, ranks.rank)}
    return Copied(state.step, tensors if staging is None else staging.copy(tensors), texts)


def write_copied(folder: Path, copied: Copied) -> dict[str, str]:
    """Write a rank's files beside those of the others, and return their sums. Nothing is left of them on an error.

    Raises:
        OSError: they cannot be written.
    """
    writing = _being_written(folder, copied.step)
    writing.mkdir(parents=True, exist_ok=True)
    sums = {}
    try:
        for name, tensors in copied.tensors.items():
            write_weights(writing / name, tensors)
            sums[name] = _kept(writing / name)
        for name, text in copied.texts.items():
            (writing / name).write_text(text, encoding="utf-8")
            sums[name] = _kept(writing / name)
    except BaseException:
        # At once: where the disk is full, whoever else writes needs the room.
        for name in (*copied.tensors, *copied.texts):
            (writing / name).unlink(missing_ok=True)
        raise
    return sums


def publish(folder: Path, step: int, sums: Mapping[str, str]) -> Path:
    """Give the checkpoint that all ranks have written its name, from which on it counts; `sums` are of all files.

    Raises:
        OSError: what is left to write cannot be.
    """
    path = folder / f"step-{step:08d}"
    writing = _being_written(folder, step)
    write_json(writing / MANIFEST, {"format": FORMAT, "files": dict(sorted(sums.items()))})
    finish_folder(writing, path)
    return path


def discard(folder: Path, step: int) -> None:
    """Delete what has been written of a checkpoint that will not be published."""
    shutil.rmtree(_being_written(folder, step), ignore_errors=True)


def _being_written(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.writing"


def _kept(path: Path) -> str:
    """The sum of a file, once it is on the disk."""
    sync_file(path)
    return sha256_of(path)


def _held(layout: Layout, optimizer: Optimizer, average: WeightAverage | None) -> dict[str, Piece]:
    """What this rank holds of weights, buffers, optimizer and averages."""
    model = layout.model
    parameters = dict(model.named_parameters())

    def piece(name: str, tensor: Tensor, of: dict[str, nn.Parameter]) -> Piece:
        if name in of and tensor.shape == local_part(of[name]).shape:
            return layout.stepped_piece(name, tensor)
        return all_of(tensor)

    held = {f"model/{name}": piece(name, tensor, parameters) for name, tensor in distinct_weights(model).items()}
    for name, parameter in layout.trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            held[f"optimizer/{key}/{name}"] = piece(name, local_part(value), layout.trained)
    if average is not None:
        held |= {f"average/{name}": piece(name, tensor, parameters) for name, tensor in average.weights().items()}
    return held


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
    maybe = (folder / AVERAGE, folder / PIECES, *folder.glob("random-*.json"), *folder.glob("pieces-*.safetensors"))
    unlisted = [file.name for file in maybe if file.exists()]
    needed = NEEDED_OF_PIECES if PIECES in sums else NEEDED
    for name in dict.fromkeys([*needed, *sums, *unlisted]):
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
    layout: Layout | None = None,
) -> None:
    """Put weights, optimizer and random states back. A share of the records that had no part in that run has random
    numbers of its own.

    Raises:
        CheckpointError: it is of another model, or of a run that averaged its weights where this one does not.
    """
    folder = checkpoint.folder
    rank = 0 if layout is None else layout.mesh.share.rank
    saved = _Saved(folder)
    if (average is not None) != saved.has_average:
        here, there = ("with", "without") if average is not None else ("without", "with")
        raise CheckpointError(
            f"{folder} was saved {there} averaged weights and this run is {here} them. Set ema as in that run."
        )
    if layout is None or layout.is_whole:
        put_weights(model, saved.all("model/"), where=str(folder))
        _restore_optimizer(model, optimizer, saved.all("optimizer/"), where=str(folder))
        if average is not None:
            average.restore(saved.all("average/"))
    else:
        _restore_pieces(saved, layout, optimizer, average)
    random = folder / _random_name(rank)
    if random.exists():
        restore_random_state(json.loads(random.read_bytes()))
    else:
        seed_all(derive_seed(checkpoint.state.seed, "train", "rank", rank, "from", checkpoint.state.step))


def load_weights(model: nn.Module, checkpoint_folder: Path) -> None:
    """Put a checkpoint's result into the model: its averaged weights if it has them, else its weights, as exact as
    they are known: of bf16 ones their masters, or with what was kept beside them.

    Raises:
        CheckpointError: the folder is damaged, or of another model.
    """
    kept_beside = check_checkpoint(checkpoint_folder).state.weights in ("bf16-kahan", "bf16-masters")
    saved = _Saved(checkpoint_folder)
    if saved.has_average:
        found = saved.all("average/")
    else:
        found = saved.exact() if kept_beside else saved.all("model/")
    put_weights(model, found, where=str(checkpoint_folder))


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


class _Saved:
    """The tensors of a checkpoint, whole ones or pieces, by what they are of and their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reader: PieceReader | None = None
        self.has_average = (folder / AVERAGE).exists()
        if (folder / PIECES).exists():
            index = json.loads((folder / PIECES).read_bytes())
            ranks = {place["rank"] for entry in index.values() for place in entry["at"]}
            self.reader = PieceReader(folder, {rank: _pieces_name(rank) for rank in ranks}, index)
            self.has_average = any(name.startswith("average/") for name in index)
        self._whole: dict[str, Tensor] = {}

    def all(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind, whole."""
        if self.reader is not None:
            return {n.removeprefix(kind): self.reader.read(n) for n in self.reader.index if n.startswith(kind)}
        return mapped_weights(self._folder / {"model/": MODEL, "optimizer/": OPTIMIZER, "average/": AVERAGE}[kind])

    def exact(self) -> dict[str, Tensor]:
        """The weights; of those in 16 bits, with what the optimizer knows besides."""
        found = self.all("model/")
        for full_name, kept in self.all("optimizer/").items():
            key, _, name = full_name.partition("/")
            if key == "master":
                found[name] = kept
            elif key == "compensation":
                found[name] = found[name].float() + kept.float()
        return found

    def whole(self, kind: str, name: str) -> Tensor:
        """One tensor."""
        return self.all(kind)[name] if self.reader is None else self.reader.read(kind + name)

    def part(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box of one of them."""
        if self.reader is not None:
            return self.reader.read(kind + name, offset, shape)
        if kind + name not in self._whole:
            self._whole |= {kind + key: tensor for key, tensor in self.all(kind).items()}
        if kind + name not in self._whole:
            raise CheckpointError(f"{self._folder} has no {name}. Build the model with the settings of that run.")
        box = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
        return self._whole[kind + name][box]

    def names(self, kind: str) -> list[str]:
        """Of all tensors of a kind."""
        if self.reader is not None:
            return [name.removeprefix(kind) for name in self.reader.index if name.startswith(kind)]
        return list(self.all(kind))


@torch.no_grad()
def _restore_pieces(saved: _Saved, layout: Layout, optimizer: Optimizer, average: WeightAverage | None) -> None:
    parameters = dict(layout.model.named_parameters())

    def fill(kind: str, name: str, piece: Piece) -> None:
        piece.local.copy_(saved.part(kind, name, piece.offset, tuple(piece.local.shape)))

    def held(name: str, tensor: Tensor) -> Piece:
        return layout.piece(name, tensor) if name in parameters else all_of(tensor)

    for name, tensor in distinct_weights(layout.model).items():
        fill("model/", name, held(name, tensor))
    if average is not None:
        for name, tensor in average.weights().items():
            fill("average/", name, held(name, tensor))
    kept: dict[str, dict[str, Tensor]] = {}
    for full_name in saved.names("optimizer/"):
        key, _, name = full_name.partition("/")
        if name not in layout.trained:
            continue
        if key == "step":
            kept.setdefault(name, {})[key] = saved.part("optimizer/", full_name, (), ())
            continue
        if key.endswith(("_codes", "_scale")):  # a layout that has them has whole weights
            kept.setdefault(name, {})[key] = saved.whole("optimizer/", full_name)
            continue
        here = layout.stepped_piece(name, layout.trained[name].detach())
        box = saved.part("optimizer/", full_name, here.offset, tuple(here.local.shape))
        tensor = torch.zeros_like(layout.trained[name], dtype=box.dtype)  # a master is no bf16
        layout.stepped_piece(name, tensor).local.copy_(box)
        kept.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in layout.trained.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _put_state(optimizer, {p: kept[names[p]] for p in ordered if names.get(p) in kept})


def _pieces_name(rank: int) -> str:
    return f"pieces-{rank:04d}.safetensors"


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
    _put_state(optimizer, {p: by_name[names[p]] for p in ordered if names[p] in by_name})


@torch.no_grad()
def _put_state(optimizer: Optimizer, found: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Into the memory where the optimizer has it already, if it has: that may be a file."""
    for parameter, tensors in found.items():
        own = optimizer.state[parameter]
        for key, tensor in tensors.items():
            if key in own:
                own[key].copy_(tensor)
            else:
                own[key] = tensor.clone()
