import io
import math
import re
from typing import Any

import pytest

from dougong.core.events import (
    CheckpointSaved,
    CheckpointSkipped,
    Evaluated,
    Event,
    RecordsSetAside,
    RunFinished,
    RunStarted,
    SamplingChanged,
    StepDone,
)
from dougong.watch import progress
from dougong.watch.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def started(step: int = 0, total: int = 100) -> RunStarted:
    return RunStarted(step=step, total_steps=total, precision="fp32", num_parameters=12345, resumed=step > 0)


def done(step: int, loss: float = 2.0, num_records: int = 8) -> StepDone:
    return StepDone(
        step=step,
        loss=loss,
        grad_norm=1.0,
        learning_rate=0.1,
        num_records=num_records,
        epoch=0,
        seconds=0.1,
        wait_seconds=0.0,
    )


def finished(**values: Any) -> RunFinished:
    return RunFinished(
        **{"step": 100, "reason": "steps", "best_metric": 0.51234, "best_step": 60, "seconds": 3725.0, **values}
    )


def lines(*events: Event) -> list[str]:
    file = io.StringIO()
    with Progress(file) as show:
        for event in events:
            show(event)
    return file.getvalue().splitlines()


def test_only_stderr_is_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as show:
        for event in (started(), done(100), finished()):
            show(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 3


@pytest.mark.usefixtures("clock")
def test_the_beginning_and_the_end_are_told() -> None:
    assert lines(started(), finished()) == [
        "training begins: 100 steps, 12,345 parameters, fp32",
        "done: 100 steps in 1:02:05, best 0.5123 at step 60",
    ]
    assert lines(
        started(40), finished(step=70, reason="interrupted", best_step=None, best_metric=None, seconds=65)
    ) == [
        "training goes on after step 40: 100 steps, 12,345 parameters, fp32",
        "interrupted, can be resumed: 70 steps in 1:05",
    ]
    assert lines(finished(reason="early"))[0].startswith("no more gain: 100 steps")


def test_a_plain_line_comes_every_so_many_seconds_and_after_the_last_step(clock: Clock) -> None:
    file = io.StringIO()
    show = Progress(file)
    show(started())
    for step in range(1, 101):
        clock.now += 1.0
        show(done(step))
    told = [line for line in file.getvalue().splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in told] == [f"step {step}/100" for step in range(10, 101, 10)]
    assert told[0] == "step 10/100: 8 records/s, 1:30 left, loss 2.0000"
    assert told[-1] == "step 100/100: 8 records/s, 0:00 left, loss 2.0000"


def test_a_resumed_run_tells_the_rate_and_the_time_left_of_its_own_steps(clock: Clock) -> None:
    file = io.StringIO()
    show = Progress(file)
    show(started(80))
    for step in range(81, 91):
        clock.now += 2.0
        show(done(step))
    assert file.getvalue().splitlines()[-1] == "step 90/100: 4 records/s, 0:20 left, loss 2.0000"


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_does_not_spoil_the_loss_for_ever(clock: Clock, spoiled: float) -> None:
    show = Progress(io.StringIO())
    show(started())
    for step, loss in enumerate((1.0, spoiled, 3.0), start=1):
        show(done(step, loss))
    assert "loss 1.1000" in show._note(3, clock.now)


def test_the_last_metrics_are_shown_with_the_rate(clock: Clock) -> None:
    file = io.StringIO()
    show = Progress(file)
    show(started())
    metrics = {"accuracy": 0.512345, "macro_f1": 0.4}
    show(Evaluated(step=50, split="validation", condition="all", metrics=metrics, num_records=9, seconds=1.0))
    clock.now = 60.0
    show(done(51))
    assert file.getvalue().splitlines()[1:] == [
        "step 50: validation (all): accuracy 0.5123, macro_f1 0.4000",
        "step 51/100: 0 records/s, 0:58 left, loss 2.0000, accuracy 0.512",
    ]


def test_a_damaged_checkpoint_is_told_in_full() -> None:
    event = CheckpointSkipped(step=8, path="run/checkpoints/step-00000012", reason="state.json is missing")
    assert lines(event) == [
        "run/checkpoints/step-00000012 is damaged and set aside: state.json is missing. An older checkpoint is used."
    ]


def test_bad_records_are_told_when_they_begin_and_each_time_they_have_doubled() -> None:
    first = [{"row": 7, "column": "image", "reason": "it is not a picture"}]
    told = lines(*[RecordsSetAside(step=1, count=count, seen=100, first=first) for count in range(1, 20)])
    assert [int(line.split()[0]) for line in told] == [1, 2, 4, 8, 16]
    assert told[0] == "1 of 100 records set aside so far, the first: row 7, column image: it is not a picture"


def test_events_that_need_no_words_get_none() -> None:
    assert lines(CheckpointSaved(step=1, path="x", best=True)) == []


def test_on_a_terminal_there_is_a_bar_and_afterwards_it_is_gone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    with Progress(file) as show:
        show(started())
        for step in range(1, 51):
            clock.now += 0.02
            show(done(step))
        show(CheckpointSkipped(step=50, path="[red]a[/red]", reason="it is damaged"))
        drawn = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)

    assert re.search(r"4\d/100 400 records/s, 0:01 left, loss 2\.0000", plain)
    assert "[red]a[/red] is damaged and set aside: it is damaged" in plain  # not read as markup
    assert plain.count("records/s") <= 13  # not one a step
    ending = file.getvalue()[len(drawn) :]
    assert "\x1b[?25h" in ending  # the cursor is back
    assert "\x1b[2K" in ending  # and the bar's line is empty


def test_an_error_in_training_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()

    def fail() -> None:
        with Progress(file) as show:
            show(started())
            show(done(1))
            raise RuntimeError("in training")

    with pytest.raises(RuntimeError, match="in training"):
        fail()
    assert file.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in file.getvalue()[-40:]


@pytest.mark.usefixtures("clock")
def test_a_rate_that_moves_is_told_with_its_reason_and_one_that_stays_is_not() -> None:
    def changed(**after: float) -> SamplingChanged:
        reason = {"photo": "from 0.3 to 0.36", "clip": "stays"}
        before = {"photo": 0.3, "clip": 0.3}
        return SamplingChanged(
            step=20,
            before=before,
            after=after,
            with_all=0.9,
            without={},
            with_none=0.1,
            quality={},
            reason=reason,
            seconds=0.1,
        )

    assert lines(changed(photo=0.36, clip=0.3)) == ["step 20: left out of training records: photo from 0.3 to 0.36"]
    assert lines(changed(photo=0.3, clip=0.3)) == []
