"""Training with rates of modalities that move."""

import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_run import TARGET, Judged, TinyLoader, interrupt_at, kinds_of, losses_of, same_weights
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.events import Announcer, read_events
from dougong.data.batch import BatchArrays, MediaArrays
from dougong.engine.batches import to_tensors
from dougong.engine.contribution import Probe
from dougong.engine.sampling import SamplingConfig
from dougong.engine.trainer import TrainConfig, TrainResult, Watch, train
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

MOVING = SamplingConfig(rate=0.3, num_records=40)
STILL = SamplingConfig(rate=0.3, highest=0.3)


class TwoViews(TinyLoader):
    """The same records as two modalities: three numbers that say the target, and three that say nothing."""

    def collate(self, order: np.ndarray[Any, Any], number: int) -> BatchArrays:
        arrays = super().collate(order, number)
        x_BN, index_B = arrays.media["x"].values["numbers_UN"], arrays.media["x"].index_B
        there_B = np.ones(len(index_B), np.bool_)
        left = MediaArrays({"v": np.ascontiguousarray(x_BN[:, :3])}, index_B, there_B)
        right = MediaArrays({"v": np.ascontiguousarray(x_BN[:, 3:])}, index_B, there_B)
        return arrays._replace(media={"left": left, "right": right})


class Output(NamedTuple):
    output_BC: Tensor


class TwoViewModel(BlockStack[Tensor, Output]):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleDict({"left": nn.Linear(3, 16), "right": nn.Linear(3, 16)})
        self.blocks = nn.ModuleList([nn.Sequential(nn.GELU(), nn.Dropout(0.1))])
        self.last = nn.Linear(16, 3)

    def embed(self, batch: Batch) -> Tensor:
        torch.rand(())  # what a model draws while it is measured must leave no trace
        total = torch.zeros(batch.num_records, 16)
        for name, media in batch.media.items():
            if len(media.values["v"]):
                x_BD = self.maps[name](media.values["v"])[media.index_B]
                total = total + x_BD * media.present_B[:, None]
        return total

    def head(self, state: Tensor) -> Output:
        return Output(self.last(state))


def loss(output: Output, batch: Batch) -> Tensor:
    assert batch.target is not None
    return functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def run(
    folder: Path, sampling: SamplingConfig | None = MOVING, *, probe: bool = True, hear: Any = None, **settings: Any
) -> tuple[TrainResult, TwoViewModel]:
    model = TwoViewModel()
    whole = TwoViews(batch_size=40)
    asked = Probe(model, to_tensors(whole.collate(np.arange(40), 0)), TARGET) if probe else None
    watch = Watch(lambda: {"all": Judged({"step": 1.0})}, "step", probe=asked)
    values = {"steps": 24, "precision": "fp32", "checkpoint_every": 4, "evaluate_every": 4, "keep": 100, **settings}
    resume = values.pop("resume", False)
    config = TrainConfig(sampling=sampling, optimizer={"learning_rate": 0.02}, **values)  # type: ignore[arg-type]
    announce = Announcer(*([hear] if hear is not None else []))
    found = train(model, loss, TwoViews(), config, folder=folder, watch=watch, announce=announce, seed=3, resume=resume)
    return found, model


def changes_of(folder: Path) -> list[dict[str, Any]]:
    kept = []
    for event in read_events(folder / "events.jsonl"):
        if event["kind"] == "SamplingChanged":
            kept.append({key: value for key, value in event.items() if key not in ("time", "seconds")})
    return kept


def test_rates_follow_what_is_measured_and_every_change_is_told(tmp_path: Path) -> None:
    run(tmp_path)

    changes = changes_of(tmp_path)
    assert [change["step"] for change in changes] == [4, 8, 12, 16, 20]  # at the end there is nothing left to steer
    for before, after in itertools.pairwise(changes):
        assert after["before"] == before["after"]
    last = changes[-1]
    assert last["without"]["left"] < last["without"]["right"] <= last["with_all"] + 0.1
    assert last["after"]["left"] > last["after"]["right"] + 0.05
    assert "is lost, so" in last["reason"]["left"]
    assert kinds_of(tmp_path).count("Evaluated") == 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_resumed_goes_on_to_the_same_losses_and_rates(tmp_path: Path, accumulation: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _, expected = run(whole, accumulation=accumulation)
    stopped, _ = run(resumed, accumulation=accumulation, hear=interrupt_at(11))
    assert stopped.step == 11

    _, model = run(resumed, accumulation=accumulation, resume=True)

    assert losses_of(resumed) == losses_of(whole)
    assert changes_of(resumed) == changes_of(whole)
    assert same_weights(model, expected)


def test_a_kill_loses_no_rate_either(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    run(killed)
    for path in (killed / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 8:
            shutil.rmtree(path)

    run(killed, resume=True)

    assert losses_of(killed) == losses_of(whole)
    assert changes_of(killed) == changes_of(whole)


def test_measuring_leaves_no_trace_in_training(tmp_path: Path) -> None:
    run(tmp_path / "measured", MOVING.model_copy(update={"smallest_step": 1.0}))
    run(tmp_path / "not", STILL, probe=False)
    run(tmp_path / "nothing left out", None, probe=False)

    assert changes_of(tmp_path / "measured")
    assert not changes_of(tmp_path / "not")
    assert losses_of(tmp_path / "measured") == losses_of(tmp_path / "not")
    assert losses_of(tmp_path / "nothing left out") != losses_of(tmp_path / "not")


def test_what_cannot_be_followed_or_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no records to measure it on"):
        run(tmp_path / "blind", probe=False)
    run(tmp_path / "with")
    with pytest.raises(CheckpointError, match="saved with moving rates of modalities and this run is without them"):
        run(tmp_path / "with", None, resume=True, steps=30)
    run(tmp_path / "without", None)
    with pytest.raises(CheckpointError, match="saved without moving rates of modalities and this run is with them"):
        run(tmp_path / "without", resume=True, steps=30)
