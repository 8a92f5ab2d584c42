"""Every layout against one process: losses, norms and stepped weights, on eight ranks that are started once."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.data.position import Share
from dougong.engine.memory.recompute import KEEPS
from dougong.engine.optimizer import alike
from dougong.engine.parallel.layout import Layout
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.shard import units_of
from dougong.engine.prepare import prepare_model
from dougong.engine.step import TrainParts, train_step
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig, ExpertsConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.generation import words_loss

WORDS = 61
STEPS = 2
WORLD = 8
BLIND = "sandwich without pictures"
"""Its picture encoder has no gradient on any rank, and must not decay."""


def signature() -> Signature:
    return Signature(
        inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=16), "photo": ImageInput(height=16, width=16)},
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )


def build(kind: str) -> BlockStack[Any, Any]:
    torch.manual_seed(0)
    picture = ImageEncoderConfig(width=32, num_layers=2, num_heads=8)
    if kind == "decoder":
        return DecoderConfig(
            num_layers=6,
            num_heads=8,
            plain_width=8,
            turned_width=4,
            value_width=8,
            experts=ExpertsConfig(num=8, num_chosen=2, hidden=32, balance_speed=0.01),
            num_further=1,
            encoders={"photo": picture},
        ).build(signature())
    return SandwichConfig(
        width=32,
        bridge=BridgeConfig(num_blocks=3, num_heads=8),
        encoders={"photo": picture, "words": TextEncoderConfig(width=32, num_layers=2, num_heads=8)},
    ).build(signature())


def batches(kind: str, place: int, count: int) -> list[Batch]:
    """The records of a step, in micro-batches of unequal size; in one of them nobody has a picture."""
    generator = torch.Generator().manual_seed(place)
    made = []
    for number in range(count):
        num_records, num_words = 5 + number % 3, 6 + number % 4
        present_B = torch.arange(num_records) % 3 != number % 3
        if number == 1 or kind == BLIND:
            present_B = torch.zeros_like(present_B)
        target = torch.randint(3, (num_records,), generator=generator)
        words = torch.randint(4, WORDS, (num_records, num_words), generator=generator)
        pixels = torch.randn(num_records, 3, 16, 16, generator=generator)
        made.append(collated(words, pixels, present_B, target))
    return made


def collated(words: Tensor, pixels: Tensor, present_B: Tensor, target: Tensor) -> Batch:
    """As a loader does: only media that somebody has are there."""
    index_B = torch.zeros(len(present_B), dtype=torch.long)
    index_B[present_B] = torch.arange(int(present_B.sum()))
    every_B = torch.arange(len(words))
    mask = torch.ones_like(words, dtype=torch.bool)
    return Batch(
        {
            "words": MediaBatch({"ids_UT": words, "mask_UT": mask}, every_B, torch.ones_like(every_B).bool()),
            "photo": MediaBatch({"pixels_UCHW": pixels[present_B]}, index_B, present_B),
        },
        target,
    )


def shared_out(batch: Batch, share: Share) -> Batch:
    """A rank's part of the records: uneven, and none where there are fewer records than ranks."""
    if share.world == 1:
        return batch
    kept = torch.arange(batch.num_records) % share.world == share.rank
    photo = batch.media["photo"]
    pixels = torch.zeros(batch.num_records, 3, 16, 16)
    pixels[photo.present_B] = photo.values["pixels_UCHW"]
    words = batch.media["words"].values["ids_UT"]
    assert batch.target is not None
    return collated(words[kept], pixels[kept], photo.present_B[kept], batch.target[kept])


def loss_of(output: Any, batch: Batch) -> Tensor:
    if hasattr(output, "loss_BN"):
        return words_loss(output)
    return torch.nn.functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Any]
    """Name to whole weight; of a rank, to its piece, where it begins, and the whole shape."""


def optimizer_of(model: BlockStack[Any, Any]) -> torch.optim.Optimizer:
    # Not AdamW: where a gradient is nothing but rounding, its first step is as long as any.
    groups = alike(p for p in model.parameters() if p.requires_grad)
    # A stage of a pipeline may have none.
    return torch.optim.SGD(
        [{"params": each} for each in groups or [[torch.nn.Parameter(torch.zeros(()))]]], lr=0.05, weight_decay=0.1
    )


def parts_of(layout: Layout) -> TrainParts:
    optimizer = optimizer_of(layout.model)
    layout.share_out(optimizer)
    return layout.parts(loss_of, optimizer)


def train_alone(kind: str, accumulation: int) -> Trained:
    model = build(kind)
    parts = TrainParts(model, loss_of, optimizer_of(model))
    reports = []
    for step in range(STEPS):
        given = batches(kind, step, accumulation)
        reports.append(train_step(parts, given, num_records=sum(each.num_records for each in given)))
    state = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    return Trained([r.loss for r in reports], [r.grad_norm for r in reports], state)


