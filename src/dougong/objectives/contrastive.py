"""How far modalities are from saying the same of a record.

Here        `contrastive_loss` of two modalities, `all_pairs_loss` of any number, `negative_weights`, which says how
            much is held against what.
Elsewhere   the vectors and the learnt temperature (model/heads.py); whether two belong together, asked of each pair
            (matching.py); adding it to what else is learnt (recipes/).
Promise     two records that share a medium are never held against each other; a medium that weighs 0 as a negative
            changes nothing, not even a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.mining import spared

TEMPERATURE = 0.07


def contrastive_loss(
    left_UD: Tensor,
    right_VD: Tensor,
    left_B: Tensor,
    right_B: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    negative_UV: Tensor | None = None,
) -> Tensor:
    """The sum of the records' losses, in float32: each must find its own partner among all that the batch has.

    Shapes: U and V distinct media of two modalities, as vectors of length 1; `left_B` and `right_B` say which of them
    each of B records has.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) both ways, as CLIP has it (Radford et al. 2021,
    arXiv:2103.00020), over distinct media. Where a medium has several partners (a sentence said by two voices), any of
    them is right. It is a sum over records, but of this batch's partners alone: micro-batches add up to something
    easier than one big batch.

    Args:
        temperature: divides the scores; a tensor where it is learnt.
        negative_UV: how much each pair that is no partnership is held against both, from 0, not at all, to 1, as any
            other. It multiplies the pair's share of the softmax. None: 1 everywhere.
    """
    with torch.autocast(left_UD.device.type, enabled=False):  # which would round the scores, and so all that follows
        score_UV = (left_UD.float() @ right_VD.float().T) / temperature
    pair_UV = _partners(score_UV, left_B, right_B)
    # A finite floor, not -inf: a medium without any partner here would get NaN gradients.
    floor = torch.finfo(score_UV.dtype).min
    paired_UV = score_UV.masked_fill(~pair_UV, floor)
    if negative_UV is not None:
        weight_UV = negative_UV.to(score_UV.dtype).masked_fill(pair_UV, 1.0)
        # log(0) is -inf, and so would be what is left of the softmax's sum; its gradient, 0 * inf, would be NaN.
        gone_UV = weight_UV <= 0
        score_UV = (score_UV + weight_UV.masked_fill(gone_UV, 1.0).log()).masked_fill(gone_UV, floor)
    to_right_U = score_UV.logsumexp(dim=1) - paired_UV.logsumexp(dim=1)
    to_left_V = score_UV.logsumexp(dim=0) - paired_UV.logsumexp(dim=0)
    return 0.5 * (to_right_U[left_B] + to_left_V[right_B]).sum()


def all_pairs_loss(
    vectors: Mapping[str, Tensor],
    index: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    temperature: float | Tensor = TEMPERATURE,
    key_B: Tensor | None = None,
) -> Tensor:
    """The contrastive loss of each pair of modalities, averaged over the pairs that the batch has.

    Args:
        vectors: of each modality its U distinct media, (U, D); a modality that the batch lacks may be missing.
        index: of each modality, which of its media each of the B records has.
        there: of each modality, whether the record has one.
        pairs: which modalities are drawn together; empty: all with all.
        temperature: as `contrastive_loss` has it.
        key_B: records of equal keys are not held against each other (`spared`).

    Raises:
        ConfigError: a pair names a modality that `index` does not know.
    """
    strange = [name for pair in pairs for name in pair if name not in index]
    if strange:
        raise ConfigError(f"a pair names {strange[0]!r}, which is no modality here. Use two of {', '.join(index)}.")
    losses = []
    for left, right in pairs or tuple(itertools.combinations(index, 2)):
        if left not in vectors or right not in vectors:
            continue
        both_B = there[left] & there[right]
        left_B, right_B = index[left][both_B], index[right][both_B]
        negative_UV = None
        if key_B is not None:
            shape = (vectors[left].shape[0], vectors[right].shape[0])
            negative_UV = (~spared(left_B, right_B, key_B[both_B], shape)).float()
        losses.append(
            contrastive_loss(
                vectors[left], vectors[right], left_B, right_B, temperature=temperature, negative_UV=negative_UV
            )
        )
    if not losses:  # a batch without any pair still has a loss, which asks nothing of anybody
        return sum((each.float().sum() * 0.0 for each in vectors.values()), torch.zeros(()))
    return torch.stack(losses).mean()


def negative_weights(similarity_UV: Tensor, *, low: float, high: float) -> Tensor:
    """1 for pairs whose given similarity is at most `low`, 0 from `high` on, and straight down between.

    What is too alike is perhaps no negative at all: two pictures of dogs, two names of one thing. The similarity comes
    from elsewhere (a frozen model's, equal words), so that training cannot make its own task easier.

    Raises:
        ConfigError: `low` is not below `high`.
    """
    if not low < high:
        raise ConfigError(f"low={low} must be below high={high}: between them a pair counts less and less.")
    return ((high - similarity_UV.float()) / (high - low)).clamp(0.0, 1.0)


def _partners(score_UV: Tensor, left_B: Tensor, right_B: Tensor) -> Tensor:
    pair_UV = score_UV.new_zeros(score_UV.shape, dtype=torch.bool)
    pair_UV[left_B, right_B] = True
    return pair_UV
