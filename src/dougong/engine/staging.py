"""Memory of one's own for what others are about to change.

Here        Staging.
Elsewhere   writing what lies there while training goes on (engine/saver.py).
Promise     what was copied stays as it was until the next copy, whatever becomes of the tensors that it was copied
            from. The same memory serves every copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Staging:
    """Copies of tensors, in the memory of the host."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The tensors of some files, by name, as they are now; what the copy before gave is overwritten."""
        given = {(file, name): tensor for file, tensors in files.items() for name, tensor in tensors.items()}
        held = self._held
        self._held = {key: _like(tensor, held.get(key)) for key, tensor in given.items()}
        if given:
            torch._foreach_copy_(list(self._held.values()), list(given.values()), non_blocking=True)
        if any(tensor.is_cuda for tensor in given.values()):
            torch.cuda.synchronize()  # nothing waits for a copy to the host by itself
        return {file: {name: self._held[file, name] for name in tensors} for file, tensors in files.items()}


def _like(tensor: Tensor, held: Tensor | None) -> Tensor:
    if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
        return held
    # Pinned where a device writes into it: other memory would be copied twice.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
