"""What is to be predicted, from a cell to a number and back.

Here        infer_target, encode_target.
Elsewhere   its description for models and callers (core/signature.py).
Promise     labels are in one order everywhere; a label not seen in training is a bad value, never another class.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dougong.core.errors import DataError
from dougong.core.signature import Target, Task
from dougong.data.batch import Array
from dougong.data.modality.medium import BadValue
from dougong.data.modality.numbers import LARGEST_NUMBER, to_category, to_number
from dougong.data.table import cells_of

MOST_LABELS: Final = 10_000
FEW_NUMBERS: Final = 20


def infer_target(column: pa.ChunkedArray, name: str, task: Task | None) -> Target:
    """The task, and its labels or its scale, from the whole training column.

    Raises:
        DataError: the column is empty, has one value only, or far too many.
    """
    kind = column.type
    values = column.drop_null()
    if len(values) == 0:
        raise DataError(f"target {name!r} is empty: it has no value to learn.")
    if task is None:
        task = _infer_task(values, kind)
    if task == "regression":
        return _regression(values, name)
    if _is_list(kind) != (task == "multi_label") or pa.types.is_struct(kind):
        raise DataError(
            f"target {name!r} holds {kind}, which task: {task} cannot learn. "
            "Lists of labels are multi_label, single values single_label, numbers regression."
        )
    if task == "multi_label":
        found = {to_category(label) for labels in values.to_pylist() for label in labels if not _is_missing(label)}
    else:
        found = {to_category(value) for value in cells_of(pc.unique(values)) if not _is_missing(value)}
    if not found:
        raise DataError(f"target {name!r} is empty: it has no value to learn.")
    if len(found) < 2 and task == "single_label":
        raise DataError(f"target {name!r} has one value only, {next(iter(found))!r}: there is nothing to learn.")
    if len(found) > MOST_LABELS:
        raise DataError(
            f"target {name!r} has {len(found):,} different values. For classes use at most {MOST_LABELS:,}; "
            "for numbers set task: regression."
        )
    return Target(name=name, task=task, labels=tuple(sorted(found, key=_natural)))


def _regression(values: pa.ChunkedArray, name: str) -> Target:
    numbers = np.array([number for number in map(_number, cells_of(values)) if number is not None])
    if len(numbers) == 0 or numbers.min() == numbers.max():
        raise DataError(f"target {name!r} has no two different numbers: there is nothing to learn.")
    # Against overflow the numbers are made small first.
    largest = float(np.abs(numbers).max())
    mean, scale = largest * float((numbers / largest).mean()), largest * float((numbers / largest).std())
    return Target(name=name, task="regression", mean=mean, scale=scale)


def _number(cell: Any) -> float | None:
    try:
        return to_number(cell, "target")
    except BadValue:
        return None  # its record is set aside later, with the reason


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _infer_task(values: pa.ChunkedArray, kind: pa.DataType) -> Task:
    if _is_list(kind):
        return "multi_label"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "regression"
    if pa.types.is_integer(kind) and len(pc.unique(values)) > FEW_NUMBERS:
        return "regression"
    return "single_label"


def encode_target(cells: list[Any], target: Target) -> Array:
    """Encoded as core/signature.py's Target says.

    Raises:
        BadValue: a cell is missing, is not a number, or is a label unknown to training.
    """
    if target.task == "regression":
        return np.array([_standardised(cell, target) for cell in cells], np.float32)
    index = {label: place for place, label in enumerate(target.labels)}
    if target.task == "single_label":
        return np.array([_place(cell, index, target) for cell in cells], np.int64)
    marks = np.zeros((len(cells), len(index)), np.float32)
    for row, cell in enumerate(cells):
        if not isinstance(cell, (list, tuple)):
            raise BadValue("the target is missing" if cell is None else f"target holds {cell!r}, not a list of labels")
        for label in cell:
            marks[row, _place(label, index, target)] = 1.0
    return marks


def _standardised(cell: Any, target: Target) -> float:
    number = to_number(cell, target.name)
    if math.isnan(number):
        raise BadValue("the target is missing")
    standardised = (number - target.mean) / target.scale
    if abs(standardised) > LARGEST_NUMBER:
        raise BadValue(f"target holds {number}, which is too far from the others to be learnt")
    return standardised


def _place(cell: Any, index: dict[str, int], target: Target) -> int:
    if _is_missing(cell):
        raise BadValue("the target is missing")
    place = index.get(to_category(cell))
    if place is None:
        raise BadValue(f"target {str(cell)[:40]!r} was not among the {len(index)} labels of the training data")
    return place


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by size, then words by alphabet."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    # "nan" is a word here: as a number it would stand anywhere.
    return (1, 0.0, label) if math.isnan(number) else (0, number, label)
