"""A loader's batches in double precision, for tests of whether many ranks step as one process does."""

from collections.abc import Iterator

import numpy as np

from dougong.data.batch import BatchArrays
from dougong.data.position import Loader, Position


class Exact:
    """A loader's batches in double precision: an optimizer makes whole steps of a gradient that is nothing but
    rounding, and what is nought in theory has such a one."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.batches_per_epoch = loader.batches_per_epoch

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        for after, arrays in self.loader.batches(start):
            yield after, _in_double(arrays)

    def one_pass(self) -> Iterator[BatchArrays]:
        return map(_in_double, self.loader.one_pass())


def _in_double(arrays: BatchArrays) -> BatchArrays:
    media = {
        name: one._replace(
            values={key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in one.values.items()}
        )
        for name, one in arrays.media.items()
    }
    return arrays._replace(media=media)
