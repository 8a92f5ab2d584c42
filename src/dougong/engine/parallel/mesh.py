"""Where each rank stands along each axis, and with whom it speaks.

Here        Mesh, `share_of`.
Elsewhere   how long the axes are (plan.py).
Promise     ranks that speak most stand next to each other: tensor innermost, then context, shard, copies, pipeline
            outermost.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dougong.data.position import Share
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks

Axis = Literal["pipeline", "replicate", "shard", "tensor"]
AXES: Final[tuple[Axis, ...]] = ("pipeline", "replicate", "shard", "tensor")


def share_of(plan: PlanConfig, ranks: Ranks) -> Share:
    """This rank's part of every batch."""
    together = plan.tensor * plan.context
    data = ranks.world // (together * plan.pipeline)
    return Share(ranks.rank // together % data, data)


Group = Literal[Axis, "copies", "context", "data", "expert", "expert copies"]


class Mesh:
    """All ranks as a block of pipeline x replicate x shard x tensor. Making one is an exchange of all of them.

    Ranks of replicate x shard begin with the same weights; they are data x context, of which shard and expert are parts
    as it comes: gradients of a rank's own tokens and of its own records are added up alike.
    """

    def __init__(self, ranks: Ranks, plan: PlanConfig) -> None:
        self.ranks, self.plan = ranks, plan
        self.copies = ranks.world // (plan.tensor * plan.pipeline)
        """How many ranks begin with the same weights."""

        self.sizes: dict[Axis, int] = {
            "pipeline": plan.pipeline,
            "replicate": self.copies // plan.shard,
            "shard": plan.shard,
            "tensor": plan.tensor,
        }
        grid = torch.arange(ranks.world).view([self.sizes[axis] for axis in AXES])
        self._grid = grid
        self._groups: dict[Group, dist.ProcessGroup | None] = {}
        self.devices: DeviceMesh | None = None
        if ranks.group is None:
            return
        if plan.shard > 1:
            accelerator = torch.accelerator.current_accelerator()
            kind = "cpu" if accelerator is None else accelerator.type
            self.devices = init_device_mesh(kind, tuple(grid.shape), mesh_dim_names=AXES)["replicate", "shard"]
        for axis in AXES:
            self._groups[axis] = self._made((axis,))
        self._groups["copies"] = self._made(("replicate", "shard"))
        self._groups["context"], self._groups["data"] = self._parted(plan.context)
        self._groups["expert"], self._groups["expert copies"] = self._parted(plan.expert)

    def group(self, name: Group) -> dist.ProcessGroup | None:
        """This rank's group along an axis, or None where it is alone there.

        copies: all that begin with the same weights; context: of these, those with the same records; data: those with
        the same part of the tokens, which share out all records.
        """
        return self._groups.get(name)

    @property
    def share(self) -> Share:
        """This rank's part of every batch: of a pipeline, a context and a tensor group all have the same."""
        return share_of(self.plan, self.ranks)

    def place(self, axis: Axis) -> int:
        """Where this rank stands along an axis."""
        inner = math.prod(self.sizes[each] for each in AXES[AXES.index(axis) + 1 :])
        return self.ranks.rank // inner % self.sizes[axis]

    @property
    def rows_of_copies(self) -> list[list[int]]:
        """All groups of ranks that begin with the same weights."""
        rows: list[list[int]] = self._grid.permute(0, 3, 1, 2).reshape(-1, self.copies).tolist()
        return rows

    def _made(self, axes: tuple[Axis, ...]) -> dist.ProcessGroup | None:
        """One group for every place along the other axes; this rank's own."""
        others = [place for place, axis in enumerate(AXES) if axis not in axes]
        kept = [place for place, axis in enumerate(AXES) if axis in axes]
        size = int(torch.tensor([self._grid.shape[place] for place in kept]).prod())
        return self._own(self._grid.permute(*others, *kept).reshape(-1, size).tolist())

    def _parted(self, size: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Copies in parts of so many neighbours: this rank's part, and those with its place in other parts."""
        if size == 1:
            return None, self._groups["copies"]
        parts = torch.tensor(self.rows_of_copies).view(-1, self.copies // size, size)
        return (
            self._own(parts.reshape(-1, size).tolist()),
            self._own(parts.transpose(1, 2).reshape(-1, self.copies // size).tolist()),
        )

    def _own(self, rows: list[list[int]]) -> dist.ProcessGroup | None:
        if len(rows[0]) == 1:
            return None
        if len(rows[0]) == self.ranks.world:
            return self.ranks.group
        found: dist.ProcessGroup
        found, _ = dist.new_subgroups_by_enumeration(rows)  # type: ignore[no-untyped-call]
        return found
