"""Making activations anew in the backward, instead of keeping them from the forward.

Here        Keep, KEEPS, `apply_recompute`; `recomputed`, of one block; `all_alike`.
Elsewhere   which block should keep what (budget.py); what that takes, measured (blocks.py).
Promise     losses, gradients and what a step leaves in buffers are bit-equal to those of a model that keeps everything,
            dropout included; names of parameters stay as they are.

After Chen et al. 2016 (arXiv:1604.06174); keeping products and making what lies between them anew, as Korthikanti et
al. 2022 (arXiv:2205.05198) do for attention alone, here for all operations by what they are. A block whose buffers move
in its forward (the running means of batch normalisation) has them moved once, which torch's own checkpoint does twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dougong.nn.block_stack import BlockStack

Keep = Literal["all", "products", "nothing"]
"""Of a block, from its forward to its backward. all: what autograd keeps. products: what comes of products,
convolutions and attention; norms, activation functions and all that is cheap is made anew, which can be done once.
nothing: what it was given alone."""

KEEPS: Final[tuple[Keep, ...]] = get_args(Keep)


def all_alike(keep: Keep, num_blocks: int) -> tuple[Keep, ...]:
    """So many blocks that keep the same."""
    return (keep,) * num_blocks


_ATEN = torch.ops.aten
_PRODUCTS: Final = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def apply_recompute(model: BlockStack[Any, Any], keep: Sequence[Keep]) -> None:
    """Have each block keep so much, in place.

    Raises:
        ValueError: not as many as the model has blocks.
    """
    if len(keep) != len(model.blocks):
        raise ValueError(f"{len(keep)} things to keep for {len(model.blocks)} blocks")
    for block, each in zip(model.blocks, keep, strict=True):
        if each != "all":
            block.forward = recomputed(block, block.forward, each)


def recomputed(block: nn.Module, forward: Callable[..., Any], keep: Keep) -> Callable[..., Any]:
    """The block's forward, keeping so much; not for "all"."""

    def contexts() -> _Contexts:
        if keep == "products":
            first, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
            return first, _Again(block, again)
        return contextlib.nullcontext(), _Again(block)

    def kept_less(*given: Any) -> Any:  # a block may be asked to show something besides
        if not torch.is_grad_enabled():
            return forward(*given)
        # Tensor by tensor: of a state in one piece, none would be what autograd saves, and could be put elsewhere.
        leaves, outline = tree_flatten(given)

        def with_state(*leaves: Any) -> Any:
            return forward(*tree_unflatten(leaves, outline))

        return checkpoint(with_state, *leaves, use_reentrant=False, context_fn=contexts)

    return kept_less


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class _Again:
    """Around the making anew, which comes once for each time that gradients are asked for."""

    def __init__(self, block: nn.Module, inner: AbstractContextManager[Any] | None = None) -> None:
        self._block, self._inner = block, inner
        self._before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in self._block.buffers()]
        # After it: torch's mode knows the block's own operations alone.
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *details: Any) -> None:
        if self._inner is not None:
            self._inner.__exit__(*details)
        with torch.no_grad():
            for buffer, was in self._before:
                buffer.copy_(was)
        self._before = []
