"""Prepares easy-VQA (questions about pictures of one shape) with every question also spoken.

Here        prepare_easy_vqa and its voices.
Elsewhere   the synthesizer (data/sources/speech.py); appearing whole or not at all (staging.py, core/files.py).
Promise     the official split is kept, no speaker of the test table is heard in training, and the same settings give
            the same bytes; tests/data/sources/test_easy_vqa.py holds it to that. The speech is synthetic.

The pictures and questions come from the PyPI package `easy-vqa` (Victor Zhou, MIT), so no network is needed.
"""

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from dougong.core.errors import DataError
from dougong.data.sources.speech import SpeechVoice, speak, speech_engine
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "easy-vqa"

TRAIN_VOICES: Final = (
    SpeechVoice(accent="en-us", variant="m1", words_per_minute=150, pitch=45),
    SpeechVoice(accent="en-us", variant="f1", words_per_minute=175, pitch=55),
    SpeechVoice(accent="en", variant="m3", words_per_minute=165, pitch=40),
    SpeechVoice(accent="en", variant="f2", words_per_minute=190, pitch=50),
    SpeechVoice(accent="en-gb-x-rp", variant="m4", words_per_minute=140, pitch=50),
    SpeechVoice(accent="en-gb-scotland", variant="f4", words_per_minute=160, pitch=45),
    SpeechVoice(accent="en-029", variant="m6", words_per_minute=180, pitch=55),
    SpeechVoice(accent="en-us", variant="m7", words_per_minute=200, pitch=50),
)
TEST_VOICES: Final = (
    SpeechVoice(accent="en-us", variant="f3", words_per_minute=170, pitch=50),
    SpeechVoice(accent="en", variant="m2", words_per_minute=155, pitch=48),
    SpeechVoice(accent="en-gb-x-rp", variant="f5", words_per_minute=185, pitch=52),
    SpeechVoice(accent="en-gb-scotland", variant="m5", words_per_minute=145, pitch=45),
)
"""Other speakers than in training, at accents and speeds within what training covers."""

ROWS_PER_GROUP: Final = 5000
SCHEMA: Final = pa.schema(
    [
        pa.field("image", MEDIA),
        pa.field("question", pa.string()),
        pa.field("speech", MEDIA),
        pa.field("answer", pa.string()),
        pa.field("voice", pa.string()),
        pa.field("image_id", pa.int32()),
    ]
)

Announce = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is."""


class _Split(NamedTuple):
    """One side of the official split, in the package's order, a voice chosen for each row."""

    name: str
    questions: list[str]
    answers: list[str]
    image_ids: list[int]
    voices: list[SpeechVoice]
    image_paths: dict[int, Path]


def prepare_easy_vqa(
    folder: Path,
    *,
    sample_rate: int = 8000,
    voices_train: Sequence[SpeechVoice] = TRAIN_VOICES,
    voices_test: Sequence[SpeechVoice] = TEST_VOICES,
    seed: int = 0,
    limit_images: int | None = None,
    announce: Announce | None = None,
) -> Path:
    """Write `train.parquet`, `test.parquet`, `speech/` and `source.json` into `folder`, and return it.

    A folder prepared before with the same settings is returned as it is. The questions about one image share one
    voice, chosen by `seed`. `limit_images` keeps the first images of each side of the split, for a quick look.
    """
    _check_voices(voices_train, voices_test)
    if limit_images is not None and limit_images < 1:
        raise DataError(f"limit_images={limit_images} leaves no records. Use 1 or more, or None for all images.")
    settings = {
        "sample_rate": sample_rate,
        "voices_train": [asdict(voice) for voice in voices_train],
        "voices_test": [asdict(voice) for voice in voices_test],
        "seed": seed,
        "limit_images": limit_images,
    }
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    tell = announce if announce is not None else _tell_nobody

    splits = [
        _read_split("train", voices_train, seed=seed, limit_images=limit_images),
        _read_split("test", voices_test, seed=seed, limit_images=limit_images),
    ]
    source = _describe(splits, settings)
    with staged_folder(folder, source) as building:
        source["longest_speech_seconds"] = _write_speech(building, splits, sample_rate=sample_rate, announce=tell)
        for done, split in enumerate(splits, start=1):
            _write_table(building, split)
            tell("writing tables", done, len(splits))
    return folder


def _check_voices(voices_train: Sequence[SpeechVoice], voices_test: Sequence[SpeechVoice]) -> None:
    if not voices_train or not voices_test:
        raise DataError(
            f"{len(voices_train)} train and {len(voices_test)} test voices cannot speak both tables. "
            "Give at least one of each."
        )
    shared = sorted({voice.variant for voice in voices_train} & {voice.variant for voice in voices_test})
    if shared:
        raise DataError(
            f"voices_train and voices_test share the speakers {', '.join(shared)}: the test would hear known voices. "
            "Give the test voices other variants."
        )


