"""What run.py makes of records is what Dougong makes of them."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dougong
from dougong.bundle import runtime
from dougong.bundle.model import Model
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator

Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(colour_run: Path) -> Model:
    return dougong.load(colour_run / "bundle")


@pytest.fixture(scope="module")
def reader(colour_run: Path) -> runtime.Runtime:
    """A runtime that reads, without graphs."""
    import json

    made = runtime.Runtime.__new__(runtime.Runtime)
    made.folder = colour_run / "bundle"
    saved = json.loads((made.folder / runtime.PREPARATION).read_text())
    made.modalities, made.target, made._tokenizers = saved["modalities"], saved["target"], {}
    return made


def collated(model: Model, rows: list[dict[str, Any]], folder: Path = Path()) -> BatchArrays:
    place, requests = model._requests(rows, folder, len(rows))
    return Collator(model.preparation, place, seed=0)(next(iter(requests)))


def test_records_are_read_as_in_training(model: Model, reader: runtime.Runtime, records: Records) -> None:
    rows = records(30, seed=5, missing=0.3)
    rows += [dict(rows[0]), {**rows[1], "remark": "  "}, {**rows[2], "weight": None, "maker": "never seen"}]
    want = collated(model, rows)

    media, bad = reader.prepare(rows, Path())

    assert not bad
    for name, (values, index_B, present_B) in media.items():
        assert values.keys() == want.media[name].values.keys()
        for key, value in values.items():
            np.testing.assert_array_equal(value, want.media[name].values[key])
            assert value.dtype == want.media[name].values[key].dtype
        np.testing.assert_array_equal(index_B, want.media[name].index_B)
        np.testing.assert_array_equal(present_B, want.media[name].present_B)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "CMYK"])
def test_pictures_of_every_kind_are_read_alike(
    model: Model, reader: runtime.Runtime, mode: str, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != "RGB":
        picture = picture.convert(mode)
    content = io.BytesIO()
    picture.save(content, format="TIFF" if mode in ("CMYK", "I;16") else "PNG")
    (tmp_path / "one.img").write_bytes(content.getvalue())
    want = collated(model, [{"photo": "one.img"}], tmp_path)

    media, bad = reader.prepare([{"photo": "one.img"}], tmp_path)

    assert not bad
    np.testing.assert_array_equal(media["photo"][0]["pixels_UCHW"], want.media["photo"].values["pixels_UCHW"])


@pytest.mark.parametrize(
    "spoilt",
    [
        {"photo": b"no picture"},
        {"photo": "../secret.png"},
        {"photo": "nowhere.png"},
        {"photo": 5},
        {"clip": b"RIFFno sound"},
        {"remark": 5},
        {"remark": "\ud800"},
        {"weight": "heavy"},
        {"weight": float("inf")},
    ],
)
def test_what_cannot_be_read_is_set_aside_alike(
    model: Model, reader: runtime.Runtime, spoilt: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"remark": "warm like fire"}, {"remark": "warm like fire", **spoilt}]
    assert [record.row for record in collated(model, rows, tmp_path).bad] == [1]

    media, bad = reader.prepare(rows, tmp_path)

    assert list(bad) == [1]
    assert all(len(present_B) == 1 for _, _, present_B in media.values())


def test_signals_are_read_alike() -> None:
    from dougong.data.modality.array import SignalConfig, SignalModality

    config = SignalConfig(column="trace", num_channels=2, max_samples=5, mean=1.0, scale=2.0)
    modality = SignalModality(config)
    cells: list[Any] = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.arange(14.0).reshape(2, 7).tolist()]
    want = modality.stack([modality.decode((cell,), Path()) for cell in cells], None)

    settings = config.model_dump()
    found = runtime.stacked(settings, [runtime.read_signal(cell, Path(), settings) for cell in cells])

    np.testing.assert_array_equal(found["samples_UCT"], want["samples_UCT"])
    np.testing.assert_array_equal(found["mask_UT"], want["mask_UT"])


def test_it_needs_nothing_of_dougong() -> None:
    code = (
        "import sys, runpy\n"
        "sys.modules['dougong'] = sys.modules['torch'] = None\n"
        f"runpy.run_path({runtime.__file__!r}, run_name='plain')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
