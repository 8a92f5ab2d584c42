"""From the scores of what could come next to what does.

Here        SamplingConfig, SamplingsConfig, `guided`, `narrowed`, `choose`.
Elsewhere   the scores (model/writer.py).
Promise     the same scores, settings and generator choose the same; temperature 0 chooses the likeliest, always.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Generator, Tensor

from dougong.core.config import Config


class SamplingConfig(Config):
    """How freely tokens are chosen."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the scores. 0: the likeliest token, always."""

    top_k: int | None = Field(default=None, gt=0)
    """Only so many of the likeliest tokens."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751)."""

    guidance: float = Field(default=1.0, ge=0)
    """How far to go from what would come without the condition to what comes with it, and beyond: 1 is plain
    sampling, 0 ignores the condition."""


class SamplingsConfig(Config):
    """The same for each direction of a writer."""

    caption: SamplingConfig = SamplingConfig(temperature=0)
    """A caption is best said as it is likeliest."""

    draw: SamplingConfig = SamplingConfig(guidance=1.5, top_p=0.95)
    """A picture is one of many that would do; guided, and without the least likely codes, more of them show what was
    asked."""


def guided(with_BV: Tensor, without_BV: Tensor, guidance: float) -> Tensor:
    """Scores drawn away from what would be said without the condition.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) on log probabilities of tokens:
    without + guidance * (with - without).
    """
    with_BV, without_BV = with_BV.log_softmax(dim=-1), without_BV.log_softmax(dim=-1)
    return without_BV + guidance * (with_BV - without_BV)


def narrowed(score_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Log probabilities at this temperature, -inf for what `top_k` and then `top_p` leave out.

    `top_p` is of the probabilities that `top_k` leaves. The likeliest token is never left out.
    """
    score_BV = score_BV / config.temperature
    sorted_BV, order_BV = score_BV.sort(dim=-1, descending=True, stable=True)
    if config.top_k is not None:
        sorted_BV[:, config.top_k :] = -torch.inf
    probability_BV = sorted_BV.softmax(dim=-1)
    # Out: those before which the others have enough already.
    out_BV = probability_BV.cumsum(dim=-1) - probability_BV >= config.top_p
    out_BV[:, 0] = False
    sorted_BV = sorted_BV.masked_fill(out_BV, -torch.inf)
    return torch.empty_like(score_BV).scatter(-1, order_BV, sorted_BV).log_softmax(dim=-1)


def choose(score_BV: Tensor, config: SamplingConfig, generator: Generator) -> Tensor:
    """One token for each record, (B,). Guidance is not applied here: it needs two scores."""
    score_BV = score_BV.float()
    if config.temperature == 0:
        return score_BV.argmax(dim=-1)
    return torch.multinomial(narrowed(score_BV, config).exp(), 1, generator=generator)[:, 0]
