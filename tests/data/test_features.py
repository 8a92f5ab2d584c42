"""Holds data/features.py to its promise: a medium that cannot be read, or held against others, gives no numbers."""

import io
import math
import struct

import numpy as np
import pytest
import soundfile
from data_builders import inline, npy, rows

from dougong.data.features import Side, read_sides, read_sound
from dougong.data.modality.medium import BadValue

EVERY = {0: np.arange(10)}


def test_an_array_of_another_dimension_than_most_is_a_bad_one() -> None:
    random = np.random.default_rng(0)
    volumes = [inline(npy(random.standard_normal((8, 8, 8)))) for _ in range(9)]
    table = rows(scan=[*volumes, inline(npy(random.standard_normal((8, 8))))])

    (found,) = read_sides(table, [Side("scan", "volume", ("scan",))], EVERY)

    assert found.num_bad == 1
    assert found.value_R.tolist() == [*range(9), -1]
    assert len(found.x_NF) == 9


def test_a_side_without_a_readable_value_has_none() -> None:
    table = rows(scan=[None] * 9 + [inline(b"no array")])
    (found,) = read_sides(table, [Side("scan", "volume", ("scan",))], EVERY)
    assert (found.num_bad, len(found.x_NF)) == (1, 0)
    assert set(found.value_R.tolist()) == {-1}


def test_one_cell_that_is_no_number_leaves_a_column_of_numbers() -> None:
    values = [float(n) for n in range(1000)]
    plain, spoilt = rows(x=values), rows(x=[math.nan, *values[1:]])
    every = {0: np.arange(1000)}
    side = [Side("table", "table", ("x",))]
    (whole,), (lacking,) = read_sides(plain, side, every), read_sides(spoilt, side, every)
    assert whole.x_NF.shape == lacking.x_NF.shape == (1000, 1)
    assert lacking.x_NF[0, 0] == 0
    np.testing.assert_allclose(lacking.x_NF[1:], whole.x_NF[1:], atol=0.01)


def test_a_claimed_rate_that_no_recording_has_is_refused_before_anything_is_made_of_it() -> None:
    content = io.BytesIO()
    soundfile.write(content, np.zeros(8), 8000, format="WAV", subtype="PCM_16")
    claiming = bytearray(content.getvalue())
    claiming[24:28] = struct.pack("<I", 2**31 - 1)
    with pytest.raises(BadValue, match="claims 2147483647 samples a second"):
        read_sound(bytes(claiming))


def test_only_the_first_half_minute_is_kept_of_all_channels_mean() -> None:
    content = io.BytesIO()
    samples = np.stack([np.full(40 * 1000, 0.5), np.zeros(40 * 1000)], axis=1)
    soundfile.write(content, samples, 1000, format="WAV", subtype="FLOAT")
    found, rate = read_sound(content.getvalue())
    assert rate == 1000
    assert len(found) == 30_000
    np.testing.assert_allclose(found, 0.25)
