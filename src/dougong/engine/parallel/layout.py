"""What all ranks make of a step together, however they share it out.

Here        Layout: gradients, loss and norm of the whole model from each rank's part.
Elsewhere   the axes (mesh.py); how parts come to be (tensor.py, context.py, pipeline.py, shard.py, expert.py);
            plain copies (replicate.py).
Promise     loss and norm are those of one process, and the same on every rank; what has a gradient on some rank has it
            on all that hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dougong.engine.parallel.clock import Clock
from dougong.engine.parallel.hierarchical import Hierarchy
from dougong.engine.parallel.mesh import Mesh
from dougong.engine.parallel.pieces import Piece
from dougong.engine.parallel.pipeline import Pipeline
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.parallel.replicate import add_up, average_moves, gradients_anywhere
from dougong.engine.parallel.shard import Sharded
from dougong.engine.parallel.stage_shard import StageShard
from dougong.engine.parallel.tensor import Cuts
from dougong.engine.step import Backward, norm_alone
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack


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
    sharded: Sharded | StageShard | None = None
    clock: Clock = field(default_factory=Clock)
    hierarchy: Hierarchy | None = None
    """What adds up gradients of copies; None: plain collectives."""

    @torch.no_grad()
    def reduce(self, loss: Tensor, before: Sequence[Tensor]) -> Tensor:
        """The step's loss, from this rank's; gradients and buffers become those of all ranks, in place."""
        began = self.clock.now() if self.pipeline is not None else self.clock.note("work", 0.0)
        if self.sharded is not None:
            self.sharded.settle()  # first: from here on each rank has its parts alone
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensor, group = self.mesh.group("tensor"), self.mesh.group("copies")
        # Which records a rank has is the same in all of a tensor group: so is what has a gradient.
        partial = [named[name].grad for name in sorted(self.cuts.partial & named.keys())]
        if tensor is not None:
            add_up([local_part(gradient) for gradient in partial if gradient is not None], tensor)
        spread = self.spread
        if group is not None:
            copied = [named[name] for name in named if name not in spread and name not in self.experts]
            # Ranks of a context have all made the loss of the same records.
            gradients, loss = gradients_anywhere(copied, group, loss / self.mesh.plan.context)
            # Over ranks with other parts of the weights, the sharder has added up.
            gradients += [local_part(g) for name in named if name in spread and (g := named[name].grad) is not None]
            copies = self.mesh.group("replicate")
            if copies is not None:
                add_up(gradients, copies, by=None if self.hierarchy is None else self._by_hierarchy)
            average_moves(list(self.model.buffers()), before, group)
        alike = self.mesh.group("expert copies")
        if self.experts and alike is not None:
            add_up(gradients_anywhere([named[name] for name in named if name in self.experts], alike, loss)[0], alike)
        if self.pipeline is not None:  # the last stage alone has it
            loss = loss.clone()
            dist.all_reduce(loss, group=self.mesh.group("pipeline"))
        self.clock.note("exchange", began)
        return loss

    @torch.no_grad()
    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of all parts of all gradients, each counted once."""
        if self.is_whole:
            return norm_alone(gradients)
        names = {id(p.grad): name for name, p in self.model.named_parameters() if p.grad is not None}
        here = self.mesh.ranks.world // self.mesh.sizes["pipeline"]
        by_copies: dict[int, list[Tensor]] = {}
        for gradient in gradients:
            parts = math.prod(cut.parts for cut in self.cuts.pieces.get(names[id(gradient)], ()))
            if isinstance(gradient, DTensor):
                parts *= self.mesh.sizes["shard"]
            by_copies.setdefault(here // parts, []).append(local_part(gradient))
        squares = [
            torch.stack(torch._foreach_norm(parts)).square().sum() / copies for copies, parts in by_copies.items()
        ]
        return self._sum(torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)).sqrt()

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of the model."""
        return self.pipeline is None and self.sharded is None and not self.cuts.pieces

    def pieces(self) -> dict[str, Piece]:
        """What this rank holds of the model's parameters."""
        return {name: self.piece(name, parameter.detach()) for name, parameter in self.model.named_parameters()}

    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank holds, of a parameter or of what is kept of it and has its shape.

        What is returned looks at the same memory: whoever writes into it writes into the model.
        """
        whole = self.shapes[name]
        local = local_part(tensor)
        offset = [0] * len(whole)
        sizes = list(whole)
        for dim, place, parts in self.cuts.pieces.get(name, ()):
            sizes[dim] = -(-whole[dim] // parts)
            offset[dim] = place * sizes[dim]
        if self.sharded is not None and name in self.spread:  # as FSDP cuts: rows, the first ranks' parts full
            size = -(-sizes[0] // self.mesh.sizes["shard"]) if sizes else 1
            offset[0] += min(self.mesh.place("shard") * size, sizes[0])
        # Words that nobody has fill up the last rank's part.
        for dim in range(local.ndim):
            local = local.narrow(dim, 0, max(0, min(local.shape[dim], whole[dim] - offset[dim])))
        return Piece(local, tuple(offset), whole)

    @property
    def backward(self) -> Backward | None:
        """What takes a micro-batch's gradients in place of the step's own."""
        return self.sharded.backward if isinstance(self.sharded, Sharded) else None

    @property
    def spread(self) -> set[str]:
        """Parameters of which each rank has a part of the rows."""
        return set() if self.sharded is None else set(self.sharded.names)

    @property
    def data_ranks(self) -> Ranks:
        """Those that share out the records with this one."""
        group = self.mesh.group("data")
        return ALONE if group is None else Ranks(group)

    @property
    def device(self) -> torch.device:
        """Where the model is; a stage of a pipeline may have nothing that says so."""
        return self.pipeline.device if self.pipeline is not None else next(self.model.parameters()).device

    def _by_hierarchy(self, flat: Tensor, name: str) -> None:
        assert self.hierarchy is not None
        self.hierarchy.all_reduce(flat, name=name)

    def _sum(self, number: Tensor) -> Tensor:
        number = number.detach().clone()
        if self.mesh.ranks.group is not None:
            dist.all_reduce(number, group=self.mesh.ranks.group)
        return number
