"""Lets the modalities of a record ask each other.

Here        BridgeConfig; its blocks, in three kinds: cross, merged and bottleneck.
Elsewhere   what stands before and after (model/sandwich.py); how much each modality counts (model/gate.py).
Promise     a modality that a record lacks leaves no trace in the others, not even NaN; one that a whole batch lacks
            costs nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.nn.attention import Attention
from dougong.nn.feedforward import FeedForward
from dougong.nn.modules_by_name import ModulesByName


class BridgeConfig(Config):
    """The blocks between encoders and gate."""

    kind: Literal["cross", "merged", "bottleneck"] = "cross"
    """cross: each modality's tokens ask those of all others. merged: all tokens ask all tokens. bottleneck: what one
    modality learns of the others passes through a few tokens between them."""

    num_bottleneck: int = Field(default=4, gt=0)
    """Those tokens, in each block of kind bottleneck."""

    num_blocks: int = Field(default=1, gt=0)
    num_heads: int = Field(default=4, gt=0)

    feedforward_ratio: float = Field(default=2.0, gt=0)
    """Hidden channels of the feed-forward, as a multiple of the width."""

    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, names: tuple[str, ...], width: int) -> list[nn.Module]:
        """The blocks, for modalities of these names."""
        kinds = {"cross": CrossBlock, "merged": MergedBlock, "bottleneck": BottleneckBlock}
        return [kinds[self.kind](self, names, width) for _ in range(self.num_blocks)]


class Looked(NamedTuple):
    """One querying modality's attention in one block. Shapes: B records, H heads, T queries, S keys."""

    weight_BHTS: Tensor
    keys: tuple[tuple[str, int], ...]
    """Whose tokens the keys are, in order, and how many."""


TokensByName = dict[str, Tensor]

BETWEEN = "(between)"
"""Whose tokens a bottleneck's are, where attention is shown."""


class CrossBlock(nn.Module):
    """Each modality asks the others, then thinks by itself; after ViLBERT (Lu et al. 2019, arXiv:1908.02265), with the
    others' tokens side by side in place of one other modality, so that any number fits."""

    def __init__(self, config: BridgeConfig, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.names = names
        asking = names if len(names) > 1 else ()  # one alone has nobody to ask
        self.norm = ModulesByName({name: nn.LayerNorm(width) for name in asking})
        self.attention = ModulesByName(
            {name: Attention(width=width, num_heads=config.num_heads, dropout=config.dropout) for name in asking}
        )
        self.inner_norm = ModulesByName({name: nn.LayerNorm(width) for name in names})
        self.feedforward = ModulesByName(
            {name: FeedForward(width=width, ratio=config.feedforward_ratio, dropout=config.dropout) for name in names}
        )

    def forward(
        self, tokens: TokensByName, masks: TokensByName, looked: dict[str, Looked] | None = None
    ) -> TokensByName:
        """The next tokens; `looked` is filled with the attention where it is given."""
        here = [name for name in self.names if name in tokens]
        normed = {name: self.norm[name](tokens[name]) for name in here if len(here) > 1}
        following = {}
        for name in here:
            x_BTD = tokens[name]
            others = [other for other in here if other != name]
            mask_BS = torch.cat([masks[other] for other in others], dim=1) if others else None
            # Not where no record has both: what has a part in a batch must not depend on how ranks share it out.
            if mask_BS is not None and _some_record_has_both(masks[name], mask_BS):
                context_BSD = torch.cat([normed[other] for other in others], dim=1)
                seen = self.attention[name](normed[name], context_BSD, mask_BS, need_weights=looked is not None)
                x_BTD = x_BTD + seen.x_BTD
                if looked is not None:
                    looked[name] = Looked(seen.weight_BHTS, tuple((o, tokens[o].shape[1]) for o in others))
            following[name] = x_BTD + self.feedforward[name](self.inner_norm[name](x_BTD))
        return following


def _some_record_has_both(mask_BT: Tensor, mask_BS: Tensor) -> bool:
    # A compiled graph cannot branch on what a tensor holds.
    return torch.compiler.is_compiling() or bool((mask_BT.any(dim=1) & mask_BS.any(dim=1)).any())


class MergedBlock(nn.Module):
    """All tokens in one row ask each other: a transformer layer over the record (as in ViLT, Kim et al. 2021,
    arXiv:2102.03334)."""

    def __init__(self, config: BridgeConfig, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.names = names
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width=width, num_heads=config.num_heads, dropout=config.dropout)
        self.inner_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width=width, ratio=config.feedforward_ratio, dropout=config.dropout)

    def forward(
        self, tokens: TokensByName, masks: TokensByName, looked: dict[str, Looked] | None = None
    ) -> TokensByName:
        here = [name for name in self.names if name in tokens]
        if not here:
            return {}
        counts = [tokens[name].shape[1] for name in here]
        x_BTD = torch.cat([tokens[name] for name in here], dim=1)
        mask_BT = torch.cat([masks[name] for name in here], dim=1)
        normed_BTD = self.norm(x_BTD)
        seen = self.attention(normed_BTD, normed_BTD, mask_BT, need_weights=looked is not None)
        x_BTD = x_BTD + seen.x_BTD
        x_BTD = x_BTD + self.feedforward(self.inner_norm(x_BTD))
        if looked is not None:
            keys = tuple(zip(here, counts, strict=True))
            for name, weight_BHTS in zip(here, seen.weight_BHTS.split(counts, dim=2), strict=True):
                looked[name] = Looked(weight_BHTS, keys)
        return dict(zip(here, x_BTD.split(counts, dim=1), strict=True))


