"""A run's curves as TensorBoard event files.

Here        TensorBoard, a listener.
Elsewhere   the events (core/events.py); looking at them (the tensorboard program).
Promise     loads no tensor library; on resume, TensorBoard forgets the steps that are trained again; if the files
            cannot be written any more, that is said once on stderr and the run goes on.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from dougong.core.events import Evaluated, Event, RecordsSetAside, RunFinished, RunStarted, StepDone

FLUSH_SECONDS = 2.0


class TensorBoard:
    """Writes what can be drawn; opens its file at the first event.

    Written here and now, not through tensorboard's own queue and thread: an error then shows where it happens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._records: RecordWriter | None = None
        self._flushed = 0.0
        self._failed = False

    def __call__(self, event: Event) -> None:
        if self._failed:
            return
        try:
            if isinstance(event, RunStarted):  # also of a run that was killed before its first checkpoint
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._write(event_pb2.Event(wall_time=event.time, step=event.step + 1, session_log=start))
            scalars = scalars_of(event)
            if scalars:
                values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
                summary = summary_pb2.Summary(value=values)
                self._write(event_pb2.Event(wall_time=event.time, step=event.step, summary=summary))
        except OSError as error:
            self._fail(error)
        if isinstance(event, RunFinished):
            self.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Put everything on the disk; a later event opens another file."""
        if self._file is not None:
            file, self._file, self._records = self._file, None, None
            try:
                file.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            print(f"dougong: no more curves in {self._folder}: {error}", file=sys.stderr)
        self.close()

    def _write(self, record: event_pb2.Event) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The nanoseconds keep two files of one process apart.
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
            self._file = (self._folder / name).open("wb")
            self._records = RecordWriter(self._file)
            head = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
            self._records.write(head.SerializeToString())
        assert self._records is not None
        self._records.write(record.SerializeToString())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


def scalars_of(event: Event) -> dict[str, float]:
    """What an event adds to the curves, by tag."""
    if isinstance(event, StepDone):
        return {
            "train/loss": event.loss,
            "train/grad_norm": event.grad_norm,
            "train/learning_rate": event.learning_rate,
            "speed/records_per_second": event.num_records / max(event.seconds, 1e-9),
            "speed/wait_ratio": event.wait_seconds / max(event.seconds, 1e-9),
        }
    if isinstance(event, Evaluated):
        return {f"{event.split}/{event.condition}/{name}": value for name, value in event.metrics.items()}
    if isinstance(event, RecordsSetAside):
        return {"records/set_aside": float(event.count)}
    return {}
