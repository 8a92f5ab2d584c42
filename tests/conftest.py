"""A made-up table of four modalities, and a run on it, shared by all tests that need one."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # ranks, photo_and_words

# A shell that starts something in the background has it ignore SIGINT, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
RATE = 4000


def _picture(colour: str, random: np.random.Generator) -> bytes:
    pixels = random.integers(0, 60, (20, 24, 3))
    pixels[4:16, 4:18] = np.array(COLOURS[colour]) + random.integers(-20, 20, 3)
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def _sound(colour: str, random: np.random.Generator) -> bytes:
    seconds = np.arange(int(RATE * random.uniform(0.2, 0.4))) / RATE
    hertz = {"red": 200, "green": 500, "blue": 1100}[colour]
    samples = np.sin(2 * np.pi * hertz * seconds) + 0.2 * random.standard_normal(len(seconds))
    content = io.BytesIO()
    soundfile.write(content, 0.4 * samples, RATE, format="WAV")
    return content.getvalue()


def _records(count: int, *, seed: int, missing: float) -> list[dict[str, Any]]:
    """Every modality tells the colour by itself."""
    random = np.random.default_rng(seed)
    words = {"red": "warm like fire", "green": "fresh like grass", "blue": "cold like the sea"}
    records = []
    for _ in range(count):
        colour = str(random.choice(list(COLOURS)))
        record: dict[str, Any] = {
            "photo": {"bytes": _picture(colour, random), "path": None},
            "clip": {"bytes": _sound(colour, random), "path": None},
            "remark": f"it is {words[colour]} number {random.integers(50)}",
            "weight": float(list(COLOURS).index(colour) + 0.3 * random.standard_normal()),
            "maker": f"{colour[0]}{random.integers(3)}",
        }
        record = {name: None if random.random() < missing else value for name, value in record.items()}
        records.append({**record, "colour": colour})
    return records


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_tests() -> Iterator[None]:
    yield
    if "ranks" in sys.modules:
        sys.modules["ranks"].close_ranks()


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict[str, Any]]]:
    return _records


@pytest.fixture(scope="session")
def colour_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 records of pictures, sounds, text, a number and a category, a fifth of all values missing."""
    path = tmp_path_factory.mktemp("table") / "colours.parquet"
    pq.write_table(pa.Table.from_pylist(_records(240, seed=0, missing=0.2)), path, row_group_size=100)
    return path


@pytest.fixture(scope="session")
def colour_run(colour_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learnt that table with no options but its target."""
    import dougong

    folder = tmp_path_factory.mktemp("runs") / "colours"
    dougong.fit(colour_table, target="colour", steps=60, out=folder, quiet=True)
    return folder
