"""A modality that the base has never had, for one task.

Here        ExtraModality.
Elsewhere   encoders (model/encoders/); where its tokens and its vector go (continual/elastic.py).
Promise     what it says reaches only records of its own task that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dougong.core.config import Config
from dougong.core.signature import NOTHING, Input, Signature
from dougong.model.encoders.encoder import Encoder, Tokens
from dougong.model.sandwich import EncoderConfig, settled_encoders
from dougong.nn.pooling import AttentionPooling
from dougong.nn.start import keep_variance


class Said(NamedTuple):
    """Of U distinct media."""

    x_UTD: Tensor
    mask_UT: Tensor
    vector_UD: Tensor


class ExtraModality(nn.Module):
    """An encoder of its own, the way to the base's width, and one vector that is added to the fused one.

    Shapes: U distinct media, T tokens, D channels. The vector begins as zero, so that learning begins with what the
    task said without it.
    """

    def __init__(self, name: str, shape: Input, width: int, encoder: EncoderConfig | None = None) -> None:
        super().__init__()
        signature = Signature(inputs={name: shape}, target=NOTHING)
        named = {} if encoder is None else {name: encoder}
        built: Encoder = settled_encoders(named, signature, width)[name].build(shape)
        self.encoder = built
        self.project = keep_variance(nn.Linear(built.width, width))
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPooling(width=width)
        self.add = nn.Linear(width, width)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)

    def resolved(self) -> Config:
        """What builds the encoder anew."""
        return self.encoder.resolved()

    def forward(self, values: Mapping[str, Tensor]) -> Said:
        found: Tokens = self.encoder(dict(values))
        x_UTD = self.project(found.x_UTD)
        pooled_UD = self.pool(self.norm(x_UTD), found.mask_UT).x_BD
        return Said(x_UTD, found.mask_UT, self.add(pooled_UD))
