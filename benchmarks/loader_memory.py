"""Whether a table larger than the loader's window passes through it in bounded memory.

Here        writing a synthetic table row group by row group, and one training epoch over it in a fresh process.
Elsewhere   the loader (data/loader.py); options and the written result (harness.py).
Promise     resident memory is read from the system (/proc/self/status, Linux), at every hundredth of the epoch; pages
            of the mapped file are counted in "resident" and not in "anonymous".

The records are random: only their sizes matter here. Four neighbours share a picture, inline, as questions about one
picture do. Nothing is repeated: there is one epoch, and no interval.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import run
from PIL import Image

from dougong.core.figures import Figure
from dougong.data.columns import infer_roles
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import PreparationConfig, fit_preparation
from dougong.data.table import open_table
from dougong.data.target import infer_target

RECORDS: Final = 2_000_000
QUICK_RECORDS: Final = 100_000
ROWS_PER_GROUP: Final = 10_000
RECORDS_PER_PICTURE: Final = 4
MIB: Final = 2**20
CONFIG: Final = LoaderConfig(batch_size=256, group_by="image", window_bytes=64 * MIB, cache_bytes=32 * MIB, workers=0)
WORDS: Final = ("left", "right", "red", "blue", "large", "small", "near", "far", "round", "square", "old", "new")


def measure(quick: bool) -> Sequence[Figure]:
    """Write, read in a fresh process, and compare the beginning with the end."""
    num_records = QUICK_RECORDS if quick else RECORDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.parquet"
        write_table(path, num_records)
        file_mib = path.stat().st_size / MIB
        done = subprocess.run([sys.executable, __file__, "--read", str(path)], stdout=subprocess.PIPE, check=True)  # noqa: S603
    found = json.loads(done.stdout)
    samples = {name: np.array([sample[name] for sample in found["samples"]]) for name in ("VmRSS", "RssAnon")}
    tenth = max(1, len(samples["VmRSS"]) // 10)
    growth = {name: float(kept[-tenth:].mean() - kept[:tenth].mean()) for name, kept in samples.items()}
    return [
        Figure(name="records read", value=found["records"], unit="records", asked=f">= {num_records}"),
        Figure(name="file", value=file_mib, unit="MiB"),
        Figure(name="window_bytes", value=CONFIG.window_bytes / MIB, unit="MiB"),
        Figure(name="cache_bytes", value=CONFIG.cache_bytes / MIB, unit="MiB"),
        Figure(name="resident before reading", value=found["before"]["VmRSS"], unit="MiB"),
        Figure(name="peak resident", value=float(samples["VmRSS"].max()), unit="MiB"),
        Figure(name="peak anonymous", value=float(samples["RssAnon"].max()), unit="MiB"),
        Figure(name="peak of all moments (VmHWM)", value=found["peak"], unit="MiB"),
        Figure(name="growth of resident, first to last tenth", value=growth["VmRSS"], unit="MiB", asked="<= 64"),
        Figure(name="growth of anonymous, first to last tenth", value=growth["RssAnon"], unit="MiB", asked="<= 64"),
        Figure(name="speed", value=found["records"] / found["seconds"], unit="records/s"),
    ]


def write_table(path: Path, num_records: int) -> None:
    """Row group by row group: no more than one is held."""
    random = np.random.default_rng(0)
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    numbers = [pa.field(f"number_{place}", pa.float64()) for place in range(4)]
    schema = pa.schema(
        [pa.field("image", media), pa.field("note", pa.string()), *numbers, pa.field("label", pa.string())]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, num_records, ROWS_PER_GROUP):
            count = min(ROWS_PER_GROUP, num_records - start)
            pictures = [_picture(random) for _ in range(-(-count // RECORDS_PER_PICTURE))]
            words = random.integers(0, len(WORDS), (count, 6))
            columns: list[Any] = [[pictures[row // RECORDS_PER_PICTURE] for row in range(count)]]
            columns.append([f"{' '.join(WORDS[word] for word in words[row])} {start + row}" for row in range(count)])
            columns.extend(random.standard_normal((4, count)))
            columns.append([f"class {label}" for label in random.integers(0, 10, count)])
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=ROWS_PER_GROUP)


def _picture(random: np.random.Generator) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(content, "PNG", compress_level=1)
    return {"bytes": content.getvalue(), "path": None}


def read(path: Path) -> dict[str, Any]:
    """One epoch of training batches, and the memory held on the way."""
    table = open_table(path)
    roles = infer_roles(table, target="label", named={"note": "text"})
    target = infer_target(table.column("label"), "label", None)
    preparation = fit_preparation(table, roles, target, PreparationConfig())
    loader = Loader(table, preparation, CONFIG, train=True)
    before, started = resident(), time.perf_counter()
    samples: list[dict[str, float]] = []
    records = 0
    for after, batch in loader.batches(Position()):
        records += len(batch.row_B)
        if records >= len(samples) * table.num_rows / 100:
            samples.append(resident())
        if after.epoch:
            break
    return {
        "records": records,
        "seconds": time.perf_counter() - started,
        "before": before,
        "samples": samples,
        "peak": resident()["VmHWM"],
    }


def resident() -> dict[str, float]:
    """The system's own figures of this process, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon", "VmHWM")}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read(Path(sys.argv[2]))))
    else:
        run("loader_memory", "One epoch of a table larger than the loader's window, in bounded memory.", measure)
