"""The processes that train one model together, and how they agree.

Here        Ranks, ALONE; `announced_ranks`, before they are connected; `connected_ranks`.
Elsewhere   what they send of the model: tensors with gradients (gather.py), gradients (replicate.py); each one's part
            of a batch (data/position.py's Share); what each is doing (heartbeat.py); starting them (supervise.py).
Promise     one process alone sends nothing and is asked nothing. Nothing is ever unpickled: what ranks tell each other
            is JSON or the bytes of tensors. A mistake that the first rank meets while the others wait is raised on all.
            A rank that is gone, or hangs for longer than the limit, ends the others, with a line that names it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dougong.core import errors
from dougong.core.errors import ConfigError, DougongError, RankError
from dougong.data.position import Share
from dougong.engine.parallel.collectives import all_gather
from dougong.engine.parallel.heartbeat import (
    LIMIT_SECONDS,
    PATIENCE,
    Heartbeat,
    Phase,
    Watcher,
    check_limit,
    lost_rank,
    watched,
)

T = TypeVar("T")

LAUNCHER: Final = "DOUGONG_LAUNCHER"
"""The environment's variable with the process that started the ranks and watches them, if it is ours."""

RANK_LOST: Final = 3
"""Exit status of a process that ended because of another rank."""


class Ranks:
    """The processes of a group. Every method but `mark` and the properties must be called by all of them, in the same
    order."""

    def __init__(self, group: dist.ProcessGroup | None = None, heartbeat: Heartbeat | None = None) -> None:
        """None: this process alone."""
        self.group = group
        self.heartbeat = heartbeat
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This rank's part of every batch."""
        return Share(self.rank, self.world)

    def mark(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank begins to do, where somebody may want to know. Not an exchange."""
        if self.heartbeat is not None:
            self.heartbeat.mark(phase, step)

    def sums(self, *numbers: int) -> tuple[int, ...]:
        """Each number added up over the ranks."""
        if self.group is None:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums, group=self.group)
        return tuple(sums.tolist())

    def added_up(self, x: Tensor) -> Tensor:
        """This one of all ranks; in its own type, so that floats of many ranks are rounded alike on all."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def every(self, flag: bool) -> bool:
        """Whether it is up on all ranks."""
        return self.sums(int(flag))[0] == self.world

    def tell(self, value: Any) -> list[Any]:
        """What each rank has to say, by rank. Anything that JSON can hold."""
        if self.group is None:
            return [value]
        texts = self._gathered(torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8))
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all ranks, by rank; each may have another number of them, also none. Without gradients.

        A rank without rows need not know what a row looks like.
        """
        if self.group is None:
            return x
        shapes = self.tell([list(x.shape), str(x.dtype).removeprefix("torch.")])
        shape, dtype_name = next((told for told in shapes if told[0][0]), shapes[0])
        dtype: torch.dtype = getattr(torch, dtype_name)
        x = x.detach().cpu().contiguous() if x.shape[0] else torch.empty((0, *shape[1:]), dtype=dtype)
        parts = self._gathered(x.reshape(-1).view(torch.uint8))
        return torch.cat([part.view(dtype).reshape(-1, *shape[1:]) for part in parts if part.numel()] or [x])

    def after_first(self, work: Callable[[], T]) -> T:
        """The first rank works, then all others do the same work and find what it left on the disk.

        Raises:
            DougongError: what the first one raised.
        """
        if self.group is None:
            return work()
        result: list[T] = []
        told: dict[str, str] | None = None
        if self.first:
            try:
                result.append(work())
            except DougongError as error:
                told = {"kind": type(error).__name__, "message": str(error)}
        told = self._from_first(told)
        if told is not None:
            raise _mistake(told["kind"])(told["message"])
        return result[0] if result else work()

    def first_says(self, work: Callable[[], T]) -> T:
        """What the first rank finds, told to all. Anything that JSON can hold.

        Raises:
            DougongError: what the first one raised.
        """
        if self.group is None:
            return work()
        found: T | None = self.after_first(work if self.first else lambda: None)
        said: T = self._from_first(found)
        return said

    def wait(self) -> None:
        """Go on when all have come here."""
        self.sums(0)

    def _from_first(self, value: Any) -> Any:
        return self.tell(value if self.first else None)[0]

    def _gathered(self, content: Tensor) -> list[Tensor]:
        """Bytes of all ranks. The sizes go first, since a collective needs the same size everywhere."""
        assert self.group is not None
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = content.numel()
        dist.all_reduce(sizes, group=self.group)
        longest = int(sizes.max())
        if longest == 0:
            return [content] * self.world
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        everything = torch.empty(self.world * longest, dtype=torch.uint8)
        all_gather(everything, padded, self.group)
        # Copies: a part in the middle need not begin where its numbers may.
        return [
            part[:size].clone() for part, size in zip(torch.split(everything, longest), sizes.tolist(), strict=True)
        ]


ALONE: Final = Ranks()
"""One process that is asked nothing."""


class Announced(NamedTuple):
    """What this process is told that it will be."""

    rank: int
    world: int
    per_node: int


def announced_ranks(environment: Mapping[str, str] = os.environ) -> Announced | None:
    """Which of `torchrun`'s ranks this process is, before any is connected; None where it started none.

    Raises:
        ConfigError: the environment names some of what is needed to connect, and lacks the rest.
    """
    if "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set and {missing[0]} is not: the ranks cannot find each other. "
            "Start with --ranks or torchrun, or unset WORLD_SIZE."
        )
    world = int(environment["WORLD_SIZE"])
    return Announced(int(environment["RANK"]), world, int(environment.get("LOCAL_WORLD_SIZE", world)))


def end_here(message: str) -> None:
    """Say why, and end this process at once: whoever waits for a rank that hangs cannot be told otherwise."""
    print(f"dougong: {message}", file=sys.stderr, flush=True)
    os._exit(RANK_LOST)


@contextlib.contextmanager
def connected_ranks(
    environment: Mapping[str, str] = os.environ,
    *,
    notes: Path | None = None,
    limit_seconds: float = LIMIT_SECONDS,
    end: Callable[[str], None] = end_here,
) -> Iterator[Ranks]:
    """The ranks that `torchrun` or our launcher started, connected inside; ALONE where neither did.

    Each kind of device has its own back end (gloo for the CPU, NCCL for CUDA), and what is sent goes by where it lies.
    In the folder `notes`, which all can read, each notes what it is doing; then no rank waits for longer than the limit
    for one that does nothing, but is told by `end`, which must not return.

    Raises:
        ConfigError: the environment names some of what is needed to connect, and lacks the rest.
        RankError: another rank is gone.
    """
    if announced_ranks(environment) is None:
        yield ALONE
        return
    check_limit(limit_seconds)
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    heartbeat = None if notes is None else Heartbeat(notes, rank)
    with contextlib.ExitStack() as stack:
        if heartbeat is not None:
            assert notes is not None
            watch = _watch(environment, notes, world, limit_seconds)
            stack.enter_context(watched(heartbeat, watch, min(1.0, limit_seconds / 5), end))
        try:
            with _process_group(environment, limit_seconds):
                yield Ranks(dist.group.WORLD, heartbeat)
        except RuntimeError as error:
            if heartbeat is None or notes is None or not _is_broken_connection(error):
                _last_words(heartbeat, error)
                raise
            fault = lost_rank(notes, world, rank)
            lost = RankError(go_on("the connection to another rank broke" if fault is None else fault.message))
            _last_words(heartbeat, lost)
            raise lost from None
        except BaseException as error:
            _last_words(heartbeat, error)
            raise
    if heartbeat is not None:
        heartbeat.close()


@contextlib.contextmanager
def _process_group(environment: Mapping[str, str], limit_seconds: float) -> Iterator[None]:
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(environment.get("LOCAL_RANK", "0")))
    # Only where no file can be watched, since the other ranks are on machines with another disk.
    timeout = datetime.timedelta(seconds=max(1800.0, (PATIENCE + 1) * limit_seconds))
    dist.init_process_group(timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _watch(environment: Mapping[str, str], notes: Path, world: int, limit_seconds: float) -> Callable[[], str | None]:
    """What a rank looks for beside its work: a launcher watches for all, and is itself watched."""
    launcher = environment.get(LAUNCHER)
    if launcher is not None:
        return lambda: None if os.getppid() == int(launcher) else go_on("the process that launched the ranks is gone")
    watcher = Watcher(notes, world, limit_seconds)

    def look() -> str | None:
        fault = watcher.look()
        return None if fault is None else go_on(fault.message)

    return look


def go_on(message: str) -> str:
    """With what would work, if that is not said already."""
    return (
        message
        if "--resume" in message
        else f"{message}. Go on from the last whole checkpoint with --resume, on as many ranks as you like."
    )


def _last_words(heartbeat: Heartbeat | None, error: BaseException) -> None:
    if heartbeat is not None:
        said = str(error) if isinstance(error, DougongError) else f"{type(error).__name__}: {error}"
        heartbeat.fail(said, lost=isinstance(error, RankError))


def _is_broken_connection(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _mistake(kind: str) -> type[DougongError]:
    found = getattr(errors, kind, DougongError)
    assert issubclass(found, DougongError)
    return found
