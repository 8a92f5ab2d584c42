"""How unlikely what is true was, token by token.

Here        `generation_loss`, `token_losses`.
Elsewhere   the scores (model/writer.py); dividing by the number of records, which only the trainer knows.
Promise     a loss is a sum over records, so that micro-batches and ranks of uneven size add up to one big batch; a
            record's tokens are averaged, so that a long picture weighs no more than a short caption; what does not
            count changes neither the loss nor any gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def token_losses(score_RNV: Tensor, target_RN: Tensor) -> Tensor:
    """Each token's cross entropy in nats, in float32. Shapes: R records, N tokens, V words or codes."""
    return functional.cross_entropy(score_RNV.float().flatten(0, 1), target_RN.flatten(), reduction="none").view(
        target_RN.shape
    )


def generation_loss(score_RNV: Tensor, target_RN: Tensor, due_RN: Tensor) -> Tensor:
    """The sum over the records of the mean cross entropy of their tokens that are due; a record with none adds 0."""
    loss_RN = token_losses(score_RNV, target_RN).masked_fill(~due_RN, 0.0)
    return (loss_RN.sum(dim=1) / due_RN.sum(dim=1).clamp(min=1)).sum()
