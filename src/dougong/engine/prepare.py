"""Lays a model out on the ranks: the one place where techniques are put in order.

Here        `prepare_model`; `check_model`, `check_precision`.
Elsewhere   the techniques themselves, each usable alone (engine/parallel/); the layout (engine/parallel/plan.py).
Promise     what a layout cannot do is refused before the model is changed. Names of parameters stay as they are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dougong.core.errors import ConfigError
from dougong.engine.memory.offload import OffloadConfig, apply_offload
from dougong.engine.memory.recompute import Keep, apply_recompute
from dougong.engine.memory.saved import Saved, SavedAs, apply_saved, check_saved
from dougong.engine.memory.segments import apply_segments, check_segments
from dougong.engine.parallel.context import apply_context, check_context, share_tokens
from dougong.engine.parallel.early import apply_early_sums
from dougong.engine.parallel.expert import apply_expert, check_expert
from dougong.engine.parallel.hierarchical import MEASURED_BYTES, Hierarchy, groups_in_nodes
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.mesh import Mesh
from dougong.engine.parallel.pipeline import apply_pipeline
from dougong.engine.parallel.plan import PlanConfig, check_plan
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.replicate import BUCKET_BYTES, copy_from_first
from dougong.engine.parallel.shard import apply_shard, units_of
from dougong.engine.parallel.state_shard import StateShard, apply_state_shard
from dougong.engine.parallel.step_shard import apply_step_shard
from dougong.engine.parallel.tensor import apply_tensor, check_tensor
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Weights, apply_weights
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack


def check_model(model: BlockStack[Any, Any], plan: PlanConfig, offload: OffloadConfig | None = None) -> None:
    """
    Raises:
        ConfigError: the model cannot be laid out so; the message says what fits.
    """
    gathered = [kind for kind in ("weights", "gradients") if offload is not None and kind in offload.on_disk]
    if plan.shard > 1 and gathered:
        raise ConfigError(
            f"memory.offload.{gathered[0]}=disk with plan shard={plan.shard}: weights that are spread are gathered in "
            "memory. Use memory.offload.optimizer alone, or shard: 1."
        )
    if plan.shard > 1 and plan.sharding == "zero1" and offload is not None and offload.on_disk:
        raise ConfigError(
            f"memory.offload.optimizer=disk with plan sharding=zero1 and shard={plan.shard}: what each rank steps "
            "is cut across blocks. Use sharding: zero2, or memory.offload: memory."
        )
    check_tensor(model, plan.tensor)
    check_context(model, plan.context, plan.context_form, plan.tensor)
    check_expert(model, plan.expert)
    if plan.shard > 1 and plan.sharding != "zero1" and not model.state_types:
        raise ConfigError(
            f"plan shard={plan.shard}: {type(model).__name__} does not say what its states are made of. "
            "Use sharding: zero1, or shard: 1."
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


def check_precision(plan: PlanConfig, weights: Weights, states: States, offload: OffloadConfig | None = None) -> None:
    """
    Raises:
        ConfigError: weights or an optimizer's state of few bits cannot be laid out so; the message says what fits.
    """
    if weights != "fp32" and plan.shard > 1 and plan.sharding == "zero3":
        raise ConfigError(
            f"plan sharding=zero3 gathers weights of one type, and with train.weights={weights} matrices are bf16 and "
            "the rest fp32. Use sharding: zero2, or weights: fp32."
        )
    if weights != "fp32" and plan.shard > 1 and plan.sharding == "zero1":
        raise ConfigError(
            f"plan sharding=zero1 steps rows of fp32 weights, and train.weights={weights} are bf16. "
            "Use sharding: zero2, which spreads the optimizer's state too, or weights: fp32."
        )
    if (weights, states) != ("fp32", "fp32") and offload is not None and offload.on_disk:
        setting = f"train.weights={weights}" if weights != "fp32" else f"train.optimizer.states={states}"
        raise ConfigError(
            f"memory.offload lays fp32 weights and what AdamW keeps of them on the disk, and {setting} is another "
            "format. Use memory.offload: memory, or fp32."
        )
    for name in ("tensor", "shard", "expert"):
        if states != "fp32" and getattr(plan, name) > 1:
            raise ConfigError(
                f"plan {name}={getattr(plan, name)} cuts weights, and the scales of train.optimizer.states={states} "
                f"are of blocks of whole ones. Use {name}: 1, or states: fp32."
            )


def prepare_model(
    model: BlockStack[Any, Any],
    plan: PlanConfig,
    ranks: Ranks,
    *,
    accumulation: int = 1,
    costs: Sequence[float] | None = None,
    keep: Sequence[Keep] | None = None,
    weights: Weights = "fp32",
    offload: OffloadConfig | None = None,
    segments: int | None = None,
    saved: Saved = "kept",
    saved_as: SavedAs = "same",
    folder: Path | None = None,
) -> Layout:
    """Lay the model out, in place, on all ranks. Each must have built the whole of it.

    `costs` are those of embedding, each block and the head, by which a pipeline is cut (`block_seconds`); `keep` is
    what each block keeps for its backward, None: all. `segments` of so many blocks are compiled and made anew as one.
    What is kept then goes where `saved` and `saved_as` say. `weights` is in what format they are, and how they are
    stepped. What `saved` and `offload` put on the disk lies in `folder`.

    Raises:
        ConfigError: the layout cannot be; nothing has been changed.
    """
    check_plan(plan, ranks.world, accumulation=accumulation)
    check_model(model, plan, offload)
    if segments is not None:
        check_segments(plan)
    check_saved(saved, saved_as, next(model.parameters()).device.type, shard=plan.shard)
    check_precision(plan, weights, "fp32", offload)
    in_node = _copies_in_node(plan, ranks.world)
    mesh = Mesh(ranks, plan)
    layout = Layout(model, mesh, shapes={name: tuple(p.shape) for name, p in model.named_parameters()})
    if ranks.group is not None:
        copy_from_first(model, ranks.group, BUCKET_BYTES)
    pipeline, tensor, expert = mesh.group("pipeline"), mesh.group("tensor"), mesh.group("expert")
    sequence = plan.sequence and len(model.token_blocks) > 0
    context = mesh.group("context")
    if pipeline is not None:  # first: the rest is done to what is here
        layout.pipeline = apply_pipeline(model, pipeline, plan.schedule, stages_per_rank=plan.chunks, costs=costs)
        layout.pipeline.clock = layout.clock
    if expert is not None:
        layout.experts = apply_expert(model, expert, layout.cuts)
    shared = None
    if context is not None:
        shared = apply_context(model, context, plan.context_form, blocks=plan.tensor if sequence else 1)
    if tensor is not None:  # it changes what a weight is
        layout.cuts = apply_tensor(model, tensor, layout.cuts, sequence=sequence)
    if shared is not None or (tensor is not None and sequence):
        share_tokens(model, tensor if sequence else None, shared)
    if segments is not None:
        apply_segments(model, segments, bounds=() if layout.pipeline is None else layout.pipeline.bounds)
        if layout.pipeline is not None:
            layout.pipeline.undivided = set(layout.pipeline.stages)
    elif keep is not None:  # after what changes a block's work, which is then done anew with its exchanges
        apply_recompute(model, keep)
        if layout.pipeline is not None:
            bounds = enumerate(itertools.pairwise(layout.pipeline.bounds))
            layout.pipeline.undivided = {stage for stage, (a, b) in bounds if set(keep[a:b]) - {"all"}}
    if saved != "kept" or saved_as != "same":  # around both: it sees what they leave
        apply_saved(model, saved, saved_as, folder=folder)
    if mesh.devices is not None:  # last: it wraps finished blocks
        shard = mesh.group("shard")
        assert shard is not None
        ignored = {parameter for name, parameter in model.named_parameters() if name in layout.experts}
        sizes = [sum(p.nbytes for p in block.parameters() if p not in ignored) for block in model.blocks]
        units = units_of(sizes, plan.gathered_bytes)
        if plan.sharding == "zero1":
            layout.sharded = apply_state_shard(model, shard, ignored=ignored)
        elif layout.pipeline is not None or len(units) < 2 or weights != "fp32":
            layout.sharded = apply_step_shard(model, shard, ignored=ignored)
        else:
            stay = plan.sharding == "zero2"
            layout.sharded = apply_shard(model, mesh.devices, units, keep_gathered=stay, ignored=ignored)
    layout.narrowed = apply_weights(model, weights, accumulation=accumulation)  # of what is here
    if offload is not None and offload.on_disk:
        assert folder is not None
        anew = [] if keep is None or segments is not None else [each != "all" for each in keep]
        layout.shelved = apply_offload(model, offload, folder / f"rank-{ranks.rank}", anew=anew)
    layout.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(layout.sharded, StateShard):
        layout.trained = {n: p for n, p in layout.trained.items() if n not in layout.spread} | layout.sharded.stepped
    if plan.reduction == "hierarchical":
        layout.hierarchy = _hierarchy(layout, plan, in_node)
    copied = mesh.group("copies") is not None and layout.is_whole and plan.context == plan.expert == 1
    if copied and layout.shelved is None and layout.hierarchy is None:
        layout.early = apply_early_sums(list(layout.trained.values()))
    return layout


def _copies_in_node(plan: PlanConfig, world: int) -> int:
    """Of the ranks with the same part of the weights, how many stand in one node."""
    copies = world // (plan.pipeline * plan.shard * plan.tensor)
    per_node = plan.per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Ranks with other parts stand next to each other.
    here = min(copies, max(1, per_node // (plan.shard * plan.tensor)))
    if plan.reduction == "hierarchical" and copies % here:
        raise ConfigError(
            f"plan reduction=hierarchical: {copies} ranks that add up the same gradients are no whole nodes of {here}. "
            "Use another number of ranks, or reduction: flat."
        )
    return here


def _hierarchy(layout: Layout, plan: PlanConfig, in_node: int) -> Hierarchy | None:
    """Of the ranks with the same part of the weights; None where they are of one node."""
    group = layout.mesh.group("replicate")
    if group is None or in_node == layout.mesh.sizes["replicate"]:
        return None
    hierarchy = Hierarchy(group, *groups_in_nodes(layout.mesh.rows("replicate"), in_node), wire=plan.wire)
    # No message is longer.
    sizes = [local_part(p).nbytes for name, p in layout.trained.items() if name not in layout.experts]
    longest = min(sum(sizes), max([BUCKET_BYTES, *sizes]))
    hierarchy.measure([size for size in MEASURED_BYTES if size <= longest] or MEASURED_BYTES[:1])
    return hierarchy
