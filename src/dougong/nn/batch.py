"""One batch of records as tensors.

Here        MediaBatch, Batch; `first_records` of one; `only_media`, which leaves out what nobody has any more.
Elsewhere   making it from records (data/batch.py, as NumPy arrays; engine/batches.py turns them into tensors).
Promise     a medium that several records share stands in it once; what records lack is not in it at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MediaBatch(NamedTuple):
    """One modality of a batch. Shapes: U distinct media, B records."""

    values: dict[str, Tensor]
    """Tensors of U rows; their names and shapes stand with the inputs in core/signature.py. U may be 0."""

    index_B: Tensor
    """Which of the U media each record has; 0 where it has none."""

    present_B: Tensor
    """Whether the record has this modality."""

    there_B: Tensor | None = None
    """Whether its medium is among the U: also where it is encoded for a loss alone, and hidden from the answer. None:
    where it is present."""

    quality_UQ: Tensor | None = None
    """How good each medium is as a recording of anything, by Q named figures of about 0 to 1 (data/quality.py)."""

    level_U: Tensor | None = None
    """How strongly each medium was corrupted on purpose: 0 not at all, 1 the most (data/corruption.py)."""

    id_U: Tensor | None = None
    """A number of each medium's content, the same on every rank: where a batch is shared out, two ranks may hold the
    same medium. None where it is not shared out."""


class Batch(NamedTuple):
    """B records."""

    media: dict[str, MediaBatch]
    """By modality name, in the signature's order. Every modality of the signature is here, present or not."""

    target: Tensor | None
    """As core/signature.py's Target says, or None where it is not known."""

    @property
    def num_records(self) -> int:
        return next(iter(self.media.values())).index_B.shape[0]


def first_records(batch: Batch, most: int) -> Batch:
    """The first so many, with their media alone."""
    if batch.num_records <= most:
        return batch
    media = {
        name: only_media(
            one._replace(
                index_B=one.index_B[:most],
                present_B=one.present_B[:most],
                there_B=None if one.there_B is None else one.there_B[:most],
            )
        )
        for name, one in batch.media.items()
    }
    return Batch(media, None if batch.target is None else batch.target[:most])


def only_media(media: MediaBatch) -> MediaBatch:
    """The same without the media that no record has, which would be encoded for nothing."""
    there_B = media.present_B if media.there_B is None else media.there_B
    used, place = torch.unique(media.index_B[there_B], return_inverse=True)
    if len(used) == next(iter(media.values.values())).shape[0]:
        return media
    index_B = torch.zeros_like(media.index_B)
    index_B[there_B] = place
    return media._replace(
        values={key: value[used] for key, value in media.values.items()},
        index_B=index_B,
        quality_UQ=None if media.quality_UQ is None else media.quality_UQ[used],
        level_U=None if media.level_U is None else media.level_U[used],
        id_U=None if media.id_U is None else media.id_U[used],
    )
