"""Attention of some tokens over other tokens.

Here        Attention (queries and context come separately), Attended, `key_mask`; `check_heads`.
Elsewhere   who asks whom (model/bridge.py); one vector out of many tokens (nn/pooling.py).
Promise     a masked token that is finite leaves no trace; a query that has nothing to look at gets exactly zero, and
            every gradient stays finite; asking for the weights changes the answer by rounding only.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.nn.split import Split
from dougong.nn.start import keep_variance

MOST_NAMED: Final = 16


def check_heads(name: str, num_heads: int, width: int) -> None:
    """
    Raises:
        ValueError: so many heads, by the name of their setting, cannot share out the width.
    """
    if width % num_heads:
        fits = [heads for heads in range(1, width + 1) if width % heads == 0 and heads <= MOST_NAMED]
        raise ValueError(
            f"{name}={num_heads} cannot share out width={width}: every head needs as many channels. "
            f"Use {name} in {fits}."
        )


class Attended(NamedTuple):
    """What the queries saw. Shapes: B records, H heads, T queries, S keys, D channels."""

    x_BTD: Tensor
    weight_BHTS: Tensor | None
    """How much each query looked at each key, where it was asked for; a row sums to 1, or to 0 without any key."""


def key_mask(mask_BS: Tensor) -> Tensor | None:
    """The mask as fused attention wants it, of shape (B, 1, 1, S), or None where every key may be seen.

    A row that may see nothing sees everything instead, since a softmax over nothing has no finite gradient: whoever
    uses this must discard such a row's answer.
    """
    # Without a mask the kernels are faster. A compiled graph cannot branch on what a tensor holds.
    if not torch.compiler.is_compiling() and bool(mask_BS.all()):
        return None
    return (mask_BS | ~mask_BS.any(dim=-1, keepdim=True))[:, None, None, :]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), keys and values in one projection."""

    def __init__(self, *, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of num_heads {num_heads}"
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = keep_variance(nn.Linear(width, width))
        self.key_value = keep_variance(nn.Linear(width, 2 * width))
        self.out = keep_variance(nn.Linear(width, width))

    def split(self) -> Split:
        return Split(columns=("query", "key_value"), rows=("out",), counts=("num_heads",))

    def forward(
        self, x_BTD: Tensor, context_BSD: Tensor, mask_BS: Tensor | None = None, *, need_weights: bool = False
    ) -> Attended:
        """What each of x's tokens finds in the context; `mask_BS` is True where there is something to see."""
        q_BHTK = self.query(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        # A head's key and value side by side, so that whole heads are a part of the projection.
        both_BS2HK = self.key_value(context_BSD).unflatten(-1, (self.num_heads, 2, -1)).transpose(-3, -2)
        k_BHSK, v_BHSK = (each_BSHK.transpose(1, 2) for each_BSHK in both_BS2HK.unbind(dim=2))
        mask_B11S = None if mask_BS is None else key_mask(mask_BS)
        dropout = self.dropout if self.training else 0.0

        weight_BHTS = None
        if need_weights:
            weight_BHTS = _weights(q_BHTK, k_BHSK, mask_B11S)
            y_BHTK = functional.dropout(weight_BHTS, dropout) @ v_BHSK
        else:
            y_BHTK = functional.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BHSK, attn_mask=mask_B11S, dropout_p=dropout
            )
        y_BTD = self.out(y_BHTK.transpose(1, 2).flatten(2))

        if mask_BS is not None and mask_B11S is not None:
            nothing_B = ~mask_BS.any(dim=-1)
            y_BTD = y_BTD.masked_fill(nothing_B[:, None, None], 0.0)
            if weight_BHTS is not None:
                weight_BHTS = weight_BHTS.masked_fill(nothing_B[:, None, None, None], 0.0)
        return Attended(y_BTD, weight_BHTS)


def _weights(q_BHTK: Tensor, k_BHSK: Tensor, mask_B11S: Tensor | None) -> Tensor:
    score_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
    if mask_B11S is not None:
        score_BHTS = score_BHTS.masked_fill(~mask_B11S, torch.finfo(score_BHTS.dtype).min)
    return torch.softmax(score_BHTS, dim=-1)
