import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import AdamW

from dougong.data.position import Share
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.replicate import add_up, copy_from_first
from dougong.engine.prepare import prepare_model
from dougong.engine.step import Reduce, StepReport, TrainParts, train_step
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack


class TwoSides(BlockStack[Any, Tensor]):
    """One layer for each modality, which has a part in the loss only where some record has that modality."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left, self.right = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        self.unused = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), float(seed)), requires_grad=False)
        self.blocks = nn.ModuleList()
        self.register_buffer("mean", torch.full((3,), 0.1 + seed, dtype=torch.float64))
        self.register_buffer("constant", torch.full((3,), 0.1, dtype=torch.float64))

    def embed(self, batch: Batch) -> Any:
        return batch

    def head(self, state: Any) -> Tensor:
        sums = [nn.functional.mse_loss(torch.zeros(0, 2), torch.zeros(0, 2), reduction="sum").double()]
        for name, layer in (("left", self.left), ("right", self.right)):
            media = state.media[name]
            if media.present_B.any():
                x_ND = media.values["x"][media.present_B]
                sums.append((layer(x_ND) - 1.0).square().sum())
                if self.training:
                    self.mean.lerp_(x_ND.mean(dim=0), 0.5)
        total = torch.stack(sums).sum()
        return total if total.requires_grad else total.requires_grad_()


def summed(output: Tensor, batch: Batch) -> Tensor:
    return output


def batch_of(present: str, share: Share) -> Batch:
    """A letter for each record: l, r, b (both) or - (neither)."""
    x_BD = torch.randn(len(present), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = share.of(len(present))

    def media(letters: str) -> MediaBatch:
        there_B = torch.tensor([letter in letters for letter in present])[mine]
        return MediaBatch({"x": x_BD[mine]}, torch.arange(len(there_B)), there_B)

    return Batch({"left": media("lb"), "right": media("rb")}, None)


def replicated(model: TwoSides) -> Reduce:
    return prepare_model(model, PlanConfig(), Ranks(dist.group.WORLD)).reduce


def stepped(patterns: list[str]) -> tuple[dict[str, Tensor], list[StepReport], list[str]]:
    """Two steps over each pattern, on this rank's share; the weights after them, what each step told, and which
    parameters had a gradient in the last one."""
    group = dist.group.WORLD if dist.is_initialized() else None
    share = Share() if group is None else Share(dist.get_rank(), dist.get_world_size())
    model = TwoSides(seed=share.rank)  # replication makes them the same
    reduce = None if group is None else replicated(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = TrainParts(model, summed, AdamW(parameters, lr=0.1, weight_decay=0.5), reduce=reduce)
    reports = [
        train_step(parts, [batch_of(pattern, share)], num_records=len(pattern)) for pattern in patterns for _ in "12"
    ]
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    return model.state_dict(), reports, with_gradient


PATTERNS = {
    "everything everywhere": ["bbbbbbbb"],
    "one rank lacks a modality": ["llllbbbb"],
    "no rank has a modality": ["llllllll"],
    "each rank has another one": ["llllrrrr", "rrrrllll"],
    "mixed": ["lrb-b-rl"],
    "some ranks have no record": ["b"],
    "first some, then none": ["bbbbbbbb", "llllllll", "l"],
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_stepped_weights_are_those_of_one_process(name: str, world: int) -> None:
    want, want_reports, want_with_gradient = stepped(PATTERNS[name])

    found = run_ranks(stepped, PATTERNS[name], world=world)

    for weights, reports, with_gradient in found:
        for key in ("left.weight", "left.bias", "right.weight", "right.bias", "unused", "frozen"):
            torch.testing.assert_close(weights[key], want[key], rtol=1e-7, atol=1e-7)
        assert with_gradient == want_with_gradient  # what nobody has a gradient of is not even decayed
        for got, wanted in zip(reports, want_reports, strict=True):
            assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
            assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)


def test_every_rank_has_the_same_weights_and_buffers_bit_for_bit() -> None:
    found = [weights for weights, _, _ in run_ranks(stepped, PATTERNS["mixed"], world=4)]

    for weights in found[1:]:
        assert all(torch.equal(weights[key], found[0][key]) for key in found[0])
    assert torch.equal(found[0]["constant"], torch.full((3,), 0.1, dtype=torch.float64))  # exactly as it was


def exchanges() -> list[int]:
    """How many a step makes."""
    model, plain, sent = TwoSides(), dist.all_reduce, []

    def counted(x: Tensor, *given: Any, **named: Any) -> Any:
        sent.append(x.numel())
        return plain(x, *given, **named)

    for name in ("mean", "constant"):  # buffers are sent apart
        delattr(model, name)
    model.float().eval()  # numbers of one type go together, and a loss is float
    parts = TrainParts(model, summed, AdamW([model.left.weight]), reduce=replicated(model))
    batch = batch_of("lrb-", Share(dist.get_rank(), dist.get_world_size()))
    media = {name: one._replace(values={"x": one.values["x"].float()}) for name, one in batch.media.items()}
    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        train_step(parts, [batch._replace(media=media)], num_records=4)
    finally:
        dist.all_reduce = plain
    return sent


def test_a_step_of_copies_is_one_exchange() -> None:
    numbers = sum(p.numel() for p in TwoSides().parameters() if p.requires_grad)
    flags = sum(p.requires_grad for p in TwoSides().parameters())
    assert run_ranks(exchanges, world=2) == [[numbers + flags + 1]] * 2


def running_means() -> tuple[Tensor, Tensor]:
    """What the ranks' buffers would be by themselves, and what they are together."""
    share = Share(dist.get_rank(), dist.get_world_size())
    alone, together = TwoSides(), TwoSides()
    for model, reduce in ((alone, None), (together, replicated(together))):
        parts = TrainParts(model, summed, AdamW([model.left.weight]), reduce=reduce)
        train_step(parts, [batch_of("bbbb", share)], num_records=4)
    return alone.mean, together.mean


