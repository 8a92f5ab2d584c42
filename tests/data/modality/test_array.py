"""Holds data/modality/array.py to its promise: nothing unpickled, nothing read that claims too much, no NaN."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_builders import HERE, inline, npy

from dougong.data.modality.array import SignalConfig, SignalModality, VolumeConfig, VolumeModality, read_array
from dougong.data.modality.medium import BadValue


def signal(**settings: Any) -> SignalModality:
    return SignalModality(SignalConfig(**{"column": "ecg", "max_samples": 100, **settings}))


def claiming_npy(shape: str, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 40


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_objects_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Trap(trace)))
    assert trace.exists()  # the trap works
    trace.unlink()
    with pytest.raises(BadValue, match="holds Python objects, which are never unpickled"):
        read_array(npy(np.array([Trap(trace)], object), allow_pickle=True), HERE)
    with pytest.raises(BadValue, match=r"is not a whole \.npy file"):
        read_array(pickle.dumps(Trap(trace)), HERE)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("shape", "kind", "reason"),
    [
        ("(100000, 100000)", "<f4", r"claims \(100000, 100000\) numbers, over the limit of 67,108,864"),
        ("(4611686018427387904, 4)", "<f4", r"claims .* over the limit"),
        ("(67108864,)", "<f8", "is truncated: 536870872 bytes of its numbers are not there"),
        ("(-5,)", "<f4", "is not a whole .npy file"),
        ("(10,", "<f4", "is not a whole .npy file"),
        ("(2,)", "<c8", "holds complex64, not real numbers"),
        ("(1,)", "<U4", "holds <U4, not real numbers"),
        ("(2,)", "<M8[s]", r"holds datetime64\[s\], not real numbers"),
    ],
)
def test_a_claim_that_cannot_be_true_is_refused_without_its_memory(shape: str, kind: str, reason: str) -> None:
    content = claiming_npy(shape, kind)
    tracemalloc.start()
    with pytest.raises(BadValue, match=reason):
        read_array(content, HERE)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (npy([1.0, np.nan]), r"has values that are not numbers \(NaN or infinite\)"),
        (npy([1.0, np.inf]), r"has values that are not numbers"),
        (npy([1.0, 1e300]), r"has values that are not numbers"),
        ([1.0, float("nan")], r"has values that are not numbers"),
        ([1.0, None], r"has values that are not numbers"),
        ([1.0, 1e300], r"has values that are not numbers"),
        ([[1.0, 2.0], [3.0]], "is not an even grid of numbers"),
        (["a", "b"], "is not an even grid of numbers"),
        ([], "is empty"),
        (npy(np.zeros((3, 0))), "is empty"),
        (npy(np.arange(100.0))[:-100], "is truncated: 100 bytes of its numbers are not there"),
        (b"hello, I am no array", "is not a whole .npy file"),
        (7.5, "holds float, not a file's bytes or path"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(cell: Any, reason: str) -> None:
    with pytest.raises(BadValue, match=reason):
        read_array(cell, HERE)


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<i2", "u1", "?", "<f2"])
def test_every_kind_of_real_number_is_read(kind: str) -> None:
    found = read_array(inline(npy(np.array([[0, 1, 1]], kind))), HERE)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0, 1, 1]])


def test_files_and_lists_give_the_same_signal() -> None:
    series = signal(mean=1.0, scale=2.0)
    want = np.array([[0, 0.5, 1]], np.float32)
    for cell in ([1, 2, 3], [[1, 2, 3]], npy([1, 2, 3]), inline(npy([[1.0, 2.0, 3.0]]))):
        np.testing.assert_array_equal(series.decode((cell,), HERE), want)


def test_a_signal_of_other_channels_is_refused() -> None:
    with pytest.raises(BadValue, match=r"has shape \(2, 3\), not \(1, time\)"):
        signal().decode(([[1, 2, 3], [4, 5, 6]],), HERE)
    with pytest.raises(BadValue, match=r"has shape \(\), not \(1, time\)"):
        signal().decode((npy(3.0),), HERE)


def test_values_beyond_the_learnt_scale_are_refused_before_they_are_infinite() -> None:
    with pytest.raises(BadValue, match="has values too far from the others to be computed with"):
        signal(scale=1e-3).decode(([1.0, 3e38],), HERE)


def test_signals_are_cut_padded_and_masked() -> None:
    series = signal(max_samples=4)
    media = [series.decode((cell,), HERE) for cell in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0])]
    stacked = series.stack(media, None)
    np.testing.assert_array_equal(stacked["samples_UCT"], [[[1, 2, 0, 0]], [[1, 2, 3, 4]]])
    assert stacked["mask_UT"].sum(axis=1).tolist() == [2, 4]
    assert series.stack([], None)["samples_UCT"].shape == (0, 1, 1)


def test_a_volume_is_cut_and_padded_around_its_centre() -> None:
    volume = VolumeModality(VolumeConfig(column="scan", depth=3, height=1, width=2))
    there = np.arange(1, 7, dtype=np.float32).reshape(1, 3, 2)
    voxels = volume.decode((npy(there),), HERE)
    np.testing.assert_array_equal(voxels, [[[0, 0]], [[3, 4]], [[0, 0]]])
    assert volume.stack([voxels, voxels], None)["voxels_U1DHW"].shape == (2, 1, 3, 1, 2)
    assert volume.stack([], None)["voxels_U1DHW"].shape == (0, 1, 3, 1, 2)
    with pytest.raises(BadValue, match="has 2 dimensions, not the 3 of a volume"):
        volume.decode((npy(there[0]),), HERE)


def test_the_same_numbers_in_another_shape_are_another_medium() -> None:
    series = signal()
    keys = [series.key((cell,)) for cell in ([1, 2, 3, 4], [[1, 2], [3, 4]], [[1, 2, 3, 4]], [1, 2, 3, 5])]
    assert len(set(keys)) == 4
    assert series.key(([1, 2, 3, 4],)) == keys[0]
    assert series.key((None,)) is None


def test_a_key_is_found_for_what_cannot_be_decoded() -> None:
    series = signal()
    for cell in ([[1.0], [2.0, 3.0]], ["a"], [1e300], 7.5):
        assert series.key((cell,)) == series.key((cell,)) is not None
