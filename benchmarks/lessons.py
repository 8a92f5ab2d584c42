"""Ten tasks for a model of easy-VQA to learn one after another.

Here        Lesson, `lessons`.
Elsewhere   learning them (continual.py).
Promise     always the same tasks and records; test records are of other takes, pictures or people than those learnt.

Tasks       spoken digits of five speakers of the Free Spoken Digit Dataset (takes 0 to 9 are the test); three pairs
            of scikit-learn's handwritten digits, four where RAVDESS is absent; emotions of RAVDESS (its last three
            actors are the test); how many of two statements are right of an easy-VQA picture (none, one, two), on
            pictures of the official test split.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from dougong.core.seeds import derive_seed
from dougong.data.sources.captions import facts_of
from dougong.data.sources.digits import find_recordings
from dougong.data.table import open_table
from dougong.recipes.tables import cache_folder

SHARED: Final = Path(__file__).parents[2] / "shared" / "data"
SPOKEN: Final = SHARED / "fsdd" / "recordings"
EMOTIONS: Final = SHARED / "ravdess"
NUM_TASKS: Final = 10
NAMED: Final = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


class Lesson(NamedTuple):
    """A task's records; every table has the base's own column names."""

    name: str
    about: str
    modality: tuple[str, ...]
    train: pa.Table
    test: pa.Table


def lessons(quick: bool) -> list[Lesson]:
    """Ten of them, always the same."""
    found = [*spoken_digits(), *emotions()]
    pairs = handwritten(4 if len(found) == 5 else 3)
    made = [*found, *pairs, counting()]
    assert len(made) == NUM_TASKS, [lesson.name for lesson in made]
    if not quick:
        return made
    few = (made[0], made[6], made[-1])
    return [lesson._replace(train=lesson.train.slice(0, 80), test=lesson.test.slice(0, 30)) for lesson in few]


def spoken_digits() -> list[Lesson]:
    found, _ = find_recordings(SPOKEN)
    speakers = sorted({each.speaker for each in found})[:5]
    made = []
    for speaker in speakers:
        own = [each for each in found if each.speaker == speaker]
        sides = [[each for each in own if (each.take < 10) is test] for test in (False, True)]
        tables = [
            pa.table(
                {
                    "speech": [{"bytes": each.path.read_bytes(), "path": each.path.name} for each in side],
                    "answer": [each.digit for each in side],
                }
            )
            for side in sides
        ]
        made.append(Lesson(f"speaker-{speaker}", "which digit does the voice say", ("speech",), *map(shuffled, tables)))
    return made


def handwritten(number: int) -> list[Lesson]:
    digits = importlib.import_module("sklearn.datasets").load_digits()
    made = []
    for pair in range(number):
        labels = (2 * pair, 2 * pair + 1)
        places = np.flatnonzero(np.isin(digits.target, labels))
        places = np.random.default_rng(0).permutation(places)
        rows = [{"image": _png(digits.images[place]), "answer": str(digits.target[place])} for place in places]
        test = len(rows) // 3
        tables = [pa.Table.from_pylist(part) for part in (rows[test:], rows[:test])]
        about = f"is the handwritten digit {labels[0]} or {labels[1]}"
        made.append(Lesson(f"written-{labels[0]}{labels[1]}", about, ("image",), *tables))
    return made


def _png(ink_HW: Any) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray((255 * ink_HW / 16).astype(np.uint8)).convert("RGB").resize((64, 64)).save(content, format="PNG")
    return {"bytes": content.getvalue(), "path": None}


def emotions() -> list[Lesson]:
    if not EMOTIONS.is_dir():
        return []
    files = sorted(EMOTIONS.glob("Actor_*/*.flac"))
    actors = sorted({path.parent.name for path in files})
    sides: list[list[dict[str, Any]]] = [[], []]
    for path in files:
        side = sides[path.parent.name in actors[-3:]]
        side.append(
            {
                "speech": {"bytes": path.read_bytes(), "path": path.name},
                "answer": NAMED[int(path.stem.split("-")[2]) - 1],
            }
        )
    tables = [shuffled(pa.Table.from_pylist(side)) for side in sides]
    return [Lesson("emotions", "which emotion does the voice have", ("speech",), *tables)]


def counting() -> Lesson:
    """Two statements of a picture, one of its colour and one of its shape."""
    sides = []
    for split, most in (("train", 900), ("test", 300)):
        table = open_table(cache_folder() / "easy-vqa" / f"{split}.parquet")
        rows = table.read(0, ["image", "question", "answer", "image_id"]).to_pylist()
        by_picture: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_picture.setdefault(row["image_id"], []).append(row)
        facts = {
            number: facts_of((row["question"], row["answer"]) for row in own) for number, own in by_picture.items()
        }
        known = {number: found for number, found in facts.items() if found.colour and found.shape}
        colours = sorted({found.colour or "" for found in known.values()})
        shapes = sorted({found.shape or "" for found in known.values()})
        random = np.random.default_rng(derive_seed(0, "counting", split))
        made = []
        for number, found in list(known.items()) * 3:
            right = [bool(random.integers(2)) for _ in range(2)]
            said = [
                fact if is_right else str(random.choice([each for each in every if each != fact]))
                for fact, is_right, every in zip((found.colour, found.shape), right, (colours, shapes), strict=True)
            ]
            question = f"how many are right: is it {said[0]}, is there a {said[1]}?"
            made.append(
                {
                    "image": by_picture[number][0]["image"],
                    "question": question,
                    "answer": ("none", "one", "two")[sum(right)],
                }
            )
        random.shuffle(made)
        sides.append(pa.Table.from_pylist(made[:most]))
    return Lesson("counting", "how many statements are right of the picture", ("image", "question"), *sides)


def shuffled(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
