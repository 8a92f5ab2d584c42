import gc
import json
import math
import os
import random
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    TARGET,
    Judged,
    TinyLoader,
    TinyModel,
    TinyOutput,
    interrupt_at,
    kinds_of,
    losses_of,
    same_weights,
    tiny_loss,
    train_tiny,
    watch_scores,
    weights,
)
from torch import Tensor

from dougong.core.config import parse
from dougong.core.errors import CheckpointError, ConfigError, DataError, DougongError, RunError
from dougong.core.events import Event, Listener, RecordsSetAside, RunFinished, RunStarted, StepDone, read_events
from dougong.data.position import Position
from dougong.engine import trainer
from dougong.engine.checkpoint import best_weights, latest_checkpoint, load_weights
from dougong.engine.evaluate import evaluate
from dougong.engine.precision.choice import PrecisionChoice
from dougong.engine.trainer import TrainConfig, Watch
from dougong.nn.batch import Batch


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def steps_of(folder: Path, kind: str) -> list[int]:
    return [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def die_at(step: int) -> Listener:
    """An error in the middle of a run, after which nothing is saved."""

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise RuntimeError("like a kill")

    return hear


def chancy_loss(output: TinyOutput, batch: Batch) -> Tensor:
    """Draws from every source besides the model's dropout."""
    return tiny_loss(output, batch) * (1 + random.random() + float(np.random.rand()))


# Sameness --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_tiny(tmp_path / name, seed=seed, loss=chancy_loss)
        random.random()  # what came before has no part
        torch.rand(1)

    first, again, other = (losses_of(tmp_path / name) for name in "abc")
    assert len(first) == 20
    assert first == again
    assert all(left != right for left, right in zip(first, other, strict=True))


def test_it_learns(tmp_path: Path) -> None:
    train_tiny(tmp_path, steps=60, model=TinyModel(dropout=0.0), optimizer={"learning_rate": 0.01})
    losses = [loss for _, loss in losses_of(tmp_path)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def nosy_watch(model: TinyModel) -> Watch:
    """Draws numbers, changes modes and gradients, as an evaluation might."""

    def judge() -> dict[str, Judged]:
        random.random(), np.random.rand(), torch.rand(3)
        found = evaluate(model, TinyLoader(24), TARGET)
        model.eval()
        return {"all": Judged(found.metrics)}

    return Watch(judge, "accuracy")


@pytest.mark.parametrize("what", ["evaluating", "saving", "measuring", "averaging", "all"])
def test_looking_on_leaves_no_trace_in_training(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what in ("measuring", "all"):
        monkeypatch.setattr("dougong.engine.precision.choice.ENOUGH_GAIN", math.inf)
    options: dict[str, dict[str, Any]] = {
        "evaluating": {"evaluate_every": 1},
        "saving": {"checkpoint_every": 1},
        "measuring": {"precision": "auto"},
        "averaging": {"ema": 0.9},
    }
    chosen = (
        options[what] if what != "all" else {key: value for each in options.values() for key, value in each.items()}
    )
    model = TinyModel()
    watch = nosy_watch(model) if what in ("evaluating", "all") else None

    _, plain = train_tiny(tmp_path / "plain", loss=chancy_loss, checkpoint_every=None)
    train_tiny(tmp_path / "watched", model=model, watch=watch, loss=chancy_loss, **{"checkpoint_every": None, **chosen})

    assert losses_of(tmp_path / "watched") == losses_of(tmp_path / "plain")
    assert same_weights(model, plain)


# Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 7, 19])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_run_is_saved_and_goes_on_to_the_same_end(tmp_path: Path, step: int, accumulation: int) -> None:
    options: dict[str, Any] = {
        "loss": chancy_loss,
        "loader": TinyLoader(bad={3}),
        "accumulation": accumulation,
        "ema": 0.9,
        "checkpoint_every": None,
    }
    _, whole = train_tiny(tmp_path / "whole", **options)
    folder = tmp_path / "stopped"

    first, _ = train_tiny(folder, hear=interrupt_at(step), **options)
    assert (first.reason, first.step) == ("interrupted", step)
    assert checkpoints(folder) == [f"step-{step:08d}"]
    second, model = train_tiny(folder, model=TinyModel(seed=8), resume=True, **options)

    assert (second.reason, second.step) == ("steps", 20)
    assert losses_of(folder) == losses_of(tmp_path / "whole")
    assert same_weights(model, whole)
    assert steps_of(folder, "RecordsSetAside") == steps_of(tmp_path / "whole", "RecordsSetAside")


@pytest.mark.parametrize(
    "how",
    [{"precision": "adaptive"}, {"precision": "fp16"}, {"precision": "fp16", "loss_scale": "doubling"}],
)
def test_a_run_in_fp16_learns_and_goes_on_with_its_scale_and_formats(tmp_path: Path, how: dict[str, Any]) -> None:
    _, whole = train_tiny(tmp_path / "whole", steps=40, **how)
    train_tiny(tmp_path / "cut", steps=40, hear=interrupt_at(18), **how)
    _, model = train_tiny(tmp_path / "cut", model=TinyModel(seed=8), steps=40, resume=True, **how)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert same_weights(model, whole)
    losses = [loss for _, loss in losses_of(tmp_path / "whole")]
    assert sum(losses[-5:]) < sum(losses[:5])
    # The model that is left computes as any other.
    batch = TinyLoader().all_tensors()
    assert model(batch).output_BC.dtype == torch.float32
    assert not vars(model.blocks[0]).keys() & {"forward"}


def test_a_change_of_format_is_announced_with_its_cause(tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", precision="adaptive")
    switches = [each for each in read_events(tmp_path / "run" / "events.jsonl") if each["kind"] == "PrecisionSwitched"]
    assert {each["after"] for each in switches} == {"fp16"}
    assert all("its gradients have fitted scales from" in each["reason"] for each in switches)


def test_a_loss_scale_has_an_effect_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_scale=doubling has no effect with precision=bf16. Use precision: fp16"):
        TrainConfig(precision="bf16", loss_scale="doubling")
    train_tiny(tmp_path, precision="fp16", hear=interrupt_at(5))
    with pytest.raises(CheckpointError, match="has another train.loss_scale"):
        train_tiny(tmp_path, precision="fp16", loss_scale="doubling", resume=True)


def test_steps_after_the_last_checkpoint_stand_in_the_file_once(tmp_path: Path) -> None:
    train_tiny(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="like a kill"):
        train_tiny(tmp_path / "run", hear=die_at(11))
    assert [step for step, _ in losses_of(tmp_path / "run")][-1] == 11
    assert checkpoints(tmp_path / "run")[-1] == "step-00000008"

    train_tiny(tmp_path / "run", resume=True)

    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_records_set_aside_after_the_last_checkpoint_are_told_once(tmp_path: Path) -> None:
    loader = TinyLoader(40, 4)
    order = [row for _, (_, batch) in zip(range(20), loader.batches(Position()), strict=False) for row in batch.row_B]
    loader.bad = {int(order[place]) for place in (8, 16, 24)}  # of steps 3, 5 and 7; step 4 is saved

    with pytest.raises(RuntimeError, match="like a kill"):
        train_tiny(tmp_path, hear=die_at(6), loader=loader, max_bad_share=0.2)
    train_tiny(tmp_path, resume=True, loader=loader, max_bad_share=0.2)

    told = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "RecordsSetAside"]
    assert [(event["step"], event["count"], len(event["first"])) for event in told] == [(3, 1, 1), (5, 2, 2), (7, 3, 3)]


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path: Path) -> None:
    _, model = train_tiny(tmp_path)
    before = losses_of(tmp_path)
    result, again = train_tiny(tmp_path, model=TinyModel(seed=8), resume=True)
    assert (result.reason, result.step) == ("steps", 20)
    assert losses_of(tmp_path) == before
    assert same_weights(model, again)


def test_resuming_where_there_is_no_run_begins_one(tmp_path: Path) -> None:
    result, _ = train_tiny(tmp_path / "new", resume=True)
    assert result.step == 20
    assert read_events(tmp_path / "new" / "events.jsonl")[0]["resumed"] is False


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    train_tiny(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(RunError, match=r"holds a run already\. Go on with it by resume, or name another folder\.$"):
        train_tiny(tmp_path)
    assert files_of(tmp_path) == before


def test_a_folder_whose_only_checkpoint_is_damaged_is_refused_too(tmp_path: Path) -> None:
    train_tiny(tmp_path, hear=interrupt_at(2))
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(RunError, match="holds a run already"):
        train_tiny(tmp_path)


class Wider(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(16, 4)


class Longer(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "has another seed: 0 there, 1 here. Resume with the settings and records of that run"),
        ({"loader": TinyLoader(48)}, "has another number of batches in an epoch: 5 there, 6 here"),
        ({"precision": "bf16"}, "has another precision: fp32 there, bf16 here"),
        ({"ema": 0.9}, "was saved without averaged weights and this run is with them. Set ema as in that run."),
        ({"model": Wider()}, "is of another model: last.weight is (3, 16) there and (4, 16) here"),
        ({"model": Longer()}, "is of another model: it lacks extra.bias, extra.weight and has nothing besides"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_is_not_resumed_as_another_one_and_stays_as_it_was(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match="like a kill"):
        train_tiny(tmp_path, hear=die_at(10))
    shutil.copytree(tmp_path / "checkpoints" / "step-00000008", tmp_path / "checkpoints" / "step-00000009")
    (tmp_path / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"damaged")
    before = files_of(tmp_path)

    with pytest.raises(CheckpointError) as refused:
        train_tiny(tmp_path, resume=True, **change)

    assert message in str(refused.value)
    assert files_of(tmp_path) == before


def test_averaged_weights_are_not_dropped_on_the_way(tmp_path: Path) -> None:
    train_tiny(tmp_path, ema=0.9, hear=interrupt_at(5))
    with pytest.raises(CheckpointError, match="was saved with averaged weights and this run is without them"):
        train_tiny(tmp_path, resume=True)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def press_twice(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, hear=press_twice)
    assert checkpoints(tmp_path) == ["step-00000004"]


# Evaluating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [5, 10, 15, 20]),  # after each epoch
        ({"accumulation": 2}, [3, 5, 8, 10, 13, 15, 18, 20]),
        ({"evaluate_every": 8}, [8, 16, 20]),
        ({"evaluate_every": 30}, [20]),
    ],
)
def test_evaluations_come_when_they_are_asked_for_and_after_the_last_step(
    tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    train_tiny(tmp_path, watch=watch_scores(*range(20)), **settings)
    assert steps_of(tmp_path, "Evaluated") == steps


def test_the_best_checkpoint_stays_and_is_what_best_weights_gives(tmp_path: Path) -> None:
    model, held = TinyModel(), []
    scores = iter([0.1, 0.9, 0.5, 0.9, 0.3, 0.2, 0.1, 0.4, 0.5, 0.6])

    def judge() -> dict[str, Judged]:
        held.append(weights(model))
        return {"all": Judged({"score": next(scores)})}

    result, _ = train_tiny(
        tmp_path, model=model, watch=Watch(judge, "score"), evaluate_every=2, checkpoint_every=3, keep=1
    )

    assert (result.best_metric, result.best_step) == (0.9, 8)  # of equals, the longer trained
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000020"]
    assert best_weights(tmp_path).name == "step-00000008"
    best = TinyModel(seed=3)
    load_weights(best, best_weights(tmp_path))
    assert same_weights(best, held[3])
    assert not same_weights(best, model)


def test_where_lower_is_better_the_lowest_is_best(tmp_path: Path) -> None:
    watch = watch_scores(3.0, 1.0, 2.0, 4.0, higher_is_better=False)
    result, _ = train_tiny(tmp_path, watch=watch)
    assert (result.best_metric, result.best_step) == (1.0, 10)


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    result, _ = train_tiny(tmp_path, watch=watch_scores(math.nan, 0.2, math.nan, 0.1))
    assert (result.best_metric, result.best_step) == (0.2, 10)


def test_the_mean_over_the_conditions_steers(tmp_path: Path) -> None:
    scores = iter([(0.9, 0.1), (0.4, 0.8), (1.0, 0.0), (0.5, 0.5)])

    def judge() -> dict[str, Judged]:
        return {name: Judged({"score": score}) for name, score in zip("ab", next(scores), strict=True)}

    result, _ = train_tiny(tmp_path, watch=Watch(judge, "score", split="test"))

    assert (result.best_metric, result.best_step) == (pytest.approx(0.6), 10)
    told = [e for e in read_events(tmp_path / "events.jsonl") if e["kind"] == "Evaluated"]
    assert [(e["split"], e["condition"], e["metrics"]["score"]) for e in told[:2]] == [
        ("test", "a", 0.9),
        ("test", "b", 0.1),
    ]


@pytest.mark.parametrize(("patience", "reason", "step"), [(1, "early", 6), (2, "early", 14), (None, "steps", 20)])
def test_without_a_gain_for_so_many_evaluations_training_ends(
    tmp_path: Path, patience: int | None, reason: str, step: int
) -> None:
    watch = watch_scores(0.1, 0.2, 0.2, 0.3, 0.4, 0.3, 0.4, 0.2, 0.1, 0.1)  # at 2, 4, ...
    result, _ = train_tiny(tmp_path, watch=watch, evaluate_every=2, patience=patience)
    assert (result.reason, result.step) == (reason, step)
    assert result.best_step == (6 if patience == 1 else 14)
    assert checkpoints(tmp_path)[-1] == f"step-{step:08d}"


def test_patience_is_counted_across_an_interruption(tmp_path: Path) -> None:
    options: dict[str, Any] = {"evaluate_every": 2, "patience": 3}
    train_tiny(tmp_path, watch=watch_scores(0.5, 0.4, 0.3), hear=interrupt_at(7), **options)
    result, _ = train_tiny(tmp_path, watch=watch_scores(0.2, 0.1, 0.1), resume=True, **options)
    assert (result.reason, result.step, result.best_metric, result.best_step) == ("early", 8, 0.5, 2)
    again, _ = train_tiny(tmp_path, watch=watch_scores(), resume=True, **options)
    assert (again.reason, again.step) == ("early", 8)


def test_patience_without_anything_to_watch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^patience=2 has nothing to watch\. Give validation records, or use null\.$"
    ):
        train_tiny(tmp_path / "run", patience=2)
    assert not (tmp_path / "run").exists()


def test_a_watched_metric_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    watch = Watch(lambda: {"all": Judged({"accuracy": 1.0, "macro_f1": 1.0})}, "rmse")
    with pytest.raises(ConfigError) as refused:
        train_tiny(tmp_path, watch=watch)
    assert str(refused.value) == (
        "the watched metric 'rmse' is not among those of validation (all): accuracy, macro_f1. "
        "Watch another one, or judge other records."
    )


# Saving ----------------------------------------------------------------------------------------------------------


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    train_tiny(tmp_path, checkpoint_every=6)
    assert steps_of(tmp_path, "CheckpointSaved") == [6, 12, 18, 20]
    assert checkpoints(tmp_path) == ["step-00000018", "step-00000020"]


def test_checkpoints_come_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick() -> float:
        return now

    def hear(event: Event) -> None:
        nonlocal now
        if isinstance(event, StepDone):
            now += 1.0

    monkeypatch.setattr(trainer.time, "perf_counter", tick)
    train_tiny(tmp_path, checkpoint_every=None, checkpoint_seconds=7.0, hear=hear)
    assert steps_of(tmp_path, "CheckpointSaved") == [7, 14, 20]


def test_checkpoints_that_a_kill_left_too_many_are_deleted_by_the_resumed_run(tmp_path: Path) -> None:
    train_tiny(tmp_path, keep=5)
    assert len(checkpoints(tmp_path)) == 5
    train_tiny(tmp_path, keep=1, resume=True)
    assert checkpoints(tmp_path) == ["step-00000020"]


def test_without_any_rhythm_the_end_is_saved(tmp_path: Path) -> None:
    train_tiny(tmp_path, checkpoint_every=None, checkpoint_seconds=None)
    assert checkpoints(tmp_path) == ["step-00000020"]


# What goes wrong -------------------------------------------------------------------------------------------------


def spoiled(*steps: int) -> Callable[[TinyOutput, Batch], Tensor]:
    """A loss that is NaN in these steps."""
    count = 0

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        return tiny_loss(output, batch) * (math.nan if count in steps else 1.0)

    return loss


def test_steps_without_a_finite_loss_are_skipped_and_training_goes_on(tmp_path: Path) -> None:
    result, model = train_tiny(tmp_path, loss=spoiled(3, 4, 9), max_skipped=3, ema=0.9)
    losses = losses_of(tmp_path)
    assert result.step == 20
    assert [step for step, loss in losses if math.isnan(loss)] == [3, 4, 9]
    assert all(bool(weight.isfinite().all()) for weight in weights(model).values())


def test_skipped_steps_move_neither_the_weights_nor_their_average(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ema": 0.9, "checkpoint_every": 5, "keep": 2}
    train_tiny(tmp_path, loss=spoiled(*range(11, 16)), hear=interrupt_at(15), **options)
    before, after = (tmp_path / "checkpoints" / name for name in ("step-00000010", "step-00000015"))
    for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert (after / name).read_bytes() == (before / name).read_bytes()


def test_too_many_skipped_steps_in_a_row_end_training_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DougongError) as refused:
        train_tiny(tmp_path, loss=spoiled(2, 3, 5, 6, 7), max_skipped=3)
    message = str(refused.value)
    assert message.startswith(
        "step 7: the loss was nan and the gradient's norm nan, and no step of the last 3 was finite."
    )
    assert message.endswith("Use a lower optimizer.learning_rate, a longer optimizer.warmup_ratio, or precision fp32.")


def test_skipped_steps_are_counted_across_an_interruption(tmp_path: Path) -> None:
    train_tiny(tmp_path, loss=spoiled(4, 5), max_skipped=3, hear=interrupt_at(5))
    with pytest.raises(DougongError, match=r"^step 6: .* no step of the last 3 was finite"):
        train_tiny(tmp_path, loss=spoiled(1), max_skipped=3, resume=True)


def test_too_many_bad_records_end_training_and_are_told_before(tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(DataError, match=r"^4 of the first 40 records cannot be used, more than max_bad_share=0\.05"):
        train_tiny(tmp_path, loader=TinyLoader(bad={1, 2, 3, 4}), hear=heard.append)
    last = [event for event in heard if isinstance(event, RecordsSetAside)][-1]
    assert last.count == 4
    assert len(last.first) == 4


def test_a_table_of_bad_records_is_refused_also_where_precision_would_be_measured(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"records cannot be used|no record that can be used"):
        train_tiny(tmp_path, loader=TinyLoader(bad=set(range(40))), precision="auto")


# Precision -------------------------------------------------------------------------------------------------------


def test_the_precision_that_was_measured_is_kept_by_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "choose_precision", lambda *arguments, **options: PrecisionChoice("bf16", 1.7))
    first, _ = train_tiny(tmp_path, precision="auto", hear=interrupt_at(5))
    monkeypatch.setattr(trainer, "choose_precision", lambda *arguments, **options: pytest.fail("measured again"))
    second, _ = train_tiny(tmp_path, precision="auto", resume=True)

    assert first.precision == second.precision == PrecisionChoice("bf16", 1.7)
    started = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "RunStarted"]
    assert [event["precision"] for event in started] == ["bf16", "bf16"]


def test_training_and_judging_compute_in_the_chosen_precision(tmp_path: Path) -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    class Noted(TinyModel):
        def head(self, state: Tensor) -> TinyOutput:
            output = super().head(state)
            seen.append((self.training, output.output_BC.dtype))
            return output

    model = Noted()
    train_tiny(tmp_path, model=model, watch=nosy_watch(model), precision="bf16", steps=5)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}


# Telling ---------------------------------------------------------------------------------------------------------


def test_a_run_is_told_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    heard: list[Event] = []
    result, model = train_tiny(tmp_path, hear=heard.append, watch=watch_scores(0.1, 0.4, 0.3, 0.2), accumulation=1)

    assert [event.kind for event in heard] == kinds_of(tmp_path)
    begin, end = heard[0], heard[-1]
    assert isinstance(begin, RunStarted)
    assert (begin.step, begin.total_steps, begin.precision, begin.resumed) == (0, 20, "fp32", False)
    assert begin.num_parameters == sum(p.numel() for p in model.parameters())
    assert isinstance(end, RunFinished)
    assert (end.step, end.reason, end.best_metric, end.best_step) == (20, "steps", 0.4, 10)
    assert (result.reason, result.step) == ("steps", 20)
    steps = [event for event in heard if isinstance(event, StepDone)]
    assert [event.epoch for event in steps] == [n // 5 for n in range(20)]
    assert all(event.num_records == 8 and 0 <= event.wait_seconds <= event.seconds for event in steps)
    schedule = TrainConfig(steps=20).optimizer
    assert [event.learning_rate for event in steps] == [schedule.learning_rate_at(n, 20) for n in range(20)]


def test_a_step_of_several_batches_counts_all_their_records(tmp_path: Path) -> None:
    train_tiny(tmp_path, loader=TinyLoader(40, 8, bad={0}), accumulation=5, steps=2)
    told = [e for e in read_events(tmp_path / "events.jsonl") if e["kind"] == "StepDone"]
    assert [event["num_records"] for event in told] == [39, 39]


def test_a_saved_state_says_where_the_loader_stood(tmp_path: Path) -> None:
    train_tiny(tmp_path, hear=interrupt_at(7), loader=TinyLoader(bad={3}))
    found = latest_checkpoint(tmp_path / "checkpoints").checkpoint
    assert found is not None
    state = found.state
    assert (state.step, state.epoch, state.batch, state.seen, state.bad_rows) == (7, 1, 2, 40, (3,))
    json.dumps(state.model_dump(mode="json"))


# Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_steps(tmp_path: Path) -> None:
    marks: dict[int, tuple[int, int]] = {}

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step in (100, 250, 400):
            gc.collect()
            # By type: asking some of torch's objects for their class warns.
            tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
            marks[event.step] = (tracemalloc.get_traced_memory()[0], tensors)

    model = TinyModel()
    every = {"evaluate_every": 25, "checkpoint_every": 25, "watch": nosy_watch(model)}
    tracemalloc.start()
    try:
        train_tiny(tmp_path, model=model, hear=hear, steps=401, ema=0.9, loader=TinyLoader(bad={3}), **every)
    finally:
        tracemalloc.stop()

    # An event that is kept costs more than 500 bytes. What other libraries put into caches comes once, perhaps late.
    assert min(marks[250][0] - marks[100][0], marks[400][0] - marks[250][0]) < 150 * 250
    assert marks[400][1] == marks[250][1] == marks[100][1]


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "batches_per_epoch", "steps"),
    [
        ({"steps": 7, "epochs": 3}, 10, 7),
        ({"epochs": 3}, 10, 30),
        ({"epochs": 0.5}, 10, 5),
        ({"epochs": 3, "accumulation": 4}, 10, 8),
        ({"epochs": 0.01}, 10, 1),
    ],
)
def test_the_number_of_steps_follows_from_steps_or_else_from_epochs(
    settings: dict[str, Any], batches_per_epoch: int, steps: int
) -> None:
    assert TrainConfig(**settings).total_steps(batches_per_epoch) == steps


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 0, "0 must be at least 1."),
        ("accumulation", 0, "0 must be at least 1."),
        ("keep", 0, "0 must be at least 1."),
        ("patience", -1, "-1 must be at least 1."),
        ("epochs", 0, "0.0 must be above 0."),
        ("max_grad_norm", math.nan, "nan must be above 0."),
        ("checkpoint_seconds", 0, "0.0 must be above 0."),
        ("ema", 1.0, "1.0 must be between 0 and 1. Use for example 0.999, or null for no average."),
        ("max_bad_share", 1.5, "1.5 must be a share, from 0 to 1."),
        ("precision", "fp8", "'fp32', 'bf16', 'fp16', 'adaptive' or 'auto'"),
        ("acumulation", 2, "Did you mean 'accumulation'?"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(TrainConfig, {setting: value}, where="train")
    assert setting in str(refused.value)
    assert message in str(refused.value)
