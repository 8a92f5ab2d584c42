"""Numbers and categories to tokens, one per column.

Here        TableEncoderConfig and what it builds.
Elsewhere   standardising numbers and numbering categories (data/modality/).
Promise     what stands where a number is not known leaves no trace, not even NaN; that it is not known is said.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Input, TableInput
from dougong.model.encoders.encoder import Encoder, Tokens, wrong_input
from dougong.nn.feedforward import FeedForward


class TableEncoderConfig(Config):
    """One token per column, each bent by itself: how columns belong together is for the bridge and the pooling."""

    kind: Literal["table"] = "table"

    width: int = Field(default=64, gt=0)
    """Channels of each token."""

    num_layers: int = Field(default=2, ge=0)
    """Residual feed-forward layers; each is one block of the model."""

    feedforward_ratio: float = Field(default=2.0, gt=0)
    """Channels inside a layer, per channel of width."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inner channels that training leaves out."""

    initializer_range: float = Field(default=0.1, gt=0)
    """Spread of the columns' random embeddings."""

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the input is not a table, or one without columns."""
        if not isinstance(given, TableInput):
            raise wrong_input(self.kind, given)
        if given.num_numbers + len(given.category_sizes) == 0:
            raise ConfigError("a table without columns says nothing: give it numbers or categories, or leave it out.")
        layers: list[nn.Module] = [TableLayer(self) for _ in range(self.num_layers)]
        return Encoder(TableStem(self, given), layers, TableTail(self.width), width=self.width, config=self)


class TableStem(nn.Module):
    """Shapes: U rows, N columns of numbers, K columns of categories, D channels; tokens are N + K."""

    def __init__(self, config: TableEncoderConfig, given: TableInput) -> None:
        super().__init__()
        shape = (given.num_numbers, config.width)
        self.weight_ND = nn.Parameter(torch.empty(shape).normal_(std=config.initializer_range))
        self.bias_ND = nn.Parameter(torch.empty(shape).normal_(std=config.initializer_range))
        self.missing_ND = nn.Parameter(torch.empty(shape).normal_(std=config.initializer_range))
        # One table of embeddings for all columns: one look-up instead of one per column.
        self.categories = nn.Embedding(max(1, sum(given.category_sizes)), config.width)
        nn.init.normal_(self.categories.weight, std=config.initializer_range)
        starts = [sum(given.category_sizes[:column]) for column in range(len(given.category_sizes))]
        self.start_K: Tensor
        self.register_buffer("start_K", torch.tensor(starts, dtype=torch.int64), persistent=False)

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        numbers_UN, known_UN = values["numbers_UN"], values["known_UN"]
        numbers_UN = numbers_UN.masked_fill(~known_UN, 0.0)  # 0 * NaN would still be NaN
        value_UND = numbers_UN[..., None] * self.weight_ND + self.bias_ND
        value_UND = torch.where(known_UN[..., None], value_UND, self.missing_ND)
        category_UKD = self.categories(values["categories_UK"] + self.start_K)
        x_UTD = torch.cat([value_UND, category_UKD], dim=1)
        return Tokens(x_UTD, x_UTD.new_ones(x_UTD.shape[:2]).bool())


class TableLayer(nn.Module):
    """Each column's token by itself."""

    def __init__(self, config: TableEncoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(width=config.width, ratio=config.feedforward_ratio, dropout=config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(tokens.x_UTD + self.feedforward(self.norm(tokens.x_UTD)), tokens.mask_UT)


class TableTail(nn.Module):
    """The last norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(self.norm(tokens.x_UTD), tokens.mask_UT)
