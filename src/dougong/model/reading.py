"""What a decoder reads of media before it writes.

Here        ReadBlock, which walks an encoder's block on the part of a state that is read; that part's beginning.
Elsewhere   the encoders' blocks themselves (model/sandwich.py); what is written (model/writer.py, model/decoder.py).
Promise     an encoder in a decoder computes what it computes in a sandwich.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from dougong.model.sandwich import SandwichState
from dougong.nn.batch import Batch, MediaBatch


class Reading(Protocol):
    """A state that has a part which encoders walk on."""

    @property
    def read(self) -> SandwichState: ...

    def _replace(self, **changes: Any) -> Self: ...


ReadingT = TypeVar("ReadingT", bound=Reading)


class ReadBlock(nn.Module):
    """One of the encoders' blocks, on what is read."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: ReadingT) -> ReadingT:
        return state._replace(read=self.block(state.read))


def nothing_read(batch: Batch) -> SandwichState:
    """Before any medium is embedded."""
    present_BM = torch.stack([media.present_B for media in batch.media.values()], dim=1)
    return SandwichState.begin({}, {}, {}, present_BM)


def and_tokens(read: SandwichState, name: str, x_UTD: Tensor, mask_UT: Tensor) -> SandwichState:
    """The same with a modality's tokens, before the first layer of its encoder."""
    return read._replace(tokens={**read.tokens, name: x_UTD}, masks={**read.masks, name: mask_UT})


def num_media(media: MediaBatch) -> int:
    """How many distinct media there are."""
    return next(iter(media.values.values())).shape[0]
