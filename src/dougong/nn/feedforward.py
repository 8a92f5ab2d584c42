"""What a block does to each token alone.

Here        FeedForward.
Elsewhere   what tokens do to each other (nn/attention.py).
Promise     a token's answer depends on that token only.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dougong.nn.split import Split
from dougong.nn.start import keep_variance


class FeedForward(nn.Module):
    """Widen, bend, narrow. Shapes: B records, T tokens, D channels."""

    def __init__(self, *, width: int, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = max(1, round(width * ratio))
        self.widen = keep_variance(nn.Linear(width, hidden))
        self.dropout = nn.Dropout(dropout)
        self.narrow = keep_variance(nn.Linear(hidden, width))

    def split(self) -> Split:
        return Split(columns=("widen",), rows=("narrow",))

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.narrow(self.dropout(functional.gelu(self.widen(x_BTD))))
        return y_BTD
