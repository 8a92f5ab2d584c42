import numpy as np
import torch

from dougong.data.batch import BatchArrays, MediaArrays
from dougong.engine.batches import to_tensors


def arrays(values: np.ndarray, target: np.ndarray | None = None) -> BatchArrays:
    rows = np.arange(len(values), dtype=np.int64)
    return BatchArrays({"x": MediaArrays({"numbers_UN": values}, rows, rows >= 0)}, target, rows, ())


def test_tensors_hold_what_the_arrays_held() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    batch = to_tensors(arrays(values, np.array([1, 0])))

    assert batch.media["x"].values["numbers_UN"].tolist() == values.tolist()
    assert batch.media["x"].index_B.dtype == torch.int64
    assert batch.media["x"].present_B.dtype == torch.bool
    assert batch.target is not None
    assert batch.target.tolist() == [1, 0]


def test_on_the_cpu_nothing_is_copied() -> None:
    values = np.zeros((2, 3), np.float32)
    batch = to_tensors(arrays(values))
    values[0, 0] = 5.0
    assert batch.media["x"].values["numbers_UN"][0, 0] == 5.0


def test_arrays_that_torch_cannot_share_are_copied_without_a_warning() -> None:
    fixed = np.ones((2, 3), np.float32)
    fixed.flags.writeable = False
    backwards = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]

    assert to_tensors(arrays(fixed)).media["x"].values["numbers_UN"].sum() == 6
    assert to_tensors(arrays(backwards)).media["x"].values["numbers_UN"].tolist() == [[2, 1, 0], [5, 4, 3]]


def test_an_unknown_target_stays_unknown() -> None:
    assert to_tensors(arrays(np.zeros((2, 3), np.float32))).target is None
