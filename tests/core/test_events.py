from pathlib import Path

from dougong.core.events import Announcer, EventFile, StepDone, read_events


def step(number: int, loss: float = 1.0) -> StepDone:
    return StepDone(
        step=number,
        loss=loss,
        grad_norm=1.0,
        learning_rate=0.1,
        num_records=4,
        epoch=0,
        seconds=0.1,
        wait_seconds=0.0,
    )


def test_a_line_cut_by_a_kill_is_passed_over_and_retrained_steps_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventFile(path)
    for number in (1, 2, 3):
        file(step(number))
    file.close()
    with path.open("a") as opened:
        opened.write('{"kind": "StepDone", "st')

    resumed = EventFile(path, resume_at=2)
    resumed(step(3, loss=0.5))
    resumed.close()

    assert [(event["step"], event["loss"]) for event in read_events(path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_every_listener_hears_every_event_in_order(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    announce = Announcer(lambda e: heard.append(("a", e.step)), lambda e: heard.append(("b", e.step)))
    announce(step(1))
    announce(step(2))
    assert heard == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
