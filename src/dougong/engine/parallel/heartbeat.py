"""What each rank is doing just now, in a small file that others can read when it no longer answers.

Here        Heartbeat, which a rank keeps; Watcher, which finds the one that hangs; `lost_rank`, the one that is gone;
            `following`, which notes the modality that a model works on.
Elsewhere   who notes what (engine/trainer.py, data/loader.py); ending and starting ranks (supervise.py).
Promise     a note costs about a microsecond and waits for nothing: it goes into memory that the system writes out, also
            after a kill. That a rank waits for the others is seen from where its main thread stands, whatever the
            layout and whoever asked for the exchange. Clocks of other machines are never compared with this one's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from torch import Tensor, nn

from dougong.core.errors import ConfigError, RunError
from dougong.nn.block_stack import BlockStack

Phase = Literal["starting", "reading", "working", "judging", "saving", "finishing"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
PATIENT: Final[frozenset[Phase]] = frozenset({"starting", "finishing"})
"""Before the first step and after the last, when one rank may read tables or write reports for all of them."""

PATIENCE: Final = 6
"""Times the limit, that such a phase may take."""

LIMIT_SECONDS: Final = 600.0
"""For any one thing that a rank does, where nothing else is said."""

GONE_SECONDS: Final = 2.0
"""Until a process that broke a connection is seen to have ended."""

State = Literal["running", "failed", "lost"]
STATES: Final[tuple[State, ...]] = get_args(State)
"""failed: by its own fault, or nobody's. lost: another rank was gone."""

# What the main thread notes, what the watching thread notes, and last words, which never overlap.
_MAIN: Final = struct.Struct("<4sIQqdBB64s64s")
_SEEN: Final = struct.Struct("<QB160s")
_SAID: Final = struct.Struct("<2048s")
_MAGIC: Final = b"beat"
_SIZE: Final = _MAIN.size + _SEEN.size + _SAID.size


class Sign(NamedTuple):
    """What a rank has noted last."""

    pid: int
    num_notes: int

    step: int
    """That it has begun; 0 before the first."""

    time: float
    """By its own clock."""

    phase: Phase
    state: State
    modality: str
    """That it read or worked on; empty where it is not known."""

    host: str
    num_looks: int
    """Of times that the thread beside the main one came round."""

    waits: bool
    """For other ranks."""

    where: str
    """Its main thread stood."""

    said: str
    """How it failed."""

    @property
    def doing(self) -> str:
        """Where it was, in words."""
        of = f" {self.modality}" if self.modality and self.phase in ("reading", "working", "judging") else ""
        return f"in step {self.step}, {self.phase}{of}" if self.step else f"before its first step, {self.phase}{of}"


def check_limit(seconds: float) -> None:
    """
    Raises:
        ConfigError: no rank could keep it.
    """
    if not seconds >= 1:
        raise ConfigError(f"--limit {seconds:g} is too short a time for a step. Use 1 or more; usual is 600.")


