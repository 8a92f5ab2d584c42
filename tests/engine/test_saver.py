"""Checkpoints are written beside training, count when they are whole, and say so when they cannot be."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_run import interrupt_at, losses_of, train_tiny

from dougong.core.errors import CheckpointError
from dougong.core.events import CheckpointSaved, Event, Listener, StepDone, read_events
from dougong.core.signature import Signature, TableInput, Target
from dougong.engine import saver
from dougong.engine.checkpoint import Copied, RunState, latest_checkpoint, write_copied
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.saver import Saver
from dougong.engine.staging import Staging
from dougong.model.sandwich import SandwichConfig


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No checkpoint is written before this is set."""
    go_on = threading.Event()

    def write(folder: Path, copied: Copied) -> dict[str, str]:
        assert go_on.wait(20)
        return write_copied(folder, copied)

    monkeypatch.setattr(saver, "write_copied", write)
    yield go_on
    go_on.set()


def failing(step: int, error: Exception) -> Callable[[Path, Copied], dict[str, str]]:
    """That checkpoint cannot be written; some of it is on the disk already."""

    def write(folder: Path, copied: Copied) -> dict[str, str]:
        if copied.step != step:
            return write_copied(folder, copied)
        writing = folder / f".step-{step:08d}.writing"
        writing.mkdir(parents=True, exist_ok=True)
        (writing / "model.safetensors").write_bytes(b"half")
        raise error

    return write


FULL = OSError(errno.ENOSPC, "No space left on device")


def after_step(step: int, work: Callable[[], object]) -> Listener:
    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            work()

    return hear


def saved_of(folder: Path) -> list[int]:
    return [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == "CheckpointSaved"]


