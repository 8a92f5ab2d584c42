"""Words in, scores of words out, where words are many.

Here        TokenLoss.
Elsewhere   sharing words out over ranks (engine/parallel/tensor.py); adding losses up (objectives/generation.py).
Promise     the loss is in float32 under any precision.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class TokenLoss(nn.Module):
    """Each token's cross entropy in nats. A module, since ranks that share the words out must compute it together."""

    def forward(self, score_BNV: Tensor, target_BN: Tensor) -> Tensor:
        """Shapes: B records, N tokens, V words."""
        loss_N = functional.cross_entropy(score_BNV.float().flatten(0, 1), target_BN.flatten(), reduction="none")
        return loss_N.view(target_BN.shape)