class Heartbeat:
    """A rank's own file."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Raises: RunError: the folder cannot be written."""
        self.path = folder / f"rank-{rank}"
        self._num_notes = self._num_looks = self.step = 0
        self._phase, self._state = PHASES.index("starting"), STATES.index("running")
        self._modality = b""
        self._host = socket.gethostname().encode()[:64]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f".rank-{rank}.new"
            new.write_bytes(bytes(_SIZE))
            with new.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _SIZE)
            self._write()
            new.replace(self.path)  # what an older process still writes goes to a file without a name
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}). Name another folder by --out.") from None

    def mark(self, phase: Phase, step: int | None = None) -> None:
        """Something else begins; `step` counts those that have begun."""
        self._phase, self._modality = PHASES.index(phase), b""
        if step is not None:
            self.step = step
        self._write()

    def modality(self, name: str) -> None:
        """The same goes on with a modality, or with none in particular: an empty name."""
        self._modality = name.encode()[:64]
        self._write()

    def look(self, thread: int) -> None:
        """Note where a thread stands."""
        self._num_looks += 1
        waits, where = _standing(thread)
        _SEEN.pack_into(self._memory, _MAIN.size, self._num_looks, waits, where.encode()[-160:])

    def fail(self, said: str, *, lost: bool = False) -> None:
        """Last words."""
        _SAID.pack_into(self._memory, _MAIN.size + _SEEN.size, said.encode()[:2048])
        self._state = STATES.index("lost" if lost else "failed")
        self._write()

    def close(self) -> None:
        """All went well: nothing is left of it."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still there
            self.path.parent.rmdir()

    def _write(self) -> None:
        self._num_notes += 1
        _MAIN.pack_into(
            self._memory,
            0,
            _MAGIC,
            os.getpid(),
            self._num_notes,
            self.step,
            time.time(),
            self._phase,
            self._state,
            self._modality,
            self._host,
        )


def read_sign(folder: Path, rank: int) -> Sign | None:
    """What a rank has noted; None where it has not begun, or is through."""
    try:
        content = (folder / f"rank-{rank}").read_bytes()
    except OSError:
        return None
    if len(content) != _SIZE or not content.startswith(_MAGIC):
        return None
    _, pid, count, step, noted, phase, state, modality, host = _MAIN.unpack_from(content)
    seen, waits, where = _SEEN.unpack_from(content, _MAIN.size)
    (said,) = _SAID.unpack_from(content, _MAIN.size + _SEEN.size)
    if phase >= len(PHASES) or state >= len(STATES):
        return None
    return Sign(
        pid, count, step, noted, PHASES[phase], STATES[state], _text(modality), _text(host), seen, bool(waits),
        _text(where), _text(said),
    )  # fmt: skip


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="ignore")


class Fault(NamedTuple):
    """A rank that the others cannot go on with."""

    rank: int
    message: str


class Watcher:
    """Looks at all ranks' files again and again. Only what changes between two looks counts, by this
    process's clock."""

    def __init__(self, folder: Path, world: int, limit_seconds: float) -> None:
        self.folder, self.world, self.limit_seconds = folder, world, limit_seconds
        self._noted: dict[int, tuple[int, float]] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        self.met: set[int] = set()

    def look(self) -> Fault | None:
        """The rank that hangs, if one does: it has noted nothing for longer than the limit and waits for nobody, or
        its process does not come round at all. Where all wait for each other, the one that is least far."""
        now = time.monotonic()
        signs = {rank: sign for rank in range(self.world) if (sign := read_sign(self.folder, rank)) is not None}
        self.met |= signs.keys()
        ended = next(((rank, sign.said) for rank, sign in signs.items() if sign.state == "lost" and sign.said), None)
        signs = {rank: sign for rank, sign in signs.items() if sign.state == "running"}
        over: dict[int, float] = {}
        stuck: dict[int, float] = {}
        for rank, sign in signs.items():
            still = now - _since(self._noted, rank, sign.num_notes, now)
            frozen = now - _since(self._seen, rank, sign.num_looks, now)
            allowed = self.limit_seconds * (PATIENCE if sign.phase in PATIENT else 1)
            if still > allowed:
                over[rank] = still
                if not sign.waits or frozen > self.limit_seconds / 2:
                    stuck[rank] = still
        if not stuck and len(over) < max(1, len(signs)):
            return None
        if stuck:
            rank = max(stuck, key=lambda each: stuck[each])
            return Fault(rank, _hangs(rank, self.world, signs[rank], stuck[rank]))
        if ended is not None:  # the others wait for one that has ended itself already, and said why
            return Fault(*ended)
        absent = next((rank for rank in range(self.world) if rank not in self.met), None)
        if absent is not None:
            return Fault(absent, f"rank {absent} of {self.world} has not begun, and the others wait for it")
        rank = min(over, key=lambda each: (signs[each].step, -over[each]))
        sign = signs[rank]
        text = f"all ranks have waited for each other for {over[rank]:.0f} seconds; rank {rank} of {self.world} is "
        return Fault(rank, text + f"least far, {sign.doing} ({sign.where})")


