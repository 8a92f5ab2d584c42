"""The one shape of every model that the engine trains: embed -> blocks -> head.

Here        BlockStack.
Elsewhere   models of that shape (model/); what is done to them (engine/).
Promise     calling the model is calling its three parts in a row, so that an engine may put recompute, compile,
            shards or pipeline stages between the blocks of any model without knowing it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import nn

from dougong.nn.batch import Batch

StateT = TypeVar("StateT")
OutputT = TypeVar("OutputT")


class BlockStack(nn.Module, ABC, Generic[StateT, OutputT]):
    """A model as a stack. The state that walks through the blocks is a (nested) tuple or dict of tensors."""

    blocks: nn.ModuleList
    """Each takes the state and returns the next one."""

    @abstractmethod
    def embed(self, batch: Batch) -> StateT:
        """The state before the first block."""

    @abstractmethod
    def head(self, state: StateT) -> OutputT:
        """What the model says, from the state after the last block."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part they belong to, for whoever treats parts differently; the others are in none."""
        return {}

    def after_step(self) -> None:
        """What moves once a step by itself, after the optimizer: by default nothing."""

    def forward(self, batch: Batch) -> OutputT:
        state = self.embed(batch)
        for block in self.blocks:
            state = block(state)
        return self.head(state)
