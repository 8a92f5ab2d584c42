"""Convolution with long strides, as one matrix product.

Here        `strided_conv1d`, `fits_stride`.
Elsewhere   who convolves so (model/encoders/audio.py).
Promise     the same numbers as torch's conv1d, up to the order of its sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional


def fits_stride(kernel: int, stride: int) -> bool:
    """Whether a kernel is whole strides long."""
    return kernel % stride == 0


def strided_conv1d(x_UTC: Tensor, weight_OCK: Tensor, bias_O: Tensor | None, stride: int) -> Tensor:
    """Convolve over T; channels stand last, in and out: (U, T, C) to (U, F, O) of F frames.

    A window of K steps is K / stride neighbouring blocks. Each block meets its part of the kernel in one product, and
    neighbours are added: no window is copied, as unfolding would, and nothing is transposed for a norm that follows.
    About twice as fast as conv1d on a CPU for kernels of hundreds of samples.
    """
    num_outputs, num_channels, kernel = weight_OCK.shape
    parts = kernel // stride
    num_frames = (x_UTC.shape[1] - kernel) // stride + 1
    num_blocks = num_frames + parts - 1
    block_UNS = x_UTC[:, : num_blocks * stride].reshape(x_UTC.shape[0], num_blocks, stride * num_channels)
    weight_PSO = weight_OCK.permute(2, 1, 0).reshape(parts, stride * num_channels, num_outputs)
    product_UNR = functional.linear(block_UNS, weight_PSO.transpose(1, 2).flatten(0, 1))
    y_UFO: Tensor = _AddNeighbours.apply(product_UNR, parts)  # type: ignore[no-untyped-call]  # as torch has it
    return y_UFO if bias_O is None else y_UFO + bias_O


class _AddNeighbours(Function):
    """Frame f is part 0 of block f, and part 1 of block f + 1, and so on; parts stand side by side, (U, N, P * O).

    Autograd's own way back from such slices fills and adds a whole tensor for each.
    """

    @staticmethod
    def forward(context: Any, product_UNR: Tensor, parts: int) -> Tensor:
        context.parts = parts
        num_frames = product_UNR.shape[1] - parts + 1
        pieces = product_UNR.chunk(parts, dim=2)
        y_UFO = pieces[0][:, :num_frames].clone()
        for part in range(1, parts):
            y_UFO += pieces[part][:, part : part + num_frames]
        return y_UFO

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_UFO,) = gradients
        parts: int = context.parts
        last = parts - 1
        # Each part's gradient is the frames', that many steps later.
        padded_UTO = functional.pad(gradient_UFO, (0, 0, last, last))
        num_blocks = gradient_UFO.shape[1] + last
        pieces = [padded_UTO[:, last - part : last - part + num_blocks] for part in range(parts)]
        return torch.cat(pieces, dim=2), None