def _since(known: dict[int, tuple[int, float]], rank: int, count: int, now: float) -> float:
    """Since when a count has not moved."""
    if rank not in known or known[rank][0] != count:
        known[rank] = (count, now)
    return known[rank][1]


def _hangs(rank: int, world: int, sign: Sign, seconds: float) -> str:
    where = f" ({sign.where})" if sign.where else ""
    return f"rank {rank} of {world} has shown no sign of life for {seconds:.0f} seconds {sign.doing}{where}"


def lost_rank(folder: Path, world: int, own_rank: int | None = None) -> Fault | None:
    """The rank whose process is gone or has failed, once it is seen to have: this is asked after a connection broke."""
    until = time.monotonic() + GONE_SECONDS
    while True:
        signs = {rank: read_sign(folder, rank) for rank in range(world) if rank != own_rank}
        known = {rank: sign for rank, sign in signs.items() if sign is not None}
        for rank, sign in known.items():
            if sign.state == "failed":
                return Fault(rank, f"rank {rank} of {world} failed {sign.doing}: {sign.said}")
        for rank, sign in known.items():
            if sign.state == "running" and sign.host == _own_host() and is_gone(sign.pid):
                return Fault(rank, f"rank {rank} of {world} was killed, or ended by itself, {sign.doing}")
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def _own_host() -> str:
    return _text(socket.gethostname().encode()[:64])


def is_gone(pid: int) -> bool:
    """Whether no such process runs on this machine; one that has ended and was not yet asked how does not run."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"


# What a rank notes of itself ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(
    heartbeat: Heartbeat, watch: Callable[[], str | None], every: float, end: Callable[[str], None]
) -> Iterator[None]:
    """A thread beside the main one: notes where that stands, and asks `watch` what is wrong; `end` is told, and ends
    the process, as the main thread may never come back."""
    main, through = threading.get_ident(), threading.Event()

    def work() -> None:
        while not through.wait(every):
            heartbeat.look(main)
            wrong = watch()
            if wrong is not None and not through.is_set():
                heartbeat.fail(wrong, lost=True)
                end(wrong)

    heartbeat.look(main)
    thread = threading.Thread(target=work, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join()


def _standing(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and where it stands."""
    innermost: Any = sys._current_frames().get(thread)
    if innermost is None:
        return False, ""
    # Whoever asked Python's own library for something is what counts: a rank that looks for the one that was lost
    # reads files.
    frame = innermost
    while frame is not None and _is_of_python(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    path = Path(frame.f_code.co_filename)
    # Every wait is called from torch's own functions, or from what is made of them here.
    waits = ("torch", "distributed") in zip(path.parts, path.parts[1:], strict=False) or path.parent == _HERE
    return waits, f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_of_python(file: str) -> bool:
    return file.startswith(("<frozen ", _PYTHON)) and not _INSTALLED.intersection(Path(file).parts)


_HERE: Final = Path(__file__).parent
_PYTHON: Final = sysconfig.get_path("stdlib") + os.sep
_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})


@contextlib.contextmanager
def following(model: BlockStack[Any, Any], heartbeat: Heartbeat | None) -> Iterator[None]:
    """Note before each block of the model which modality it is of."""
    if heartbeat is None:
        yield
        return

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda *_: heartbeat.modality(name)

    names = modalities_of_blocks(model)
    handles = [block.register_forward_pre_hook(note(name)) for block, name in zip(model.blocks, names, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def modalities_of_blocks(model: BlockStack[Any, Any]) -> list[str]:
    """Of each block, the only part of the model that its parameters belong to; empty where there is none."""
    owner: dict[Tensor, str] = {p: name for name, parameters in model.parts().items() for p in parameters}
    found = []
    for block in model.blocks:
        owners = {owner.get(parameter, "") for parameter in block.parameters()}
        found.append(owners.pop() if len(owners) == 1 else "")
    return found
