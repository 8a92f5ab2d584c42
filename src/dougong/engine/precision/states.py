"""An optimizer's means in fp32, or in 8 or 4 bits.

Here        States, StateFormat.
Elsewhere   the optimizer that keeps them (adamw.py).
Promise     format and tables are torchao's: codes of 8 bits with a scale for every 256 numbers (Dettmers et al. 2021,
            arXiv:2110.02861), or of 4 bits for every 128 (Li et al. 2023, arXiv:2309.01507). As there, weights of less
            than 4,096 numbers, or of no whole number of such blocks, keep fp32.

torchao's own optimizer is not used: it compiles a kernel for every shape (13 seconds for the first, on a CPU), keeps in
the weight's format what it keeps whole, in which a second mean of beta .999 stands still, and rounds by the generator
that dropout draws from. Its way to find codes takes four times as long without a compiler as torch's search.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dougong.core.errors import ConfigError

States = Literal["fp32", "8bit", "4bit"]
"""Of a weight's first and second mean."""

BLOCKS: Final = {"8bit": 256, "4bit": 128}
SMALL: Final = 4096

_SIGNED: Final = (True, False)
"""The first mean has a sign, the second has none."""


class StateFormat:
    """How means are kept, as plain tensors in a weight's state."""

    def __init__(self, states: States) -> None:
        """
        Raises:
            ConfigError: what it needs is not installed.
        """
        self.states = states
        # Of this format alone: one made while tensors have no numbers (a rehearsal) must not serve another.
        self._tables = {} if states == "fp32" else {signed: torch.tensor(_codes(states, signed)) for signed in _SIGNED}

    def begin(self, state: dict[str, Any], name: str, weight: Tensor) -> None:
        """Nothing has been met yet."""
        if not self._few(weight):
            state[name] = torch.zeros_like(weight, dtype=_type(weight))
            return
        # What is there is zero because its scale is, whatever the code.
        half = 2 if self.states == "4bit" else 1
        state[f"{name}_codes"] = torch.zeros(weight.numel() // half, dtype=torch.uint8, device=weight.device)
        state[f"{name}_scale"] = torch.zeros(weight.numel() // BLOCKS[self.states], device=weight.device)

    def read(self, state: dict[str, Any], name: str, weight: Tensor, *, signed: bool) -> Tensor:
        """In fp32; what is kept so, itself."""
        if name in state:
            found: Tensor = state[name]
            return found
        codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
        if self.states == "4bit":
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
        table = self._tables[signed].to(codes.device)
        numbers: Tensor = table[codes.int()].view(len(scale), -1) * scale[:, None]
        return numbers.view(weight.shape)

    def write(self, state: dict[str, Any], name: str, value: Tensor, *, signed: bool) -> None:
        """Keep it, where it was not stepped in place."""
        if name in state:
            return
        blocks = value.reshape(-1, BLOCKS[self.states])
        scale = blocks.abs().amax(dim=1).clip(1e-12)
        table = self._tables[signed].to(value.device)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(blocks / scale[:, None], middles, out_int32=True, right=True).to(torch.uint8).view(-1)
        if self.states == "4bit":
            codes = (codes[::2] << 4) | codes[1::2]
        state[f"{name}_codes"].copy_(codes)
        state[f"{name}_scale"].copy_(scale)

    def _few(self, weight: Tensor) -> bool:
        if self.states == "fp32" or weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        return weight.numel() >= SMALL and weight.numel() % BLOCKS[self.states] == 0


def _type(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype


@functools.cache
def _codes(states: States, signed: bool) -> tuple[float, ...]:
    """The numbers that codes stand for, from the smallest."""
    try:
        from torchao.optim import subclass_4bit, subclass_8bit
    except ImportError:
        raise ConfigError(
            f"optimizer.states={states} needs the package torchao, which is not installed. "
            "Install dougong[lowbit], or use states: fp32."
        ) from None
    of = subclass_8bit if states == "8bit" else subclass_4bit
    return tuple(of.get_qmap_signed() if signed else of.get_qmap_unsigned())
