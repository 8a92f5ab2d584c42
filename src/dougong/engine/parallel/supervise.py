"""Starts the ranks of a run on this machine, watches them, and starts all of them again where one is lost.

Here        `supervise`.
Elsewhere   what each rank is doing (heartbeat.py); connecting (ranks.py); going on (engine/trainer.py).
Promise     a rank that dies, or hangs for longer than the limit, ends all others at once, with one line that says which
            one, in which step, at what; then all go on from the last whole checkpoint, as often as is allowed. What a
            user can mend is said once and never tried again. No process is left behind, not even one that a rank had
            started; if this one is killed, its ranks end by themselves.

Ranks meet at a store that this process holds, so that no port has to be free a second later, which it then may not be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

import torch.distributed as dist

from dougong.core.errors import ConfigError, RankError
from dougong.engine.parallel.heartbeat import LIMIT_SECONDS, PATIENCE, Watcher, check_limit, read_sign
from dougong.engine.parallel.ranks import LAUNCHER, RANK_LOST, go_on

LOOK_SECONDS: Final = 0.1
"""Between two looks at the processes."""

SETTLE_SECONDS: Final = 2.0
"""In which a rank that is the cause shows, after one that only suffers from it has ended."""

END_SECONDS: Final = 5.0
"""From the friendly signal to the other one."""

START_SECONDS: Final = 300.0
"""Until a rank has loaded what it needs and notes what it is doing."""

MENDABLE: Final = (2,)
"""Exit statuses by which a rank says that trying again would not help."""

INTERRUPTED: Final = 130

Command = Callable[[bool], Sequence[str]]
"""What to run as each rank; it is told whether ranks have been started before."""


class Loss(NamedTuple):
    """Why the ranks have to be ended."""

    rank: int
    message: str
    status: int = 1
    """Exit status of the rank, where it has one."""


def supervise(
    command: Command,
    *,
    num_ranks: int,
    notes: Path,
    restarts: int = 2,
    limit_seconds: float = LIMIT_SECONDS,
    say: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Run `command` as so many ranks to its end, and return its exit status. In the folder `notes` ranks note what they
    are doing. The first rank has this process's own output; what others complain of is shown with their number.

    The first Ctrl-C is passed on, by which ranks stop after a checkpoint; so is the second, which stops them at once.

    Raises:
        ConfigError: so few ranks, restarts or seconds make no sense, or this is itself a rank.
        RankError: a rank was lost once more than is allowed.
    """
    if num_ranks < 1 or restarts < 0:
        raise ConfigError(f"--ranks {num_ranks} --restarts {restarts}: use 1 rank or more, and 0 restarts or more.")
    check_limit(limit_seconds)
    if "WORLD_SIZE" in environment:
        raise ConfigError(
            f"--ranks {num_ranks} starts ranks of its own, and this is one of {environment['WORLD_SIZE']} already. "
            "Leave --ranks out under torchrun, or unset WORLD_SIZE."
        )
    with _signals_noted() as noted:
        for launch in range(restarts + 1):
            shutil.rmtree(notes, ignore_errors=True)
            launched = _Launch(command(launch > 0), num_ranks, notes, limit_seconds, environment, noted)
            loss = None
            try:
                loss = launched.run()
            finally:
                launched.end(None if loss is None else loss.rank)
                complaints = launched.complaints()
                shutil.rmtree(notes, ignore_errors=True)
            if loss is None:
                return 0
            for complaint in complaints:
                print(complaint, file=sys.stderr)
            if loss.status in MENDABLE or noted.terminated or (noted.interrupts and loss.status == INTERRUPTED):
                return loss.status
            if noted.interrupts or launch == restarts:
                raise RankError(go_on(loss.message))
            say(f"{loss.message}. All ranks start again, time {launch + 1} of {restarts}.")
    raise AssertionError("the loop returns or raises")


