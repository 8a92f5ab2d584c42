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
from dougong.data.modality.numbers import to_number

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
        numbers = values.cast(pa.float64()).to_numpy()
        numbers = numbers[np.isfinite(numbers)]
        scale = float(numbers.std()) if len(numbers) else 0.0
        if scale == 0:
            raise DataError(f"target {name!r} has no two different numbers: there is nothing to learn.")
        return Target(name=name, task=task, mean=float(numbers.mean()), scale=scale)
    if task == "multi_label":
        found = {str(label) for labels in values.to_pylist() for label in labels if label is not None}
    else:
        found = {_label(value) for value in pc.unique(values).to_pylist()}
    if len(found) < 2 and task == "single_label":
        raise DataError(f"target {name!r} has one value only, {next(iter(found))!r}: there is nothing to learn.")
    if not found or len(found) > MOST_LABELS:
        raise DataError(
            f"target {name!r} has {len(found):,} different values. For classes use at most {MOST_LABELS:,}; "
            "for numbers set task: regression."
        )
    return Target(name=name, task=task, labels=tuple(sorted(found, key=_natural)))


def _infer_task(values: pa.ChunkedArray, kind: pa.DataType) -> Task:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
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
    return (number - target.mean) / target.scale


def _place(cell: Any, index: dict[str, int], target: Target) -> int:
    if cell is None:
        raise BadValue("the target is missing")
    place = index.get(_label(cell))
    if place is None:
        raise BadValue(f"target {str(cell)[:40]!r} was not among the {len(index)} labels of the training data")
    return place


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by size, then words by alphabet."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
