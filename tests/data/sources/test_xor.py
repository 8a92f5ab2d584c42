"""Holds data/sources/xor.py to its promise: exclusive or, exactly balanced, the same each time."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dougong.core.errors import DataError
from dougong.data.columns import infer_roles
from dougong.data.sources.xor import prepare_xor
from dougong.data.table import open_table

SIDES = ("train", "validation", "test")
SIZES = {"train": 40, "validation": 8, "test": 12}


def rows_of(folder: Path, side: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{side}.parquet").to_pylist()
    return rows


def shown(row: dict[str, Any]) -> str:
    """By the pixels: on a grey ground, what is coloured is the shape."""
    pixels_HWC = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])), np.float64)
    return "red" if (pixels_HWC[..., 0] - pixels_HWC[..., 2]).mean() > 0 else "blue"


def said(row: dict[str, Any]) -> str:
    return "red" if "red" in row["sentence"].split() else "blue"


def test_the_answer_says_whether_picture_and_sentence_agree(tmp_path: Path) -> None:
    folder = prepare_xor(tmp_path / "xor", sizes=SIZES)

    for side in SIDES:
        for row in rows_of(folder, side):
            assert row["answer"] == ("true" if shown(row) == said(row) else "false")


def test_all_four_pairs_are_equally_frequent_so_neither_alone_tells(tmp_path: Path) -> None:
    folder = prepare_xor(tmp_path / "xor", sizes=SIZES)

    for side in SIDES:
        rows = rows_of(folder, side)
        assert len(rows) == SIZES[side]
        for reading in (shown, said):
            counts = Counter((reading(row), row["answer"]) for row in rows)
            assert counts == {
                (colour, answer): SIZES[side] // 4 for colour in ("red", "blue") for answer in ("true", "false")
            }


def test_no_picture_is_in_two_tables(tmp_path: Path) -> None:
    folder = prepare_xor(tmp_path / "xor", sizes=SIZES)

    pictures = [row["image"]["bytes"] for side in SIDES for row in rows_of(folder, side)]

    assert len(set(pictures)) == len(pictures) == 60


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    def digest(seed: int, name: str) -> str:
        folder = prepare_xor(tmp_path / name, seed=seed, sizes=SIZES)
        return hashlib.sha256(b"".join((folder / f"{side}.parquet").read_bytes() for side in SIDES)).hexdigest()

    assert digest(1, "a") == digest(1, "b") != digest(2, "c")


def test_it_calls_itself_synthetic_and_is_kept_until_a_setting_changes(tmp_path: Path) -> None:
    folder = prepare_xor(tmp_path / "xor", sizes=SIZES)
    first = (folder / "source.json").stat().st_mtime_ns

    prepare_xor(folder, sizes=SIZES)
    assert (folder / "source.json").stat().st_mtime_ns == first
    assert json.loads((folder / "source.json").read_text(encoding="utf-8"))["about"].startswith("Synthetic")

    prepare_xor(folder, seed=1, sizes=SIZES)
    assert (folder / "source.json").stat().st_mtime_ns != first


def test_columns_mean_what_they_are_without_being_named(tmp_path: Path) -> None:
    table = open_table(prepare_xor(tmp_path / "xor", sizes=SIZES) / "train.parquet")

    roles = infer_roles(table, target=None, named={})

    assert {name: found.role for name, found in roles.items()} == {
        "image": "image",
        "sentence": "text",
        "answer": "target",
    }


@pytest.mark.parametrize("size", [0, 6])
def test_a_size_that_cannot_be_balanced_is_refused_in_one_line(size: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{size} test records cannot share out the 4 pairs") as caught:
        prepare_xor(tmp_path / "xor", sizes={**SIZES, "test": size})

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "xor").exists()