class BottleneckBlock(nn.Module):
    """A few tokens ask each modality, and each modality asks itself and them.

    After the attention bottlenecks of Nagrani et al. 2021 (MBT, arXiv:2107.00135), with bottleneck tokens that are
    learnt anew for each block and filled before they are asked, in place of tokens that walk from block to block: so
    a block needs no more of the state than any other.
    """

    def __init__(self, config: BridgeConfig, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.names = names
        self.bottleneck_ND = nn.Parameter(torch.randn(config.num_bottleneck, width))

        def ask() -> Attention:
            return Attention(width=width, num_heads=config.num_heads, dropout=config.dropout)

        self.norm = ModulesByName({name: nn.LayerNorm(width) for name in names})
        self.gather = ModulesByName({name: ask() for name in names})
        self.between_norm = nn.LayerNorm(width)
        self.attention = ModulesByName({name: ask() for name in names})
        self.inner_norm = ModulesByName({name: nn.LayerNorm(width) for name in names})
        self.feedforward = ModulesByName(
            {name: FeedForward(width=width, ratio=config.feedforward_ratio, dropout=config.dropout) for name in names}
        )

    def forward(
        self, tokens: TokensByName, masks: TokensByName, looked: dict[str, Looked] | None = None
    ) -> TokensByName:
        here = [name for name in self.names if name in tokens]
        if not here:
            return {}
        normed = {name: self.norm[name](tokens[name]) for name in here}
        between_BND = self.between_norm(self._gather(here, normed, masks))
        seen_BN = between_BND.new_ones(between_BND.shape[:2]).bool()
        following = {}
        for name in here:
            context_BSD = torch.cat([normed[name], between_BND], dim=1)
            mask_BS = torch.cat([masks[name], seen_BN], dim=1)
            seen = self.attention[name](normed[name], context_BSD, mask_BS, need_weights=looked is not None)
            x_BTD = tokens[name] + seen.x_BTD
            if looked is not None:
                keys = ((name, tokens[name].shape[1]), (BETWEEN, between_BND.shape[1]))
                looked[name] = Looked(seen.weight_BHTS, keys)
            following[name] = x_BTD + self.feedforward[name](self.inner_norm[name](x_BTD))
        return following

    def _gather(self, here: list[str], normed: TokensByName, masks: TokensByName) -> Tensor:
        """The bottleneck tokens of each record: the mean of what they found in the modalities that it has."""
        like_BTD = normed[here[0]]
        query_BND = self.bottleneck_ND.to(like_BTD.dtype).expand(like_BTD.shape[0], -1, -1)
        found_BND, count_B = torch.zeros_like(query_BND), masks[here[0]].new_zeros(like_BTD.shape[0], dtype=torch.long)
        for name in here:
            found_BND = found_BND + self.gather[name](query_BND, normed[name], masks[name]).x_BTD
            count_B = count_B + masks[name].any(dim=1)
        return query_BND + found_BND / count_B.clamp(min=1)[:, None, None]
