"""Lays a model out on the ranks: the one place where techniques are put in order.

Here        `prepare_model`.
Elsewhere   the techniques themselves, each usable alone (engine/parallel/); the layout (engine/parallel/plan.py).
Promise     what a layout cannot do is refused before the model is changed. Names of parameters stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dougong.core.errors import ConfigError
from dougong.engine.parallel.expert import apply_expert, check_expert
from dougong.engine.parallel.hierarchical import Hierarchy, groups_in_nodes
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.mesh import Mesh
from dougong.engine.parallel.pipeline import apply_pipeline
from dougong.engine.parallel.plan import PlanConfig, check_plan
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.replicate import BUCKET_BYTES, copy_from_first
from dougong.engine.parallel.shard import apply_shard
from dougong.engine.parallel.stage_shard import apply_stage_shard
from dougong.engine.parallel.tensor import apply_tensor, check_tensor
from dougong.nn.block_stack import BlockStack


def check_model(model: BlockStack[Any, Any], plan: PlanConfig) -> None:
    """
    Raises:
        ConfigError: the model cannot be laid out so; the message says what fits.
    """
    check_tensor(model, plan.tensor)
    check_expert(model, plan.expert)
    if plan.shard > 1 and not model.state_types:
        raise ConfigError(
            f"plan shard={plan.shard}: {type(model).__name__} does not say what its states are made of. Use shard: 1."
        )
    stages = plan.pipeline * plan.chunks
    if plan.pipeline > 1 and model.embed_names is None:
        raise ConfigError(
            f"plan pipeline={plan.pipeline}: {type(model).__name__} uses a part of it in several places and cannot be "
            "cut into stages. Use pipeline: 1."
        )
    if plan.pipeline > 1 and stages > len(model.blocks):
        raise ConfigError(
            f"plan pipeline={plan.pipeline} with chunks={plan.chunks} makes {stages} stages, and the model has "
            f"{len(model.blocks)} blocks. Use {len(model.blocks)} stages or fewer."
        )


def prepare_model(
    model: BlockStack[Any, Any],
    plan: PlanConfig,
    ranks: Ranks,
    *,
    accumulation: int = 1,
    costs: Sequence[float] | None = None,
) -> Layout:
    """Lay the model out, in place, on all ranks. Each must have built the whole of it.

    `costs` are those of embedding, each block and the head, by which a pipeline is cut (`block_seconds`).

    Raises:
        ConfigError: the layout cannot be; nothing has been changed.
    """
    check_plan(plan, ranks.world, accumulation=accumulation)
    check_model(model, plan)
    mesh = Mesh(ranks, plan)
    layout = Layout(model, mesh, shapes={name: tuple(p.shape) for name, p in model.named_parameters()})
    if ranks.group is not None:
        copy_from_first(model, ranks.group, BUCKET_BYTES)
    pipeline, tensor, expert = mesh.group("pipeline"), mesh.group("tensor"), mesh.group("expert")
    if pipeline is not None:  # first: the rest is done to what is here
        layout.pipeline = apply_pipeline(model, pipeline, plan.schedule, stages_per_rank=plan.chunks, costs=costs)
        layout.pipeline.clock = layout.clock
    if expert is not None:
        layout.experts = apply_expert(model, expert, layout.cuts)
    if tensor is not None:  # it changes what a weight is
        layout.cuts = apply_tensor(model, tensor, layout.cuts, sequence=plan.sequence)
    if mesh.devices is not None:  # last: it wraps finished blocks
        data, shard = mesh.group("data"), mesh.group("shard")
        assert data is not None
        assert shard is not None
        ignored = {parameter for name, parameter in model.named_parameters() if name in layout.experts}
        if layout.pipeline is None:
            keep = plan.sharding == "zero2"
            layout.sharded = apply_shard(model, mesh.devices, data, keep_gathered=keep, ignored=ignored)
        else:
            copies = mesh.group("replicate")
            layout.sharded = apply_stage_shard(model, mesh.devices, shard, copies, ignored=ignored)
            layout.pipeline.shard = layout.sharded
    if plan.reduction == "hierarchical":
        layout.hierarchy = _hierarchy(mesh, plan)
    return layout


def _hierarchy(mesh: Mesh, plan: PlanConfig) -> Hierarchy | None:
    """Of the ranks that share out the records; None where they are of one node."""
    group = mesh.group("data")
    if group is None:
        return None
    per_node = plan.per_node or int(os.environ.get("LOCAL_WORLD_SIZE", mesh.ranks.world))
    here = min(mesh.data, max(1, per_node // plan.tensor))  # tensor ranks stand next to each other
    if mesh.data % here:
        raise ConfigError(
            f"plan reduction=hierarchical: the {mesh.data} ranks that share out the records are no whole nodes of "
            f"{here}. Use another number of ranks, or reduction: flat."
        )
    if here == mesh.data:
        return None
    hierarchy = Hierarchy(group, *groups_in_nodes(mesh.data_rows, here), wire=plan.wire)
    hierarchy.measure()
    return hierarchy
