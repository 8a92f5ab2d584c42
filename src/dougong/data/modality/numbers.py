"""Columns of numbers and categories, together one modality.

Here        TableConfig, TableModality, fitting it.
Elsewhere   making a token of each column (model/encoders/table.py).
Promise     a missing value is marked, never guessed; a value that is no number (NaN, infinite) is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from dougong.core.config import Config
from dougong.core.signature import TableInput
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.damage.numbers import rows
from dougong.data.modality.medium import BadValue, Modality
from dougong.data.quality import TABLE, Quality, table_quality

LARGEST_NUMBER: Final = float(np.finfo(np.float32).max)


class NumberColumn(Config):
    """A column of numbers and what standardises it."""

    name: str
    mean: float = 0.0
    scale: float = 1.0


class CategoryColumn(Config):
    """A column of names; index 0 means one that was not seen in training, or none."""

    name: str
    values: tuple[str, ...]


class TableConfig(Config):
    """The numeric and categorical columns of a table."""

    kind: Literal["table"] = "table"
    numbers: tuple[NumberColumn, ...] = ()
    categories: tuple[CategoryColumn, ...] = ()


class TableModality(Modality):
    """Decoded as one row: numbers (NaN where missing), then category indices."""

    quality_names = TABLE

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self._index = [{value: i for i, value in enumerate(column.values, start=1)} for column in config.categories]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*(column.name for column in self.config.numbers), *(column.name for column in self.config.categories))

    def signature(self) -> TableInput:
        return TableInput(
            num_numbers=len(self.config.numbers),
            category_sizes=tuple(len(column.values) + 1 for column in self.config.categories),
        )

    def key(self, cells: tuple[Any, ...]) -> Hashable:
        return None if all(cell is None for cell in cells) else cells

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        row = np.zeros(len(cells), np.float64)
        for place, column in enumerate(self.config.numbers):
            row[place] = (to_number(cells[place], column.name) - column.mean) / column.scale
            if abs(row[place]) > LARGEST_NUMBER:
                raise BadValue(
                    f"{column.name} holds {cells[place]}, which is too far from the others to be computed with"
                )
        for place, index in enumerate(self._index, start=len(self.config.numbers)):
            row[place] = 0 if cells[place] is None else index.get(to_category(cells[place]), 0)
        return row

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        rows_UC = np.stack(media) if media else np.zeros((0, len(self.columns)))
        split = len(self.config.numbers)
        known_UN = ~np.isnan(rows_UC[:, :split])
        numbers_UN = np.where(known_UN, rows_UC[:, :split], 0.0).astype(np.float32)
        return {
            "numbers_UN": numbers_UN,
            "known_UN": known_UN,
            "categories_UK": np.ascontiguousarray(rows_UC[:, split:]).astype(np.int64),
        }

    @functools.cached_property
    def damages(self) -> Mapping[str, Damage]:
        return rows(len(self.config.numbers), self.signature().category_sizes)

    def quality(self, values: Mapping[str, Array]) -> Quality:
        return table_quality(values["numbers_UN"], values["known_UN"], values["categories_UK"])


def to_category(cell: Any) -> str:
    """A category's name; a whole number has one name, however a file format may store it."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def to_number(cell: Any, column: str) -> float:
    """A finite float, or NaN for a missing value.

    Raises:
        BadValue: it is not a number.
    """
    if cell is None:
        return math.nan
    try:
        number = float(cell)
    except OverflowError:
        raise BadValue(f"{column} holds a number of {len(str(cell))} digits: nothing computes with those") from None
    except (TypeError, ValueError):
        raise BadValue(f"{column} holds {str(cell)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise BadValue(f"{column} holds {number}: leave a missing number empty")
    return number
