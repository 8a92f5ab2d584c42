"""Root mean square normalisation, whatever the products' precision.

Here        RMSNorm.
Elsewhere   layer normalisation is torch's own, which is always computed in fp32.
Promise     the same numbers as torch's where everything is fp32; in mixed precision it is computed in fp32, and what
            comes of it is.
"""

from __future__ import annotations

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """After Zhang and Sennrich 2019 (arXiv:1910.07467). Under autocast torch would compute it in 16 bits, and from its
    parts where weights are of another type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())
