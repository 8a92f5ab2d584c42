"""Holds data/sources/easy_vqa.py to its promise: official split, unheard test speakers, same settings same bytes."""

import json
import sys
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from dougong.core.errors import DataError
from dougong.data.sources.easy_vqa import TEST_VOICES, TRAIN_VOICES, prepare_easy_vqa
from dougong.data.sources.speech import SpeechVoice

NUM_IMAGES = 4
OFFICIAL_ROWS = {"train": 38575, "test": 9673}
OFFICIAL_QUESTIONS = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}
OFFICIAL_IMAGES = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_easy_vqa(tmp_path_factory.mktemp("easy") / "vqa", limit_images=NUM_IMAGES)


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return rows


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_table_is_the_official_split_in_its_order(prepared: Path, split: str) -> None:
    questions, answers, image_ids = OFFICIAL_QUESTIONS[split]()
    assert len(questions) == OFFICIAL_ROWS[split]
    official = [row for row in zip(questions, answers, image_ids, strict=True) if row[2] < NUM_IMAGES]
    images = OFFICIAL_IMAGES[split]()

    rows = rows_of(prepared, split)

    assert [(row["question"], row["answer"], row["image_id"]) for row in rows] == official
    for row in rows:
        picture = Path(images[row["image_id"]])
        assert row["image"] == {"bytes": picture.read_bytes(), "path": f"{split}/images/{picture.name}"}


def test_no_test_speaker_is_heard_in_training(prepared: Path) -> None:
    heard = {split: {row["voice"] for row in rows_of(prepared, split)} for split in ("train", "test")}

    assert heard["train"] <= {voice.voice_id for voice in TRAIN_VOICES}
    assert heard["test"] <= {voice.voice_id for voice in TEST_VOICES}
    assert not {voice.variant for voice in TRAIN_VOICES} & {voice.variant for voice in TEST_VOICES}


def test_a_speaker_on_both_sides_is_refused(tmp_path: Path) -> None:
    # Another accent does not make another speaker.
    voices_test = [SpeechVoice(accent="en-gb-scotland", variant=TRAIN_VOICES[0].variant)]

    with pytest.raises(DataError, match=r"share the speakers m1: .* Give the test voices other variants\.$"):
        prepare_easy_vqa(tmp_path / "vqa", voices_test=voices_test)


def test_all_questions_about_one_image_share_a_voice(prepared: Path) -> None:
    voices: dict[int, set[str]] = {}
    for row in rows_of(prepared, "train"):
        voices.setdefault(row["image_id"], set()).add(row["voice"])

    assert all(len(of_one_image) == 1 for of_one_image in voices.values())
    assert len(set.union(*voices.values())) > 1


def test_the_same_seed_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    assert bytes_of(prepare_easy_vqa(tmp_path / "again", limit_images=NUM_IMAGES)) == bytes_of(prepared)


def test_another_seed_gives_other_voices(prepared: Path, tmp_path: Path) -> None:
    other = prepare_easy_vqa(tmp_path / "other", limit_images=NUM_IMAGES, seed=1)

    assert [row["voice"] for row in rows_of(other, "train")] != [row["voice"] for row in rows_of(prepared, "train")]


def test_fewer_images_keep_the_voices_they_had(prepared: Path, tmp_path: Path) -> None:
    fewer = rows_of(prepare_easy_vqa(tmp_path / "fewer", limit_images=1), "train")

    assert fewer == rows_of(prepared, "train")[: len(fewer)]


def test_every_path_is_relative_and_leads_to_a_clip_that_can_be_heard(prepared: Path) -> None:
    for split in ("train", "test"):
        for row in rows_of(prepared, split):
            path = row["speech"]["path"]
            assert row["speech"]["bytes"] is None
            assert path.startswith(f"speech/{row['voice']}/")
            samples, sample_rate = soundfile.read(prepared / path)
            assert sample_rate == 8000
            assert 0.5 < len(samples) / sample_rate < 4
            assert np.abs(samples).max() > 0.1


def test_nothing_prepared_names_this_machine(prepared: Path) -> None:
    for name, content in bytes_of(prepared).items():
        assert str(prepared.parent).encode() not in content, name
        assert str(Path(easy_vqa.__file__).parent).encode() not in content, name


def test_the_source_says_that_the_speech_is_synthetic_and_the_folder_partial(prepared: Path) -> None:
    source = json.loads((prepared / "source.json").read_text(encoding="utf-8"))

    assert source["speech"] == "synthetic: espeak-ng"
    assert source["settings"]["limit_images"] == NUM_IMAGES
    assert source["splits"]["train"]["rows"] == len(rows_of(prepared, "train"))
    assert source["versions"]["easy-vqa"]
    assert source["versions"]["engine"].startswith("espeak-ng ")


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []

    folder = prepare_easy_vqa(
        tmp_path / "vqa", limit_images=1, announce=lambda what, done, total: heard.append((what, done, total))
    )

    num_clips = len(list(folder.rglob("*.flac")))
    assert heard[num_clips - 1] == ("speaking questions", num_clips, num_clips)
    assert heard[-1] == ("writing tables", 2, 2)


def test_an_interrupted_preparation_leaves_nothing_half_written(tmp_path: Path) -> None:
    def interrupt(_what: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_easy_vqa(tmp_path / "vqa", limit_images=1, announce=interrupt)

    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_preparation_keeps_what_was_there(tmp_path: Path) -> None:
    def interrupt(what: str, _done: int, _total: int) -> None:
        if what == "writing tables":
            raise KeyboardInterrupt

    folder = prepare_easy_vqa(tmp_path / "vqa", limit_images=1)
    before = bytes_of(folder)

    with pytest.raises(KeyboardInterrupt):
        prepare_easy_vqa(folder, limit_images=1, seed=1, announce=interrupt)

    assert bytes_of(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_prepared_with_the_same_settings_is_left_as_it_is(tmp_path: Path) -> None:
    folder = prepare_easy_vqa(tmp_path / "vqa", limit_images=1)
    heard: list[str] = []

    prepare_easy_vqa(folder, limit_images=1, announce=lambda what, _done, _total: heard.append(what))
    assert heard == []

    prepare_easy_vqa(folder, limit_images=1, seed=1, announce=lambda what, _done, _total: heard.append(what))
    assert heard


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")

    with pytest.raises(DataError, match="it holds other files, which would be lost") as caught:
        prepare_easy_vqa(tmp_path, limit_images=1)

    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("espeakng_loader", "cannot speak text: the package espeakng-loader"),
        ("easy_vqa", "cannot prepare easy-VQA: the package easy-vqa"),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy(
    package: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(DataError, match=rf"^{message}.* Run: pip install 'dougong\[demo\]'$"):
        prepare_easy_vqa(tmp_path / "vqa", limit_images=1)

    assert list(tmp_path.iterdir()) == []


def test_settings_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"limit_images=0 leaves no records"):
        prepare_easy_vqa(tmp_path / "vqa", limit_images=0)
    with pytest.raises(DataError, match=r"0 train and 4 test voices"):
        prepare_easy_vqa(tmp_path / "vqa", voices_train=[])