def _read_split(name: str, voices: Sequence[SpeechVoice], *, seed: int, limit_images: int | None) -> _Split:
    try:
        package = importlib.import_module("easy_vqa")
    except ImportError:
        raise DataError(
            "cannot prepare easy-VQA: the package easy-vqa, which holds it, is not installed. "
            "Run: pip install 'dougong[demo]'"
        ) from None
    questions, answers, image_ids = getattr(package, f"get_{name}_questions")()
    image_paths = getattr(package, f"get_{name}_image_paths")()
    kept = set(sorted(image_paths)[:limit_images])
    rows = [row for row in zip(questions, answers, image_ids, strict=True) if row[2] in kept]
    return _Split(
        name=name,
        questions=[question for question, _, _ in rows],
        answers=[answer for _, answer, _ in rows],
        image_ids=[image_id for _, _, image_id in rows],
        voices=[_choose_voice(voices, f"{seed}/{name}/{image_id}") for _, _, image_id in rows],
        image_paths={image_id: Path(image_paths[image_id]) for image_id in sorted(kept)},
    )


def _choose_voice(voices: Sequence[SpeechVoice], unit: str) -> SpeechVoice:
    # A hash, not a generator: an image keeps its voice when the number of images changes.
    digest = hashlib.sha256(unit.encode()).digest()
    return voices[int.from_bytes(digest[:8], "big") % len(voices)]


def _write_speech(building: Path, splits: Sequence[_Split], *, sample_rate: int, announce: Announce) -> float:
    """Speak each question once in each voice that asks it; return the longest clip's seconds."""
    clips = {
        _speech_path(question, voice): (question, voice)
        for split in splits
        for question, voice in zip(split.questions, split.voices, strict=True)
    }
    longest_seconds = 0.0
    for done, path in enumerate(sorted(clips), start=1):
        question, voice = clips[path]
        samples = speak(question, voice, sample_rate)
        _write_flac(building / path, samples, sample_rate)
        longest_seconds = max(longest_seconds, len(samples) / sample_rate)
        announce("speaking questions", done, len(clips))
    return longest_seconds


def _speech_path(question: str, voice: SpeechVoice) -> str:
    """Where a clip lies, relative to the tables, with `/` on every system."""
    question_id = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")
    return f"speech/{voice.voice_id}/{question_id}.flac"


def _write_flac(path: Path, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rounded here, so that the file does not depend on how the library rounds.
    soundfile.write(path, np.round(samples * 32767).astype(np.int16), sample_rate, format="FLAC", subtype="PCM_16")


def _write_table(building: Path, split: _Split) -> None:
    pictures = {
        image_id: {"bytes": path.read_bytes(), "path": f"{split.name}/images/{path.name}"}
        for image_id, path in split.image_paths.items()
    }
    speech = [
        {"bytes": None, "path": _speech_path(question, voice)}
        for question, voice in zip(split.questions, split.voices, strict=True)
    ]
    table = pa.table(
        {
            "image": [pictures[image_id] for image_id in split.image_ids],
            "question": split.questions,
            "speech": speech,
            "answer": split.answers,
            "voice": [voice.voice_id for voice in split.voices],
            "image_id": split.image_ids,
        },
        schema=SCHEMA,
    )
    pq.write_table(table, building / f"{split.name}.parquet", row_group_size=ROWS_PER_GROUP, compression="zstd")


def _describe(splits: Sequence[_Split], settings: dict[str, Any]) -> dict[str, Any]:
    engine = speech_engine()  # first: it says what to install where the engine is missing
    return {
        "name": NAME,
        "about": "Pictures of one coloured shape, a question about each, typed and spoken, and its one-word answer.",
        "speech": "synthetic: espeak-ng",
        "versions": {
            "easy-vqa": importlib.metadata.version("easy-vqa"),
            "espeakng-loader": importlib.metadata.version("espeakng-loader"),
            "engine": engine,
        },
        "licences": {
            "pictures, questions, answers": "MIT, Victor Zhou (PyPI: easy-vqa)",
            "speech": "ours; made with espeak-ng (GPL-3.0), run as a tool",
        },
        "splits": {
            split.name: {
                "rows": len(split.questions),
                "images": len(split.image_paths),
                "questions": len(set(split.questions)),
                "answers": len(set(split.answers)),
                "voices": sorted({voice.voice_id for voice in split.voices}),
            }
            for split in splits
        },
        "settings": settings,
    }


def _tell_nobody(_what: str, _done: int, _total: int) -> None:
    pass
