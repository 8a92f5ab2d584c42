"""Teaching witnesses to say how much they know.

Here        `evidence_loss`.
Elsewhere   what evidence is and how it is combined (model/evidence.py).
Promise     a sum over records, as objectives/decision.py's; the right class's evidence is never punished.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def evidence_loss(alpha_BC: Tensor, target_B: Tensor, *, doubt_weight: float) -> Tensor:
    """The expected cross entropy under the Dirichlet, and `doubt_weight` times the evidence for wrong classes.

    Shapes: B records, C classes. Sensoy et al. 2018 (arXiv:1806.01768), equation 4, as Han et al. 2021
    (arXiv:2102.02051) use it: sum over classes of y (digamma(S) - digamma(alpha)), and the divergence from the even
    Dirichlet once the right class's evidence is taken away. Their weight of the second part rises with the epochs;
    ours is one number, so that a step's loss depends on its batch alone.
    """
    strength_B = alpha_BC.sum(dim=-1)
    right_B = alpha_BC.gather(1, target_B[:, None])[:, 0]
    fit_B = torch.digamma(strength_B) - torch.digamma(right_B)
    right_BC = functional.one_hot(target_B, alpha_BC.shape[-1])
    wrong_BC = torch.where(right_BC.bool(), torch.ones_like(alpha_BC), alpha_BC)
    return (fit_B + doubt_weight * _from_even(wrong_BC)).sum()


def _from_even(alpha_BC: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of a Dirichlet from the one with all ones, (B,)."""
    strength_B1 = alpha_BC.sum(dim=-1, keepdim=True)
    num_classes = torch.tensor(float(alpha_BC.shape[-1]), dtype=alpha_BC.dtype, device=alpha_BC.device)
    scale_B = torch.lgamma(strength_B1)[:, 0] - torch.lgamma(alpha_BC).sum(dim=-1) - torch.lgamma(num_classes)
    spread_BC = (alpha_BC - 1.0) * (torch.digamma(alpha_BC) - torch.digamma(strength_B1))
    return scale_B + spread_BC.sum(dim=-1)
