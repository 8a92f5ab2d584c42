"""Products that round alike, however many rows there are.

Here        `by_row`.
Elsewhere   changes of a frozen model's layers, which do the same with low-rank products (continual/elastic.py).
Promise     a row's answer is the same bits in any batch, on one machine.

One product of many rows is faster, and its rounding depends on their number: matrix libraries take other code for a few
rows than for many. Records of one task in a batch of many are few.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def by_row(layer: nn.Linear, x_BI: Tensor) -> Tensor:
    """A linear layer's answer, (B, O), by a product for each of B rows. Shapes: I inputs, O outputs."""
    weight_BIO = layer.weight.t().expand(len(x_BI), -1, -1)
    said_BO: Tensor = torch.bmm(x_BI[:, None], weight_BIO)[:, 0]
    return said_BO if layer.bias is None else said_BO + layer.bias
