"""Holds data/sources/seen_and_spoken.py to its promise: pairs of one digit, and nothing in two tables."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from dougong.core.errors import DataError
from dougong.data.sources import seen_and_spoken
from dougong.data.sources.seen_and_spoken import prepare_seen_and_spoken

SIDES = ("train", "validation", "test")
SHARED_DATA = Path(os.environ.get("DOUGONG_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data")
REAL_RECORDINGS = SHARED_DATA / "fsdd" / "recordings"


def rows_of(folder: Path, side: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{side}.parquet").to_pylist()
    return rows


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> seen_and_spoken._Pictures:
    """Ten of each digit, in place of scikit-learn's: the first pixel's ink says the digit. Two are alike."""
    random = np.random.default_rng(0)
    digit_N = np.repeat(np.arange(10), 10)
    ink_NHW = random.integers(0, 17, (100, 8, 8)).astype(np.float64)
    ink_NHW[:, 0, 0] = digit_N
    ink_NHW[39] = ink_NHW[38]
    made_up = seen_and_spoken._Pictures(ink_NHW, digit_N)
    monkeypatch.setattr(seen_and_spoken, "_load_pictures", lambda: made_up)
    return made_up


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Four speakers, two digits, three takes."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    random = np.random.default_rng(0)
    for speaker in ("ann", "bob", "cem", "dee"):
        for digit in (0, 7):
            for take in range(3):
                soundfile.write(folder / f"{digit}_{speaker}_{take}.flac", random.uniform(-0.1, 0.1, 400), 8000)
    return folder


def ink_of(row: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) * (16 / 255)


def test_picture_and_recording_are_of_one_digit_as_they_were(
    recordings: Path, tmp_path: Path, pictures: seen_and_spoken._Pictures
) -> None:
    folder = prepare_seen_and_spoken(recordings, tmp_path / "pairs", pairings=2)

    rows = [row for side in SIDES for row in rows_of(folder, side)]

    assert {row["digit"] for row in rows} == {"0", "7"}
    for row in rows:
        assert round(float(ink_of(row)[0, 0])) == int(row["digit"])
        assert row["speech"]["path"].startswith(f"{row['digit']}_{row['speaker']}_")
        assert row["speech"]["bytes"] == (recordings / row["speech"]["path"]).read_bytes()
        number = int(row["image"]["path"].removesuffix(".png").split("_")[1])
        np.testing.assert_allclose(ink_of(row), pictures.ink_NHW[number], atol=16 / 255)


def test_no_speaker_recording_or_picture_is_in_two_tables(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_seen_and_spoken(recordings, tmp_path / "pairs", pairings=4)

    for read in (
        lambda row: row["speaker"],
        lambda row: row["speech"]["bytes"],
        lambda row: row["image"]["bytes"],
    ):
        seen = [{read(row) for row in rows_of(folder, side)} for side in SIDES]
        assert all(seen)
        assert not seen[0] & seen[1]
        assert not seen[0] & seen[2]
        assert not seen[1] & seen[2]


def test_a_training_recording_is_paired_with_different_pictures_others_with_one(
    recordings: Path, tmp_path: Path
) -> None:
    folder = prepare_seen_and_spoken(recordings, tmp_path / "pairs", pairings=3)

    for side, pairings, num_recordings in (("train", 3, 12), ("validation", 1, 6), ("test", 1, 6)):
        pairs = [(row["speech"]["path"], row["image"]["path"]) for row in rows_of(folder, side)]
        assert len(set(pairs)) == len(pairs) == pairings * num_recordings
    # 3 pictures of a digit for the test's 3 recordings of it: each has its own.
    assert len({row["image"]["path"] for row in rows_of(folder, "test")}) == 6


def test_pictures_that_are_alike_are_one(recordings: Path, tmp_path: Path) -> None:
    split = seen_and_spoken._split_pictures(seen_and_spoken._load_pictures(), seed=0)

    assert sorted(number for side in split.values() for number in side[3]) == [*range(30, 39)]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(recordings: Path, tmp_path: Path) -> None:
    def digest(seed: int, name: str) -> str:
        folder = prepare_seen_and_spoken(recordings, tmp_path / name, seed=seed)
        return hashlib.sha256(b"".join((folder / f"{side}.parquet").read_bytes() for side in SIDES)).hexdigest()

    assert digest(1, "a") == digest(1, "b") != digest(2, "c")


def test_prepared_tables_are_kept_until_something_changes(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_seen_and_spoken(recordings, tmp_path / "pairs", pairings=2)
    first = (folder / "source.json").stat().st_mtime_ns

    prepare_seen_and_spoken(recordings, folder, pairings=2)
    assert (folder / "source.json").stat().st_mtime_ns == first

    (recordings / "0_dee_2.flac").unlink()
    assert len(rows_of(prepare_seen_and_spoken(recordings, folder, pairings=2), "test")) == 5
    assert len(rows_of(prepare_seen_and_spoken(recordings, folder, pairings=3), "train")) == 36


def test_the_source_says_that_the_pairs_are_of_other_people(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_seen_and_spoken(recordings, tmp_path / "pairs")

    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))

    assert "not by the same people" in source["about"]
    assert source["splits"]["test"] == {"rows": 6, "speakers": ["dee"], "recordings": 6, "pictures": 6}
    assert str(tmp_path) not in json.dumps(source)


@pytest.mark.parametrize(
    ("pairings", "message"),
    [(0, "pairings=0 leaves no training records"), (5, "more pictures of a 0 than the 4 .* Use 4 or fewer")],
)
def test_impossible_pairings_are_refused_in_one_line(
    pairings: int, message: str, recordings: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare_seen_and_spoken(recordings, tmp_path / "pairs", pairings=pairings)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()


def test_a_missing_package_is_one_line_with_the_remedy(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real pictures, which are not to be had
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(DataError, match=r"scikit-learn.* is not installed. Run: pip install 'dougong\[digits\]'"):
        prepare_seen_and_spoken(recordings, tmp_path / "pairs")


@pytest.mark.skipif(not REAL_RECORDINGS.is_dir(), reason=f"no Free Spoken Digit Dataset in {REAL_RECORDINGS}")
def test_every_published_test_pair_has_a_picture_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.undo()

    folder = prepare_seen_and_spoken(REAL_RECORDINGS, tmp_path / "pairs")

    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert {side: (found["rows"], found["pictures"]) for side, found in source["splits"].items()} == {
        "train": (8000, 719),
        "validation": (500, 500),
        "test": (500, 500),
    }
