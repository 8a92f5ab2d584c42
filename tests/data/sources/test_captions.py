"""Holds data/sources/captions.py to its promise: nothing said that is not proved, the official split kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import easy_vqa
import pyarrow.parquet as pq
import pytest

from dougong.core.errors import DataError
from dougong.data.sources.captions import COLOURS, SHAPES, Facts, facts_of, prepare_captions


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_captions(tmp_path_factory.mktemp("captions") / "here", limit_images=60, captions_train=2)


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ([("what color is the shape?", "teal")], Facts("teal", None)),
        ([("what color is the triangle?", "blue")], Facts("blue", "triangle")),
        ([("what is the gray shape?", "circle")], Facts("gray", "circle")),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], Facts("red", "circle")),
        ([("is there not a red shape?", "no"), ("does the image not contain a circle?", "yes")], Facts("red", None)),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], Facts(None, "rectangle")),
        ([(f"is there a {colour} shape?", "no") for colour in COLOURS if colour != "brown"], Facts("brown", None)),
        ([("is there a red shape?", "no")], Facts(None, None)),
    ],
)
def test_questions_prove_what_they_prove(asked: list[tuple[str, str]], want: Facts) -> None:
    assert facts_of(asked) == want


@pytest.mark.parametrize(
    "asked",
    [
        [("what color is the shape?", "teal"), ("is there a teal shape?", "no")],
        [("what color is the shape?", "teal"), ("is there a red shape?", "yes")],
        [(f"is there a {shape}?", "no") for shape in SHAPES],
    ],
)
def test_a_contradiction_is_refused(asked: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match="the questions about a picture say"):
        facts_of(asked)


def test_captions_say_what_is_proved_and_nothing_else(prepared: Path) -> None:
    for split in ("train", "test"):
        questions, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        for row in pq.read_table(prepared / f"{split}.parquet").to_pylist():
            asked = [(q, a) for q, a, i in zip(questions, answers, image_ids, strict=True) if i == row["image_id"]]
            words = set(row["caption"].split())
            assert facts_of(asked) == (row["colour"], row["shape"])
            assert words & {*COLOURS, *SHAPES} == {row["colour"], row["shape"]}
            assert row["named"] == f"{row['colour']} {row['shape']}"
            assert row["image"]["bytes"] == Path(paths[row["image_id"]]).read_bytes()


def test_pictures_that_are_not_proved_are_counted_and_captions_of_one_differ(prepared: Path) -> None:
    source = json.loads((prepared / "source.json").read_text())
    rows = pq.read_table(prepared / "train.parquet").to_pylist()

    split = source["splits"]["train"]
    assert split["images"] + split["left_out"] == 60
    assert split["left_out"] > 0
    assert len(rows) == 2 * split["images"] == len({(row["image_id"], row["caption"]) for row in rows})


def test_the_same_settings_write_the_same_and_other_pictures_keep_their_captions(
    prepared: Path, tmp_path: Path
) -> None:
    fewer = prepare_captions(tmp_path / "fewer", limit_images=20, captions_train=2)
    other = prepare_captions(tmp_path / "other", limit_images=20, captions_train=2, seed=1)

    rows = pq.read_table(prepared / "train.parquet").to_pylist()
    assert pq.read_table(fewer / "train.parquet").to_pylist() == [row for row in rows if row["image_id"] < 20]
    assert pq.read_table(other / "train.parquet").to_pylist() != [row for row in rows if row["image_id"] < 20]


def test_mistakes_get_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="captions_train=7 is not possible: there are 6 wordings"):
        prepare_captions(tmp_path / "a", captions_train=7)
    with pytest.raises(DataError, match="limit_images=0 leaves no records"):
        prepare_captions(tmp_path / "a", limit_images=0)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match="the package easy-vqa, which holds the pictures, is not installed"):
        prepare_captions(tmp_path / "a")
