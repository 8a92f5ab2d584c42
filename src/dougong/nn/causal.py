"""Attention of each token over itself and what came before.

Here        CausalLayer (attention, then feed-forward), Cache.
Elsewhere   attention among modalities (nn/attention.py); writing token by token (model/writer.py).
Promise     a token depends on nothing after it; reading tokens one by one with a cache gives what reading them at once
            gives, within 1e-5; a masked token that is finite leaves no trace in the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.nn.feedforward import FeedForward
from dougong.nn.start import keep_variance


class Cache(NamedTuple):
    """Keys and values of the tokens read so far. Shapes: B records, H heads, S tokens, K channels of a head."""

    key_BHSK: Tensor
    value_BHSK: Tensor


class CausalLayer(nn.Module):
    """One layer of a decoder, norms first. Shapes: B records, T new tokens, S tokens in all, D channels."""

    def __init__(self, *, width: int, num_heads: int, feedforward_ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of num_heads {num_heads}"
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = keep_variance(nn.Linear(width, 3 * width))
        self.out = keep_variance(nn.Linear(width, width))
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width=width, ratio=feedforward_ratio, dropout=dropout)

    def forward(self, x_BTD: Tensor, mask_BS: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The tokens after the layer, and the cache with them in it.

        `mask_BS` is True where there is something to see, the cached tokens first. Each record's first token must be:
        what a token that sees nothing would get is not defined.
        """
        q_BHTK, k_BHSK, v_BHSK = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        )
        if cache is not None:
            k_BHSK = torch.cat([cache.key_BHSK, k_BHSK], dim=2)
            v_BHSK = torch.cat([cache.value_BHSK, v_BHSK], dim=2)
        num_new, num_all = q_BHTK.shape[2], k_BHSK.shape[2]
        before_TS = torch.ones(num_new, num_all, dtype=torch.bool, device=x_BTD.device).tril(num_all - num_new)
        y_BHTK = functional.scaled_dot_product_attention(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            attn_mask=before_TS & mask_BS[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        x_BTD = x_BTD + functional.dropout(self.out(y_BHTK.transpose(1, 2).flatten(2)), self.dropout, self.training)
        x_BTD = x_BTD + self.feedforward(self.feedforward_norm(x_BTD))
        return x_BTD, Cache(k_BHSK, v_BHSK)
