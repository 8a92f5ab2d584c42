"""What compressing takes of memory, against answering with the model that is compressed, and against training it.

Here        a bundle of BERT-small and ViT-small, and a table of made-up records; three processes, one of which answers
            all records, one of which trains the model for two steps, and one of which compresses it from end to end:
            shapes, proxies, learning, rounding, the engine's own files.
Elsewhere   the model (large.py).
Promise     all read the same records in the same batches. What a process had at most is the kernel's figure (VmHWM);
            what its libraries take before the first record, measured in the same process, is taken off.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import Kept
from large import large_sandwich
from parts import once
from PIL import Image

from dougong.bundle.files import load_from
from dougong.compress.backends import OpenVinoBackend
from dougong.compress.candidate import Budget
from dougong.compress.distil import DistilConfig
from dougong.compress.run import compress_bundle
from dougong.compress.search_config import SearchConfig
from dougong.core.config import parse
from dougong.core.figures import Figure
from dougong.core.sizes import bytes_as_text
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.table import open_table
from dougong.engine.batches import to_tensors
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.step import TrainParts, train_step
from dougong.objectives.decision import decision_loss

BATCH: Final = 16
RECORDS: Final = 64
STEPS: Final = 2


def measure(quick: bool, kept: Kept) -> Iterator[Figure]:
    yield from once(kept, f"memory, {'quick' if quick else 'whole'}", measure_anew)


def measure_anew() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = large_sandwich()
        model.save(folder / "bundle")
        weights = sum(weight.nbytes for weight in model.network.state_dict().values())
        write_records(folder / "records.parquet")
        found = {what: in_a_process(what, folder) for what in ("answer", "train", "compress")}
    yield Figure(name="weights of the model", value=weights / 2**20, unit="MiB")
    for what, told in found.items():
        yield Figure(name=f"{what}: memory over what libraries take", value=told["more"], unit="MiB")
        yield Figure(name=f"{what}: all that the process had", value=told["peak"], unit="MiB")
    for other in ("answer", "train"):
        for key, apart in {"more": "apart", "peak": "included"}.items():
            yield Figure(
                name=f"compressing over the teacher's {other}ing, libraries {apart}",
                value=found["compress"][key] / found[other][key],
                unit="x",
                asked="<= 3",
            )


def write_records(path: Path) -> None:
    random = np.random.default_rng(0)
    photos, words, names = [], [], []
    for number in range(RECORDS):
        content = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (224, 224, 3), np.uint8)).save(content, format="PNG")
        photos.append({"bytes": content.getvalue(), "path": None})
        words.append(" ".join(f"word{each}" for each in random.integers(0, 4000, 32)))
        names.append("abcdefghij"[number % 10])
    pq.write_table(pa.table({"photo": photos, "words": words, "named": names}), path)


def in_a_process(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", "import compress_memory; compress_memory.alone()", what, str(folder)]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)  # noqa: S603, our own file
    if done.returncode:
        raise RuntimeError(f"{what} ended with status {done.returncode}: {done.stderr[-2000:]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def resident(key: str) -> float:
    """Of this process, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {key}")


def answer(folder: Path) -> None:
    load_from(folder / "bundle").predict(folder / "records.parquet", batch_size=BATCH)


def train(folder: Path) -> None:
    model = load_from(folder / "bundle")
    target = model.preparation.target
    model.network.requires_grad_(True).train()

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return decision_loss(output.output_BC, batch.target, target.task)

    parts = TrainParts(model.network, loss, OptimizerConfig().build(model.network), 1.0)
    table = open_table(folder / "records.parquet")
    loader = Loader(table, model.preparation, LoaderConfig(batch_size=BATCH, workers=0), train=True)
    for number, (_, arrays) in enumerate(loader.batches(Position())):
        if number == STEPS:
            break
        train_step(parts, [to_tensors(arrays)], num_records=len(arrays.row_B))


def compress(folder: Path) -> None:
    values = SearchConfig().model_dump(mode="json") | {
        "widths": [0.5],
        "keeps": [0.6],
        "layers": [1.0],
        "blocks": [1.0],
        "pool": False,
        "turns": 3,
        "ranked": 1,
        "proxy_steps": STEPS,
        "tried": 1,
        "finished": 1,
        "held_out": 0.2,
    }
    values["importance"]["num_records"] = BATCH
    values["distil"] = DistilConfig().model_dump(mode="json")
    values["distil"]["loader"] |= {"batch_size": BATCH, "workers": 0}
    values["distil"]["train"]["steps"] = 2 * STEPS
    size = sum(path.stat().st_size for path in (folder / "bundle").iterdir() if path.suffix == ".safetensors")
    compress_bundle(
        folder / "bundle",
        folder / "records.parquet",
        Budget(size_bytes=size / 20, max_loss=1.0),
        folder / "out",
        parse(SearchConfig, values, where="memory"),
        say=lambda line: print(f"{bytes_as_text(resident('VmRSS') * 2**20)}: {line}", file=sys.stderr),
        backends=(OpenVinoBackend(),),
    )


def alone() -> None:
    """One of the processes: which, and where, are its arguments."""
    torch.set_num_threads(1)
    before = resident("VmRSS")
    {"answer": answer, "train": train, "compress": compress}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"more": resident("VmHWM") - before, "peak": resident("VmHWM")}))
