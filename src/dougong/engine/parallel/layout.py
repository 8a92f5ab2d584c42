"""What all ranks make of a step together, however they share it out.

Here        Layout: gradients, loss and norm of the whole model from each rank's part.
Elsewhere   the axes (mesh.py); how parts come to be (tensor.py, pipeline.py, shard.py, expert.py); plain copies
            (replicate.py).
Promise     loss and norm are those of one process, and the same on every rank; what has a gradient on some rank has it
            on all that hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dougong.engine.parallel.mesh import Mesh
from dougong.engine.parallel.pipeline import Pipeline
from dougong.engine.parallel.replicate import add_up, average_moves, gradients_anywhere
from dougong.engine.parallel.shard import Sharded
from dougong.engine.parallel.tensor import Cuts
from dougong.nn.block_stack import BlockStack


class Piece(NamedTuple):
    """A box of a parameter."""

    local: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    """The whole parameter's shape."""


@dataclass
class Layout:
    """A model that several ranks train, and how."""

    model: BlockStack[Any, Any]
    mesh: Mesh
    cuts: Cuts = field(default_factory=Cuts)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the whole model's parameters."""

    experts: set[str] = field(default_factory=set)
    """Parameters of experts that are spread."""

    pipeline: Pipeline | None = None
    sharded: Sharded | None = None

    @torch.no_grad()
    def reduce(self, loss: Tensor, before: Sequence[Tensor]) -> Tensor:
        """The step's loss, from this rank's; gradients and buffers become those of all ranks, in place."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensor, data = self.mesh.group("tensor"), self.mesh.group("data")
        if self.sharded is not None:
            self.sharded.settle()
        # Which records a rank has is the same in all of a tensor group: so is what has a gradient.
        partial = [named[name].grad for name in sorted(self.cuts.partial & named.keys())]
        if tensor is not None:
            add_up([_local(gradient) for gradient in partial if gradient is not None], tensor)
        spread = set() if self.sharded is None else set(self.sharded.names)
        for names, group in (
            ([name for name in named if name not in spread and name not in self.experts], data),
            ([name for name in named if name in self.experts], self.mesh.group("expert copies")),
        ):
            if group is not None and names:
                add_up(gradients_anywhere([named[name] for name in names], group), group)
        if data is not None:
            average_moves(list(self.model.buffers()), before, data)
        return self._sum(loss) / self.mesh.sizes["tensor"]

    @torch.no_grad()
    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of all parts of all gradients, each counted once."""
        names = {id(p.grad): name for name, p in self.model.named_parameters() if p.grad is not None}
        here = self.mesh.ranks.world // self.mesh.sizes["pipeline"]
        by_copies: dict[int, list[Tensor]] = {}
        for gradient in gradients:
            parts = math.prod(cut.parts for cut in self.cuts.pieces.get(names[id(gradient)], ()))
            if isinstance(gradient, DTensor):
                parts *= self.mesh.sizes["shard"]
            by_copies.setdefault(here // parts, []).append(_local(gradient))
        squares = [
            torch.stack(torch._foreach_norm(parts)).square().sum() / copies for copies, parts in by_copies.items()
        ]
        device = self.pipeline.device if self.pipeline is not None else next(self.model.parameters()).device
        return self._sum(torch.stack(squares).sum() if squares else torch.zeros((), device=device)).sqrt()

    def pieces(self, like: dict[str, Tensor] | None = None) -> dict[str, Piece]:
        """What this rank holds of the model, or of what is `like` its parameters, by their names."""
        found = {}
        for name, parameter in self.model.named_parameters():
            whole = self.shapes[name]
            tensor = parameter.detach() if like is None else like.get(name)
            if tensor is None:
                continue
            local = _local(tensor)
            offset = [0] * len(whole)
            sizes = list(whole)
            for dim, place, parts in self.cuts.pieces.get(name, ()):
                sizes[dim] = -(-whole[dim] // parts)
                offset[dim] = place * sizes[dim]
            if isinstance(parameter, DTensor):  # as FSDP cuts: rows, the first ranks' parts full
                size = -(-sizes[0] // self.mesh.sizes["shard"])
                offset[0] += min(self.mesh.place("shard") * size, sizes[0])
            # Words that nobody has fill up the last rank's part.
            for dim in range(local.ndim):
                local = local.narrow(dim, 0, max(0, min(local.shape[dim], whole[dim] - offset[dim])))
            found[name] = Piece(local, tuple(offset), whole)
        return found

    def _sum(self, number: Tensor) -> Tensor:
        number = number.detach().clone()
        if self.mesh.ranks.group is not None:
            dist.all_reduce(number, group=self.mesh.ranks.group)
        return number


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
