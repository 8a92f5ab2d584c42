"""What every modality does with a cell.

Here        Modality (the interface), BadValue, `media_key`, `media_bytes`; `unit_key`, what records have in common.
Elsewhere   each kind in its own file; putting a batch together (data/collate.py).
Promise     a cell that cannot be used raises BadValue with its reason and nothing else; no path leads out of the
            table's folder; sizes are checked before anything is decoded.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dougong.core.files import inside
from dougong.core.signature import Input
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage

LARGEST_FILE_BYTES: Final = 256 * 2**20
LONGEST_KEY: Final = 200


class BadValue(Exception):
    """This cell cannot be used, and why. Not an error of the program: the record is set aside."""


class Modality(ABC):
    """One modality of a table: reads its cells, makes its part of a batch."""

    quality_names: tuple[str, ...] = ()
    """What `quality` measures, in its order; what `cell_quality` does comes last."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that it reads."""

    @abstractmethod
    def signature(self) -> Input:
        """What a model must know of its values."""

    @abstractmethod
    def key(self, cells: tuple[Any, ...]) -> Hashable:
        """Equal for equal media; None where the record has nothing."""

    @abstractmethod
    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        """The medium, not augmented, small enough to be kept.

        Raises:
            BadValue: it cannot be used.
        """

    @abstractmethod
    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        """One batch of distinct media, altered at random where a generator is given."""

    @property
    @abstractmethod
    def damages(self) -> Mapping[str, Damage]:
        """The ways in which a decoded medium can be spoilt on purpose, by name."""

    @abstractmethod
    def quality(self, values: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """How good each of U stacked media is, (U, Q), as data/quality.py says."""

    def cell_quality(self, cells: tuple[Any, ...]) -> tuple[float, ...]:
        """What decoding would hide of how good a medium is."""
        return ()


def media_key(cell: Any) -> Hashable:
    """What tells two media apart: the bytes where they are inline (names repeat), else the path."""
    if isinstance(cell, dict) and not _is_other_struct(cell):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if cell is None:
        return None
    if isinstance(cell, bytes):
        return _digest(cell)
    if not isinstance(cell, str):
        cell = repr(cell)  # of a wrong type: its decoding will say so
    # A long name takes the room of a short one in a cache; an empty one says as little as none.
    return (cell if len(cell) <= LONGEST_KEY else _digest(cell.encode("utf-8", "surrogatepass"))) or None


def unit_key(cell: Any) -> Hashable:
    """What tells two units (patients, speakers) apart: 3 and 3.0 are one, however a file format stores them. None where
    nobody knows it: nothing, no number, or a word of blanks alone."""
    if cell is None or isinstance(cell, (dict, bytes, list)):
        return media_key(cell)
    if isinstance(cell, float) and not math.isfinite(cell):
        return None if math.isnan(cell) else str(cell)
    if isinstance(cell, str):
        return media_key(cell) if cell.strip() else None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def media_bytes(cell: Any, folder: Path) -> bytes:
    """The encoded file of a media cell.

    Raises:
        BadValue: wrong type, no such file, out of the folder, too large.
    """
    if isinstance(cell, dict):
        if _is_other_struct(cell):
            raise BadValue(f"holds a struct of {', '.join(map(str, cell))}, not of bytes and path"[:100])
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        content = cell
    elif isinstance(cell, str):
        content = _file_bytes(cell, folder)
    else:
        raise BadValue(f"holds {type(cell).__name__}, not a file's bytes or path")
    if not content:
        raise BadValue("is an empty file")
    if len(content) > LARGEST_FILE_BYTES:
        raise BadValue(f"has over {LARGEST_FILE_BYTES // 2**20} MiB")
    return content


def _file_bytes(name: str, folder: Path) -> bytes:
    try:
        path = inside(folder, name)
        if path is None:
            raise BadValue(f"path {_short(name)} leads out of the table's folder")
        if not path.is_file():
            raise BadValue(f"there is no file {_short(name)}")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise BadValue(f"file {_short(name)} has over {LARGEST_FILE_BYTES // 2**20} MiB")
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long a name, links in a circle, no right to read, half a character: the system's own words say which.
        reason = getattr(error, "strerror", None) or str(error).split(" from ")[0]
        raise BadValue(f"path {_short(name)} cannot be read ({reason[:80]})") from None


def _is_other_struct(cell: dict[Any, Any]) -> bool:
    return bool(cell) and not {"bytes", "path"} & cell.keys()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def pad(rows: Sequence[npt.NDArray[Any]], width: int, dtype: npt.DTypeLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Rows of unequal length as one array of `width` columns, and a mask of what is real."""
    padded = np.zeros((len(rows), width), dtype)
    mask = np.zeros((len(rows), width), np.bool_)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = True
    return padded, mask


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
