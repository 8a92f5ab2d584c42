"""Records of two small tasks, and settings to learn them fast."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image

from dougong.continual.learn import LearnConfig
from dougong.data.table import Table, table_of_rows
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig

Rows = list[dict[str, Any]]
RATE = 4000


def stripes(count: int, *, seed: int, ways: tuple[str, ...] = ("across", "along")) -> Rows:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        way = str(random.choice(ways))
        pixels = random.integers(0, 40, (20, 24, 3))
        start = int(random.integers(4))
        if way == "across":
            pixels[start::4] += 180
        elif way == "along":
            pixels[:, start::4] += 180
        else:  # chequered
            pixels[::2, start::4] += 180
        content = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, format="PNG")
        rows.append({"picture": {"bytes": content.getvalue(), "path": None}, "lies": way})
    return rows


def tones(count: int, *, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        pitch = str(random.choice(["low", "high"]))
        seconds = np.arange(1600) / RATE
        hertz = {"low": 320, "high": 1600}[pitch] * random.uniform(0.95, 1.05)
        samples = np.sign(np.sin(2 * np.pi * hertz * seconds)) + 0.1 * random.standard_normal(1600)
        content = io.BytesIO()
        soundfile.write(content, 0.4 * samples, RATE, format="WAV")
        rows.append({"clip": {"bytes": content.getvalue(), "path": None}, "pitch": pitch})
    return rows


def table_of(rows: Rows) -> Table:
    return table_of_rows(pa.Table.from_pylist(rows), Path("."))


def quick(**settings: Any) -> LearnConfig:
    train = TrainConfig(
        steps=40, precision="fp32", evaluate_every=20, optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    )
    return LearnConfig(**{"budget": 0.1, "train": train, **settings})
