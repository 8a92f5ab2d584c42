import io
from typing import Any

import numpy as np
import pytest

from dougong.serve.columns import BadRequest, Column, Columns
from dougong.serve.settings import Limits
from dougong.serve.wire import BYTES_KEY, FrameError, Frames, pack

DOCUMENTS = [
    {
        "kind": "batch",
        "records": [{"photo": {"bytes": b"\x89PNG\0", "path": None}, "remark": "grün", "weight": 1.5}, {}],
    },
    {"kind": "answers", "bodies": [b"{}", b"", b'{"a": 1}'], "statuses": [200, 422, 500]},
    {"nothing": None},
]


def test_what_is_packed_comes_out_the_same_however_it_is_cut() -> None:
    sent = b"".join(map(pack, DOCUMENTS))

    for step in (1, 7, 64, len(sent)):
        frames = Frames()
        found = [frame for at in range(0, len(sent), step) for frame in frames.feed(sent[at : at + step])]
        assert found == DOCUMENTS


def test_half_a_character_goes_through() -> None:
    frame = {"kind": "batch", "records": [{"remark": "\ud800"}]}

    assert list(Frames().feed(pack(frame))) == [frame]


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(FrameError, match="what is no frame"):
        list(Frames().feed(b"HTTP/1.1 200 OK\r\n\r\n"))
    with pytest.raises(TypeError, match="set cannot be sent"):
        pack({"records": {1, 2}})


@pytest.mark.parametrize(
    "value", [[{BYTES_KEY: 0}], [[1.0, {BYTES_KEY: 7}]], [[1.0], [1.0, 2.0]], ["a"], [10**400], {BYTES_KEY: 0}]
)
def test_nobody_can_send_what_stands_for_bytes(value: Any) -> None:
    columns = Columns([Column("ecg", "signal", "ecg", 100, (1, -1))], Limits())

    with pytest.raises(BadRequest, match="^ecg: "):
        columns.record({"ecg": value})


def test_numbers_in_lists_go_to_a_worker_as_bytes() -> None:
    columns = Columns([Column("ecg", "signal", "ecg", 100, (1, -1))], Limits())

    cell = columns.record({"ecg": [[1.0, 2.5, -3.0]]})["ecg"]

    np.testing.assert_array_equal(np.load(io.BytesIO(cell["bytes"]), allow_pickle=False), [[1.0, 2.5, -3.0]])
