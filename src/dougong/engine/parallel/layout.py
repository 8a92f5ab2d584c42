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
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dougong.engine.parallel.clock import Clock
from dougong.engine.parallel.early import EarlySums
from dougong.engine.parallel.hierarchical import Hierarchy
from dougong.engine.parallel.mesh import Mesh
from dougong.engine.parallel.pieces import Piece
from dougong.engine.parallel.pipeline import Pipeline
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.parallel.replicate import add_up, add_up_gradients, agree, average_moves, gradients_anywhere
from dougong.engine.parallel.shard import Sharded
from dougong.engine.parallel.state_shard import StateShard
from dougong.engine.parallel.step_shard import StepShard
from dougong.engine.parallel.tensor import Cuts
from dougong.engine.precision.weights import Narrowed
from dougong.engine.step import AllBackward, Backward, Elsewhere, Loss, Moved, Reduced, TrainParts, norm_of, one_by_one
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack


class _Agreed(NamedTuple):
    """By all ranks that begin with the same weights."""

    loss: Tensor
    norm: Tensor | None
    present: list[bool]
    """Of what is copied: whether some rank has a gradient of it."""


class Shelved(Elsewhere, Protocol):
    """State that lies on the disk (engine/memory/offload.py)."""

    def take(self, optimizer: Optimizer) -> None:
        """Have what the optimizer keeps lie there too, if it is to."""
        ...

    def close(self) -> None:
        """Nothing lies there any more."""
        ...