def files_of(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints" / f"step-{step:08d}").iterdir()}


def test_what_was_copied_stays_and_the_memory_serves_again() -> None:
    staging, weight = Staging(), torch.arange(6.0).view(2, 3)
    first = staging.copy({"file": {"a": weight, "b": weight.T}})["file"]
    weight += 1
    assert torch.equal(first["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(first["b"], torch.arange(6.0).view(2, 3).T)

    again = staging.copy({"file": {"a": weight, "b": weight.T}})["file"]
    assert torch.equal(again["a"], weight)
    assert [x.data_ptr() for x in again.values()] == [x.data_ptr() for x in first.values()]
    other = staging.copy({"file": {"a": weight.double()}})["file"]["a"]
    assert other.dtype == torch.float64
    assert torch.equal(other, weight.double())


def test_training_goes_on_while_a_checkpoint_is_written_that_holds_its_own_step(
    tmp_path: Path, held: threading.Event
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 5, "steps": 9, "keep": 5, "ema": 0.9}
    counted: list[int] = []

    def look() -> None:
        counted.append(len(list((tmp_path / "beside" / "checkpoints").glob("step-*"))))
        held.set()

    train_tiny(tmp_path / "beside", hear=after_step(9, look), **options)  # four steps on
    train_tiny(tmp_path / "plain", **options)

    assert counted == [0]
    assert saved_of(tmp_path / "beside") == [5, 9]
    for step in (5, 9):
        assert files_of(tmp_path / "beside", step) == files_of(tmp_path / "plain", step)
    assert losses_of(tmp_path / "beside") == losses_of(tmp_path / "plain")


def test_one_that_comes_due_too_early_waits_and_this_is_told(tmp_path: Path, held: threading.Event) -> None:
    def soon() -> None:
        threading.Timer(0.3, held.set).start()

    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        after_step(8, soon)(event)

    train_tiny(tmp_path, checkpoint_every=4, steps=11, hear=hear)

    saved = {event.step: event for event in heard if isinstance(event, CheckpointSaved)}
    assert list(saved) == [4, 8, 11]
    assert saved[4].wait_seconds < 0.1
    assert saved[8].pause_seconds >= saved[8].wait_seconds > 0.2


def test_the_memory_of_one_under_way_is_not_taken_for_the_next(tmp_path: Path, held: threading.Event) -> None:
    threading.Timer(0.3, held.set).start()
    options: dict[str, Any] = {"checkpoint_every": 1, "steps": 5, "keep": 5}
    train_tiny(tmp_path / "beside", **options)
    train_tiny(tmp_path / "plain", **options)
    for step in range(1, 6):
        assert files_of(tmp_path / "beside", step) == files_of(tmp_path / "plain", step)


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(tmp_path / "whole")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_copied", failing(8, FULL))
        with pytest.raises(CheckpointError) as told:
            train_tiny(folder, hear=after_step(9, lambda: time.sleep(0.2)))

    assert str(told.value) == (
        f"the checkpoint of step 8 cannot be written to {folder / 'checkpoints'} (No space left on device). "
        "Make room there and go on with the run by resume, or begin another one elsewhere."
    )
    assert losses_of(folder)[-1][0] == 9
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    train_tiny(folder, resume=True)
    assert losses_of(folder) == losses_of(tmp_path / "whole")


def test_no_room_for_the_weights_themselves_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")  # Windows has none

    def write(folder: Path, copied: Copied) -> dict[str, str]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return write_copied(folder, copied)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(saver, "write_copied", write)
    with pytest.raises(CheckpointError, match=r"step 1 cannot be written to .* \(.*File too large.*\)\. Make room"):
        train_tiny(tmp_path, steps=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_last_one_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "write_copied", failing(6, FULL))
    with pytest.raises(CheckpointError, match=r"^the checkpoint of step 6 cannot be written"):
        train_tiny(tmp_path, hear=interrupt_at(6))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_our_own_mistake_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "write_copied", failing(4, KeyError("ours")))
    with pytest.raises(KeyError, match="ours"):
        train_tiny(tmp_path)


def test_an_error_in_training_does_not_lose_what_was_taken_before_it(tmp_path: Path, held: threading.Event) -> None:
    def fail() -> None:
        threading.Timer(0.1, held.set).start()
        raise RuntimeError("like a kill")

    with pytest.raises(RuntimeError, match="like a kill"):
        train_tiny(tmp_path, hear=after_step(6, fail))
    assert saved_of(tmp_path) == [4]
    train_tiny(tmp_path / "whole")
    train_tiny(tmp_path, resume=True)
    assert losses_of(tmp_path) == losses_of(tmp_path / "whole")


def test_no_thread_is_left(tmp_path: Path) -> None:
    train_tiny(tmp_path)
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


# On ranks --------------------------------------------------------------------------------------------------------


def on_ranks(folder: Path, error: Exception | None) -> dict[str, Any]:
    """Rank 1 is slow to write, and may fail."""
    ranks = Ranks(dist.group.WORLD)
    target = Target(name="kind", task="single_label", labels=("a", "b"))
    torch.manual_seed(0)
    model = SandwichConfig(width=8).build(
        Signature(inputs={"x": TableInput(num_numbers=2, category_sizes=())}, target=target)
    )
    layout = prepare_model(model, PlanConfig(shard=2, gathered_bytes=0), ranks)
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1)
    go_on = threading.Event()

    def write(folder: Path, copied: Copied) -> dict[str, str]:
        assert ranks.first or go_on.wait(20)
        if error is not None and not ranks.first:
            raise error
        return write_copied(folder, copied)

    saver.write_copied, kept = write, saver.write_copied
    told: dict[str, Any] = {"counts": []}
    own = Saver(folder, layout, optimizer, None, keep=1)
    try:
        state = RunState(
            step=1, epoch=0, batch=1, batches_per_epoch=5, seed=0, precision="fp32", precision_ratio=None, best_step=1
        )
        own.begin(state)
        for look in range(200):
            saved = own.look(*map(bool, ranks.sums(own.busy, own.failed)))
            told["counts"].append((folder / "step-00000001").exists())
            if look == 20:
                go_on.set()
            if saved is not None:
                told["saved"] = saved.state.step
                break
            time.sleep(0.005)
    except CheckpointError as failure:
        told["error"] = str(failure)
    finally:
        saver.write_copied = kept
    ranks.wait()
    return told


def test_a_checkpoint_counts_when_the_slowest_rank_has_written(tmp_path: Path) -> None:
    for told in run_ranks(on_ranks, tmp_path, None, world=2):
        assert told["saved"] == 1
        assert told["counts"].index(True) > 20
        assert told["counts"][-1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path).checkpoint is not None


def test_what_one_rank_cannot_write_is_told_on_all(tmp_path: Path) -> None:
    found = run_ranks(on_ranks, tmp_path, FULL, world=2)
    assert len({told["error"] for told in found}) == 1
    assert found[0]["error"].startswith(f"the checkpoint of step 1 cannot be written to {tmp_path} (No space left")
    assert list(tmp_path.iterdir()) == []
