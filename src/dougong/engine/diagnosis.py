"""Where a number that is not finite came from, once a step has met one.

Here        `diagnose`, Finding; `agree`, on the ranks that it began on.
Elsewhere   noticing, and leaving weights as they were (engine/step.py); what is said of it (engine/trainer.py).
Promise     looking changes nothing: random numbers, buffers and gradients are as before. In a model that ranks compute
            together each looks only at what it holds, without a forward, whose exchanges would show the same on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dougong.engine.parallel.heartbeat import modalities_of_blocks
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.random_state import random_state_kept
from dougong.engine.step import TrainParts, one_by_one
from dougong.engine.weights import local_part
from dougong.nn.batch import Batch

RECORDS, WEIGHTS, BLOCKS, LOSS, GRADIENTS = "records", "weights", "blocks", "loss", "gradients"
_PLACES: Final = (RECORDS, WEIGHTS, BLOCKS, LOSS, GRADIENTS)


class Finding(NamedTuple):
    """The first thing on the way through a step that is not finite."""

    place: str
    number: int
    """Within its place: of the block."""

    modality: str
    """Empty where it is not one modality's."""

    what: str


class Agreed(NamedTuple):
    """Of all ranks."""

    ranks: list[int]
    """On which it began; none where that was not found."""

    modality: str
    reason: str
    mend_records: bool
    """Whether they are what it began with."""


def agree(finding: Finding | None, ranks: Ranks) -> Agreed:
    """What comes first of all that the ranks have found, and on which of them."""
    told = ranks.tell(None if finding is None else list(finding))
    found = {rank: Finding(*each) for rank, each in enumerate(told) if each is not None}
    if not found:
        return Agreed([], "", "all that was looked at is finite", False)
    first = min((_PLACES.index(each.place), each.number) for each in found.values())
    where = [rank for rank, each in found.items() if (_PLACES.index(each.place), each.number) == first]
    chosen = found[where[0]]
    who = "" if ranks.world == 1 else f"on rank{'s' * (len(where) > 1)} {', '.join(map(str, where))} "
    of = f"{chosen.modality}: " if chosen.modality else ""
    return Agreed(where, chosen.modality, f"{who}{of}{chosen.what}", chosen.place == RECORDS)


def diagnose(
    parts: TrainParts, batches: Sequence[Batch], rows: Sequence[Sequence[int]], *, num_records: int, again: bool = True
) -> Finding | None:
    """Look through a step that was skipped; `rows` are the numbers of each batch's records. Records and weights are
    looked at; with `again`, the step's forward and backward are done once more, in which all ranks must have a part."""
    with torch.no_grad():
        found = _in_records(batches, rows) or _in_weights(parts.model)
    # A rank that has found something all the same takes part: others may wait for it.
    passed = _in_passes(parts, batches, num_records) if again else None
    return found or passed


def _in_records(batches: Sequence[Batch], rows: Sequence[Sequence[int]]) -> Finding | None:
    for batch, numbers in zip(batches, rows, strict=True):
        for name, media in batch.media.items():
            there_B = media.present_B if media.there_B is None else media.there_B
            for values in media.values.values():
                if _is_finite(values):
                    continue
                finite_U = values.flatten(1).isfinite().all(dim=1)
                for row, there, place in zip(numbers, there_B.tolist(), media.index_B.tolist(), strict=True):
                    if there and not finite_U[place]:
                        return Finding(RECORDS, 0, name, f"record {row} holds a number that is not finite")
        if batch.target is not None and not _is_finite(batch.target):
            finite_B = (
                batch.target.flatten(1).isfinite().all(dim=1) if batch.target.ndim > 1 else batch.target.isfinite()
            )
            row = numbers[finite_B.tolist().index(False)]
            return Finding(RECORDS, 0, "", f"the target of record {row} is not finite")
    return None


def _in_weights(model: nn.Module) -> Finding | None:
    owner = _owners(model)
    for name, parameter in model.named_parameters():
        if not _is_finite(local_part(parameter)):
            return Finding(WEIGHTS, 0, owner.get(parameter, ""), f"the weights {name} are not finite")
    return None


def _in_passes(parts: TrainParts, batches: Sequence[Batch], num_records: int) -> Finding | None:
    """Through embedding, blocks, head and loss, and back."""
    model = parts.model
    names, modalities = modalities_of_blocks(model), {name for batch in batches for name in batch.media}
    found: list[Finding] = []

    def note(number: int, name: str, state: Any, what: str) -> None:
        if found:
            return
        for path, tensor in _tensors(state, ()):
            if not _is_finite(tensor.detach()):
                of = name or next((each for each in reversed(path) if each in modalities), "")
                found.append(Finding(BLOCKS, number, of, what))
                return

    handles = []
    for place, (block, name) in enumerate(zip(model.blocks, names, strict=True)):
        if place == 0:
            handles.append(
                block.register_forward_pre_hook(lambda _, given: note(0, "", given, "what is embedded is not finite"))
            )
        handles.append(
            block.register_forward_hook(
                lambda module, _, state, number=place + 1, name=name: note(
                    number, name, state, f"what block {number} ({type(module).__name__}) makes is not finite"
                )
            )
        )
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        with random_state_kept():
            loss = (parts.all_backward or one_by_one)(parts, batches, num_records)
        if not found and not _is_finite(loss):
            found.append(Finding(LOSS, 0, "", "the loss is not finite, though what the model's blocks make is"))
        if not found:
            owner = _owners(model)
            # Backwards: the one next to the loss had it first.
            for name, parameter in reversed(list(model.named_parameters())):
                if parameter.grad is not None and not _is_finite(local_part(parameter.grad)):
                    found.append(
                        Finding(GRADIENTS, 0, owner.get(parameter, ""), f"the gradient of {name} is not finite")
                    )
                    break
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
    return found[0] if found else None


def _owners(model: Any) -> dict[Tensor, str]:
    return {parameter: name for name, parameters in model.parts().items() for parameter in parameters}


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Those in a nested value, with the keys and fields that lead there."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, (*path, str(key)))
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        for key, inner in zip(fields, value, strict=True):
            yield from _tensors(inner, (*path, str(key)))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
