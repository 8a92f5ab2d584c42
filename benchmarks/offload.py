"""A decoder whose state is several times the memory (claim 7).

Here        `dougong train` under a hard limit, with its state on the disk, in memory without the limit, and in memory
            with it; the disk's bandwidth under the same limit.
Elsewhere   the limit (capped.py); bytes on many ranks (zero_bytes.py); options and the written result (harness.py).
Promise     the same recipe from the same seed; only `memory.offload` differs. What the disk allows is reckoned from
            bandwidths that are measured under the limit before and after the run, in a file as large as the state, read
            and written from end to end; and from the least bytes that a step can move: weights read twice and
            gradients written, then weights, gradients and both means read, and all but gradients written.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from capped import cap_folder, capped
from harness import run

from dougong.core.errors import DougongError
from dougong.core.events import read_events
from dougong.core.figures import Figure

CAP: Final = 768 * 2**20
STEPS: Final = 20
LAYERS: Final = 66
READ_EACH, WRITTEN_EACH = 24, 16
"""Bytes of each parameter, in a step."""

WORDS = 400
PIECE = 4 * 2**20

RECIPE = """
kind: decode
name: large
data:
  train: {table}
  loader: {{batch_size: 4, workers: 0}}
model:
  width: 512
  num_layers: {layers}
  num_heads: 8
  latent_rank: 192
  plain_width: 64
  turned_width: 32
  value_width: 64
  hidden: 2176
  experts: null
  writes: said
train:
  steps: {steps}
  precision: fp32
  checkpoint_seconds: null
  evaluate_every: 1000
memory:
  recompute: blocks
"""


class Ran(NamedTuple):
    """A run."""

    losses: list[float]
    seconds: list[float]
    parameters: int


class Bandwidth(NamedTuple):
    """Bytes a second."""

    read: float
    written: float


def measure(quick: bool) -> Iterator[Figure]:
    steps, layers = (3, 60) if quick else (STEPS, LAYERS)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as kept, cap_folder(CAP) as group:
        folder = Path(kept)
        recipe = written_recipe(folder, layers, steps)
        refused = train(recipe, folder / "refused", group)
        yield Figure(name="exit status in memory under the limit", value=refused.returncode, unit="", asked="<= 2")
        print(f"in memory under the limit: {refused.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        whole = ran(train(recipe, folder / "whole", None), folder / "whole")
        state = 12 * whole.parameters
        before = bandwidth(folder / "file", state, group)
        there = ran(train(recipe, folder / "there", group, "memory.offload=disk"), folder / "there")
        after = bandwidth(folder / "file", state, group)
    yield Figure(name="limit", value=CAP / 2**20, unit="MiB")
    yield Figure(name="weights and AdamW's means over the limit", value=state / CAP, unit="", asked=">= 4")
    yield Figure(name="steps", value=len(there.losses), unit="")
    differences = [abs(a - b) for a, b in zip(there.losses, whole.losses, strict=True)]
    yield Figure(
        name="largest difference of a loss to the run in memory", value=max(differences), unit="", asked="<= 0"
    )
    reads, writes = (sorted(pair) for pair in zip(before, after, strict=True))
    yield figure_of("disk, read", reads, "MB/s", 1e-6)
    yield figure_of("disk, written", writes, "MB/s", 1e-6)
    # The first step makes what the system has not laid out yet.
    seconds = there.seconds[1:]
    yield figure_of("step on the disk", seconds, "s")
    yield figure_of("step in memory, without the limit", whole.seconds[1:], "s")
    allowed = [whole.parameters * (READ_EACH / each.read + WRITTEN_EACH / each.written) for each in (before, after)]
    yield figure_of("what the disk allows", allowed, "s")
    middle = statistics.median(seconds)
    ratios = [middle / each for each in allowed]
    yield figure_of("step over what the disk allows", ratios, "", asked="<= 1.5")


def figure_of(name: str, values: list[float], unit: str, factor: float = 1.0, asked: str | None = None) -> Figure:
    """The median, from the least to the most."""
    low, middle, high = (factor * each for each in (min(values), statistics.median(values), max(values)))
    return Figure(name=name, value=middle, unit=unit, low=low, high=high, asked=asked)


def written_recipe(folder: Path, layers: int, steps: int) -> Path:
    chance = random.Random(0)  # noqa: S311, words that say nothing
    words = [f"w{number}" for number in range(WORDS)]
    table = folder / "train.jsonl"
    table.write_text(
        "\n".join(json.dumps({"said": " ".join(chance.choices(words, k=16))}) for _ in range(128)), encoding="utf-8"
    )
    recipe = folder / "large.yaml"
    recipe.write_text(RECIPE.format(table=table, layers=layers, steps=steps), encoding="utf-8")
    return recipe


def train(recipe: Path, out: Path, group: Path | None, *settings: str) -> Any:
    command = [sys.executable, "-m", "dougong", "train", str(recipe), "--json", "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    return capped(command, group, OMP_NUM_THREADS="2")


def ran(done: Any, folder: Path) -> Ran:
    if done.returncode:
        raise DougongError(f"training ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    steps = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]
    started = next(event for event in read_events(folder / "events.jsonl") if event["kind"] == "RunStarted")
    return Ran([e["loss"] for e in steps], [e["seconds"] for e in steps], started["num_parameters"])


BANDWIDTH = """
import json, os, sys, time
path, size, piece = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
handle = os.open(path, os.O_RDWR | os.O_CREAT)
os.posix_fallocate(handle, 0, size)
block = bytearray(os.urandom(piece))
def passed(work):
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    for place in range(0, size, piece):
        work(place)
    os.fdatasync(handle)
    return size / (time.perf_counter() - began)
os.pwrite(handle, block, 0)
for place in range(0, size, piece):
    os.pwrite(handle, block, place)
os.fdatasync(handle)
written = passed(lambda place: os.pwrite(handle, block, place))
read = passed(lambda place: os.preadv(handle, [block], place))
print(json.dumps([read, written]))
os.close(handle)
os.unlink(path)
"""


def bandwidth(file: Path, size: int, group: Path) -> Bandwidth:
    """From end to end of a file whose room is taken already, as a shelf's is."""
    time.sleep(5)  # what was written before is on the disk
    done = capped([sys.executable, "-c", BANDWIDTH, str(file), str(size), str(PIECE)], group)
    if done.returncode:
        raise DougongError(f"the disk could not be measured: {done.stderr.strip()[-500:]}")
    return Bandwidth(*json.loads(done.stdout))


if __name__ == "__main__":
    run("offload", "A decoder whose state is four times the memory it may have", measure)
