"""One batch of records as NumPy arrays, ready to become tensors without a copy.

Here        MediaArrays, BatchArrays, BadRecord.
Elsewhere   filling it (data/collate.py); its twin in tensors (nn/batch.py) and the way there (engine/batches.py).
Promise     a medium that several records share is decoded and stands here once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class BadRecord(NamedTuple):
    """A record that was set aside."""

    row: int
    """Its number in the table, from 0."""

    column: str
    reason: str


class MediaArrays(NamedTuple):
    """One modality: U distinct media, B records. Names and shapes of `values`: core/signature.py."""

    values: dict[str, Array]
    index_B: npt.NDArray[np.int64]
    present_B: npt.NDArray[np.bool_]
    there_B: npt.NDArray[np.bool_] | None = None
    quality_UQ: npt.NDArray[np.float32] | None = None
    level_U: npt.NDArray[np.float32] | None = None
    id_U: npt.NDArray[np.int64] | None = None
    """These four as nn/batch.py has them."""


class BatchArrays(NamedTuple):
    """B good records, and the bad ones that were met on the way."""

    media: dict[str, MediaArrays]
    target: Array | None
    row_B: npt.NDArray[np.int64]
    """The records' numbers in their table."""

    bad: tuple[BadRecord, ...]
