"""Wrong partners that are nearly right.

Here        `hard_negatives`; `spared`, which pairs are perhaps not wrong, and Keyed, by what.
Elsewhere   who looks at them (model/dual.py, objectives/contrastive.py); how wrong it is about them
            (objectives/matching.py).
Promise     a partner is never drawn as a wrong one; a medium for which the batch has no wrong one is told so. The draw
            is torch's own, whose state a checkpoint keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mined(NamedTuple):
    """Shapes: U media."""

    chosen_U: Tensor
    """A wrong partner of each; any where there is none."""

    known_U: Tensor
    """Whether there is one."""


def hard_negatives(score_UV: Tensor, pair_UV: Tensor) -> Mined:
    """Draw for each of U media a wrong one of V, the likelier the more alike the two are.

    As ALBEF does (Li et al. 2021, arXiv:2107.07651): by the softmax of the contrastive scores, which are similarities
    over the temperature. They mask a record's own partner; here all partners are, of which a medium may have several.

    Args:
        score_UV: the scores; no gradient goes through the choice.
        pair_UV: which two are partners.
    """
    score_UV = score_UV.detach().float().masked_fill(pair_UV, torch.finfo(torch.float32).min)
    known_U = ~pair_UV.all(dim=1)
    # Where all are partners the floor alone is left, whose softmax is even: something is drawn, and marked unknown.
    chance_UV = score_UV.softmax(dim=1)
    return Mined(torch.multinomial(chance_UV, 1)[:, 0], known_U)


class Keyed(NamedTuple):
    """Which of the media of one modality the records that have one have, and their keys. Shapes: N such records."""

    medium_N: Tensor
    key_N: Tensor
    num_media: int


def spared(left: Keyed, right: Keyed) -> Tensor:
    """Which of the U x V pairs of media come from records of one key, whether or not one record has both: they may say
    the same (Khosla et al. 2020, arXiv:2004.11362, call such records positives; here they are only left out)."""
    _, key_M = torch.unique(torch.cat([left.key_N, right.key_N]), return_inverse=True)
    num_keys = int(key_M.max()) + 1 if len(key_M) else 1
    left_UK, right_VK = (key_M.new_zeros((each.num_media, num_keys), dtype=torch.float32) for each in (left, right))
    left_UK[left.medium_N, key_M[: len(left.key_N)]] = 1.0
    right_VK[right.medium_N, key_M[len(left.key_N) :]] = 1.0
    spared_UV: Tensor = left_UK @ right_VK.T > 0
    return spared_UV
