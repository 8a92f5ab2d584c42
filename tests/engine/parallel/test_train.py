"""Whole runs on many ranks, against one process."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_run import TARGET, TinyLoader, TinyModel, TinyOutput, losses_of, tiny_loss, weights
from torch import Tensor

from dougong.core.errors import DataError, DougongError, RunError
from dougong.core.events import Announcer, Event, read_events
from dougong.data.batch import BatchArrays
from dougong.data.position import Share
from dougong.engine.checkpoint import checkpoints_of
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.trainer import TrainConfig, TrainResult, Watch, train
from dougong.nn.batch import Batch

STEPS = 20


class Shared(TinyLoader):
    """A share of TinyLoader's batches: 40 records in batches of 9, of which the last has 4."""

    def __init__(self, share: Share, bad: set[int] | None = None) -> None:
        super().__init__(40, 9, bad=bad)
        self.share = share

    def collate(self, order: np.ndarray[Any, Any], number: int) -> BatchArrays:
        rows = order[number * self.batch_size :][: self.batch_size]
        mine = TinyLoader(len(self.x_ND), len(rows), bad=self.bad)
        return TinyLoader.collate(mine, rows[self.share.of(len(rows))], 0)


def connected() -> Ranks:
    return Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE


def trained(folder: Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], TrainResult, int]:
    """A run of a model without chance; `options` say what is different in it. The weights, and how many events this
    rank heard of."""
    ranks = connected()
    dropout = options.pop("dropout", 0.0)
    bad, interrupt, spoil = (options.pop(name, None) for name in ("bad", "interrupt", "spoil"))
    resume = options.pop("resume", False)
    model = TinyModel(seed=ranks.rank, dropout=dropout, norm=False)
    loader = Shared(ranks.share, bad)
    heard: list[Event] = []
    steps = 0

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        # On the last rank alone: the others agree.
        if ranks.rank == ranks.world - 1 and steps == interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        spoiled = ranks.rank == ranks.world - 1 and spoil is not None and steps >= spoil
        return tiny_loss(output, batch) * (math.nan if spoiled else 1.0)

    def judge() -> dict[str, Evaluation]:
        return {"all": evaluate(model, loader, TARGET, loss=tiny_loss, ranks=ranks)}

    config = TrainConfig(
        **{"steps": STEPS, "precision": "fp32", "checkpoint_every": 4, "evaluate_every": 5, **options}  # type: ignore[arg-type]
    )
    result = train(
        model,
        loss,
        loader,
        config,
        folder=folder,
        watch=Watch(judge, "accuracy"),
        announce=Announcer(heard.append),
        resume=resume,
        ranks=ranks,
    )
    return weights(model), result, len(heard)


def numbers_of(folder: Path) -> list[Any]:
    return [loss for _, loss in losses_of(folder)]


@pytest.mark.parametrize("world", [2, 4])
def test_losses_figures_and_weights_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    options = {"bad": {3, 11}, "accumulation": 2, "ema": 0.9}
    want, want_result, _ = trained(tmp_path / "one", dict(options))

    found = run_ranks(trained, tmp_path / "many", options, world=world)

    # The sums of a batch are made in another order: some of float32's last bits, over 20 steps.
    np.testing.assert_allclose(numbers_of(tmp_path / "many"), numbers_of(tmp_path / "one"), rtol=1e-5)
    for rank, (got, result, heard) in enumerate(found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(got[name], found[0][0][name]) for name in got)
        assert (result.reason, result.step, result.best_step) == ("steps", STEPS, want_result.best_step)
        assert (heard > 0) is (rank == 0)
    told = [read_events(tmp_path / name / "events.jsonl") for name in ("one", "many")]
    for kind, keys in {
        "StepDone": ("step", "num_records", "epoch"),
        "Evaluated": ("step", "num_records"),
        "RecordsSetAside": ("step", "count", "seen", "first"),
        "RunStarted": ("total_steps", "precision", "num_parameters"),
    }.items():
        one, many = ([[e[key] for key in keys] for e in events if e["kind"] == kind] for events in told)
        assert one == many, kind
    assert any(event["kind"] == "RecordsSetAside" for event in told[0])