class _Noted:
    """Signals that this process got."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminated = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.terminated = True


@contextlib.contextmanager
def _signals_noted() -> Iterator[_Noted]:
    noted = _Noted()
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield noted
        return
    before = {number: signal.signal(number, noted.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Launch:
    """All ranks, once."""

    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        notes: Path,
        limit_seconds: float,
        environment: Mapping[str, str],
        noted: _Noted,
    ) -> None:
        self.notes, self.num_ranks, self.limit_seconds = notes, num_ranks, limit_seconds
        self.store = dist.TCPStore(  # type: ignore[attr-defined]  # which torch has, and its stubs lack
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self.watcher = Watcher(notes, num_ranks, limit_seconds)
        self.started = time.monotonic()
        self.noted = noted
        self.processes: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []
        self.said: list[list[str]] = [[] for _ in range(num_ranks)]
        shared = {
            **environment,
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # by which torch knows that no rank holds the store
            LAUNCHER: str(os.getpid()),
        }
        shared.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_ranks)))
        if sys.platform == "linux":
            shared.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody outside is to reach them
        try:
            for rank in range(num_ranks):
                self._start(rank, command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        except BaseException:
            self.end(None)
            raise

    def _start(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # Groups of their own: the terminal's Ctrl-C then comes once, from here, and what they start can be ended.
        process = subprocess.Popen(  # noqa: S603  # the caller's own command
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        self.processes.append(process)
        if rank:
            reader = threading.Thread(target=self._read, args=(rank, process), daemon=True)
            reader.start()
            self.readers.append(reader)

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        """Mistakes are kept, since all ranks meet most of them; what else is said is shown at once."""
        assert process.stderr is not None
        own = f"dougong (rank {rank}): "
        with process.stderr:
            for line in process.stderr:
                if line.startswith(own):
                    self.said[rank].append(line.removeprefix(own).rstrip("\n"))
                else:
                    print(f"rank {rank}: {line.rstrip()}", file=sys.stderr, flush=True)

    def run(self) -> Loss | None:
        """Wait for all to end well, or for one to be lost; Ctrl-C is passed on meanwhile."""
        passed_on = 0
        while True:
            if self.noted.terminated:
                return Loss(0, "ended from outside", 128 + signal.SIGTERM)
            if passed_on < self.noted.interrupts:
                passed_on += 1
                self._signal(signal.SIGINT)
            ended = {rank: status for rank in range(self.num_ranks) if (status := self._status(rank)) is not None}
            if len(ended) == self.num_ranks and not any(ended.values()):
                return None
            loss = self._lost(ended) or self._hanging(ended)
            if loss is not None:
                return loss
            time.sleep(LOOK_SECONDS)

    def _status(self, rank: int) -> int | None:
        """How a rank ended, which is asked without letting it go: its number stays its own until `end`."""
        process = self.processes[rank]
        if process.returncode is not None:
            return process.returncode
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _signal(self, number: int) -> None:
        for rank, process in enumerate(self.processes):
            if self._status(rank) is None:
                os.kill(process.pid, number)  # as none has been let go, the number is still its own

    def _lost(self, ended: Mapping[int, int]) -> Loss | None:
        failed = {rank: status for rank, status in ended.items() if status}
        if not failed:
            return None
        until = time.monotonic() + SETTLE_SECONDS
        while all(status == RANK_LOST for status in failed.values()) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS / 4)
            failed = {rank: status for rank in range(self.num_ranks) if (status := self._status(rank))}
        # Killed before failed, failed before suffering from it.
        rank = min(failed, key=lambda each: (failed[each] > 0, failed[each] == RANK_LOST, each))
        status, sign = failed[rank], read_sign(self.notes, rank)
        doing = "before it began" if sign is None else sign.doing
        if status < 0:
            return Loss(rank, f"rank {rank} of {self.num_ranks} was killed ({_signal_name(-status)}) {doing}", status)
        if status == RANK_LOST and sign is not None:
            return Loss(rank, f"rank {rank} of {self.num_ranks} lost the others {doing}", status)
        said = f": {sign.said.splitlines()[0]}" if sign is not None and sign.said else ""
        return Loss(rank, f"rank {rank} of {self.num_ranks} ended with status {status} {doing}{said}", status)

    def _hanging(self, ended: Mapping[int, int]) -> Loss | None:
        fault = self.watcher.look()
        if fault is not None:
            return Loss(fault.rank, fault.message)
        if time.monotonic() - self.started > max(START_SECONDS, PATIENCE * self.limit_seconds):
            for rank in range(self.num_ranks):
                if rank not in self.watcher.met and rank not in ended:
                    return Loss(rank, f"rank {rank} of {self.num_ranks} has not begun")
        return None

    def end(self, lost: int | None) -> None:
        """End whoever still runs, and all that they have started. One that is lost may not hear the friendly signal."""
        if lost is not None and not self.noted.terminated and self._status(lost) is None:
            os.kill(self.processes[lost].pid, signal.SIGKILL)
        self._signal(signal.SIGTERM)
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until and any(self._status(rank) is None for rank in range(len(self.processes))):
            time.sleep(LOOK_SECONDS / 4)
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for reader in self.readers:
            reader.join(END_SECONDS)

    def complaints(self) -> list[str]:
        """What ranks after the first have said and no rank before them."""
        first = read_sign(self.notes, 0)
        told = [] if first is None else [first.said]
        found = []
        for rank, lines in enumerate(self.said):
            for line in lines:
                if line not in told:
                    told.append(line)
                    found.append(f"dougong (rank {rank}): {line}")
        return found


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
