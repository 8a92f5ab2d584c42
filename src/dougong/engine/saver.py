"""Checkpoints that are written while training goes on.

Here        Saver, Saved.
Elsewhere   what a checkpoint holds, and what counts as one (engine/checkpoint.py); when to save (engine/trainer.py).
Promise     training stands still for a copy in memory; where state lies on the disk because there is no room for it,
            until it is written. A checkpoint counts from the moment in which all of its files
            are on the disk, on whichever ranks they were written: a kill before leaves the one before. Ranks agree in
            exchanges of the training thread alone; the thread beside it touches the disk and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch.optim import Optimizer

from dougong.core.errors import CheckpointError
from dougong.engine.average import WeightAverage
from dougong.engine.checkpoint import (
    RunState,
    copy_pieces,
    copy_whole,
    discard,
    prune_checkpoints,
    publish,
    write_copied,
)
from dougong.engine.parallel.layout import Layout
from dougong.engine.random_state import random_state
from dougong.engine.staging import Staging

Sums = dict[str, str]


class Saved(NamedTuple):
    """A checkpoint that counts from now on."""

    state: RunState
    path: Path
    pause_seconds: float
    wait_seconds: float


@dataclass
class _Beside:
    """Work in a thread beside this one."""

    work: Callable[[], Sums]
    sums: Sums = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.sums = self.work()
        except Exception as error:  # raised by whoever waits for it
            self.error = error

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


@dataclass
class _UnderWay:
    """A checkpoint that does not count yet."""

    state: RunState
    pause_seconds: float
    wait_seconds: float
    beside: _Beside
    sums: Sums | None = None
    """Of all ranks' files, once all are written: what is under way then is publishing, by the first rank."""


class Saver:
    """Writes a run's checkpoints, one at a time. Methods are called by all ranks together, but for `close`."""

    def __init__(
        self, folder: Path, layout: Layout, optimizer: Optimizer, average: WeightAverage | None, *, keep: int
    ) -> None:
        """`folder` is that of all checkpoints, of which the last `keep` stay, and the best."""
        self.folder, self.layout, self.optimizer, self.average, self.keep = folder, layout, optimizer, average, keep
        self._ranks = layout.mesh.ranks
        self._staging = Staging() if layout.shelved is None else None
        self._now: _UnderWay | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._now is not None and self._now.beside.busy

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return self._now is not None and not self._now.beside.busy and self._now.beside.error is not None

    def begin(self, state: RunState) -> Saved | None:
        """Take the model as it stands, and begin to write it. One that is still being written is waited for, and
        returned.

        Raises:
            CheckpointError: that one could not be written.
        """
        began = time.perf_counter()
        before = self.finish()
        waited = time.perf_counter() - began
        if self.layout.is_whole:
            random_states = self._ranks.tell(random_state())
            if not self._ranks.first:
                copied = None
            else:
                copied = copy_whole(
                    state, self.layout.model, self.optimizer, self.average, random_states, self._staging
                )
        else:
            copied = copy_pieces(state, self.layout, self.optimizer, self.average, self._staging)
        beside = _Beside(lambda: {} if copied is None else write_copied(self.folder, copied))
        if self._staging is None:
            beside.wait()  # what it writes is what training will change
        self._now = _UnderWay(state, time.perf_counter() - began, waited, beside)
        return before

    def look(self, busy: bool, failed: bool) -> Saved | None:
        """Go a step further with what is under way, if it is time: `busy` and `failed` are whether some rank is. What
        counts from now on is returned, once.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        return None if busy and not failed else self._further()

    def finish(self) -> Saved | None:
        """Wait until what is under way counts.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        saved = None
        while self._now is not None:
            saved = self._further()
        return saved

    def close(self) -> Saved | None:
        """After an error, on this rank alone: no file is written any more. What was taken before the error counts,
        where no other rank has a part in it."""
        now, self._now = self._now, None
        if now is None:
            return None
        now.beside.wait()
        if now.beside.error is not None or not self._ranks.first:
            return None
        if now.sums is None:
            if not self.layout.is_whole:
                return None
            with contextlib.suppress(OSError):  # there is an error to tell already
                self._publish(now.state.step, now.beside.sums)
                return self._saved(now)
            return None
        return self._saved(now)

    def _further(self) -> Saved | None:
        now = self._now
        if now is None:
            return None
        now.beside.wait()
        error = now.beside.error
        told = self._ranks.tell({"sums": now.beside.sums, "error": None if error is None else _reason(error)})
        reasons = [each["error"] for each in told if each["error"] is not None]
        if reasons:
            self._now = None
            if self._ranks.first:
                discard(self.folder, now.state.step)
            if error is not None and not isinstance(error, OSError | SafetensorError):
                raise error
            raise CheckpointError(
                f"the checkpoint of step {now.state.step} cannot be written to {self.folder} ({reasons[0]}). "
                "Make room there and go on with the run by resume, or begin another one elsewhere."
            ) from error
        if now.sums is None:
            sums = now.sums = {name: found for each in told for name, found in each["sums"].items()}
            step = now.state.step
            now.beside = _Beside(lambda: self._publish(step, sums) if self._ranks.first else {})
            return None
        self._now = None
        return self._saved(now)

    def _publish(self, step: int, sums: Sums) -> Sums:
        publish(self.folder, step, sums)
        prune_checkpoints(self.folder, self.keep)
        return sums

    def _saved(self, now: _UnderWay) -> Saved:
        path = self.folder / f"step-{now.state.step:08d}"
        return Saved(now.state, path, now.pause_seconds, now.wait_seconds)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