def test_a_run_goes_on_at_any_number_of_ranks(tmp_path: Path) -> None:
    trained(tmp_path / "whole", {})
    run_ranks(trained, tmp_path / "cut", {"interrupt": 7}, world=4)
    run_ranks(trained, tmp_path / "cut", {"interrupt": 6, "resume": True}, world=2)
    trained(tmp_path / "cut", {"resume": True})

    np.testing.assert_allclose(numbers_of(tmp_path / "cut"), numbers_of(tmp_path / "whole"), rtol=1e-5)
    assert len(numbers_of(tmp_path / "cut")) == STEPS


def test_an_interruption_of_one_rank_ends_the_run_on_all_and_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Each rank goes on with its own random numbers too."""
    run_ranks(trained, tmp_path / "whole", {"dropout": 0.3}, world=2)
    cut = run_ranks(trained, tmp_path / "cut", {"dropout": 0.3, "interrupt": 7}, world=2)
    assert [(result.reason, result.step) for _, result, _ in cut] == [("interrupted", 7)] * 2

    run_ranks(trained, tmp_path / "cut", {"dropout": 0.3, "resume": True}, world=2)

    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")
    latest = sorted(checkpoints_of(tmp_path / "cut").iterdir())[-1]
    assert (latest / "random.json").read_text() != (latest / "random-1.json").read_text()


def fails_alike(folder: Path, options: dict[str, Any]) -> str:
    try:
        trained(folder, options)
    except DougongError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_mistakes_are_raised_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(trained, tmp_path / "run", {"steps": 4}, world=2)

    there = run_ranks(fails_alike, tmp_path / "run", {}, world=2)
    spoiled = run_ranks(fails_alike, tmp_path / "spoiled", {"spoil": 3, "max_skipped": 2}, world=2)
    too_many = run_ranks(fails_alike, tmp_path / "bad", {"bad": set(range(20))}, world=2)

    for told, start in (
        (there, f"{RunError.__name__}: {tmp_path / 'run'} holds a run already"),
        (spoiled, f"{DougongError.__name__}: step 4: the loss was nan"),
        (too_many, f"{DataError.__name__}: "),
    ):
        assert told[0] == told[1]
        assert told[0].startswith(start)


def test_precision_is_measured_as_often_on_all_ranks_and_agreed_on(tmp_path: Path) -> None:
    found = run_ranks(trained, tmp_path / "run", {"precision": "auto", "steps": 2}, world=2)
    assert len({result.precision.precision for _, result, _ in found}) == 1


def test_ranks_decide_alike_in_which_format(tmp_path: Path) -> None:
    found = run_ranks(trained, tmp_path / "run", {"precision": "adaptive", "steps": 6}, world=2)
    assert all(torch.equal(value, found[0][0][name]) for each in found for name, value in each[0].items())
    alone, _, _ = trained(tmp_path / "alone", {"precision": "adaptive", "steps": 6})
    for name, value in alone.items():
        torch.testing.assert_close(found[0][0][name], value, rtol=1e-2, atol=1e-3)  # 16 bits, in sums of another order


def judged(num_records: int, batch_size: int) -> Evaluation:
    ranks = connected()
    model = TinyModel(dropout=0.0, norm=False)
    loader = Shared(ranks.share, bad={1, 2, 30})
    loader.x_ND, loader.y_N, loader.batch_size = loader.x_ND[:num_records], loader.y_N[:num_records], batch_size
    return evaluate(model, loader, TARGET, loss=tiny_loss, ranks=ranks)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("num_records", "batch_size"), [(40, 9), (3, 9), (2, 1)])
def test_evaluation_gathers_the_records_in_order(num_records: int, batch_size: int, world: int) -> None:
    """Also where ranks have none at all, or there are none."""
    want = judged(num_records, batch_size)
    for got in run_ranks(judged, num_records, batch_size, world=world):
        assert got.row_B.tolist() == want.row_B.tolist()
        assert got.prediction_B.tolist() == want.prediction_B.tolist()
        assert got.bad == want.bad
        assert got.num_records == want.num_records
        assert (got.target_B is None) is (want.target_B is None)
        if want.target_B is not None:
            assert got.target_B.tolist() == want.target_B.tolist()  # type: ignore[union-attr]
        np.testing.assert_allclose(got.probability_BC, want.probability_BC, rtol=1e-5)  # type: ignore[arg-type]
        assert got.metrics == pytest.approx(want.metrics, rel=1e-6)
        assert got.gate == pytest.approx(want.gate)
        if want.confusion is not None:
            assert got.confusion.tolist() == want.confusion.tolist()  # type: ignore[union-attr]
