"""Prepares the Free Spoken Digit Dataset: recordings of people saying one digit.

Here        prepare_digits; finding the recordings and keeping speakers apart, for whoever pairs them with something.
Elsewhere   decoding the recordings (the rest of data); appearing whole or not at all (staging.py, core/files.py).
Promise     every recording is in exactly one table, and no speaker is in two of them;
            tests/data/sources/test_digits.py holds it to that.

The user names the folder: the recordings (Jackson and others, CC BY-SA 4.0) are not part of this project.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dougong.core.errors import DataError
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "free-spoken-digit-dataset"
RECORDING_NAME: Final = re.compile(r"(?P<digit>[0-9])_(?P<speaker>[^_]+)_(?P<take>[0-9]+)\.(flac|wav)")
SCHEMA: Final = pa.schema([pa.field("speech", MEDIA), pa.field("digit", pa.string()), pa.field("speaker", pa.string())])


class Recording(NamedTuple):
    """One file. Sorting puts them by speaker, then digit, then take."""

    speaker: str
    digit: str
    take: int
    path: Path


def prepare_digits(recordings: Path, folder: Path) -> Path:
    """Write `train.parquet`, `validation.parquet`, `test.parquet` and `source.json` into `folder`, and return it.

    By alphabet the last speaker is the test, the one before is the validation, and all others are for training:
    4, 1 and 1 of the published six. A folder prepared before from the same files is returned as it is.
    """
    found, num_other_files = find_recordings(recordings)
    speakers_of = speakers_apart(found, recordings)
    settings = {"speakers": speakers_of, "recordings": fingerprint(found)}
    if is_prepared(folder, name=NAME, settings=settings):
        return folder

    rows_of = {
        split: [recording for recording in found if recording.speaker in names] for split, names in speakers_of.items()
    }
    source = {
        "name": NAME,
        "about": "Recordings of people saying one digit; the recordings lie inside the tables.",
        "speech": "recorded",
        "licences": {"speech": "CC BY-SA 4.0, Zohar Jackson and the other speakers"},
        "splits": {split: {"rows": len(rows), "speakers": speakers_of[split]} for split, rows in rows_of.items()},
        "num_other_files": num_other_files,
        "settings": settings,
    }
    with staged_folder(folder, source) as building:
        for split, rows in rows_of.items():
            _write_table(building / f"{split}.parquet", rows)
    return folder


def find_recordings(recordings: Path) -> tuple[list[Recording], int]:
    """The recordings in order, and how many files are something else.

    Raises:
        DataError: there is no such folder, or no recording in it.
    """
    if not recordings.is_dir():
        raise DataError(
            f"{recordings} is not a folder: there are no spoken digits to read. "
            "Give the `recordings` folder of the Free Spoken Digit Dataset."
        )
    found = []
    num_other_files = 0
    for path in recordings.iterdir():
        match = RECORDING_NAME.fullmatch(path.name)
        if match is not None and path.is_file():
            found.append(Recording(match["speaker"], match["digit"], int(match["take"]), path))
        else:
            num_other_files += 1
    if not found:
        raise DataError(
            f"{recordings} holds no recordings {{digit}}_{{speaker}}_{{index}}.flac or .wav, like 7_jackson_32.wav. "
            "Give the `recordings` folder of the Free Spoken Digit Dataset."
        )
    return sorted(found), num_other_files


def speakers_apart(found: Sequence[Recording], recordings: Path, *, turn: int = 0) -> dict[str, list[str]]:
    """Who is heard in which table: the last by alphabet is the test, the one before the validation; each turn moves
    everybody by one place.

    Raises:
        DataError: there are fewer than three speakers.
    """
    speakers = sorted({recording.speaker for recording in found})
    if len(speakers) < 3:
        raise DataError(
            f"{recordings} holds recordings of {len(speakers)} speakers ({', '.join(speakers)}): train, validation and "
            "test need one each, since a speaker is never shared. Give the recordings of 3 speakers or more."
        )
    first = -turn % len(speakers)
    speakers = speakers[first:] + speakers[:first]
    return {"train": speakers[:-2], "validation": speakers[-2:-1], "test": speakers[-1:]}


def fingerprint(found: Sequence[Recording]) -> str:
    """Changes with the files. Names and sizes, because a folder already prepared should be recognised at once."""
    listing = "\n".join(f"{recording.path.name} {recording.path.stat().st_size}" for recording in found)
    return hashlib.sha256(listing.encode()).hexdigest()


def _write_table(path: Path, rows: Sequence[Recording]) -> None:
    table = pa.table(
        {
            "speech": [{"bytes": row.path.read_bytes(), "path": row.path.name} for row in rows],
            "digit": [row.digit for row in rows],
            "speaker": [row.speaker for row in rows],
        },
        schema=SCHEMA,
    )
    # Small groups: the recordings make a row some kilobytes. They are compressed already.
    pq.write_table(table, path, row_group_size=500, compression="zstd")
