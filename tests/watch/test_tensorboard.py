import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dougong.core.events import Evaluated, RecordsSetAside, RunFinished, RunStarted, StepDone
from dougong.watch.tensorboard import TensorBoard, scalars_of


def started(step: int = 0, resumed: bool = False) -> RunStarted:
    return RunStarted(step=step, total_steps=100, precision="fp32", num_parameters=1, resumed=resumed)


def done(step: int, loss: float = 1.0) -> StepDone:
    return StepDone(
        step=step,
        loss=loss,
        grad_norm=2.0,
        learning_rate=0.5,
        num_records=8,
        epoch=0,
        seconds=0.25,
        wait_seconds=0.05,
    )


def finished(step: int) -> RunFinished:
    return RunFinished(step=step, reason="steps", best_metric=None, best_step=None, seconds=1.0)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the tensorboard program would draw."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_draws_what_was_announced(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as write:
        write(started())
        write(done(1, loss=1.5))
        write(RecordsSetAside(step=2, count=3, seen=40, first=[]))
        write(done(2, loss=0.75))
        metrics = {"accuracy": 0.5, "macro_f1": 0.25}
        write(Evaluated(step=2, split="validation", condition="spoken", metrics=metrics, num_records=4, seconds=1.0))

    assert curves(tmp_path) == {
        "train/loss": [(1, 1.5), (2, 0.75)],
        "train/grad_norm": [(1, 2.0), (2, 2.0)],
        "train/learning_rate": [(1, 0.5), (2, 0.5)],
        "speed/records_per_second": [(1, 32.0), (2, 32.0)],
        "speed/wait_ratio": [(1, pytest.approx(0.2)), (2, pytest.approx(0.2))],
        "records/set_aside": [(2, 3.0)],
        "validation/spoken/accuracy": [(2, 0.5)],
        "validation/spoken/macro_f1": [(2, 0.25)],
    }


@pytest.mark.parametrize("saved", [0, 2])
def test_a_resumed_run_replaces_the_steps_that_are_trained_again(tmp_path: Path, saved: int) -> None:
    """Also where the kill came before the first checkpoint, and it begins anew."""
    killed = TensorBoard(tmp_path)
    killed(started())
    for step in (1, 2, 3, 4):
        killed(done(step, loss=float(step)))
    killed.close()

    with TensorBoard(tmp_path) as again:
        again(started(saved, resumed=saved > 0))
        for step in range(saved + 1, 4):
            again(done(step, loss=10.0 + step))

    want = [(step, float(step) if step <= saved else 10.0 + step) for step in (1, 2, 3)]
    assert curves(tmp_path)["train/loss"] == want
    assert len(list(tmp_path.iterdir())) == 2


def test_the_end_of_the_run_puts_everything_on_the_disk(tmp_path: Path) -> None:
    write = TensorBoard(tmp_path)
    write(started())
    write(done(1))
    write(finished(1))
    assert curves(tmp_path)["train/loss"] == [(1, 1.0)]


def test_without_an_event_no_file_is_opened(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "curves"):
        pass
    assert not (tmp_path / "curves").exists()


def unmakeable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "curves"


def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk runs full in the middle of it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full, a disk that is always full")
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened(Path("/dev/full"), *a, **k))
    monkeypatch.setattr("dougong.watch.tensorboard.FLUSH_SECONDS", 0.0)
    return tmp_path / "curves"


def full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = full(tmp_path, monkeypatch)
    monkeypatch.setattr("dougong.watch.tensorboard.FLUSH_SECONDS", 1e9)
    return folder


@pytest.mark.parametrize("trouble", [unmakeable, full, full_at_the_end])
@pytest.mark.parametrize("ended", [True, False])
def test_files_that_cannot_be_written_are_told_once_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: Callable[[Path, pytest.MonkeyPatch], Path],
    ended: bool,
) -> None:
    folder = trouble(tmp_path, monkeypatch)
    write = TensorBoard(folder)
    write._flushed = -1e12 if trouble is full else 1e12
    with write:
        for event in (started(), done(1), done(2), *([finished(2), done(3)] if ended else [])):
            write(event)
    del write
    gc.collect()  # nothing is left open to complain later

    _, err = capsys.readouterr()
    assert err.startswith(f"dougong: no more curves in {folder}: ")
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = TensorBoard(full(tmp_path, monkeypatch))
    write._flushed = -1e12
    write(started())
    assert "no more curves" in capsys.readouterr().err
    assert write._file is None


def test_speeds_of_a_step_without_duration_are_finite() -> None:
    event = StepDone(
        step=1, loss=1.0, grad_norm=1.0, learning_rate=1.0, num_records=8, epoch=0, seconds=0.0, wait_seconds=0.0
    )
    assert scalars_of(event)["speed/records_per_second"] == pytest.approx(8e9)


def test_no_tensor_library_is_loaded() -> None:
    script = "import sys, dougong.watch.tensorboard; print([n for n in ('torch', 'tensorflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
