"""What is made of the fused vector, and of one modality's tokens alone.

Here        DecisionHead (classes or a number) and its config; ContrastiveHead.
Elsewhere   what their outputs mean and how wrong they are (objectives/).
Promise     one row of outputs per record, whatever the record has; a contrastive vector has length 1.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.config import Config
from dougong.nn.pooling import AttentionPooling
from dougong.nn.start import keep_variance


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
