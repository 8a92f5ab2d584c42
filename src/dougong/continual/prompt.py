"""A few tokens that tell the bridge what is asked.

Here        `words_vector`, PromptNetwork.
Elsewhere   where the tokens stand (continual/elastic.py); capacity, which is the adapters' (continual/adapters.py).
Promise     a prompt follows from the task's description and the record alone, never from who else is in the batch.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.continual.rows import by_row
from dougong.nn.start import keep_variance

HASHED: Final = 256
LONGEST_PIECE: Final = 4


def words_vector(text: str) -> npt.NDArray[np.float32]:
    """A description as a vector of length 1, the same on every machine: counts of its words and of their pieces, by
    hash (Weinberger et al. 2009, arXiv:0902.2206). No model is needed, so that any base will do."""
    vector_W = np.zeros(HASHED, np.float32)
    for word in text.lower().split():
        padded = f" {word} "
        pieces = [padded, *(padded[i : i + LONGEST_PIECE] for i in range(len(padded) - LONGEST_PIECE + 1))]
        for piece in pieces:
            number = int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "big")
            vector_W[number % HASHED] += 1.0 if number & (1 << 40) else -1.0
    return vector_W / max(1e-6, float(np.linalg.norm(vector_W)))


class PromptNetwork(nn.Module):
    """From a description and a record to P tokens. Shapes: B records, D channels, P tokens, K hidden channels.

    After the prompts of L2P (Wang et al. 2021, arXiv:2112.08654), which are chosen from a pool by a key of the record
    and prepended inside one encoder; here they are computed, and stand where modalities ask each other.
    """

    asked_K: Tensor

    def __init__(self, *, width: int, num_prompts: int, hidden: int, description: str) -> None:
        super().__init__()
        self.num_prompts, self.width = num_prompts, width
        words_W = torch.from_numpy(words_vector(description))
        # Drawn once and kept by nobody: what a description says to K channels is the same wherever it is read.
        mix_WK = torch.from_numpy(np.random.default_rng(HASHED).standard_normal((HASHED, hidden)).astype(np.float32))
        self.register_buffer("asked_K", words_W @ mix_WK, persistent=False)
        self.read = keep_variance(nn.Linear(width, hidden))
        self.say = keep_variance(nn.Linear(hidden, num_prompts * width))

    def forward(self, record_BD: Tensor) -> Tensor:
        """(B, P, D)."""
        hidden_BK = functional.gelu(by_row(self.read, functional.layer_norm(record_BD, (self.width,))) + self.asked_K)
        said_BN = by_row(self.say, hidden_BK)
        return said_BN.view(len(said_BN), self.num_prompts, self.width)
