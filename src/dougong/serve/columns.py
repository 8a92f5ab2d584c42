"""What a model reads, column by column, and how a caller's value becomes a cell.

Here        Column, Columns, BadRequest.
Elsewhere   requests as a whole (v1.py, v2.py); decoding a cell (data/modality/).
Promise     no cell ever names a file of the server's: media are bytes that came with the request. No URL is fetched
            unless its host was allowed. What is refused is told in one line, without quoting more than a column's name.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from dougong.core.bundle import Manifest
from dougong.data.modality.audio import AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.numbers import TableModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.serve.backend import WRITING_KINDS
from dougong.serve.service_time import Shape, length_step
from dougong.serve.settings import Limits

Kind = Literal["text", "image", "audio", "number", "category", "signal", "volume"]
CHARACTERS_A_TOKEN: Final = 4
LENGTH_UNIT: Final = 16
"""Tokens: what is shorter differs too little to be kept apart."""

MOST_KEPT_SHAPES: Final = 1000
SOUND_TOKENS_A_SECOND: Final = 50


class BadRequest(Exception):
    """What came cannot be a request, and why."""

    def __init__(self, reason: str, status: int = 422) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class Fetch(NamedTuple):
    """A medium that is still at this address, on an allowed host."""

    url: str


class Column(NamedTuple):
    """One column."""

    name: str
    kind: Kind
    modality: str
    most_tokens: int
    """What a longer one is cut to."""

    shape: tuple[int, ...] = ()
    """Of numbers given as an array; -1 for time."""


class Columns:
    """All columns of a model."""

    def __init__(self, columns: list[Column], limits: Limits, fetch_from: tuple[str, ...] = ()) -> None:
        self.by_name = {column.name: column for column in columns}
        self.limits = limits
        self._fetch_from = frozenset(fetch_from)
        self._shapes: dict[tuple[tuple[str, ...], int], Shape] = {}

    @classmethod
    def of_bundle(cls, folder: Path, manifest: Manifest, limits: Limits, fetch_from: tuple[str, ...] = ()) -> Columns:
        """As a bundle's preparation says. Its files' sums are checked by whoever loads it."""
        found: list[Column] = []
        writes = manifest.model.get("kind") in WRITING_KINDS  # about a picture, and reads nothing else
        for name, modality in Preparation.load(folder).modalities.items():
            if writes and not isinstance(modality, ImageModality):
                continue
            if isinstance(modality, TableModality):
                found += [Column(each.name, "number", name, 1) for each in modality.config.numbers]
                found += [Column(each.name, "category", name, 1) for each in modality.config.categories]
            elif isinstance(modality, TextModality):
                found.append(Column(modality.config.column, "text", name, modality.config.max_tokens))
            elif isinstance(modality, ImageModality):
                found.append(Column(modality.config.column, "image", name, 0))
            elif isinstance(modality, AudioModality):
                most = int(SOUND_TOKENS_A_SECOND * modality.config.max_seconds)
                found.append(Column(modality.config.column, "audio", name, most))
            else:
                signature = modality.signature()
                if signature.kind == "signal":
                    shape: tuple[int, ...] = (signature.num_channels, -1)
                    found.append(Column(modality.columns[0], "signal", name, signature.max_samples // 8, shape))
                else:
                    assert signature.kind == "volume"
                    shape = (signature.depth, signature.height, signature.width)
                    found.append(Column(modality.columns[0], "volume", name, 0, shape))
        return cls(found, limits, fetch_from)

    def record(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A caller's values by column, as cells; None and empty ones left out.

        Raises:
            BadRequest: a column is unknown, or a value cannot be one.
        """
        cells: dict[str, Any] = {}
        for name, value in values.items():
            column = self.by_name.get(name)
            if column is None:
                raise BadRequest(f"no column is called {_shown(name)}; the model reads {', '.join(self.by_name)}")
            if value is None or value == "" or value == b"":
                continue
            cells[name] = self._cell(column, value)
        return cells

    def shape(self, cells: Mapping[str, Any]) -> Shape:
        """What sets the cost of a record: what it carries, and about how many tokens."""
        length = 0.0
        for name, cell in cells.items():
            column = self.by_name[name]
            if column.kind == "text":
                length += min(column.most_tokens, len(cell) / CHARACTERS_A_TOKEN)
            elif column.kind == "audio" and isinstance(cell, dict):
                # 16-bit sound of 16,000 samples a second; of other files it is a guess, but alike for alike files.
                length += min(column.most_tokens, len(cell["bytes"]) / 32_000 * SOUND_TOKENS_A_SECOND)
            elif column.kind == "signal":
                length += min(column.most_tokens, len(cell["bytes"]) / 64)
        key = (tuple(cells), length_step(length / LENGTH_UNIT))
        shape = self._shapes.get(key)
        if shape is None:
            shape = Shape(tuple(sorted({self.by_name[name].modality for name in cells})), key[1])
            if len(self._shapes) < MOST_KEPT_SHAPES:
                self._shapes[key] = shape
        return shape

    def _cell(self, column: Column, value: Any) -> Any:
        kind = column.kind
        if kind == "text":
            if not isinstance(value, str):
                raise BadRequest(f"{column.name}: give text, not {_kind_of(value)}")
            if len(value) > self.limits.tokens * CHARACTERS_A_TOKEN:
                raise BadRequest(f"{column.name}: longer than {self.limits.tokens} tokens", 413)
            return value
        if kind == "number":
            return _number(column.name, value)
        if kind == "category":
            if isinstance(value, bool | int | float | str):
                return value
            raise BadRequest(f"{column.name}: give a text or a number, not {_kind_of(value)}")
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if kind in ("signal", "volume") and isinstance(value, list):
            try:
                return {"bytes": array_file(value), "path": None}
            except (ValueError, TypeError, OverflowError, RecursionError):
                raise BadRequest(f"{column.name}: give numbers, as many in each row") from None
        return self._medium(column, value)

    def _medium(self, column: Column, value: Any) -> Any:
        if isinstance(value, Mapping):
            if set(value) == {"url"} and isinstance(value["url"], str):
                return self._address(column, value["url"])
            if set(value) <= {"bytes", "path"} and isinstance(value.get("bytes"), str):
                value = value["bytes"]  # as tables hold them; a path says nothing here
        if not isinstance(value, str):
            raise BadRequest(f"{column.name}: give a file's bytes as base64 or a data: URI, not {_kind_of(value)}")
        if value.startswith("data:"):
            head, comma, value = value.partition(",")
            if not comma or not head.endswith(";base64"):
                raise BadRequest(f"{column.name}: a data: URI must be of base64, as in data:image/png;base64,iVBOR...")
        elif value[:8].lower().startswith(("http://", "https://")):
            return self._address(column, value)
        try:
            return {"bytes": base64.b64decode(value, validate=True), "path": None}
        except (binascii.Error, ValueError):
            raise BadRequest(
                f"{column.name}: is not base64. Encode the file's bytes, or send it as multipart"
            ) from None

    def _address(self, column: Column, url: str) -> Fetch:
        from urllib.parse import urlsplit

        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if host is None or host not in self._fetch_from:
            raise BadRequest(
                f"{column.name}: no URL of that host is fetched here. Send the file's bytes, or start the server with "
                "--fetch-from HOST"
            )
        return Fetch(url)


def array_file(values: Any) -> bytes:
    """Numbers as a file of NumPy's: what goes to a worker is bytes, whatever a caller nests in lists.

    Raises:
        ValueError, TypeError, OverflowError: these are no numbers, or not as many in each row.
    """
    content = io.BytesIO()
    np.save(content, np.asarray(values, np.float32), allow_pickle=False)
    return content.getvalue()


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRequest(f"{name}: give a number") from None
    if isinstance(value, bool | int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise BadRequest(f"{name}: give a finite number, not {_kind_of(value)}")


def _kind_of(value: Any) -> str:
    kinds = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _shown(name: object) -> str:
    text = str(name)
    return repr(text if len(text) <= 40 else text[:37] + "...").encode("ascii", "backslashreplace").decode()
