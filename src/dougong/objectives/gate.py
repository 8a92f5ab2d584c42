"""Teaching the gate whom to trust, from corruption that is known because we made it.

Here        `gate_loss`.
Elsewhere   the gate (model/gate.py); corrupting training records (data/corruption.py).
Promise     a sum over records; one whose present modalities were all left alike teaches nothing, as does one that
            has fewer than two.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-6


def gate_loss(weight_BM: Tensor, level_BM: Tensor, present_BM: Tensor) -> Tensor:
    """Cross entropy between the gate's weights and trust shared out by how clean each modality is.

    Shapes: B records, M modalities. `level_BM` is 0 for a clean medium and 1 for one corrupted as strongly as can be.
    Trust is 1 - level, as a share of what the record's present modalities have of it together. Only records in which
    some modality is cleaner than another are judged: among equals it is the content that should decide.
    """
    clean_BM = (1.0 - level_BM).clamp(min=0.0) * present_BM
    highest_B = clean_BM.masked_fill(~present_BM, 0.0).amax(dim=1)
    lowest_B = clean_BM.masked_fill(~present_BM, 1.0).amin(dim=1)
    judged_B = (present_BM.sum(dim=1) > 1) & (highest_B > lowest_B)
    trust_BM = clean_BM / clean_BM.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
    # Among those present: one that is completed from the others has a weight too, and nothing to be judged by.
    weight_BM = weight_BM.float() * present_BM
    weight_BM = weight_BM / weight_BM.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
    # An absent modality's weight is 0, and its trust too: a floor keeps 0 * log(0) finite.
    loss_B = -(trust_BM * torch.log(weight_BM.clamp(min=SMALLEST))).sum(dim=1)
    return (loss_B * judged_B).sum()
