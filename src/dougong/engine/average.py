"""A moving average of the weights, which often judges better than the last weights.

Here        WeightAverage.
Elsewhere   when it is updated and used (engine/trainer.py); keeping it (engine/checkpoint.py).
Promise     training never sees it: the weights come back bit for bit after it stood in for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dougong.engine.weights import distinct_weights


class WeightAverage:
    """An exponential moving average of every floating-point weight and buffer."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        weights = {name: w for name, w in distinct_weights(model).items() if w.is_floating_point()}
        self._names = list(weights)
        self._weights = list(weights.values())
        # Of 16 bits, what a step moves an average by would be rounded away.
        self._averages = [w.float() if w.dtype == torch.bfloat16 else w.clone() for w in self._weights]

    def update(self, num_updates: int) -> None:
        """Move towards the weights after `num_updates` steps; the first steps count more, as in TensorFlow's."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        weights = [weight.to(average.dtype) for weight, average in zip(self._weights, self._averages, strict=True)]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The model's weights with the averages in their places."""
        return distinct_weights(self._model) | dict(zip(self._names, self._averages, strict=True))

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take the averages from saved weights."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the averages inside."""
        copies = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, copies)
