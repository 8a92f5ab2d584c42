"""A model that lies on several ranks, on the disk: what each rank holds, and any part of it again.

Here        Piece, `all_of`, `index_of`, `own_pieces`, PieceReader.
Elsewhere   which pieces a rank holds (layout.py); whole checkpoints (engine/checkpoint.py).
Promise     what was written from any layout is read into any other, or whole, bit for bit. Files are safetensors and
            JSON; torch's own distributed checkpoints keep a pickle beside their tensors (docs/adr/).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dougong.core.errors import CheckpointError
from dougong.core.files import inside


class Piece(NamedTuple):
    """A box of a tensor."""

    local: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    """The whole tensor's shape."""


def all_of(tensor: Tensor) -> Piece:
    """A tensor that this rank holds whole."""
    return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))


Told = dict[str, list[Any]]
"""Name to [whole shape, offset, shape] of a rank's piece, as JSON holds it."""


def told(pieces: Mapping[str, Piece]) -> Told:
    """What a rank says of its pieces."""
    return {name: [list(p.whole), list(p.offset), list(p.local.shape)] for name, p in pieces.items()}


def index_of(ranks: Iterable[Told]) -> dict[str, dict[str, Any]]:
    """Where each tensor's pieces lie, from what every rank has said: of those that several hold, with the first.

    Raises:
        CheckpointError: a part of a tensor is held by nobody.
    """
    index: dict[str, dict[str, Any]] = {}
    for rank, held in enumerate(ranks):
        for name, (whole, offset, shape) in held.items():
            entry = index.setdefault(name, {"whole": whole, "at": []})
            known = any(place["offset"] == offset and place["shape"] == shape for place in entry["at"])
            if not known and math.prod(shape):
                entry["at"].append({"rank": rank, "offset": offset, "shape": shape})
    for name, entry in index.items():
        there = sum(math.prod(place["shape"]) for place in entry["at"])
        if there != math.prod(entry["whole"]):
            raise CheckpointError(f"of {name} {there} of {math.prod(entry['whole'])} numbers are held by some rank")
    return index


def own_pieces(pieces: Mapping[str, Piece], index: Mapping[str, Mapping[str, Any]], rank: int) -> dict[str, Tensor]:
    """Those that the index expects of this rank."""
    due = {name for name, entry in index.items() if any(place["rank"] == rank for place in entry["at"])}
    return {name: piece.local for name, piece in pieces.items() if name in due}


class PieceReader:
    """Any box of any tensor, from the files that several ranks have written."""

    def __init__(self, folder: Path, files: Mapping[int, str], index: Mapping[str, Mapping[str, Any]]) -> None:
        """`files` are the ranks' files, in the folder."""
        self.index = index
        self._folder, self._files = folder, files

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """The box of this shape from `offset` on; the whole tensor where they are not given.

        Raises:
            CheckpointError: there is no such tensor, or its files are damaged.
        """
        if name not in self.index:
            raise CheckpointError(f"{self._folder} has no {name}. Build the model with the settings of that run.")
        whole = tuple(self.index[name]["whole"])
        offset = offset if offset is not None else (0,) * len(whole)
        shape = shape if shape is not None else whole
        found: Tensor | None = None
        for place in self.index[name]["at"]:
            lows = [max(a, b) for a, b in zip(offset, place["offset"], strict=True)]
            highs = [
                min(a + n, b + m) for a, n, b, m in zip(offset, shape, place["offset"], place["shape"], strict=True)
            ]
            if any(low >= high for low, high in zip(lows, highs, strict=True)):
                continue
            part = self._part(
                place["rank"], name, [(lo - b, hi - b) for lo, hi, b in zip(lows, highs, place["offset"], strict=True)]
            )
            if found is None:
                found = part.new_empty(shape)
            found[tuple(slice(lo - a, hi - a) for lo, hi, a in zip(lows, highs, offset, strict=True))] = part
        if found is None:
            dtype = self._part(self.index[name]["at"][0]["rank"], name, []).dtype if self.index[name]["at"] else None
            return torch.empty(shape, dtype=dtype)
        return found

    def _part(self, rank: int, name: str, box: list[tuple[int, int]]) -> Tensor:
        file = inside(self._folder, self._files[rank])
        if file is None or not file.is_file():
            raise CheckpointError(f"{self._folder}: {self._files[rank]} is missing")
        try:
            with safe_open(file, framework="pt") as opened:
                if not box:
                    found: Tensor = opened.get_tensor(name)
                    return found.clone()
                cut: Tensor = opened.get_slice(name)[tuple(slice(first, last) for first, last in box)]
                return cut.clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}). Use another checkpoint.") from None
