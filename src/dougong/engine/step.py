"""One training step.

Here        TrainParts, StepReport, `train_step`; its parts as one process has them; Loss, and SummedLoss, which can be
            asked for its terms.
Elsewhere   what many ranks add up (engine/parallel/replicate.py); the loop, events and checkpoints
            (engine/trainer.py); the loss, and other ways to take its gradients (objectives/).
Promise     records weigh the same, however they are shared out to micro-batches and ranks; a step whose loss or
            gradient is not finite, on any rank, changes nothing on all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.engine.precision.choice import Chosen, autocast
from dougong.engine.precision.scaling import Scaling
from dougong.engine.weights import local_part
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

Loss = Callable[[Any, Batch], Tensor]
"""From a model's output and its batch to a scalar: the sum over the batch's records."""

TermsOf = Callable[[Any, Batch], Mapping[str, Tensor]]
"""The same, as the terms that it is the sum of, by name and weighted."""


@runtime_checkable
class SummedLoss(Protocol):
    """A loss that can be asked for its terms."""

    def __call__(self, output: Any, batch: Batch) -> Tensor: ...

    def terms(self, output: Any, batch: Batch) -> Mapping[str, Tensor]:
        """As TermsOf says."""
        ...


class SumOfTerms:
    """A SummedLoss by its terms."""

    def __init__(self, terms: TermsOf) -> None:
        self.terms = terms

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        return torch.stack([*self.terms(output, batch).values()]).sum()


class Reduced(NamedTuple):
    """Of all ranks."""

    loss: Tensor
    grad_norm: Tensor


class Moved(NamedTuple):
    """A buffer, and a copy of what it was before the step."""

    buffer: Tensor
    before: Tensor


Reduce = Callable[[Tensor, Sequence[Moved]], Reduced]
"""From this rank's loss and buffers to loss and gradient norm of all ranks; gradients and buffers become those of all
ranks in place."""


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Of them all. `clip_grad_norm_` would also write every gradient, each time."""
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    return norm


Backward = Callable[["TrainParts", Batch, float], Tensor]
"""Adds a batch's gradients to those of the micro-batches before it, and returns its loss; both are parts of a mean over
so many records, times the loss's scale: the sum is divided by this number."""


AllBackward = Callable[["TrainParts", Sequence[Batch], float], Tensor]
"""The same of all micro-batches."""


class Elsewhere(Protocol):
    """Gradients that lie outside of memory (engine/memory/offload.py)."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of them all."""
        ...

    def multiply(self, gradients: Sequence[Tensor], by: float) -> None:
        """Make them so many times as long, at the latest when the optimizer comes to them."""
        ...


@dataclass(frozen=True)
class TrainParts:
    """What a step needs."""

    model: BlockStack[Any, Any]
    loss: Loss
    optimizer: Optimizer
    max_grad_norm: float | None = 1.0
    precision: Chosen = "fp32"
    device_type: str = "cpu"
    backward: Backward | None = None
    """None: plain_backward."""

    reduce: Reduce | None = None
    """None: there are no other ranks."""

    all_backward: AllBackward | None = None
    """None: one micro-batch after the other."""

    elsewhere: Elsewhere | None = None
    """Where gradients lie that are not to be read more often than need be. None: in memory."""

    scaling: Scaling | None = None
    """Of the loss, whose gradients must fit fp16. None: it is not scaled."""

    def buffers(self) -> list[Tensor]:
        """The model's, each once."""
        found = [buffer for module in self._with_buffers for buffer in module._buffers.values() if buffer is not None]
        return list({id(buffer): buffer for buffer in found}.values())

    @functools.cached_property
    def _with_buffers(self) -> list[nn.Module]:
        """Modules that have some. Walking through all of a model takes as long as one of its layers."""
        return [module for module in self.model.modules() if module._buffers]


class StepReport(NamedTuple):
    """What a step did."""

    loss: float
    """Mean over the records, of all ranks."""

    grad_norm: float
    """Before clipping."""

    skipped: bool
    """The loss or the gradient was not finite, and the weights stayed as they were."""


def train_step(parts: TrainParts, batches: Sequence[Batch], *, num_records: int) -> StepReport:
    """Step once over the micro-batches.

    `num_records` counts all of them, on all ranks, so that uneven batches weigh each record the same. A rank whose
    share of a batch is empty has an empty one here: the loss may hold exchanges that wait for it.
    """
    parts.optimizer.zero_grad(set_to_none=True)
    moved = [Moved(buffer, buffer.clone()) for buffer in parts.buffers()]
    scale = 1.0 if parts.scaling is None else 2.0**parts.scaling.exponent
    total = (parts.all_backward or one_by_one)(parts, batches, num_records / scale)
    if parts.scaling is not None:
        parts.scaling.see()
    if parts.reduce is not None:
        reduced = parts.reduce(total, moved)
        gradients = _gradients(parts.optimizer)
    else:
        gradients = _gradients(parts.optimizer)
        reduced = Reduced(total, (norm_of if parts.elsewhere is None else parts.elsewhere.norm)(gradients))

    # The one wait for the device: whether to step at all depends on both numbers.
    both = torch.stack([reduced.loss, reduced.grad_norm.to(reduced.loss)]).tolist()
    loss, grad_norm = (value / scale for value in both)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if parts.scaling is not None:
        parts.scaling.after(finite=finite)

    if not finite:
        parts.optimizer.zero_grad(set_to_none=True)
        for buffer, before in moved:
            buffer.copy_(before)  # a running mean that met a NaN would never lose it
        return StepReport(loss, grad_norm, skipped=True)
    shorter = 1.0
    if parts.max_grad_norm is not None and grad_norm > parts.max_grad_norm:
        shorter = parts.max_grad_norm / grad_norm
    if gradients and shorter / scale != 1.0:  # what is stepped here may have none
        (multiply if parts.elsewhere is None else parts.elsewhere.multiply)(gradients, shorter / scale)
    parts.optimizer.step()
    parts.model.after_step()
    return StepReport(loss, grad_norm, skipped=False)


def one_by_one(parts: TrainParts, batches: Sequence[Batch], num_records: float) -> Tensor:
    """One micro-batch after the other, each forward and backward."""
    backward = parts.backward or plain_backward
    return torch.stack([backward(parts, batch, num_records) for batch in batches]).sum()


def plain_backward(parts: TrainParts, batch: Batch, num_records: float) -> Tensor:
    """Every parameter's gradient of the one loss."""
    with autocast(parts.precision, parts.device_type):
        loss = parts.loss(parts.model(batch), batch).float() / num_records
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
    return loss.detach()


def multiply(gradients: Sequence[Tensor], by: float) -> None:
    """In place, at once."""
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], by)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters: Iterable[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
