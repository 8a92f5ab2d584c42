"""How much of a step's gradient is chance.

Here        NoiseMeter, which compares the gradients of some steps in a row; NoiseMeasured, the event of it.
Elsewhere   measuring what flows through a network, and gradients of several losses (engine/flow/).
Promise     training is changed by nothing. Between windows nothing is computed; in one, a copy of the gradient is held.
            What noise hides whole is None, never a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.core.errors import ConfigError
from dougong.core.events import Event


@dataclass(frozen=True, kw_only=True)
class NoiseMeasured(Event):
    """Of some steps in a row."""

    window: int
    """How many."""

    signal: float | None
    """The squared length of the gradient without noise, as estimated; None where noise hides it."""

    noise: float
    """The mean squared length of what a step's gradient has besides."""

    batches: float | None
    """The gradient noise scale in batches of this size: of so many together signal and noise would be equal. Far above
    1, larger batches need fewer steps; far below, they are a waste. None where there is no signal to be seen."""


class NoiseMeter:
    """Compares gradients of `window` steps in a row, of every `every`. Call `step` after each step.

    McCandlish et al. 2018 (arXiv:1812.06162) compare a small and a large batch of the same weights. We take steps in a
    row for the small ones and their mean for the large one: for that nothing is computed twice, and weights move
    between them, which counts as noise. Gradients are those that the optimizer is given, so clipping takes part.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, window: int = 8, every: int = 400, steps: int = 0
    ) -> None:
        """`steps` have been taken before."""
        if not 1 < window <= every:
            raise ConfigError(f"window {window} must be 2 or more, and no more than every {every}. Use 8 and 400.")
        self._model = model
        self._window, self._every = window, every
        self._steps = steps
        self._sums: list[tuple[nn.Parameter, Tensor]] = []
        """What is trained when a window begins, and its gradients so far."""

        self._squares: list[float] = []
        self._handle = optimizer.register_step_pre_hook(self._before_update)

    def close(self) -> None:
        """Nothing is hooked any more."""
        self._handle.remove()
        self._sums = []

    def step(self) -> NoiseMeasured | None:
        """After each optimizer step: what a window that ends with it says."""
        self._steps += 1
        if len(self._squares) < self._window:
            return None
        k = self._window
        mean_square = math.fsum(self._squares) / k
        square_of_mean = _square([total for _, total in self._sums]) / k**2
        self._sums, self._squares = [], []
        if not math.isfinite(mean_square):
            return None
        noise = max(0.0, (mean_square - square_of_mean) * k / (k - 1))
        signal = (k * square_of_mean - mean_square) / (k - 1)
        seen = signal > 1e-3 * mean_square  # below, it is chance whether it is above 0
        return NoiseMeasured(
            step=self._steps,
            window=k,
            signal=signal if seen else None,
            noise=noise,
            batches=noise / signal if seen else None,
        )

    @torch.no_grad()
    def _before_update(self, *_: object) -> None:
        if not self._sums:
            # Not the first steps: their gradients are those of weights that were drawn.
            if self._steps % self._every != self._every - self._window and self._steps != self._window:
                return
            self._sums = [(p, torch.zeros_like(p)) for p in self._model.parameters() if p.requires_grad]
        fresh = [(total, p.grad.to_dense()) for p, total in self._sums if p.grad is not None]
        if fresh:
            torch._foreach_add_([total for total, _ in fresh], [gradient for _, gradient in fresh])
        self._squares.append(_square([gradient for _, gradient in fresh]))


def _square(tensors: list[Tensor]) -> float:
    """Of the length of all together."""
    if not tensors:
        return 0.0
    norms = torch.stack(list(torch._foreach_norm([each.float() for each in tensors])))
    return float(norms.double().square().sum())
