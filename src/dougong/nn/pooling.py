"""One vector out of many tokens.

Here        AttentionPooling, Pooled.
Elsewhere   averaging neighbouring tokens, which leaves many (model/encoders/image.py, model/encoders/audio.py).
Promise     a masked token that is finite leaves no trace; no token at all gives zeros and finite gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pooled(NamedTuple):
    """Shapes: B records, T tokens, D channels."""

    x_BD: Tensor
    weight_BT: Tensor
    """How much each token counted; a row sums to 1, or to 0 without any token."""


class AttentionPooling(nn.Module):
    """Averages tokens by a learnt score of each."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Pooled:
        score_BT = self.score(x_BTD)[..., 0]
        # A finite floor, not -inf: a row with no token at all would get NaN gradients.
        score_BT = score_BT.masked_fill(~mask_BT, torch.finfo(score_BT.dtype).min)
        weight_BT = score_BT.softmax(dim=-1) * mask_BT
        return Pooled((weight_BT[:, None, :].to(x_BTD.dtype) @ x_BTD)[:, 0], weight_BT)
