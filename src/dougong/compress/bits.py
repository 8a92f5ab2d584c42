"""Weights in few bits.

Here        Rounded (whole numbers with their scales), `to_eight`, `to_four` (nearest, or by GPTQ); Range, of inputs.
Elsewhere   which layer gets how many (quantise.py); kernels that compute with them (engines/).
Promise     what a graph holds is exactly what `widened` says, so that an error measured here is the engine's too, but
            for the order of its sums.

Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dougong.compress.plan import GROUP

SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
DAMPING = 0.01
COLUMNS_AT_ONCE = 128


class Rounded(NamedTuple):
    """A matrix of whole numbers."""

    number_OI: Tensor
    """int8 of 8 bits; uint8 from 0 to 15 of 4 bits."""

    scale_OG: Tensor
    """float32, but of numbers that float16 has."""

    zero_OG: Tensor | None
    """4 bits: what stands for zero, uint8. None: 0 does."""

    def widened(self) -> Tensor:
        """The weights that these numbers stand for, float32 (O, I)."""
        rows, columns = self.number_OI.shape
        number_OGX = self.number_OI.float().view(rows, self.scale_OG.shape[1], -1)
        if self.zero_OG is not None:
            number_OGX = number_OGX - self.zero_OG.float()[..., None]
        return (number_OGX * self.scale_OG[..., None]).view(rows, columns)


class Range(NamedTuple):
    """Between which values an input is rounded to 256 steps, of which one is exactly zero."""

    low: float
    high: float

    def rounded(self, x: Tensor) -> Tensor:
        """The values that 8 bits leave."""
        step = (self.high - self.low) / 255
        return ((x.clamp(self.low, self.high) - self.low) / step).round() * step + self.low


def to_eight(weight_OI: Tensor) -> Rounded:
    """One scale for each output, so that the largest weight is 127."""
    scale_O1 = _half((weight_OI.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-6))
    number_OI = (weight_OI / scale_O1).round().clamp(-127, 127).to(torch.int8)
    return Rounded(number_OI, scale_O1, None)


def to_four(weight_OI: Tensor, hessian_II: Tensor | None = None) -> Rounded:
    """A scale and a zero for each group of inputs of each output.

    With `hessian_II`, the sum of x x^T over inputs, what rounding does to an output is made good by the weights still
    to be rounded: GPTQ (Frantar et al. 2022, arXiv:2210.17323), with groups whose scales are found when they are
    reached, and columns in their own order.
    """
    rows, columns = weight_OI.shape
    group = GROUP if columns % GROUP == 0 else columns
    weight_OI = weight_OI.detach().float().clone()
    if hessian_II is None:
        weight_NX = weight_OI.view(-1, group)
        scale_N, zero_N = _fit(weight_NX)
        number_NX = (weight_NX / scale_N[:, None] + zero_N[:, None]).round().clamp(0, 15)
        scale_OG, zero_OG = scale_N.view(rows, -1), zero_N.view(rows, -1)
        return Rounded(number_NX.view(rows, columns).to(torch.uint8), scale_OG, zero_OG.to(torch.uint8))
    factor_II = _inverse_factor(hessian_II)
    number_OI = torch.zeros_like(weight_OI, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, columns, COLUMNS_AT_ONCE):
        end = min(columns, start + COLUMNS_AT_ONCE)
        error_OK = torch.zeros(len(weight_OI), end - start)
        for column in range(start, end):
            if column % group == 0:
                scale_O, zero_O = _fit(weight_OI[:, column : column + group])
                scales.append(scale_O)
                zeros.append(zero_O)
            number_O = (weight_OI[:, column] / scales[-1] + zeros[-1]).round().clamp(0, 15)
            number_OI[:, column] = number_O.to(torch.uint8)
            wrong_O = (weight_OI[:, column] - (number_O - zeros[-1]) * scales[-1]) / factor_II[column, column]
            weight_OI[:, column + 1 : end] -= wrong_O[:, None] * factor_II[column, column + 1 : end]
            error_OK[:, column - start] = wrong_O
        weight_OI[:, end:] -= error_OK @ factor_II[start:end, end:]
    return Rounded(number_OI, torch.stack(scales, dim=1), torch.stack(zeros, dim=1).to(torch.uint8))


def _fit(weight_OX: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero of each row with the least squared error, among ranges that are cut off more and more."""
    high_O, low_O = weight_OX.amax(dim=1).clamp(min=0), weight_OX.amin(dim=1).clamp(max=0)
    best_O = torch.full_like(high_O, torch.inf)
    scale_O, zero_O = torch.ones_like(high_O), torch.zeros_like(high_O)
    for shrink in SHRINKS[:5]:
        tried_O = _half(((high_O - low_O) * shrink / 15).clamp(min=1e-6))
        middle_O = (-low_O * shrink / tried_O).round().clamp(0, 15)
        number_OX = (weight_OX / tried_O[:, None] + middle_O[:, None]).round().clamp(0, 15)
        error_O = (weight_OX - (number_OX - middle_O[:, None]) * tried_O[:, None]).square().sum(dim=1)
        better_O = error_O < best_O
        best_O = torch.where(better_O, error_O, best_O)
        scale_O, zero_O = torch.where(better_O, tried_O, scale_O), torch.where(better_O, middle_O, zero_O)
    return scale_O, zero_O


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    diagonal_I = hessian_II.diagonal()
    damped_II = hessian_II.double() + torch.eye(len(hessian_II)) * (DAMPING * diagonal_I.mean().clamp(min=1e-6))
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    upper_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return upper_II.float()


def _half(scale: Tensor) -> Tensor:
    return scale.half().float()


def fit_range(x_ND: Tensor) -> Range:
    """The range with the least squared error on these inputs, zero included, so that padding stays exact."""
    high, low = max(float(x_ND.max()), 0.0), min(float(x_ND.min()), 0.0)
    best, chosen = float("inf"), Range(-1e-3, 1e-3)
    for shrink in SHRINKS:
        tried = _with_exact_zero(low * shrink, high * shrink)
        error = float((tried.rounded(x_ND) - x_ND).square().mean())
        if error < best:
            best, chosen = error, tried
    return chosen


def _with_exact_zero(low: float, high: float) -> Range:
    step = max((high - low) / 255, 1e-8)
    below = round(-low / step)
    return Range(-below * step, (255 - below) * step)
