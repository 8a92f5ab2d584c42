"""Every layer computed by several ranks together.

Here        `apply_tensor`, `check_tensor`, Cut, Cuts.
Elsewhere   what can be cut, which each layer says itself (nn/split.py); the exchanges (exchange.py).
Promise     a step gives every rank the gradients of its part of the weights that one process would have, within
            rounding; what is not cut gets the same gradient on all ranks, once `Cuts.partial` has been added up. Names
            of parameters stay as they are. A model that cannot be cut so is refused before anything is changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.engine.parallel.exchange import (
    added_up,
    all_channels,
    all_tokens,
    entered,
    tokens_added_up,
    tokens_entered,
)
from dougong.nn.block_stack import BlockStack
from dougong.nn.split import Split, splits_of
from dougong.nn.vocabulary import TokenLoss


class Cut(NamedTuple):
    """The part of a parameter that a rank holds: the `place`-th of `parts` equal ones along `dim`."""

    dim: int
    place: int
    parts: int


@dataclass
class Cuts:
    """What was cut, by the names of parameters."""

    pieces: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    """One cut, or several along different dimensions."""
    partial: set[str] = field(default_factory=set)
    """Not cut, but each rank's gradient is of a part of the tokens: they are to be added up over the ranks."""

    def add(self, name: str, cut: Cut) -> None:
        self.pieces[name] = (*self.pieces.get(name, ()), cut)


def check_tensor(model: BlockStack[Any, Any], count: int) -> None:
    """
    Raises:
        ConfigError: a layer cannot be shared out by so many ranks; the message says by how many it can.
    """
    sizes: dict[str, int] = {}
    for name, module, split in splits_of(model):
        sizes |= {f"{name}.{each}": getattr(*_owner(module, each)) for each in split.counts}
        sizes |= {f"{name}.{each}.out_features": _child(module, each).out_features for each in split.columns}
        for each, dim in split.pieces:
            sizes[f"{name}.{each}'s dimension {dim}"] = getattr(*_owner(module, each)).shape[dim]
    most = math.gcd(*sizes.values()) if sizes else count
    for what, size in sizes.items():
        if size % count:
            fits = [n for n in range(1, most + 1) if most % n == 0]
            raise ConfigError(
                f"plan tensor={count} cannot share out {what.removeprefix('.')}={size}: every rank needs an equal "
                f"part. Use tensor in {fits}, which fit the whole model."
            )


def apply_tensor(
    model: BlockStack[Any, Any], group: dist.ProcessGroup, cuts: Cuts | None = None, *, sequence: bool = False
) -> Cuts:
    """Keep this rank's part of every layer that can be cut, in place; `cuts` are those that have been made before.

    With `sequence`, tokens are shared out between the layers, where the model says they can be (`token_blocks`), by
    `share_tokens` (context.py).

    Raises:
        ConfigError: a layer cannot be shared out by so many ranks.
    """
    check_tensor(model, dist.get_world_size(group))
    cuts = cuts or Cuts()
    if sequence:
        for place in model.token_blocks:
            cuts.partial |= {f"blocks.{place}.{name}" for name, _ in model.blocks[place].named_parameters()}
    in_sequence = {
        id(module) for place in (model.token_blocks if sequence else ()) for module in model.blocks[place].modules()
    }
    for name, module, split in list(splits_of(model)):
        _cut(module, split, f"{name}." if name else "", group, cuts, in_sequence=id(module) in in_sequence)
    # What has been cut works on all tokens.
    cuts.partial -= cuts.pieces.keys()
    return cuts


