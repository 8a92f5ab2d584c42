"""Holds watch/sheet.py to its promise: one page, nothing outside it, nothing of data read as markup."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from dougong.core.errors import ConfigError
from dougong.recipes.check import check_recipe_or_table
from dougong.watch.sheet import _curve


def png(pixels: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(content, format="PNG")
    return content.getvalue()


def npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def wav(samples: Any) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, 4000, format="WAV")
    return content.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sheet")
    random = np.random.default_rng(0)
    photos = [png(random.integers(0, 256, (16, 16, 3))) for _ in range(40)]
    photos[7] = png(np.full((16, 16, 3), 20))
    notes = [f"all is well with number {row}" for row in range(40)]
    notes[9] = "<script>alert(1)</script> &amp; zzz qqq xxx"
    table = {
        "photo": [{"bytes": photo, "path": None} for photo in photos],
        "clip": [{"bytes": wav(0.1 * random.standard_normal(800)), "path": None} for _ in range(40)],
        "note": notes,
        "size": [float(row) if row != 11 else None for row in range(40)],
        "ecg": [random.standard_normal(60).tolist() for _ in range(40)],
        "scan": [{"bytes": npy(random.random((4, 5, 6))), "path": None} for _ in range(40)],
        "label": ["no", "yes"] * 20,
    }
    pq.write_table(pa.table(table), folder / "mixed.parquet")
    settings = folder / "mixed.yaml"
    settings.write_text(
        f"name: mixed\ndata: {{train: {folder / 'mixed.parquet'}, target: label, "
        "columns: {note: text, scan: volume}}\n"
    )
    check_recipe_or_table(str(settings), pictures=folder / "new" / "worst.html")
    return (folder / "new" / "worst.html").read_text(encoding="utf-8")


def test_the_worst_of_every_kind_is_shown(page: str) -> None:
    for name in ("photo", "clip", "note", "table", "ecg", "scan"):
        assert re.search(rf"<h2>train, {name}", page)
    photo = page[page.index("<h2>train, photo") :]
    sharpness = photo[photo.index("<h3>sharpness</h3>") : photo.index("<h3>exposure</h3>")]
    assert re.search(r'alt="row (\d+)"', sharpness).group(1) == "7"  # type: ignore[union-attr]
    assert "at most" in sharpness
    assert "1 x letters of markup, first in rows 9" in page


def test_a_picture_is_the_one_that_a_model_would_get(page: str) -> None:
    found = re.search(r'src="data:image/png;base64,([^"]+)" width="16" height="16" alt="row 7"', page)
    assert found is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.group(1)))))
    assert (shown == 20).all()


def test_nothing_is_fetched_and_nothing_of_data_is_markup(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page


def test_a_curve_reaches_its_box_and_returns() -> None:
    points = [tuple(map(float, point.split(","))) for point in _curve(np.array([0.0, 1.0, -1.0, 0.0])).split()]
    assert len(points) == 8
    assert min(y for _, y in points) == 0.0
    assert max(y for _, y in points) == 2.02
    assert points[0][0] == points[-1][0]
    assert len(_curve(np.zeros(100_000)).split()) == 320


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("worst.png", r"ends in '.png', and the sheet is a page. Use a name in .html"),
        ("x.html", "is no place for a file"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_reading(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.html").mkdir()
    with pytest.raises(ConfigError, match=message):
        check_recipe_or_table("nowhere.csv", pictures=tmp_path / name)