@dataclass
class Layout:
    """A model that several ranks train, and how."""

    model: BlockStack[Any, Any]
    mesh: Mesh
    cuts: Cuts = field(default_factory=Cuts)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the whole model's parameters."""

    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    """What this rank's optimizer steps. Looking it up costs milliseconds."""

    experts: set[str] = field(default_factory=set)
    """Parameters of experts that are spread."""

    pipeline: Pipeline | None = None
    sharded: Sharded | StepShard | StateShard | None = None
    clock: Clock = field(default_factory=Clock)
    shelved: Shelved | None = None
    hierarchy: Hierarchy | None = None
    """What adds up gradients of copies; None: plain collectives."""

    early: EarlySums | None = None
    """What adds them up in the backward already, by plain collectives; None: it is done afterwards."""

    narrowed: Narrowed = field(default_factory=lambda: Narrowed("fp32", {}))
    """What has become of weights that are in 16 bits."""

    @torch.no_grad()
    def reduce(self, loss: Tensor, moved: Sequence[Moved]) -> Reduced:
        """The step's loss and the gradients' norm, from this rank's; gradients and buffers become those of all ranks,
        in place. As few exchanges as there can be: each is a wait for the slowest rank."""
        began = self.clock.now() if self.pipeline is not None else self.clock.note("work", 0.0)
        group, alike = self.mesh.group("copies"), self.mesh.group("expert copies")
        if self.early is not None:
            return self._reduce_early(self.early, loss, moved, began)
        agreed = None
        if group is not None:
            loss = loss / self.mesh.plan.context  # ranks of a context have all made the loss of the same records
            if self.sharded is not None or self.hierarchy is not None:
                agreed = self._agree(loss, group)
                loss = agreed.loss
        trained, tensor = self.trained, self.mesh.group("tensor")
        if tensor is not None:
            # Which records a rank has is the same in all of a tensor group: so is what has a gradient.
            partial = [trained[name].grad for name in sorted(self.cuts.partial & trained.keys())]
            add_up([local_part(gradient) for gradient in partial if gradient is not None], tensor)
        if agreed is not None:
            self._add_up_copies(agreed.present)
        elif group is not None:
            loss = add_up_gradients(self._copied(), group, loss)
        if group is not None:
            average_moves(moved, group)
        if self.experts and alike is not None:
            add_up_gradients([trained[name] for name in trained if name in self.experts], alike, loss)
        norm = None if agreed is None else agreed.norm
        if norm is None:
            loss, norm = self._norm(loss)
        self.clock.note("exchange", began)
        return Reduced(loss, norm)

    def _reduce_early(self, early: EarlySums, loss: Tensor, moved: Sequence[Moved], began: float) -> Reduced:
        """The same of whole copies, most of which the backward has sent."""
        group = self.mesh.group("copies")
        assert group is not None
        loss = early.settle(loss)
        average_moves(moved, group)
        self.clock.note("exchange", began)
        return Reduced(loss, norm_of([p.grad for p in self.trained.values() if p.grad is not None]))

    def _agree(self, loss: Tensor, group: dist.ProcessGroup) -> _Agreed:
        """On what has a gradient, before it is added up: where others than copies have done so already, or what goes
        between nodes is rounded. The norm comes along where nothing is left to be added up."""
        present = [parameter.grad is not None for parameter in self._copied()]
        numbers = [loss]
        if isinstance(self.sharded, Sharded) and self.mesh.sizes["shard"] == self.mesh.ranks.world and not self.experts:
            gradients = [local_part(p.grad) for p in self.trained.values() if p.grad is not None]
            numbers.append(norm_of(gradients).to(loss).square())
        spread = [] if self.sharded is None else self.sharded.present()
        anywhere, sums = agree([*present, *spread], torch.stack(numbers), group)
        if self.sharded is not None:
            self.sharded.settle(anywhere[len(present) :])
        return _Agreed(sums[0], sums[1].sqrt() if len(numbers) == 2 else None, anywhere[: len(present)])

    def _copied(self) -> list[nn.Parameter]:
        """What all ranks that begin with the same weights hold the same of."""
        apart = self.spread | self.experts
        return [p for name, p in self.trained.items() if name not in apart]

    def _add_up_copies(self, present: Sequence[bool]) -> None:
        gradients = gradients_anywhere(self._copied(), present)
        # Over ranks with other parts of the weights, the sharder has added up.
        spread = self.spread
        gradients += [local_part(g) for name, p in self.trained.items() if name in spread and (g := p.grad) is not None]
        copies = self.mesh.group("replicate")
        if copies is not None:
            add_up(gradients, copies, by=None if self.hierarchy is None else self._by_hierarchy)

    def _norm(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, which in a pipeline the last stage alone has; and of all parts of all gradients, each counted
        once."""
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        if self.is_whole:
            return loss, norm_of(list(gradients.values()))
        here, spread = self.mesh.ranks.world // self.mesh.sizes["pipeline"], self.spread
        by_copies: dict[int, list[Tensor]] = {}
        for name, gradient in gradients.items():
            parts = math.prod(cut.parts for cut in self.cuts.pieces.get(name, ()))
            if name in spread:
                parts *= self.mesh.sizes["shard"]
            by_copies.setdefault(here // parts, []).append(local_part(gradient))
        squares = [norm_of(parts).square() / copies for copies, parts in by_copies.items()]
        square = torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)
        numbers = torch.stack([loss.to(square) / here, square])
        dist.all_reduce(numbers, group=self.mesh.ranks.group)
        return loss if self.pipeline is None else numbers[0], numbers[1].sqrt()

    def share_out(self, optimizer: Optimizer) -> None:
        """Have an optimizer of the model step what it is to step here, and keep what it keeps where that is to lie, in
        place; before its first step."""
        if isinstance(self.sharded, StateShard):
            self.sharded.share_out(optimizer)
        if self.shelved is not None:
            self.shelved.take(optimizer)

    @property
    def has_whole_model(self) -> bool:
        """Whether every rank holds all weights, and all gradients of its records."""
        return self.pipeline is None and not self.cuts.pieces and isinstance(self.sharded, StateShard | None)

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of the model and of its optimizer."""
        return self.has_whole_model and self.sharded is None

    def pieces(self) -> dict[str, Piece]:
        """What this rank holds of the model's parameters."""
        return {name: self.piece(name, parameter.detach()) for name, parameter in self.model.named_parameters()}

    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank holds, of a parameter or of what is kept of it and has its shape.

        What is returned looks at the same memory: whoever writes into it writes into the model.
        """
        if isinstance(self.sharded, StateShard) or name not in self.spread:
            return self._box(name, tensor)
        # As FSDP cuts: rows, the first ranks' parts full.
        rows = self._sizes(name)[0]
        size = -(-rows // self.mesh.sizes["shard"])
        return self._box(name, tensor, first=min(self.mesh.place("shard") * size, rows))

    def stepped_piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank steps, of a parameter, of what has its shape, or of what the optimizer keeps of it."""
        if not (isinstance(self.sharded, StateShard) and name in self.spread):
            return self.piece(name, tensor)
        rows = self.sharded.rows.get(name, range(0))
        return self._box(name, tensor if len(tensor) == len(rows) else tensor[rows.start : rows.stop], rows.start)

    def _sizes(self, name: str) -> list[int]:
        """Of what this rank's model has of a parameter, before it is spread."""
        sizes = list(self.shapes[name])
        for dim, _, parts in self.cuts.pieces.get(name, ()):
            sizes[dim] = -(-sizes[dim] // parts)
        return sizes

    def _box(self, name: str, tensor: Tensor, first: int = 0) -> Piece:
        """Of what this rank's model has of a parameter, the rows from `first` on."""
        whole, sizes = self.shapes[name], self._sizes(name)
        local = local_part(tensor)
        offset = [0] * len(whole)
        for dim, place, _ in self.cuts.pieces.get(name, ()):
            offset[dim] = place * sizes[dim]
        if first:
            offset[0] += first
        # Words that nobody has fill up the last rank's part.
        for dim in range(local.ndim):
            local = local.narrow(dim, 0, max(0, min(local.shape[dim], whole[dim] - offset[dim])))
        return Piece(local, tuple(offset), whole)

    def parts(self, loss: Loss, optimizer: Optimizer, **more: Any) -> TrainParts:
        """What a step on this layout needs; `more` as TrainParts has it."""
        made: dict[str, Any] = {
            "backward": self.backward,
            "reduce": None if self.mesh.ranks.group is None else self.reduce,
            "all_backward": self.all_backward,
            "elsewhere": self.shelved,
        }
        return TrainParts(self.model, loss, optimizer, **{**made, **more})

    @property
    def backward(self) -> Backward | None:
        """What takes a micro-batch's gradients in place of the step's own."""
        return self.sharded.backward if isinstance(self.sharded, Sharded) else None

    @property
    def all_backward(self) -> AllBackward | None:
        """The same of all micro-batches."""
        if self.early is not None:
            return self.early.backward
        work = None if self.pipeline is None else self.pipeline.backward
        return self.sharded.around(work or one_by_one) if isinstance(self.sharded, StepShard) else work

    @property
    def spread(self) -> set[str]:
        """Parameters of which each rank has, or steps, a part of the rows."""
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
