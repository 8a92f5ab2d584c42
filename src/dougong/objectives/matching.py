"""Whether two media belong together, asked of each pair by itself.

Here        `matching_loss`.
Elsewhere   choosing the pairs that do not (model/mining.py) and looking at both of a pair at once (model/dual.py);
            telling one medium from a batch of others (contrastive.py).
Promise     what belongs together and what does not weigh the same, however many wrong pairs were found for a right one;
            a pair that is not known counts nothing.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def matching_loss(match_P: Tensor, is_pair_P: Tensor, known_P: Tensor | None = None) -> Tensor:
    """The sum of the records' losses, in float32. Shapes: P pairs, of which those that belong together are the records.

    Binary cross entropy as in ALBEF (Li et al. 2021, arXiv:2107.07651); they average over all pairs, of which two
    thirds are wrong. Here right ones and wrong ones have half of the weight each.

    Args:
        match_P: the head's score of each pair; above 0 says that it belongs together.
        is_pair_P: whether it does.
        known_P: whether there is such a pair at all: a batch may have no wrong partner for a medium. None: all.
    """
    loss_P = functional.binary_cross_entropy_with_logits(match_P.float(), is_pair_P.float(), reduction="none")
    right_P, wrong_P = is_pair_P, ~is_pair_P
    if known_P is not None:
        right_P, wrong_P = right_P & known_P, wrong_P & known_P
    # Masked, not selected: a pair that is not there may have any finite score.
    right = loss_P.masked_fill(~right_P, 0.0).sum()
    wrong = loss_P.masked_fill(~wrong_P, 0.0).sum() * right_P.sum() / wrong_P.sum().clamp(min=1)
    return 0.5 * (right + wrong)