def train_laid_out(kind: str, accumulation: int, plan: PlanConfig, anew: bool = False) -> Trained:
    """`anew`: blocks keep all, products or nothing, by turns."""
    model = build(kind)
    keep = [KEEPS[(2 - place) % len(KEEPS)] for place, _ in enumerate(model.blocks)] if anew else None
    ranks = Ranks(dist.group.WORLD)
    if ranks.rank:  # what other ranks had drawn must not matter
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    layout = prepare_model(model, plan, ranks, accumulation=accumulation, keep=keep)
    parts = parts_of(layout)
    reports = []
    for step in range(STEPS):
        given = batches(kind, step, accumulation)
        num_records = sum(each.num_records for each in given)
        own = [shared_out(each, layout.mesh.share) for each in given]
        reports.append(train_step(parts, own, num_records=num_records))
    weights: dict[str, Any] = {
        name: (piece.local.numpy().copy(), piece.offset, piece.whole) for name, piece in layout.pieces().items()
    }
    weights |= {name: (b.numpy().copy(), (0,) * b.ndim, tuple(b.shape)) for name, b in model.named_buffers()}
    return Trained([r.loss for r in reports], [r.grad_norm for r in reports], weights)


LAYOUTS: dict[str, PlanConfig] = {
    "8x1x1": PlanConfig(),
    "8x1x1, by nodes of 4": PlanConfig(reduction="hierarchical", per_node=4),
    "4x2x1, by nodes of 4": PlanConfig(tensor=2, reduction="hierarchical", per_node=4),
    "1x8x1": PlanConfig(tensor=8),
    "1x8x1, tokens whole": PlanConfig(tensor=8, sequence=False),
    "1x1x8": PlanConfig(pipeline=8),
    "2x2x2 gpipe": PlanConfig(tensor=2, pipeline=2, schedule="gpipe"),
    "2x2x2 1f1b": PlanConfig(tensor=2, pipeline=2),
    "2x2x2 interleaved": PlanConfig(tensor=2, pipeline=2, chunks=2, schedule="interleaved"),
    "2x2x2 zbv": PlanConfig(tensor=2, pipeline=2, chunks=2, schedule="zbv"),
    "2x2x2 dualpipev": PlanConfig(tensor=2, pipeline=2, chunks=2, schedule="dualpipev"),
    "zero3 over 8": PlanConfig(shard=8, gathered_bytes=0),
    "zero3 over 8, all gathered together": PlanConfig(shard=8),
    "zero3 over 8, a few together": PlanConfig(shard=8, gathered_bytes=100_000),
    "zero2 over 8": PlanConfig(shard=8, sharding="zero2", gathered_bytes=0),
    "zero2 over 8, a few together": PlanConfig(shard=8, sharding="zero2", gathered_bytes=100_000),
    "zero1 over 8": PlanConfig(shard=8, sharding="zero1"),
    "zero1, hybrid 2x2, tensor 2": PlanConfig(shard=2, sharding="zero1", tensor=2),
    "zero1, hybrid 2x4, a copy on each node": PlanConfig(
        shard=4, sharding="zero1", reduction="hierarchical", per_node=4
    ),
    "zero1 over 4, zbv": PlanConfig(pipeline=2, chunks=2, schedule="zbv", shard=4, sharding="zero1"),
    "zero1 over 4, experts over 2, tensor 2": PlanConfig(expert=2, shard=4, sharding="zero1", tensor=2),
    "zero1 over 8, context 4": PlanConfig(context=4, shard=8, sharding="zero1"),
    "hybrid 2x2, tensor 2": PlanConfig(shard=2, tensor=2, gathered_bytes=0),
    "context 8": PlanConfig(context=8),
    "context 4, data 2": PlanConfig(context=4),
    "context 4, data 2, heads for tokens": PlanConfig(context=4, context_form="swap"),
    "context 2, tensor 2, data 2": PlanConfig(context=2, tensor=2),
    "context 2, tensor 4, heads for tokens": PlanConfig(context=2, tensor=4, context_form="swap"),
    "context 2, tensor 2, tokens whole between layers": PlanConfig(context=2, tensor=2, sequence=False),
    "context 2, pipeline 2, tensor 2, heads for tokens": PlanConfig(
        context=2, pipeline=2, tensor=2, context_form="swap"
    ),
    "context 4, zero3 over 8": PlanConfig(context=4, shard=8),
    "context 2, hybrid 2x2, tensor 2": PlanConfig(context=2, shard=2, tensor=2),
    "context 2, experts over 4": PlanConfig(context=2, expert=4),
    "hybrid 4x2, copies by nodes of 4": PlanConfig(shard=2, reduction="hierarchical", per_node=4),
    "hybrid 2x4, a copy on each node": PlanConfig(shard=4, reduction="hierarchical", per_node=4),
    "gpipe, zero2 over 2, tensor 2": PlanConfig(pipeline=2, schedule="gpipe", shard=2, sharding="zero2", tensor=2),
    "1f1b, zero2 over 2, tensor 2": PlanConfig(pipeline=2, shard=2, sharding="zero2", tensor=2),
    "interleaved, zero2 over 4": PlanConfig(pipeline=2, chunks=2, schedule="interleaved", shard=4, sharding="zero2"),
    "zbv, hybrid 2x2": PlanConfig(pipeline=2, chunks=2, schedule="zbv", shard=2, sharding="zero2"),
    "dualpipev, zero2 over 4": PlanConfig(pipeline=2, chunks=2, schedule="dualpipev", shard=4, sharding="zero2"),
    "experts over 2, pipeline 2, zero2 over 4": PlanConfig(expert=2, pipeline=2, shard=4, sharding="zero2"),
    "context 2, pipeline 2, zero2 over 2": PlanConfig(context=2, pipeline=2, shard=2, sharding="zero2"),
    "1f1b, hybrid 2x2, copies by nodes of 2": PlanConfig(
        pipeline=2, shard=2, sharding="zero2", reduction="hierarchical", per_node=2
    ),
    "experts over 4": PlanConfig(expert=4),
    "experts over 2, zero3 over 4, tensor 2": PlanConfig(expert=2, shard=4, tensor=2, gathered_bytes=0),
    "experts over 2, pipeline 2, tensor 2": PlanConfig(expert=2, pipeline=2, tensor=2),
}
ACCUMULATION = 4


