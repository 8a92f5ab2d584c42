"""Real kills, and what a resumed run makes of what they left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_run import losses_of

from dougong.core.events import read_events

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks what it kills")


class Killed(NamedTuple):
    whole: Path
    killed: Path
    kills: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["memory", "disk"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """With `disk`, the state of the run that was killed lay there, and that of the other in memory."""
    folder = tmp_path_factory.mktemp("kill")
    command = [sys.executable, str(HERE / "kill_and_resume.py"), str(folder), "1", request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Killed(folder / "whole", folder / "killed", json.loads(done.stdout))


@pytest.mark.slow
def test_it_was_killed_many_times_also_in_the_middle_of_saving(runs: Killed) -> None:
    assert len(runs.kills) >= 4
    assert len({kill["step"] for kill in runs.kills}) >= 3
    assert any(name.startswith(".step-") for kill in runs.kills for name in kill["names"])


@pytest.mark.slow
def test_every_step_has_the_loss_that_it_would_have_had_and_stands_there_once(runs: Killed) -> None:
    assert [step for step, _ in losses_of(runs.whole)] == list(range(1, 61))
    assert losses_of(runs.killed) == losses_of(runs.whole)


@pytest.mark.slow
def test_weights_optimizer_averages_and_random_states_end_bit_for_bit_the_same(runs: Killed) -> None:
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (runs.whole, runs.killed)]
    assert names[0] == names[1]
    for name in names[0]:
        left, right = (run / "checkpoints" / name for run in (runs.killed, runs.whole))
        files = sorted(path.name for path in right.iterdir())
        assert {"model.safetensors", "optimizer.safetensors", "random.json", "state.json"} <= set(files)
        assert sorted(path.name for path in left.iterdir()) == files
        for file in files:
            assert (left / file).read_bytes() == (right / file).read_bytes(), file


@pytest.mark.slow
def test_what_a_kill_leaves_of_state_on_the_disk_is_gone_in_the_end(runs: Killed) -> None:
    on_disk = any(kill["left"] for kill in runs.kills)
    assert on_disk or not (runs.killed / "offload").exists()
    if on_disk:
        assert sum(bool(kill["left"]) for kill in runs.kills) >= 3
    assert not list((runs.killed / "offload").glob("*"))


@pytest.mark.slow
def test_evaluations_and_bad_records_are_told_once_and_as_ever(runs: Killed) -> None:
    def told(run: Path, kind: str, *keys: str) -> list[list[Any]]:
        return [[event[key] for key in keys] for event in read_events(run / "events.jsonl") if event["kind"] == kind]

    for kind, *keys in (("Evaluated", "step", "metrics"), ("RecordsSetAside", "step", "count", "first")):
        assert told(runs.whole, kind, *keys)
        assert told(runs.killed, kind, *keys) == told(runs.whole, kind, *keys)
