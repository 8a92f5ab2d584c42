"""Prepares digits that are both seen and spoken: handwritten pictures beside recordings of people saying the digit.

Here        prepare_seen_and_spoken.
Elsewhere   finding the recordings and who is heard in which table (digits.py); appearing whole or not at all
            (staging.py).
Promise     a picture and a recording in one record are of one digit; no speaker, no recording and no picture is in
            two tables; the same settings give the same bytes; tests/data/sources/test_seen_and_spoken.py holds it to
            that. The pairs are made here: who wrote the digit is not who speaks it.

The user names the folder of recordings (Free Spoken Digit Dataset, CC BY-SA 4.0). The pictures, 8 x 8 pixels, are
those that scikit-learn ships (Alpaydin and Kaynak, UCI: Optical Recognition of Handwritten Digits, CC BY 4.0).
"""

import hashlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dougong.core.errors import DataError
from dougong.core.seeds import derive_seed
from dougong.data.sources.digits import Recording, find_recordings, fingerprint, speakers_apart
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "seen-and-spoken"

SIDES: Final = {"test": 0.3, "validation": 0.3}
"""Shares of each digit's pictures; the rest is for training. With the published recordings, 50 of a digit by each
speaker, every pair of the test then has a picture of its own."""

PAIRINGS: Final = 4
INK: Final = 16
"""The pictures count ink from 0 to 16."""

SCHEMA: Final = pa.schema(
    [
        pa.field("image", MEDIA),
        pa.field("speech", MEDIA),
        pa.field("digit", pa.string()),
        pa.field("speaker", pa.string()),
    ]
)


class _Pictures(NamedTuple):
    """Shapes: N pictures of H x W."""

    ink_NHW: npt.NDArray[np.float64]
    digit_N: npt.NDArray[np.int64]


class _Pair(NamedTuple):
    """One record: a recording, and the number of a picture of the same digit."""

    recording: Recording
    picture: int


def prepare_seen_and_spoken(recordings: Path, folder: Path, *, seed: int = 0, pairings: int = PAIRINGS) -> Path:
    """Write `train.parquet`, `validation.parquet`, `test.parquet` and `source.json` into `folder`, and return it.

    Columns: image (PNG), speech (as recorded), digit, speaker. Each training recording is paired with `pairings`
    pictures, each other one with a single picture; `seed` says who is heard in which table, splits the pictures and
    pairs them. A folder prepared
    before from the same files with the same settings is returned as it is.

    Raises:
        DataError: no recordings of three speakers, no scikit-learn, or fewer pictures than pairings.
    """
    if pairings < 1:
        raise DataError(f"pairings={pairings} leaves no training records. Use 1 or more.")
    found, num_other_files = find_recordings(recordings)
    speakers_of = speakers_apart(found, recordings, turn=seed)
    pictures = _load_pictures()
    settings = {
        "seed": seed,
        "pairings": pairings,
        "speakers": speakers_of,
        "recordings": fingerprint(found),
        "pictures": hashlib.sha256(pictures.ink_NHW.tobytes() + pictures.digit_N.tobytes()).hexdigest(),
    }
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    pictures_of = _split_pictures(pictures, seed=seed)
    pairs_of = {
        side: _pair(
            [recording for recording in found if recording.speaker in names],
            pictures_of[side],
            pairings=pairings if side == "train" else 1,
            seed=derive_seed(seed, NAME, "pair", side),
        )
        for side, names in speakers_of.items()
    }
    source = {
        "name": NAME,
        "about": "Handwritten digits and recordings of people saying them, paired by digit: not by the same people.",
        "speech": "recorded",
        "licences": {
            "speech": "CC BY-SA 4.0, Zohar Jackson and the other speakers",
            "pictures": "CC BY 4.0, E. Alpaydin and C. Kaynak (UCI: Optical Recognition of Handwritten Digits)",
        },
        "splits": {
            side: {
                "rows": len(pairs),
                "speakers": speakers_of[side],
                "recordings": len({pair.recording for pair in pairs}),
                "pictures": len({pair.picture for pair in pairs}),
            }
            for side, pairs in pairs_of.items()
        },
        "num_other_files": num_other_files,
        "settings": settings,
    }
    with staged_folder(folder, source) as building:
        for side, pairs in pairs_of.items():
            _write_table(building / f"{side}.parquet", pairs, pictures)
    return folder


def _load_pictures() -> _Pictures:
    try:
        collections = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise DataError(
            "cannot prepare seen-and-spoken: the package scikit-learn, which holds the pictures, is not installed. "
            "Run: pip install 'dougong[digits]'"
        ) from None
    held = collections.load_digits()
    return _Pictures(np.asarray(held.images, np.float64), np.asarray(held.target, np.int64))


def _split_pictures(pictures: _Pictures, *, seed: int) -> dict[str, dict[int, list[int]]]:
    """Numbers of pictures by side and digit, in random order; one that was drawn twice counts once."""
    pictures_of: dict[str, dict[int, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    _, first_N = np.unique(pictures.ink_NHW.reshape(len(pictures.digit_N), -1), axis=0, return_index=True)
    first_N = np.sort(first_N)
    for digit in range(10):
        order = first_N[pictures.digit_N[first_N] == digit]
        np.random.default_rng(derive_seed(seed, NAME, "split", digit)).shuffle(order)
        end_test = round(SIDES["test"] * len(order))
        end_validation = end_test + round(SIDES["validation"] * len(order))
        pictures_of["test"][digit] = order[:end_test].tolist()
        pictures_of["validation"][digit] = order[end_test:end_validation].tolist()
        pictures_of["train"][digit] = order[end_validation:].tolist()
    return pictures_of


def _pair(
    recordings: Sequence[Recording], pictures_of: dict[int, list[int]], *, pairings: int, seed: int
) -> list[_Pair]:
    """Each recording with `pairings` different pictures, and each picture about as often as others of its digit."""
    pairs: list[_Pair] = []
    for digit in range(10):
        spoken = [recording for recording in recordings if int(recording.digit) == digit]
        numbers = list(pictures_of[digit])
        if spoken and pairings > len(numbers):
            raise DataError(
                f"pairings={pairings} asks for more pictures of a {digit} than the {len(numbers)} that are for "
                f"training. Use {len(numbers)} or fewer."
            )
        np.random.default_rng(derive_seed(seed, digit)).shuffle(numbers)
        stride = len(numbers) // pairings
        pairs += [
            _Pair(recording, numbers[(place + again * stride) % len(numbers)])
            for again in range(pairings)
            for place, recording in enumerate(spoken)
        ]
    # In the order of the recordings, as the table of recordings alone has it.
    return sorted(pairs, key=lambda pair: pair.recording)


def _write_table(path: Path, pairs: Sequence[_Pair], pictures: _Pictures) -> None:
    drawn = {pair.picture: _picture(pictures, pair.picture) for pair in pairs}
    table = pa.table(
        {
            "image": [drawn[pair.picture] for pair in pairs],
            "speech": [{"bytes": pair.recording.path.read_bytes(), "path": pair.recording.path.name} for pair in pairs],
            "digit": [pair.recording.digit for pair in pairs],
            "speaker": [pair.recording.speaker for pair in pairs],
        },
        schema=SCHEMA,
    )
    pq.write_table(table, path, row_group_size=500, compression="zstd")


def _picture(pictures: _Pictures, number: int) -> dict[str, bytes | str]:
    content = io.BytesIO()
    grey_HW = np.round(pictures.ink_NHW[number] * (255 / INK)).astype(np.uint8)
    Image.fromarray(grey_HW).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": f"{pictures.digit_N[number]}_{number}.png"}
