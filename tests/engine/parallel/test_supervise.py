"""Ranks that die, hang or are mistaken. Most of them are processes of a few lines, which start at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import as_rank
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_run import losses_of

from dougong.core.errors import ConfigError, RankError
from dougong.engine.parallel.heartbeat import is_gone
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.parallel.supervise import supervise

AS_RANK = str(Path(as_rank.__file__))


def unbroken(folder: Path) -> None:
    torch.set_num_threads(1)
    as_rank.run(folder, Ranks(dist.group.WORLD), [])


@pytest.mark.slow
def test_a_rank_that_dies_and_one_that_hangs_are_named_and_the_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    said: list[str] = []
    faults = [[1, 6, "kill"], [0, 10, "hang"]]

    def command(again: bool) -> list[str]:
        return [sys.executable, AS_RANK, str(tmp_path / "cut"), json.dumps(faults)]

    status = supervise(
        command, num_ranks=2, notes=tmp_path / "cut" / "ranks", limit_seconds=as_rank.LIMIT_SECONDS, say=said.append
    )

    assert status == 0
    assert said[0] == "rank 1 of 2 was killed (SIGKILL) in step 6, working x. All ranks start again, time 1 of 2."
    hung = re.fullmatch(
        r"rank 0 of 2 has shown no sign of life for (\d+) seconds in step 10, working x \(engine/as_rank\.py:\d+ in "
        r"forward\)\. All ranks start again, time 2 of 2\.",
        said[1],
    )
    assert hung is not None, said
    assert int(hung[1]) <= 2 * as_rank.LIMIT_SECONDS  # on a busy machine
    run_ranks(unbroken, tmp_path / "whole", world=2)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert not (tmp_path / "cut" / "ranks").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("hang", "rank 1 of 2 has shown no sign of life for ", marks=pytest.mark.slow),
        ("kill", "rank 1 of 2 was killed, or ended by itself, in step 3, "),
        pytest.param("mistake", "rank 1 of 2 failed in step 3, working x: a mistake of one", marks=pytest.mark.slow),
    ],
)
def test_without_our_launcher_ranks_end_by_themselves_and_name_the_one(kind: str, message: str, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, AS_RANK, str(tmp_path), json.dumps([[1, 3, kind]])]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]

    told = [process.communicate(timeout=90)[1] for process in processes]

    assert processes[0].returncode == 3
    assert processes[1].returncode == {"kill": -signal.SIGKILL, "hang": 3, "mistake": 2}[kind]
    assert told[0].count("\n") == 1, told[0]  # a line, no traceback
    assert message in told[0]
    assert "in step 3, working x" in told[0]
    assert "Go on from the last whole checkpoint with --resume" in told[0]


# Of a few lines ------------------------------------------------------------------------------------------------------


def script(text: str) -> Callable[[bool], list[str]]:
    """Ranks that do this, told whether they are started again."""
    head = "import os, signal, sys, time\nrank, again = os.environ['RANK'], sys.argv[1] == 'True'\n"
    return lambda again: [sys.executable, "-c", head + textwrap.dedent(text), str(again)]


def launched(text: str, tmp_path: Path, **options: int) -> tuple[int, list[str]]:
    said: list[str] = []
    return supervise(script(text), notes=tmp_path / "ranks", say=said.append, **{"num_ranks": 2, **options}), said


def test_a_lost_rank_is_started_again_no_more_than_allowed(tmp_path: Path) -> None:
    assert launched("sys.exit(0 if again or rank == '0' else 1)", tmp_path) == (
        0,
        ["rank 1 of 2 ended with status 1 before it began. All ranks start again, time 1 of 2."],
    )
    with pytest.raises(RankError, match=r"^rank 1 of 2 was killed \(SIGKILL\) before it began\. Go on .* --resume"):
        launched("os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else time.sleep(60)", tmp_path, restarts=1)


def test_a_rank_that_cannot_even_be_ended_kindly_keeps_nobody_waiting(tmp_path: Path) -> None:
    text = """
    from pathlib import Path
    from dougong.engine.parallel.heartbeat import Heartbeat
    heartbeat = Heartbeat(Path(sys.argv[2]), int(rank))
    heartbeat.mark('reading', 3)
    if rank == '0': os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(.1)
        heartbeat.modality('photo')
    """
    said: list[str] = []
    command = lambda again: [*script(text)(again), str(tmp_path)]  # noqa: E731
    with pytest.raises(RankError, match=r"^rank 0 of 2 has shown no sign of life for [1-9] seconds in step 3, reading"):
        supervise(command, num_ranks=2, notes=tmp_path, restarts=0, limit_seconds=1, say=said.append)
    assert said == []


def test_a_mistake_is_said_once_and_never_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = f"""
    print(f'dougong (rank {{rank}}): no such table\\nmore of {{rank}}', file=sys.stderr, flush=True)
    open({str(tmp_path / "said")!r} + rank, 'w')
    while not all(os.path.exists({str(tmp_path / "said")!r} + each) for each in '012'): time.sleep(.01)
    sys.exit(2)
    """
    status, said = launched(text, tmp_path, num_ranks=3)

    assert (status, said) == (2, [])
    told = capfd.readouterr().err
    assert told.count("\ndougong (rank 1): no such table\n") == 1
    assert "dougong (rank 2)" not in told
    assert "rank 2: more of 2\n" in told


def test_all_have_their_place_in_the_environment_and_the_first_one_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    launched(f"print([os.environ[name] for name in {names}], 'OMP_NUM_THREADS' in os.environ)", tmp_path)
    assert capfd.readouterr().out == "['0', '0', '2', '2', '127.0.0.1'] True\n"


def test_nothing_is_left_behind_not_even_what_a_rank_has_started(tmp_path: Path) -> None:
    child = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open({}, 'w').write(str(os.getpid())); time.sleep(60)"
    path = tmp_path / "child"
    text = f"""
    if rank == '0':
        os.fork() or [exec({child.format(repr(str(path)))!r})]
        time.sleep(60)
    while not os.path.exists({str(path)!r}) or not open({str(path)!r}).read(): time.sleep(.01)
    sys.exit(1)
    """
    with pytest.raises(RankError, match="rank 1 of 2 ended with status 1"):
        launched(text, tmp_path, restarts=0)
    pid = int(path.read_text())
    until = time.monotonic() + 5
    while not is_gone(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert is_gone(pid)


def pressed(when: Path, *numbers: int) -> threading.Thread:
    """Signals for this process, once a file is there."""

    def press() -> None:
        for number in numbers:
            while not when.exists():
                time.sleep(0.01)
            when.unlink()
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_is_passed_on_and_nothing_starts_again(tmp_path: Path) -> None:
    text = f"""
    os.chdir({str(tmp_path)!r})
    seen = 0
    def tell():
        open(f'{{{{rank}}}}-{{{{seen}}}}', 'w')
        if rank == '1':
            while not os.path.exists(f'0-{{{{seen}}}}'): time.sleep(.01)
            os.remove(f'0-{{{{seen}}}}')
            open('ready', 'w')
    def note(*_):
        global seen
        seen += 1
        if seen == {{}}: sys.exit({{}})
        tell()
    signal.signal(signal.SIGINT, note)
    tell()
    time.sleep(30); time.sleep(30)
    """
    for presses, status in ((1, 0), (2, 130)):
        thread = pressed(tmp_path / "ready", *[signal.SIGINT] * presses)
        assert launched(text.format(presses, status), tmp_path) == (status, [])
        thread.join()
    thread = pressed(tmp_path / "ready", signal.SIGTERM)
    assert launched(text.format(3, 0), tmp_path) == (143, [])
    thread.join()


def test_what_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use 1 rank or more, and 0 restarts or more"):
        launched("", tmp_path, restarts=-1)
    with pytest.raises(ConfigError, match="--limit 0.5 is too short"):
        supervise(script(""), num_ranks=2, notes=tmp_path, limit_seconds=0.5, say=print)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="--ranks 2 starts ranks of its own, and this is one of 4 already"):
        launched("", tmp_path)
