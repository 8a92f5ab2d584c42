"""How unlikely what is true was, token by token.

Here        `generation_loss`, `token_losses`; `words_loss`, of a model that has each word's loss already.
Elsewhere   the scores (model/writer.py, model/decoder.py); dividing by the number of records, which only the
            trainer knows.
Promise     a loss is a sum over records, so that micro-batches and ranks of uneven size add up to one big batch; a
            record's tokens are averaged, so that a long picture weighs no more than a short caption; what does not
            count changes neither the loss nor any gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dougong.model.decoder import DecoderOutput


def token_losses(score_RNV: Tensor, target_RN: Tensor) -> Tensor:
    """Each token's cross entropy in nats, in float32. Shapes: R records, N tokens, V words or codes."""
    return functional.cross_entropy(score_RNV.float().flatten(0, 1), target_RN.flatten(), reduction="none").view(
        target_RN.shape
    )


def generation_loss(score_RNV: Tensor, target_RN: Tensor, due_RN: Tensor) -> Tensor:
    """The sum over the records of the mean cross entropy of their tokens that are due; a record with none adds 0."""
    return _summed(token_losses(score_RNV, target_RN), due_RN)


def words_loss(output: DecoderOutput, *, further_weight: float = 0.3) -> Tensor:
    """The same of the next words, and `further_weight` times the mean of the same of words further on (DeepSeek-V3,
    2024, arXiv:2412.19437, section 2.2)."""
    loss = _summed(output.loss_BN, output.due_BN)
    if output.further:
        further = torch.stack([_summed(loss_BN, due_BN) for loss_BN, due_BN in output.further])
        loss = loss + further_weight * further.mean()
    return loss


def _summed(loss_RN: Tensor, due_RN: Tensor) -> Tensor:
    return (loss_RN.masked_fill(~due_RN, 0.0).sum(dim=1) / due_RN.sum(dim=1).clamp(min=1)).sum()