def test_running_means_are_averaged() -> None:
    (first, together), (second, also) = run_ranks(running_means, world=2)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(together, (first + second) / 2)
    assert torch.equal(together, also)


def spoiled(where: str) -> tuple[StepReport, bool, bool]:
    """A step that is not finite on rank 1; whether weights and buffers stayed, and whether the next step is finite."""
    rank = dist.get_rank()
    model = TwoSides()
    optimizer = AdamW([model.left.weight, model.left.bias], lr=0.1)

    def loss(output: Tensor, batch: Batch) -> Tensor:
        if rank != 1:
            return output
        return output * math.nan if where == "loss" else output + (model.left.weight * 0).sum().abs().sqrt()

    reduce = replicated(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batch_of("llll", Share(rank, 2))
    report = train_step(TrainParts(model, loss, optimizer, reduce=reduce), [batch], num_records=4)
    same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = train_step(TrainParts(model, summed, optimizer, reduce=reduce), [batch], num_records=4)
    return report, same, not after.skipped


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(where: str) -> None:
    for report, same, finite_after in run_ranks(spoiled, where, world=2):
        assert report.skipped
        assert same
        assert finite_after
    assert all(math.isnan(report.loss) is (where == "loss") for report, _, _ in run_ranks(spoiled, where, world=2))


def in_buckets(bucket_bytes: int) -> list[list[Tensor]]:
    """Tensors of several sizes and types: added up, and copied from the first rank."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    generator = torch.Generator().manual_seed(rank)
    model = nn.Module()
    for place, (shape, dtype) in enumerate([((3, 5), torch.float32), ((), torch.float64), ((40,), torch.float32)] * 2):
        model.register_buffer(f"x{place}", torch.randn(shape, generator=generator, dtype=dtype))
    sums = [buffer.clone() for buffer in model.buffers()]
    add_up(sums, group, bucket_bytes)
    copy_from_first(model, group, bucket_bytes)
    return [sums, list(model.buffers())]


def test_what_is_sent_in_many_buckets_is_as_in_one() -> None:
    one = run_ranks(in_buckets, 10**6, world=2)
    for bucket_bytes in (0, 100, 200):
        for found in run_ranks(in_buckets, bucket_bytes, world=2):
            for got, want in zip(found, one[0], strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
