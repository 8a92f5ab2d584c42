"""Holds data/sources/digits.py to its promise: every recording once, no speaker in two tables."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from dougong.core.errors import DataError
from dougong.data.sources.digits import prepare_digits

SPLITS = ("train", "validation", "test")
SHARED_DATA = Path(os.environ.get("DOUGONG_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data")
REAL_RECORDINGS = SHARED_DATA / "fsdd" / "recordings"


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return rows


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Six speakers, two digits, two takes; one take as wav, and a file that is no recording."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for speaker in ("ann", "bob", "cem", "dee", "eva", "fay"):
        for digit in (0, 7):
            for take, suffix in ((2, "wav"), (10, "flac")):
                samples = generator.uniform(-0.1, 0.1, 400)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.{suffix}", samples, 8000)
    (folder / "notes_of_ann.txt").write_text("not a recording", encoding="utf-8")
    return folder


def test_every_recording_is_in_one_table_as_it_was(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_digits(recordings, tmp_path / "digits")

    rows = [row for split in SPLITS for row in rows_of(folder, split)]

    assert sorted(row["speech"]["path"] for row in rows) == sorted(path.name for path in recordings.glob("[07]_*"))
    for row in rows:
        assert row["speech"]["bytes"] == (recordings / row["speech"]["path"]).read_bytes()
        assert row["speech"]["path"].startswith(f"{row['digit']}_{row['speaker']}_")


def test_no_speaker_is_in_two_tables(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_digits(recordings, tmp_path / "digits")

    speakers = {split: {row["speaker"] for row in rows_of(folder, split)} for split in SPLITS}

    assert speakers == {"train": {"ann", "bob", "cem", "dee"}, "validation": {"eva"}, "test": {"fay"}}


def test_rows_come_by_speaker_then_digit_then_take(recordings: Path, tmp_path: Path) -> None:
    rows = rows_of(prepare_digits(recordings, tmp_path / "digits"), "test")

    assert [row["speech"]["path"] for row in rows] == ["0_fay_2.wav", "0_fay_10.flac", "7_fay_2.wav", "7_fay_10.flac"]


def test_files_that_are_no_recordings_are_counted(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_digits(recordings, tmp_path / "digits")

    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))

    assert source["num_other_files"] == 1
    assert source["splits"]["train"]["rows"] == 16
    assert str(tmp_path) not in json.dumps(source)


def test_prepared_tables_are_kept_until_the_recordings_change(recordings: Path, tmp_path: Path) -> None:
    folder = prepare_digits(recordings, tmp_path / "digits")
    first = (folder / "source.json").stat().st_mtime_ns

    prepare_digits(recordings, folder)
    assert (folder / "source.json").stat().st_mtime_ns == first

    (recordings / "0_fay_2.wav").unlink()
    assert len(rows_of(prepare_digits(recordings, folder), "test")) == 3


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder: .* Give the `recordings` folder") as caught:
        prepare_digits(tmp_path / "nowhere", tmp_path / "digits")

    assert "\n" not in str(caught.value)


def test_a_folder_without_recordings_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "7_jackson.wav").touch()

    with pytest.raises(
        DataError, match=r"holds no recordings \{digit\}_\{speaker\}_\{index\}\.flac or \.wav"
    ) as caught:
        prepare_digits(tmp_path, tmp_path / "digits")

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "digits").exists()


def test_too_few_speakers_are_refused_in_one_line(recordings: Path, tmp_path: Path) -> None:
    for path in recordings.glob("*_[c-f]*_*"):
        path.unlink()

    with pytest.raises(DataError, match=r"recordings of 2 speakers \(ann, bob\): .* 3 speakers or more"):
        prepare_digits(recordings, tmp_path / "digits")


@pytest.mark.skipif(not REAL_RECORDINGS.is_dir(), reason=f"no Free Spoken Digit Dataset in {REAL_RECORDINGS}")
def test_the_published_recordings_split_four_one_one(tmp_path: Path) -> None:
    folder = prepare_digits(REAL_RECORDINGS, tmp_path / "digits")

    assert [pq.read_metadata(folder / f"{split}.parquet").num_rows for split in SPLITS] == [2000, 500, 500]
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert source["splits"]["validation"]["speakers"] == ["theo"]
    assert source["splits"]["test"]["speakers"] == ["yweweler"]
    samples, sample_rate = soundfile.read(io.BytesIO(rows_of(folder, "test")[0]["speech"]["bytes"]))
    assert sample_rate == 8000
    assert len(samples) > 800