FURTHER = {
    "1x8x1",
    "context 2, hybrid 2x2, tensor 2",
    "zero2 over 8, a few together",
    "hybrid 2x2, tensor 2",
    "4x2x1, by nodes of 4",
    "1x8x1, tokens whole",
    "zero3 over 8",
    "zero2 over 8",
    "context 2, tensor 4, heads for tokens",
    "context 2, tensor 2, tokens whole between layers",
    "context 4, data 2",
    "hybrid 2x4, a copy on each node",
    "gpipe, zero2 over 2, tensor 2",
    "interleaved, zero2 over 4",
    "zbv, hybrid 2x2",
    "dualpipev, zero2 over 4",
    "1f1b, hybrid 2x2, copies by nodes of 2",
    "zero1, hybrid 2x4, a copy on each node",
    "zero1 over 4, zbv",
    "zero1 over 4, experts over 2, tensor 2",
    "zero1 over 8, context 4",
    "context 2, tensor 2, data 2",
    "context 4, zero3 over 8",
    "context 2, experts over 4",
    "context 2, pipeline 2, zero2 over 2",
    "experts over 2, pipeline 2, zero2 over 4",
    "experts over 2, zero3 over 4, tensor 2",
}
"""Made of parts that other layouts have too."""

OF_SANDWICH = {
    "8x1x1",
    "1x1x8",
    "2x2x2 gpipe",
    "2x2x2 dualpipev",
    "8x1x1, by nodes of 4",
    "zero1, hybrid 2x2, tensor 2",
}
OF_DECODER = LAYOUTS.keys() - FURTHER - {"2x2x2 gpipe", "2x2x2 dualpipev", "8x1x1, by nodes of 4"}
"""The quick ones of each: what both can have, one of them shows."""

CASES = [
    pytest.param(kind, name, marks=() if name in quick else pytest.mark.slow)
    for kind, quick in (("decoder", OF_DECODER), ("sandwich", OF_SANDWICH))
    for name, plan in LAYOUTS.items()
    if kind == "decoder" or plan.expert == plan.context == 1  # a sandwich has no experts, and no order of tokens
]
CASES += [
    pytest.param(BLIND, name, marks=() if quick else pytest.mark.slow)
    for name, quick in (
        ("8x1x1", True),
        ("zero1 over 8", True),
        ("zero3 over 8", False),
        ("zero3 over 8, a few together", True),
        ("1f1b, zero2 over 2, tensor 2", False),
    )
]
assert LAYOUTS.keys() >= FURTHER | OF_SANDWICH
ANEW = [
    ("sandwich", "8x1x1"),
    ("sandwich", "2x2x2 1f1b"),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("sandwich", "2x2x2 zbv"),
            ("sandwich", "zero3 over 8, a few together"),
            ("decoder", "zero1, hybrid 2x2, tensor 2"),
            ("decoder", "zero2 over 8, a few together"),
            ("decoder", "1f1b, zero2 over 2, tensor 2"),
            ("decoder", "context 4, data 2, heads for tokens"),
            ("decoder", "experts over 2, zero3 over 4, tensor 2"),
        )
    ),
    ("decoder", "2x2x2 dualpipev"),
]
"""One of each way to carry a step out."""

