"""What a network answers and is asked for, in figures.

Here        `output_told`, `targets_told`; `answer_of` and `tensors_of`, which find tensors in what a network returns.
Elsewhere   what it is given (inputs.py); the step in which it is asked (step.py).
Promise     nothing is kept of a tensor but figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def output_told(output: Any, loss_inputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of the scores that were learnt from, or else of the answer; `loss_inputs` are scores and targets."""
    logits = loss_inputs[0][0] if loss_inputs else None
    answer = logits if logits is not None else answer_of(output)
    if answer is None or not isinstance(answer, Tensor) or answer.ndim < 2 or answer.shape[-1] < 2:
        return {}
    rows = answer.detach().float().reshape(-1, answer.shape[-1])
    chances = rows.softmax(dim=-1)
    entropy = -(chances * chances.clamp(min=1e-30).log()).sum(dim=-1).mean() / math.log(rows.shape[-1])
    told = {
        "spread": float(rows.std()),
        "between_records": float(rows.std(dim=0).mean()) if len(rows) > 1 else 0.0,
        "entropy": float(entropy),
        "commonest": float(rows.argmax(dim=-1).bincount(minlength=rows.shape[-1]).max()) / len(rows),
        "classes": float(rows.shape[-1]),
    }
    if loss_inputs:
        target = loss_inputs[0][1].reshape(-1)
        if not target.is_floating_point() and target.numel() == len(rows):
            told["right"] = float((rows.argmax(dim=-1) == target).float().mean())
    return told


def targets_told(loss_inputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """How many records each class has, where targets are classes."""
    if not loss_inputs or loss_inputs[0][1].is_floating_point() or not loss_inputs[0][1].numel():
        return {}
    target = loss_inputs[0][1].reshape(-1)
    counts = target[target >= 0].bincount().tolist()
    return {"counts": counts[:64], "distinct": sum(count > 0 for count in counts), "number": len(target)}


def answer_of(output: Any) -> Tensor | None:
    """What decides, of all that a network returned: its logits, or the first tensor of more than one number."""
    for name in ("logits", "output_BC"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found.float()
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.ndim >= 1 and tensor.numel() > 1:
            return tensor.float()
    return None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All that stand in it, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)
