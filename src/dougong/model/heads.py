"""What is made of the fused vector, and of one modality's tokens alone.

Here        DecisionHead (classes or a number) and its config; ContrastiveHead,
            PlainHead and LearntTemperature; MatchingHead.
Elsewhere   what their outputs mean and how wrong they are (objectives/).
Promise     one row of outputs per record, whatever the record has; a contrastive vector has length 1.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from dougong.core.config import Config
from dougong.nn.pooling import AttentionPooling
from dougong.nn.start import keep_variance

COLDEST: Final = 0.01
"""The lowest temperature that is learnt; CLIP's limit too (Radford et al. 2021, arXiv:2103.00020)."""

WARMEST: Final = 1.0


class DecisionConfig(Config):
    """A small network from the fused vector to the outputs."""

    width: int = Field(gt=0)
    """Channels of the fused vector (D)."""

    hidden: int = Field(gt=0)
    """Channels between its two layers."""

    num_outputs: int = Field(gt=0)
    """Classes, or 1 for regression (C)."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the hidden channels that training leaves out."""

    def build(self) -> DecisionHead:
        return DecisionHead(self)


class DecisionHead(nn.Module):
    """Shapes: B records, D channels, C outputs."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.hidden = keep_variance(nn.Linear(config.width, config.hidden))
        self.dropout = nn.Dropout(config.dropout)
        self.out = keep_variance(nn.Linear(config.hidden, config.num_outputs))

    def forward(self, fused_BD: Tensor) -> Tensor:
        output_BC: Tensor = self.out(self.dropout(functional.gelu(self.hidden(self.norm(fused_BD)))))
        return output_BC


class ContrastiveHead(nn.Module):
    """A medium's tokens to one vector of length 1, to be held against another modality's.

    Shapes: U media, T tokens, D channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPooling(width=width)
        self.project = keep_variance(nn.Linear(width, width, bias=False))

    def forward(self, x_UTD: Tensor, mask_UT: Tensor) -> Tensor:
        pooled_UD = self.pool(self.norm(x_UTD), mask_UT).x_BD
        return functional.normalize(self.project(pooled_UD), dim=-1)


class PlainHead(nn.Module):
    """The mean of a medium's tokens, of length 1; nothing is learnt. Shapes as ContrastiveHead's."""

    def forward(self, x_UTD: Tensor, mask_UT: Tensor) -> Tensor:
        x_UTD = x_UTD.masked_fill(~mask_UT[..., None], 0.0)
        return functional.normalize(x_UTD.sum(dim=1), dim=-1)  # a sum points where the mean does


class LearntTemperature(nn.Module):
    """What divides contrastive scores, learnt as its logarithm and kept between 0.01 and 1.

    CLIP (Radford et al. 2021, arXiv:2103.00020) cuts the parameter off after each step; here its value is cut off, and
    beyond a limit only a gradient that leads back gets through, so that nothing but the optimizer changes a weight.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        kept: Tensor = _Kept.apply(self.log, math.log(COLDEST), math.log(WARMEST))  # type: ignore[no-untyped-call]  # as torch has it
        return kept.exp()


class _Kept(Function):
    """Cut off below and above; outside, the gradient that would lead further out is dropped."""

    @staticmethod
    def forward(context: Any, value: Tensor, low: float, high: float) -> Tensor:
        context.save_for_backward(value)
        context.low, context.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,), (gradient,) = context.saved_tensors, gradients
        # A descent moves against the gradient.
        further_out = ((value <= context.low) & (gradient > 0)) | ((value >= context.high) & (gradient < 0))
        return gradient.masked_fill(further_out, 0.0), None, None


class MatchingHead(nn.Module):
    """From both media of a pair, each seen in the light of the other, to a score of whether they belong together.

    Shapes: P pairs, M = 2 modalities, D channels. The product of the two says where they agree.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3 * width)
        self.hidden = keep_variance(nn.Linear(3 * width, width))
        self.out = keep_variance(nn.Linear(width, 1))

    def forward(self, vector_PMD: Tensor) -> Tensor:
        left_PD, right_PD = vector_PMD.unbind(dim=1)
        joined_PN = self.norm(torch.cat([left_PD, right_PD, left_PD * right_PD], dim=-1))
        match_P1: Tensor = self.out(functional.gelu(self.hidden(joined_PN)))
        return match_P1[:, 0]
