"""Tokens of a modality that a record lacks, made from those that it has.

Here        CompletionConfig, Completion (what completes one modality), `parts`.
Elsewhere   where it stands in the model (model/sandwich.py); holding it against the truth (objectives/missing.py).
Promise     only real tokens are asked, never a completed one; a record that has nothing is given nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.nn.attention import Attention
from dougong.nn.feedforward import FeedForward
from dougong.nn.start import keep_variance


class CompletionConfig(Config):
    """How a modality is completed. It is learnt from records from which training withholds what they have."""

    num_tokens: int = Field(default=1, gt=0)
    """Tokens that stand in for a modality, whatever number it would have had."""

    num_layers: int = Field(default=1, gt=0)
    """Times that they ask the other modalities' tokens, and think."""

    num_heads: int = Field(default=4, gt=0)
    """Attention heads; they share out the model's width."""

    feedforward_ratio: float = Field(default=2.0, gt=0)
    """Hidden channels of the feed-forward, as a multiple of the width."""

    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, names: tuple[str, ...], width: int) -> Completion:
        """For one modality, from others of these names."""
        return Completion(self, names, width)


class Completion(nn.Module):
    """Learnt questions to the other modalities' tokens; their answers are this modality's tokens.

    Shapes: B records, K questions, S tokens of the others, D channels.

    The missing modality is imagined from the others as in SMIL (Ma et al. 2021, arXiv:2103.05677), by attention as in
    Perceiver (Jaegle et al. 2021, arXiv:2103.03206), in place of SMIL's mixture of prior vectors and its meta-learning.
    """

    def __init__(self, config: CompletionConfig, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.names = names
        self.question_KD = nn.Parameter(torch.empty(config.num_tokens, width).normal_())
        # Whose token one is; else a question could not ask one modality rather than another.
        self.source_MD = nn.Parameter(torch.empty(len(names), width).normal_(std=0.1))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([CompletionLayer(config, width) for _ in range(config.num_layers)])
        self.last_norm = nn.LayerNorm(width)
        self.out = keep_variance(nn.Linear(width, width))
        self.mark_D = nn.Parameter(torch.zeros(width))
        """Added to what stands in, so that all that follows can tell it from what was given."""

    def forward(self, tokens: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """The completed tokens (B, K, D), unmarked; meaningless for a record without any token."""
        here = [name for name in self.names if name in tokens]
        context_BSD = torch.cat([self.norm(tokens[name]) + self.source_MD[self.names.index(name)] for name in here], 1)
        mask_BS = torch.cat([masks[name] for name in here], dim=1)
        x_BKD = self.question_KD.expand(context_BSD.shape[0], -1, -1)
        for layer in self.layers:
            x_BKD = layer(x_BKD, context_BSD, mask_BS)
        completed_BKD: Tensor = self.out(self.last_norm(x_BKD))
        return completed_BKD


class CompletionLayer(nn.Module):
    """Ask, then think; norms come first."""

    def __init__(self, config: CompletionConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width=width, num_heads=config.num_heads, dropout=config.dropout)
        self.inner_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width=width, ratio=config.feedforward_ratio, dropout=config.dropout)

    def forward(self, x_BKD: Tensor, context_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        x_BKD = x_BKD + self.attention(self.norm(x_BKD), context_BSD, mask_BS).x_BTD
        following_BKD: Tensor = x_BKD + self.feedforward(self.inner_norm(x_BKD))
        return following_BKD


def parts(x_UTD: Tensor, mask_UT: Tensor, num_parts: int) -> Tensor:
    """The means of a medium's tokens in so many parts of its length, (U, K, D): what completed tokens should be.

    Part k of n tokens is from floor(k n / K) to before ceil((k + 1) n / K): of fewer tokens than parts, some stand in
    two. A medium without any token gives zeros.
    """
    count_U1 = mask_UT.sum(dim=1, keepdim=True)
    part_K = torch.arange(num_parts, device=mask_UT.device)
    start_UK = part_K * count_U1 // num_parts
    end_UK = -(-(part_K + 1) * count_U1 // num_parts)
    place_UT = mask_UT.cumsum(dim=1) - 1  # among the real ones
    inside_UKT = (place_UT[:, None] >= start_UK[..., None]) & (place_UT[:, None] < end_UK[..., None])
    inside_UKT = inside_UKT & mask_UT[:, None]
    share_UKT = inside_UKT / inside_UKT.sum(dim=2, keepdim=True).clamp(min=1)
    return share_UKT.to(x_UTD.dtype) @ x_UTD.masked_fill(~mask_UT[..., None], 0.0)
