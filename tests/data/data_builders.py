"""Small media and tables for the tests of data."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from dougong.core.signature import Target
from dougong.data.columns import infer_roles
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.table import Table, table_of_rows
from dougong.data.target import infer_target

HERE = Path()


def picture(
    width: int = 16, height: int = 16, *, seed: int = 0, form: str = "PNG", grey: bool = False, **options: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(content, form, **options)
    return content.getvalue()


def claiming_picture(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def sound(
    seconds: float = 0.2, *, rate: int = 8000, seed: int = 0, form: str = "FLAC", subtype: str | None = None
) -> bytes:
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    return sound_of(samples, rate=rate, form=form, subtype=subtype)


def sound_of(samples: Any, *, rate: int = 8000, form: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.asarray(samples), rate, format=form, subtype=subtype)
    return content.getvalue()


def claiming_flac(num_samples: int) -> bytes:
    """A FLAC of 0.2 seconds whose header claims this many samples: 36 bits from the middle of byte 21."""
    content = bytearray(sound())
    content[21] = (content[21] & 0xF0) | (num_samples >> 32)
    content[22:26] = struct.pack(">I", num_samples & 0xFFFFFFFF)
    return bytes(content)


def npy(array: Any, *, allow_pickle: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, np.asarray(array), allow_pickle=allow_pickle)
    return content.getvalue()


def inline(content: bytes | None) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def rows(folder: Path = HERE, /, **columns: Any) -> Table:
    return table_of_rows(pa.table(columns), folder)


def parquet(path: Path, *, rows_per_group: int = 100, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def fitted(
    table: Table, named: Mapping[str, str] | None = None, *, target: str = "label", **settings: Any
) -> Preparation:
    roles = infer_roles(table, target=target, named=named or {})
    found = infer_target(table.column(target), target, None)
    return fit_preparation(table, roles, found, PreparationConfig(**settings))


LABELS = Target(name="label", task="single_label", labels=("no", "yes"))


def array_cells(count: int) -> list[list[float]]:
    return [[float(row), 1.0, 2.0] for row in range(count)]
