"""Attention whose keys and values are remembered as one small vector a token.

Here        LatentAttention, LatentCache.
Elsewhere   turning queries and keys by their place (nn/rotary.py); who sees whom (nn/context.py); the layer around it
            (model/decoder.py).
Promise     a token depends on nothing after it; reading tokens one by one with a cache gives what reading them at once
            gives, within 1e-5; a masked token that is finite leaves no trace in the others.

Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434; V3, arXiv:2412.19437). Many tokens read at once have
their latents widened to keys and values. With a cache the widening is moved to the query and to the answer instead
(their section 2.1.2), so that a step reads L + R numbers a token, and never builds keys and values of all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.nn.context import Context, Seen
from dougong.nn.norm import RMSNorm
from dougong.nn.rotary import Rotation, turned
from dougong.nn.split import Split, same


class LatentCache(NamedTuple):
    """What is remembered of the tokens read so far. Shapes: B records, S tokens, L latent channels, R turned ones."""

    latent_BSL: Tensor
    key_BSR: Tensor
    """Turned already."""


class LatentAttention(nn.Module):
    """Shapes: B records, T new tokens that are here, Q that ask, S all tokens, D channels, H heads, K plain, R turned
    and V value channels of a head, L latent channels."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        query_rank: int | None,
        latent_rank: int,
        plain_width: int,
        turned_width: int,
        value_width: int,
        score_scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent_rank, self.plain_width, self.turned_width = latent_rank, plain_width, turned_width
        self.value_width = value_width
        self.scale = (plain_width + turned_width) ** -0.5 * score_scale
        query_width = num_heads * (plain_width + turned_width)
        if query_rank is None:
            self.query = nn.Linear(width, query_width, bias=False)
        else:
            self.query_down = nn.Linear(width, query_rank, bias=bias)
            self.query_norm = RMSNorm(query_rank, eps=1e-6)
            self.query = nn.Linear(query_rank, query_width, bias=False)
        self.has_query_rank = query_rank is not None
        self.latent_down = nn.Linear(width, latent_rank + turned_width, bias=bias)
        self.latent_norm = RMSNorm(latent_rank, eps=1e-6)
        self.shared_key = same()
        self.key_value = nn.Linear(latent_rank, num_heads * (plain_width + value_width), bias=False)
        self.out = nn.Linear(num_heads * value_width, width, bias=bias)
        self.context = Context()

    def split(self) -> Split:
        return Split(columns=("query", "key_value"), rows=("out",), counts=("num_heads",), shared=("shared_key",))

    def forward(self, x_BTD: Tensor, seen: Seen, cache: LatentCache | None = None) -> tuple[Tensor, LatentCache]:
        """What the tokens find in themselves and what came before, and the cache with all of them in it.

        Whoever may see nothing sees everything: its answer must be discarded.
        """
        q_BTHK, q_BTHR = self._queries(x_BTD, seen.by)
        read = self._read(x_BTD, seen.key_by)
        if cache is None:
            y_BTHV = self._at_once(torch.cat([q_BTHK, q_BTHR], dim=-1), read, seen)
        else:
            read = LatentCache(*(torch.cat(pair, dim=1) for pair in zip(cache, read, strict=True)))
            y_BTHV = self._absorbed(q_BTHK, q_BTHR, read, seen.mask_BQS)
        return self.out(y_BTHV.flatten(2)), read

    def _queries(self, x_BTD: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
        if self.has_query_rank:
            x_BTD = self.query_norm(self.query_down(x_BTD))
        q_BTH = self.query(x_BTD).unflatten(-1, (self.num_heads, -1))
        plain, to_turn = q_BTH.split([self.plain_width, self.turned_width], dim=-1)
        return plain, turned(to_turn, by)

    def _read(self, x_BTD: Tensor, by: Rotation) -> LatentCache:
        # What others need of a token is this, and far less than its keys and values.
        both_BS = self.context.whole(self.latent_down(x_BTD))
        latent_BSL, key_BSR = torch.split(both_BS, [self.latent_rank, self.turned_width], dim=-1)
        key_BSR = self.shared_key(key_BSR)
        return LatentCache(self.latent_norm(latent_BSL), turned(key_BSR[:, :, None], by)[:, :, 0])

    def _at_once(self, q_BTH: Tensor, read: LatentCache, seen: Seen) -> Tensor:
        wide_BSH = self.key_value(read.latent_BSL).unflatten(-1, (-1, self.plain_width + self.value_width))
        k_BSHK, v_BSHV = wide_BSH.split([self.plain_width, self.value_width], dim=-1)
        k_BSH = torch.cat([k_BSHK, read.key_BSR[:, :, None].expand(-1, -1, k_BSHK.shape[2], -1)], dim=-1)
        q_BHQ, k_BHS, v_BHSV = (x.transpose(1, 2) for x in (self.context.to_heads(q_BTH), k_BSH, v_BSHV))
        found, begin = [], 0
        for run in seen.asking:
            end = begin + len(run)
            mask = None if seen.mask_BQS is None else seen.mask_BQS[:, None, begin:end, : run.stop]
            if mask is None and run.start:
                before_QS = torch.ones(len(run), run.stop, dtype=torch.bool, device=q_BTH.device)
                mask = before_QS.tril(run.start)
            found.append(
                functional.scaled_dot_product_attention(
                    q_BHQ[:, :, begin:end],
                    k_BHS[:, :, : run.stop],
                    v_BHSV[:, :, : run.stop],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=self.scale,
                )
            )
            begin = end
        return self.context.to_tokens(torch.cat(found, dim=2).transpose(1, 2))

    def _absorbed(self, q_BTHK: Tensor, q_BTHR: Tensor, read: LatentCache, mask_BTS: Tensor | None) -> Tensor:
        weight_HL = self.key_value.weight.view(self.num_heads, -1, self.latent_rank)
        key_HKL, value_HVL = torch.split(weight_HL, [self.plain_width, self.value_width], dim=1)
        q_BTHL = torch.einsum("bthk,hkl->bthl", q_BTHK, key_HKL)
        score_BHTS = torch.einsum("bthl,bsl->bhts", q_BTHL, read.latent_BSL)
        score_BHTS = (score_BHTS + torch.einsum("bthr,bsr->bhts", q_BTHR, read.key_BSR)) * self.scale
        if mask_BTS is None:
            num_new, num_all = score_BHTS.shape[-2:]
            mask_BTS = torch.ones(1, num_new, num_all, dtype=torch.bool, device=score_BHTS.device)
            mask_BTS = mask_BTS.tril(num_all - num_new)
        score_BHTS = score_BHTS.float().masked_fill(~mask_BTS[:, None], torch.finfo(torch.float32).min)
        weight_BHTS = score_BHTS.softmax(dim=-1).to(q_BTHK.dtype)
        found_BTHL = torch.einsum("bhts,bsl->bthl", weight_BHTS, read.latent_BSL)
        return torch.einsum("bthl,hvl->bthv", found_BTHL, value_HVL)