known_alone = functools.cache(train_alone)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_layout_trains_as_one_process_does(kind: str, name: str) -> None:
    check_alike(kind, run_ranks(train_laid_out, kind, ACCUMULATION, LAYOUTS[name], world=WORLD))


@pytest.mark.parametrize(("kind", "name"), ANEW)
def test_a_layout_that_makes_activations_anew_trains_as_one_process_that_keeps_them(kind: str, name: str) -> None:
    check_alike(kind, run_ranks(train_laid_out, kind, ACCUMULATION, LAYOUTS[name], True, world=WORLD))


def check_alike(kind: str, found: list[Trained]) -> None:
    """Each rank's steps were those of one process, and its pieces are of one process's weights."""
    expected = known_alone(kind, ACCUMULATION)
    expected_weights = {name: value for name, value in expected.weights.items() if value.is_floating_point()}
    whole = {name: torch.full_like(value, torch.nan) for name, value in expected_weights.items()}
    for each in found:
        assert each.losses == pytest.approx(expected.losses, abs=1e-5)
        assert each.norms == pytest.approx(expected.norms, rel=1e-5)
        assert (each.losses, each.norms) == (found[0].losses, found[0].norms)
        for weight, (piece, offset, shape) in each.weights.items():
            if weight not in whole:
                continue
            assert shape == tuple(whole[weight].shape)
            local = torch.from_numpy(piece)
            box = tuple(slice(first, first + size) for first, size in zip(offset, local.shape, strict=True))
            known = whole[weight][box]
            # Ranks that hold the same piece hold the same.
            assert ((known - local).abs()[~known.isnan()] < 1e-7).all(), weight
            whole[weight][box] = local
    for weight, value in whole.items():
        # Nothing is left that no rank holds.
        assert (value - expected_weights[weight]).abs().max() < 1e-5, weight


def test_blocks_are_gathered_together_until_they_are_enough() -> None:
    assert units_of([3, 3, 3, 9, 1, 1], 6) == [range(2), range(2, 4), range(4, 6)]
    assert units_of([3, 3, 3], 0) == [range(1), range(1, 2), range(2, 3)]
    assert units_of([3, 3, 3], 100) == [range(3)]
    assert units_of([], 6) == []


def across_nodes(sharded: bool) -> tuple[list[int], int, float]:
    """Who speaks with this rank across nodes, the numbers that went by nodes in a step, and the step's norm."""
    model, ranks = build("decoder"), Ranks(dist.group.WORLD)
    plan = PlanConfig(shard=2 if sharded else 1, reduction="hierarchical", per_node=4)
    layout = prepare_model(model, plan, ranks)
    hierarchy = layout.hierarchy
    assert hierarchy is not None
    plain, sent = hierarchy.all_reduce, []

    def all_reduce(x: Tensor, **named: Any) -> None:
        sent.append(x.numel())
        plain(x, form="scatter", **named)

    hierarchy.all_reduce = all_reduce  # type: ignore[method-assign]
    parts = parts_of(layout)
    (batch,) = batches("decoder", 0, 1)
    report = train_step(parts, [shared_out(batch, layout.mesh.share)], num_records=batch.num_records)
    return dist.get_process_group_ranks(hierarchy.across), sum(sent), report.grad_norm


def test_a_rank_sends_its_part_alone_across_nodes() -> None:
    (norm,), num = train_alone("decoder", 1).norms[:1], sum(p.numel() for p in build("decoder").parameters())
    for sharded in (False, True):
        found = run_ranks(across_nodes, sharded, world=WORLD)
        for rank, (others, sent, norm_here) in enumerate(found):
            assert others == [rank % 4, rank % 4 + 4]
            assert norm_here == pytest.approx(norm, rel=1e-5)
            assert 0.9 * num < (2 if sharded else 1) * sent < 1.1 * num


def parts_known(kind: str, plan: PlanConfig) -> list[tuple[str, int, int]]:
    """Of each part: how many weights it has here, and how many of these are the model's."""
    model = build(kind)
    prepare_model(model, plan, Ranks(dist.group.WORLD), accumulation=ACCUMULATION)
    own = set(model.parameters())
    return [(name, len(weights), len(own & set(weights))) for name, weights in model.parts().items()]


def test_rates_by_part_find_the_weights_that_a_layout_has_put_in_place_of_others() -> None:
    for plan in (PlanConfig(tensor=2, pipeline=2), PlanConfig(pipeline=2, shard=4, sharding="zero2")):
        found = run_ranks(parts_known, "sandwich", plan, world=WORLD)
        assert all(count == known for each in found for _, count, known in each)
        assert sum(count for each in found for _, count, _ in each) > 0
