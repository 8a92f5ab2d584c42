"""Long sequences: several ranks have the same records, and each a part of their tokens.

Here        `apply_context`, `check_context`, SharedContext; `share_tokens`, which tensor ranks use too.
Elsewhere   what a layer asks of other tokens (nn/context.py); the exchanges (exchange.py); adding up gradients, which
            are those of a rank's own tokens (layout.py).
Promise     gradients added up over the ranks are those of one process, within rounding, in either form. Every rank has
            as much to look at: of 2 x count chunks it has one from the front, and its like from the back.

gather      each rank gets what attention reads of all tokens, of which it keeps the gradients (Llama 3, 2024,
            arXiv:2407.21783, section 3.3.2); latents are sent, not keys and values of all heads.
swap        in attention, each rank has all tokens and a part of the heads (DeepSpeed-Ulysses, Jacobs et al. 2023,
            arXiv:2309.14509); latents are gathered, queries and answers exchanged.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.engine.parallel.exchange import all_tokens, exchanged, own_tokens, tokens_entered
from dougong.nn.block_stack import BlockStack
from dougong.nn.context import Context, HasContext, Runs
from dougong.nn.latent_attention import LatentAttention

Form = Literal["gather", "swap"]


class SharedContext(Context):
    """This rank's part of the tokens."""

    def __init__(self, group: dist.ProcessGroup, form: Form, blocks: int = 1) -> None:
        """`blocks` are those that tokens were cut into before, of each of which this rank has its chunks."""
        self.group, self.form, self.blocks = group, form, blocks
        count, self.place = dist.get_world_size(group), dist.get_rank(group)
        self.chunks = 2 * count
        self._own = [self.place, self.chunks - 1 - self.place]
        by_rank = [chunk for place in range(count) for chunk in (place, self.chunks - 1 - place)]
        self._order = _inverse(by_rank)
        """Where in the ranks' chunks, one rank after the other, each of a block stands."""

        of_all = [
            block * self.chunks + chunk
            for place in range(count)
            for block in range(blocks)
            for chunk in (place, self.chunks - 1 - place)
        ]
        self._by_rank, self._order_of_all = of_all, _inverse(of_all)

    def padded(self, num: int) -> int:
        return num + -num % (self.chunks * self.blocks)

    def here(self, num: int) -> Runs:
        size = num // (self.chunks * self.blocks)
        starts = [(block * self.chunks + chunk) * size for block in range(self.blocks) for chunk in self._own]
        return tuple(range(start, start + size) for start in starts)

    def asking(self, num: int) -> Runs:
        return (range(num),) if self.form == "swap" else self.here(num)

    def own(self, x_BT: Tensor) -> Tensor:
        lacking = -x_BT.shape[1] % self.chunks
        x_BT = functional.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (0, lacking))
        return _chosen(x_BT, self.chunks, self._own)

    def whole(self, x_BT: Tensor) -> Tensor:
        return _chosen(tokens_entered(x_BT, self.group), self.chunks, self._order)

    def told(self, x_BT: Tensor) -> Tensor:
        return _chosen(all_tokens(x_BT, self.group), self.chunks, self._order)

    def to_heads(self, x_BTH: Tensor) -> Tensor:
        if self.form == "gather":
            return x_BTH
        x_BTH = exchanged(x_BTH, self.group, split_dim=2, joined_dim=1)
        return _chosen(x_BTH, len(self._by_rank), self._order_of_all)

    def to_tokens(self, x_BTH: Tensor) -> Tensor:
        if self.form == "gather":
            return x_BTH
        x_BTH = _chosen(x_BTH, len(self._by_rank), self._by_rank)
        return exchanged(x_BTH, self.group, split_dim=1, joined_dim=2)


def check_context(model: BlockStack[Any, Any], count: int, form: Form, tensor: int = 1) -> None:
    """
    Raises:
        ConfigError: the model's tokens cannot be shared out, or not its heads by so many ranks.
    """
    if count == 1:
        return
    if not len(model.token_blocks) or not isinstance(model, HasContext):
        raise ConfigError(
            f"plan context={count}: {type(model).__name__} does not say where its tokens can be shared out. "
            "Use context: 1."
        )
    for module in model.modules():
        if form == "swap" and isinstance(module, LatentAttention) and module.num_heads % (count * tensor):
            raise ConfigError(
                f"plan context={count}, tensor={tensor} with context_form=swap cannot share out "
                f"{module.num_heads} heads: every rank needs as many. Use a product that divides them, or "
                "context_form: gather."
            )


def apply_context(model: BlockStack[Any, Any], group: dist.ProcessGroup, form: Form, *, blocks: int = 1) -> Context:
    """Have every layer work on this rank's part of the tokens, in place; before `apply_tensor`.

    `blocks` are those that `share_tokens` cuts tokens into before. What is returned goes to it.
    """
    between = {id(module) for place in model.token_blocks for module in model.blocks[place].modules()}
    in_blocks, by_itself = SharedContext(group, form, blocks), SharedContext(group, form)
    for module in model.modules():
        if isinstance(module, HasContext):
            module.context = in_blocks if id(module) in between else by_itself
        if form == "swap" and isinstance(module, LatentAttention):
            widen = module.key_value
            widen.forward = functools.partial(_own_heads, widen, group)  # type: ignore[method-assign]
    return in_blocks


def _own_heads(linear: nn.Linear, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    # Asked when it is called: other ranks may have taken heads too.
    return functional.linear(x, linear.weight.chunk(dist.get_world_size(group))[dist.get_rank(group)])


def share_tokens(model: BlockStack[Any, Any], together: dist.ProcessGroup | None, context: Context | None) -> None:
    """Before the first of the model's `token_blocks` each rank keeps its part of the tokens; after the last it has all
    again. `together` are ranks that compute every layer together, and share out what each of the `context` has."""
    first, last = model.blocks[model.token_blocks[0]], model.blocks[model.token_blocks[-1]]
    context = context or Context()
    count = 1 if together is None else dist.get_world_size(together)

    def begin(state: Any) -> Any:
        x_BTD, mask_BT = model.tokens(state)
        length = mask_BT.shape[1]
        padded = context.padded(length + -length % count) - length
        x_BTD, mask_BT = functional.pad(x_BTD, (0, 0, 0, padded)), functional.pad(mask_BT, (0, padded))
        if together is not None:
            x_BTD = own_tokens(x_BTD, together)
        return model.with_tokens(state, context.own(x_BTD), mask_BT, padded)

    def end(state: Any) -> Any:
        x_BTD, mask_BT = model.tokens(state)
        length = mask_BT.shape[1] - model.num_padded(state)
        x_BTD = context.whole(x_BTD)
        if together is not None:
            x_BTD = all_tokens(x_BTD, together)
        return model.with_tokens(state, x_BTD[:, :length], mask_BT[:, :length], 0)

    if not _is_elsewhere(first):
        into = first.forward
        first.forward = lambda state: into(begin(state))
    if not _is_elsewhere(last):
        out_of = last.forward
        last.forward = lambda state: end(out_of(state))


def _is_elsewhere(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is None


def _chosen(x_BT: Tensor, chunks: int, order: list[int]) -> Tensor:
    """Of so many equal chunks of the tokens these, in this order."""
    x_BCS = x_BT.reshape(len(x_BT), chunks, x_BT.shape[1] // chunks, *x_BT.shape[2:])
    return x_BCS.index_select(1, torch.tensor(order, device=x_BT.device)).flatten(1, 2)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
