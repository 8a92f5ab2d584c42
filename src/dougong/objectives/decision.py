"""How wrong a decision is, and how sure.

Here        `decision_loss`, `decision_probabilities`.
Elsewhere   the outputs (model/heads.py); dividing by the number of records, which only the trainer knows.
Promise     a loss is a sum over records, so that micro-batches and ranks of uneven size add up to one big batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.core.signature import Task


def decision_loss(output_BC: Tensor, target: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
    """The sum of the records' losses, in float32. Shapes: B records, C outputs; `target` as core/signature.py says.

    Cross entropy for a single label, binary cross entropy (its mean over the classes) for several labels, squared
    error for a number.

    Raises:
        ConfigError: `label_smoothing` where there are no labels, or not from 0 to below 1.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(
            f"label_smoothing={label_smoothing} is no share: it is the probability taken from the true label. "
            "Use 0.0 for none, 0.1 for some."
        )
    output_BC = output_BC if output_BC.dtype == torch.float64 else output_BC.float()
    if task == "single_label":
        return functional.cross_entropy(output_BC, target, label_smoothing=label_smoothing, reduction="sum")
    if task == "multi_label":
        target_BC = target.to(output_BC.dtype) * (1.0 - label_smoothing) + 0.5 * label_smoothing
        loss_BC = functional.binary_cross_entropy_with_logits(output_BC, target_BC, reduction="none")
        return loss_BC.mean(dim=-1).sum()
    if label_smoothing:
        raise ConfigError(
            f"label_smoothing={label_smoothing} has no labels to smooth: the task is regression. Use 0.0."
        )
    return functional.mse_loss(output_BC[:, 0], target.to(output_BC.dtype), reduction="sum")


def decision_probabilities(output_BC: Tensor, task: Task) -> Tensor:
    """Probabilities of shape (B, C): over the classes, or of each class; regression's outputs stay as they are."""
    output_BC = output_BC.float()
    if task == "single_label":
        return output_BC.softmax(dim=-1)
    return output_BC.sigmoid() if task == "multi_label" else output_BC
