"""By what a loss is multiplied, so that its gradients are neither too small nor too large for fp16.

Here        Scaling; OverflowScaling, GradScaler's rule; HistoryScale, a scale that follows the range that gradients
            have had.
Elsewhere   multiplying and dividing (engine/step.py); the range, and what is to be aimed at (adaptive.py).
Promise     a scale is a power of two, so that multiplying and dividing by it loses nothing; it never leaves
            [2 ** LEAST, 2 ** MOST].
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

from dougong.core.config import Config

LEAST: Final = -24
MOST: Final = 40


class Scaling(Protocol):
    """The scale of the next step, and what it learns of each."""

    @property
    def exponent(self) -> int:
        """Of the scale, a power of two."""
        ...

    def see(self) -> None:
        """All gradients of this rank are there, times the scale."""
        ...

    def after(self, *, finite: bool) -> None:
        """A step's gradients were finite, on all ranks, or it was skipped."""
        ...


class OverflowState(Config):
    """What a resumed run needs of an OverflowScaling."""

    kind: Literal["doubling"] = "doubling"
    exponent: int
    finite_in_a_row: int


class OverflowScaling:
    """Doubled after so many steps without overflow, halved after one: torch.amp.GradScaler's rule and numbers
    (Micikevicius et al. 2018, arXiv:1710.03740)."""

    def __init__(self, exponent: int = 16, growth_interval: int = 2000) -> None:
        self.growth_interval = growth_interval
        self.state = OverflowState(exponent=exponent, finite_in_a_row=0)

    @property
    def exponent(self) -> int:
        return self.state.exponent

    def see(self) -> None:
        """It learns from overflows alone."""

    def after(self, *, finite: bool) -> None:
        exponent, in_a_row = self.state.exponent, self.state.finite_in_a_row + 1
        if not finite:
            exponent, in_a_row = max(LEAST, exponent - 1), 0
        elif in_a_row == self.growth_interval:
            exponent, in_a_row = min(MOST, exponent + 1), 0
        self.state = OverflowState(exponent=exponent, finite_in_a_row=in_a_row)


class HistoryScale:
    """What the range of gradients asks for; after an overflow, whose size nobody can see, much less at once."""

    STEP_BACK: Final = 8
    """Exponents, after the first overflow in a row; twice as many after each further one."""

    def __init__(self, exponent: int = 0) -> None:
        self.exponent = exponent
        self.overflows_in_a_row = 0

    def aim(self, exponent: int) -> None:
        """What the history asks for."""
        self.exponent = min(MOST, max(LEAST, exponent))

    def after(self, *, finite: bool) -> None:
        if finite:
            self.overflows_in_a_row = 0
            return
        self.exponent = max(LEAST, self.exponent - (self.STEP_BACK << min(self.overflows_in_a_row, 3)))
        self.overflows_in_a_row += 1
