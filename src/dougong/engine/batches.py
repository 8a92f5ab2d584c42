"""From a loader's arrays to a model's tensors.

Here        `to_tensors`.
Elsewhere   filling the arrays (data/collate.py); what the tensors mean (nn/batch.py).
Promise     on the CPU nothing is copied, but for arrays that may not be written: torch would warn of each.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dougong.data.batch import Array, BatchArrays
from dougong.nn.batch import Batch, MediaBatch

CPU: Final = torch.device("cpu")


def to_tensors(arrays: BatchArrays, device: torch.device = CPU) -> Batch:
    """The same batch as tensors on `device`."""
    media = {
        name: MediaBatch(
            {key: _to_tensor(value, device) for key, value in one.values.items()},
            _to_tensor(one.index_B, device),
            _to_tensor(one.present_B, device),
            *(
                None if each is None else _to_tensor(each, device)
                for each in (one.there_B, one.quality_UQ, one.level_U, one.id_U)
            ),
        )
        for name, one in arrays.media.items()
    }
    return Batch(media, None if arrays.target is None else _to_tensor(arrays.target, device))


def _to_tensor(array: Array, device: torch.device) -> Tensor:
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