def _cut(
    module: nn.Module, split: Split, prefix: str, group: dist.ProcessGroup, cuts: Cuts, *, in_sequence: bool
) -> None:
    count, place = dist.get_world_size(group), dist.get_rank(group)
    enter = _Enter(group, tokens_entered if in_sequence else entered)
    leave: Callable[..., Tensor] = tokens_added_up if in_sequence else added_up

    def keep(name: str, dim: int) -> None:
        owner, attribute = _owner(module, name)
        whole: Tensor = getattr(owner, attribute)
        part = whole.detach().chunk(count, dim=dim)[place].clone()
        setattr(owner, attribute, nn.Parameter(part, requires_grad=whole.requires_grad))
        cuts.add(prefix + name, Cut(dim, place, count))

    for name in split.columns:
        linear = _child(module, name)
        keep(f"{name}.weight", 0)
        if linear.bias is not None:
            keep(f"{name}.bias", 0)
        linear.out_features //= count
        linear.forward = functools.partial(_columns, linear.forward, enter)
    for name in split.rows:
        linear = _child(module, name)
        keep(f"{name}.weight", 1)
        linear.in_features //= count
        linear.forward = functools.partial(_rows, linear, enter, functools.partial(leave, group=group))
    for name in split.counts:
        owner, attribute = _owner(module, name)
        setattr(owner, attribute, getattr(owner, attribute) // count)
    for name, dim in split.pieces:
        keep(name, dim)
    for name in split.shared:
        # Beside columns the tokens are put together as theirs are; beside pieces they have been, and stand in rows.
        here = tokens_entered if in_sequence and not split.tokens else entered
        _child(module, name).forward = functools.partial(here, group=group)
    for name in split.summed:
        _child(module, name).forward = functools.partial(leave, group=group)
    if in_sequence:
        for name in split.tokens:
            _child(module, name).forward = functools.partial(all_tokens, group=group)
            # What computes alike with all tokens has its whole gradient on every rank.
            cuts.partial -= {f"{prefix}router.{each}" for each, _ in _child(module, "router").named_parameters()}
    _cut_vocabulary(module, split, prefix, group, cuts)


class _Enter:
    """Into what several column layers have in common: what they are all given enters once."""

    def __init__(self, group: dist.ProcessGroup, into: Callable[[Tensor, dist.ProcessGroup], Tensor]) -> None:
        self._group, self._into = group, into
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = (x, self._into(x, self._group))
        return self._last[1]

    def forget(self) -> None:
        self._last = None


def _columns(through: Callable[[Tensor], Tensor], enter: _Enter, x: Tensor) -> Tensor:
    return through(enter(x))


def _rows(linear: nn.Linear, enter: _Enter, leave: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    enter.forget()
    y = leave(functional.linear(x, linear.weight))
    return y if linear.bias is None else y + linear.bias  # once, not once a rank


# Words ---------------------------------------------------------------------------------------------------------


def _cut_vocabulary(module: nn.Module, split: Split, prefix: str, group: dist.ProcessGroup, cuts: Cuts) -> None:
    """Words are shared out in equal parts, the last of them filled up with words that nobody has."""
    count, place = dist.get_world_size(group), dist.get_rank(group)
    for name in split.vocabulary:
        child = _child(module, name)
        if isinstance(child, nn.Embedding | nn.Linear):
            whole = child.weight
            num_words = whole.shape[0]
            size = -(-num_words // count)
            filled = functional.pad(whole.detach(), (0, 0, 0, size * count - num_words))
            child.weight = nn.Parameter(filled[place * size : (place + 1) * size].clone(), whole.requires_grad)
            cuts.add(f"{prefix}{name}.weight", Cut(0, place, count))
            if isinstance(child, nn.Embedding):
                child.forward = functools.partial(_embedded, child, place * size, group)  # type: ignore[method-assign]
            else:
                child.forward = functools.partial(_scored, child, num_words, group)  # type: ignore[method-assign]
        elif isinstance(child, TokenLoss):
            child.forward = functools.partial(_token_loss, child, group)  # type: ignore[method-assign]


def _embedded(embedding: nn.Embedding, first: int, group: dist.ProcessGroup, id_BT: Tensor) -> Tensor:
    own_BT = id_BT - first
    elsewhere_BT = (own_BT < 0) | (own_BT >= embedding.weight.shape[0])
    x_BTD = functional.embedding(own_BT.masked_fill(elsewhere_BT, 0), embedding.weight)
    return added_up(x_BTD.masked_fill(elsewhere_BT[..., None], 0.0), group)


def _scored(linear: nn.Linear, num_words: int, group: dist.ProcessGroup, x_BTD: Tensor) -> Tensor:
    """In training this rank's words, for `_token_loss`; all words otherwise."""
    score_BTV = functional.linear(entered(x_BTD, group), linear.weight)
    size, first = linear.weight.shape[0], dist.get_rank(group) * linear.weight.shape[0]
    nobody_V = torch.arange(first, first + size, device=x_BTD.device) >= num_words
    score_BTV = score_BTV.masked_fill(nobody_V, torch.finfo(score_BTV.dtype).min)
    return score_BTV if linear.training else all_channels(score_BTV, group)[..., :num_words]


def _token_loss(loss: TokenLoss, group: dist.ProcessGroup, score_BNV: Tensor, target_BN: Tensor) -> Tensor:
    if not loss.training:
        return TokenLoss.forward(loss, score_BNV, target_BN)
    score_BNV = score_BNV.float()
    largest_BN = score_BNV.detach().amax(dim=-1)
    dist.all_reduce(largest_BN, op=dist.ReduceOp.MAX, group=group)
    score_BNV = score_BNV - largest_BN[..., None]
    first = dist.get_rank(group) * score_BNV.shape[-1]
    own_BN = target_BN - first
    elsewhere_BN = (own_BN < 0) | (own_BN >= score_BNV.shape[-1])
    chosen_BN = score_BNV.gather(-1, own_BN.masked_fill(elsewhere_BN, 0)[..., None])[..., 0]
    both_2BN = torch.stack([score_BNV.exp().sum(dim=-1), chosen_BN.masked_fill(elsewhere_BN, 0.0)])
    total_BN, chosen_BN = added_up(both_2BN, group)
    loss_BN: Tensor = total_BN.log() - chosen_BN
    return loss_BN


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    """What holds a dotted name, and the name's last part."""
    *path, last = name.split(".")
    return module.get_submodule(".".join(path)), last


def _child(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)
