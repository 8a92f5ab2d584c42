"""Vectors that a frozen model has made, as one token each.

Here        VectorEncoderConfig and what it builds.
Elsewhere   making them (whoever holds that model); reading lists of numbers (data/modality/array.py); the linear map to
            the width that modalities share (model/sandwich.py's FinishBlock).
Promise     a vector shorter than the longest seen is filled up with zeros, and a longer one was cut when it was read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.config import Config
from dougong.core.signature import Input, SignalInput
from dougong.model.encoders.encoder import Encoder, Tokens, wrong_input


class VectorEncoderConfig(Config):
    """The vector itself, some of it left out: with few records, what is learnt above a frozen model soon overfits."""

    kind: Literal["vector"] = "vector"
    reads: ClassVar[str] = "signal"
    """A column of lists of numbers is read as a signal of one channel."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the vector's numbers that training leaves out."""

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the input is not one list of numbers."""
        if not isinstance(given, SignalInput) or given.num_channels != 1:
            raise wrong_input(self.kind, given)
        stem = VectorStem(given.max_samples, self.dropout)
        return Encoder(stem, [], VectorTail(), width=given.max_samples, config=self)


class VectorStem(nn.Module):
    """Shapes: U vectors, C = 1 channel, T numbers, which become the D channels of one token."""

    def __init__(self, num_numbers: int, dropout: float) -> None:
        super().__init__()
        self.num_numbers = num_numbers
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        x_UD = values["samples_UCT"][:, 0]
        x_UD = functional.pad(x_UD, (0, self.num_numbers - x_UD.shape[1]))
        x_U1D = self.dropout(x_UD)[:, None]
        return Tokens(x_U1D, x_U1D.new_ones(x_U1D.shape[:2]).bool())


class VectorTail(nn.Module):
    """Nothing is left to do."""

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens
