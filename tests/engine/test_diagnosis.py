"""What is said of a number that is not finite: where it began, on which rank, of which modality."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_run import TinyLoader, TinyModel, TinyOutput, kinds_of, losses_of, same_weights, tiny_loss, train_tiny
from torch import Tensor, nn

from dougong.core.errors import DougongError
from dougong.core.events import StepDone, StepSkipped, read_events
from dougong.data.batch import BatchArrays
from dougong.data.position import Share
from dougong.engine.diagnosis import agree, diagnose
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.step import TrainParts
from dougong.engine.trainer import TrainConfig, train
from dougong.nn.batch import Batch


class Parted(TinyModel):
    """Its block is of the modality x."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"x": list(self.blocks.parameters())}


class Breaks(torch.autograd.Function):
    """A gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.nan


def found(spoil: str) -> tuple[str, str]:
    """Modality and reason of one step, something of which was spoilt."""
    model, batch = Parted(), TinyLoader().all_tensors()
    loss = tiny_loss
    if spoil == "record":
        batch.media["x"].values["numbers_UN"][7, 2] = math.inf
    if spoil == "hidden":  # what no record has is nobody's fault
        batch.media["x"].present_B[7] = False
        batch.media["x"].values["numbers_UN"][7, 2] = math.nan
    if spoil == "weights":
        model.blocks[0][0].weight.data[1, 1] = math.nan  # type: ignore[index]
    if spoil == "block":
        model.blocks[0][1] = nn.Threshold(10.0, math.nan)  # type: ignore[index]
    if spoil == "embed":
        model.first.forward = lambda x: x.new_full((len(x), 16), math.nan)  # type: ignore[method-assign]
    if spoil == "loss":
        loss = lambda output, batch: tiny_loss(output, batch) * math.nan  # noqa: E731
    if spoil == "gradient":
        model.blocks[0].register_forward_hook(lambda _, __, state: Breaks.apply(state))
    parts = TrainParts(model, loss, OptimizerConfig().build(model))
    before, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    agreed = agree(diagnose(parts, [batch], [list(range(100, 140))], num_records=40), ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    return agreed.modality, agreed.reason


@pytest.mark.parametrize(
    ("spoil", "modality", "reason"),
    [
        ("record", "x", "x: record 107 holds a number that is not finite"),
        ("weights", "x", "x: the weights blocks.0.0.weight are not finite"),
        ("block", "x", "x: what block 1 (Sequential) makes is not finite"),
        ("hidden", "", "what is embedded is not finite"),
        ("embed", "", "what is embedded is not finite"),
        ("loss", "", "the loss is not finite, though what the model's blocks make is"),
        ("gradient", "x", "x: the gradient of blocks.0.3.bias is not finite"),
        ("nothing", "", "all that was looked at is finite"),
    ],
)
def test_the_first_that_is_not_finite_is_named(spoil: str, modality: str, reason: str) -> None:
    assert found(spoil) == (modality, reason)


class Spoilt(TinyLoader):
    """A share of TinyLoader's batches; record 25's x is NaN."""

    def __init__(self, share: Share) -> None:
        super().__init__(16 * share.world, 8 * share.world)
        self.share = share
        self.x_ND[25, 3] = math.nan

    def collate(self, order: Any, number: int) -> BatchArrays:
        # Not shuffled: every other batch has it, in the second rank's share.
        rows = sorted(order)[number * self.batch_size :][: self.batch_size]
        mine = TinyLoader(len(self.x_ND), len(rows))
        mine.x_ND, mine.y_N = self.x_ND, self.y_N
        return TinyLoader.collate(mine, rows[self.share.of(len(rows))], 0)


def trained(folder: Path, max_skipped: int) -> str:
    ranks = Ranks(dist.group.WORLD)
    config = TrainConfig(steps=4, precision="fp32", max_skipped=max_skipped)
    model = Parted(seed=3, norm=False)
    try:
        train(model, tiny_loss, Spoilt(ranks.share), config, folder=folder, ranks=ranks)
    except DougongError as error:
        return str(error)
    return ""


def test_a_rank_with_a_spoilt_record_is_named_with_step_and_modality(tmp_path: Path) -> None:
    assert run_ranks(trained, tmp_path / "on", 3, world=2) == ["", ""]
    skipped = [event for event in read_events(tmp_path / "on" / "events.jsonl") if event["kind"] == "StepSkipped"]
    assert [(event["step"], event["ranks"], event["modality"]) for event in skipped] == [(2, [1], "x"), (4, [1], "x")]

    for told in run_ranks(trained, tmp_path / "off", 1, world=2):
        assert told.startswith("step 2: the loss was nan and the gradient's norm nan, ")
        assert "on rank 1 x: record 25 holds a number that is not finite. Mend the records" in told


def test_looking_leaves_no_trace_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with a step that is skipped has the losses that it would have without the look."""

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        return tiny_loss(output, batch) * (math.nan if torch.rand(()) < 0.2 else 1.0)

    _, looked = train_tiny(tmp_path / "looked", loss=loss, ema=0.9)
    monkeypatch.setattr("dougong.engine.trainer.diagnose", lambda *_, **__: None)
    _, blind = train_tiny(tmp_path / "blind", loss=loss, ema=0.9)

    assert StepSkipped.__name__ in kinds_of(tmp_path / "looked")
    assert str(losses_of(tmp_path / "looked")) == str(losses_of(tmp_path / "blind"))  # NaN equals itself there
    assert kinds_of(tmp_path / "looked").count(StepDone.__name__) == 20
    assert same_weights(looked, blind)
