"""Learns from a folder that grows, for as long and in as much memory as is allowed.

Here        `learn_growing`, Round.
Elsewhere   learning once (continual/learn.py).
Promise     a shard counts when it is whole: it is read once it is a whole Parquet file that no longer grows. What was
            learnt from is written with the task, so that a process that was killed goes on with the next shard. No
            more records are held than the memory allows: the newest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dougong.continual.learn import LearnConfig, Learnt, learn
from dougong.continual.rehearsal import RehearsalStore
from dougong.continual.tasks import read_parts, remove_task
from dougong.core.bundle import read_bundle
from dougong.core.errors import DataError
from dougong.data.split import Inseparable
from dougong.data.table import table_of_rows

KEPT_PARTS: Final = 2
"""The newest, and the one before it to go back to."""


class Round(NamedTuple):
    """What one look at the folder led to."""

    learnt: Learnt
    shards: tuple[str, ...]
    left_out: tuple[str, ...]
    """Older shards that were beyond the memory allowed."""


def learn_growing(
    bundle: Path,
    name: str,
    folder: Path,
    config: LearnConfig,
    *,
    seconds: float,
    most_bytes: int,
    every_seconds: float = 5.0,
    rounds: int | None = None,
    fewest: int = 20,
    rehearsal: RehearsalStore | None = None,
    description: str = "",
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Round]:
    """Learn whenever at least `fewest` new records have come, until the time is over, or so many `rounds`.

    Each round goes on from what the task knows, on as many of the newest shards as fit; a round that has begun is
    ended. The part that is left stands for the earlier ones.

    Raises:
        DataError: the folder is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Name the one in which Parquet files appear.")
    ends = time.monotonic() + seconds
    sizes: dict[str, int] = {}
    done = 0
    longest = 0.0
    alike: list[str] = []
    """New shards whose records all hang together, so that none can be held out."""

    while time.monotonic() + longest < ends and (rounds is None or done < rounds):
        learnt_from = _learnt_from(bundle, name)
        found = {path.name: path for path in sorted(folder.glob("*.parquet"))}
        # One that grew since the last look is still being written.
        steady = [each for each, path in found.items() if sizes.get(each) == path.stat().st_size and _is_whole(path)]
        sizes = {each: path.stat().st_size for each, path in found.items()}
        new = [each for each in steady if each not in learnt_from]
        if not new or new == alike or sum(pq.read_metadata(found[each]).num_rows for each in new) < fewest:
            pause(min(every_seconds, max(0.0, ends - time.monotonic())))
            continue
        order = sorted(steady, key=lambda each: (each in new, found[each].stat().st_mtime_ns, each), reverse=True)
        chosen: list[pa.Table] = []
        held = 0
        used: list[str] = []
        for each in order:
            rows = pq.read_table(found[each])
            if chosen and (held + rows.nbytes > most_bytes or not rows.schema.equals(chosen[0].schema)):
                continue
            if not chosen and rows.nbytes > most_bytes:
                rows = rows.slice(0, max(1, int(rows.num_rows * most_bytes / rows.nbytes)))
                say(f"{each} is beyond the memory allowed: its first {rows.num_rows} records are learnt")
            chosen.append(rows)
            used.append(each)
            held += rows.nbytes
        left_out = tuple(each for each in new if each not in used)
        started = time.monotonic()
        # Of a round that was killed: the next one has other shards, and cannot go on with it.
        work = bundle.resolve().parent / f".{bundle.resolve().name}.learning" / name
        shutil.rmtree(work, ignore_errors=True)
        say(f"{len(used)} shards, {sum(rows.num_rows for rows in chosen)} records")
        try:
            learnt = learn(
                bundle,
                name,
                table_of_rows(pa.concat_tables(chosen), folder),
                config,
                description=description,
                target=target,
                columns=columns,
                rehearsal=rehearsal,
                work=work,
                covers_earlier=True,
                # What could not be held counts as seen: it would be tried again for ever.
                note={"shards": sorted({*learnt_from, *used, *left_out})},
            )
        except Inseparable as error:
            say(f"waiting for others: {error}")
            alike = new
            continue
        longest = max(longest, time.monotonic() - started)
        _forget_older(bundle, name)
        done += 1
        yield Round(learnt, tuple(used), left_out)


def _learnt_from(bundle: Path, name: str) -> set[str]:
    parts = [part.task for part in read_parts(bundle, read_bundle(bundle)) if part.task.name == name]
    found: Any = parts[-1].provenance.get("shards", []) if parts else []
    return {str(each) for each in found}


def _is_whole(path: Path) -> bool:
    try:
        return bool(pq.read_metadata(path).num_rows >= 0)
    except (pa.ArrowException, OSError):
        return False


def _forget_older(bundle: Path, name: str) -> None:
    numbers = [part.task.number for part in read_parts(bundle, read_bundle(bundle)) if part.task.name == name]
    for number in sorted(numbers)[:-KEPT_PARTS]:
        remove_task(bundle, name, number=number)
