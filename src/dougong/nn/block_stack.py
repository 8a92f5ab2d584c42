"""The one shape of every model that the engine trains: embed -> blocks -> head.

Here        BlockStack.
Elsewhere   models of that shape (model/); what is done to them (engine/).
Promise     calling the model is calling its three parts in a row, so that an engine may put recompute, compile,
            shards or pipeline stages between the blocks of any model without knowing it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from dougong.nn.batch import Batch

StateT = TypeVar("StateT")
OutputT = TypeVar("OutputT")


class BlockStack(nn.Module, ABC, Generic[StateT, OutputT]):
    """A model as a stack. The state that walks through the blocks is a (nested) tuple or dict of tensors."""

    embed_names: ClassVar[tuple[str, ...] | None] = None
    """Children that `embed` alone uses; `head` uses all others but the blocks. None: a block uses what another part
    uses too, so that the stack cannot be cut into stages."""

    state_types: ClassVar[tuple[type, ...]] = ()
    """The named tuples that states and outputs are made of, for whoever passes them on."""

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

    token_blocks: range = range(0)
    """Blocks, in a row, between which ranks may hold a part of the tokens each: what `tokens` says. A model whose ranks
    may hold it for all of these blocks has a `context` (nn/context.py), as its layers have, and uses no weights but on
    `context.own` afterwards."""

    # Not abstract, these three: a model that names no token_blocks is never asked, and need not answer.

    def tokens(self, state: StateT) -> tuple[Tensor, Tensor]:
        """The tokens (B, T, D) that `token_blocks` work on, and their mask (B, T)."""
        raise NotImplementedError(f"{type(self).__name__} names token_blocks and must say what their tokens are")

    def with_tokens(self, state: StateT, x_BTD: Tensor, mask_BT: Tensor, num_padded: int) -> StateT:
        """The state with a part of the tokens, or all; the mask is of all, `num_padded` at its end added besides."""
        raise NotImplementedError(f"{type(self).__name__} names token_blocks and must say what their tokens are")

    def num_padded(self, state: StateT) -> int:
        """How many tokens were added at the end."""
        raise NotImplementedError(f"{type(self).__name__} names token_blocks and must say what their tokens are")

    def after_step(self) -> None:
        """What moves once a step by itself, after the optimizer: by default nothing."""

    def forward(self, batch: Batch) -> OutputT:
        state = self.embed(batch)
        for block in self.blocks:
            state = block(state)
        return self.head(state)
