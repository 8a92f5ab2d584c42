"""Prepares pictures with truthful captions, from what easy-VQA's questions and answers tell of each picture.

Here        prepare_captions, `facts_of` (what the questions about one picture prove), the wordings.
Elsewhere   the questions themselves as records (easy_vqa.py); appearing whole or not at all (staging.py).
Promise     a caption says nothing that the picture's questions do not prove; a picture of which they prove too little
            is left out and counted; training and test pictures stay on the sides of the official split.

The pictures and questions come from the PyPI package `easy-vqa` (Victor Zhou, MIT), so no network is needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dougong.core.errors import DataError
from dougong.core.seeds import derive_seed
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "captions"

SHAPES: Final = ("circle", "rectangle", "triangle")
COLOURS: Final = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

WORDINGS: Final = (
    "a {colour} {shape}",
    "there is a {colour} {shape} in the picture",
    "the picture shows a {colour} {shape}",
    "a {shape} that is {colour}",
    "one {colour} {shape} on a pale ground",
    "the {shape} in this picture is {colour}",
)

ROWS_PER_GROUP: Final = 1000
SCHEMA: Final = pa.schema(
    [
        pa.field("image", MEDIA),
        pa.field("caption", pa.string()),
        pa.field("named", pa.string()),
        pa.field("colour", pa.string()),
        pa.field("shape", pa.string()),
        pa.field("image_id", pa.int32()),
    ]
)


class Facts(NamedTuple):
    """What is proved of a picture; None where nothing is."""

    colour: str | None
    shape: str | None


class _Split(NamedTuple):
    name: str
    rows: list[dict[str, Any]]
    num_pictures: int
    num_left_out: int


def facts_of(asked: Iterable[tuple[str, str]]) -> Facts:
    """What the questions and answers about one picture prove: by saying it, or by denying all else.

    Raises:
        DataError: they contradict each other.
    """
    said: dict[str, set[str]] = {"colour": set(), "shape": set()}
    denied: dict[str, set[str]] = {"colour": set(), "shape": set()}
    for question, answer in asked:
        words = question.lower().rstrip("?").split()
        mentioned = [(kind, word) for word in words for kind in said if word in _words(kind)]
        if answer in ("yes", "no"):
            there = (answer == "yes") is not ("not" in words or "no" in words)
            for kind, word in mentioned:
                (said if there else denied)[kind].add(word)
        else:  # "what color is the triangle?" proves the triangle too
            for kind, word in [*mentioned, *((kind, answer) for kind in said if answer in _words(kind))]:
                said[kind].add(word)
    return Facts(_proved("colour", said, denied), _proved("shape", said, denied))


def _words(kind: str) -> tuple[str, ...]:
    return COLOURS if kind == "colour" else SHAPES


def _proved(kind: str, said: dict[str, set[str]], denied: dict[str, set[str]]) -> str | None:
    possible = (said[kind] or set(_words(kind))) - denied[kind]
    if not possible or len(said[kind]) > 1:
        raise DataError(
            f"the questions about a picture say its {kind} is {', '.join(sorted(said[kind])) or 'none'} and is not "
            f"{', '.join(sorted(denied[kind]))}. Install the package easy-vqa again."
        )
    return possible.pop() if len(possible) == 1 else None


def prepare_captions(
    folder: Path, *, captions_train: int = 3, captions_test: int = 1, seed: int = 0, limit_images: int | None = None
) -> Path:
    """Write `train.parquet`, `test.parquet` and `source.json` into `folder`, and return it.

    A picture gets so many captions, each a record, with wordings drawn by `seed` and the picture's own number.
    A folder prepared before with the same settings is returned as it is.

    Raises:
        DataError: the package easy-vqa is not installed, or a number makes no sense.
    """
    for name, count in (("captions_train", captions_train), ("captions_test", captions_test)):
        if not 1 <= count <= len(WORDINGS):
            raise DataError(f"{name}={count} is not possible: there are {len(WORDINGS)} wordings. Use 1 to that many.")
    if limit_images is not None and limit_images < 1:
        raise DataError(f"limit_images={limit_images} leaves no records. Use 1 or more, or None for all images.")
    settings = {
        "captions_train": captions_train,
        "captions_test": captions_test,
        "seed": seed,
        "limit_images": limit_images,
        "wordings": list(WORDINGS),
    }
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    splits = [
        _read_split("train", captions_train, seed=seed, limit_images=limit_images),
        _read_split("test", captions_test, seed=seed, limit_images=limit_images),
    ]
    with staged_folder(folder, _describe(splits, settings)) as building:
        for split in splits:
            table = pa.Table.from_pylist(split.rows, schema=SCHEMA)
            pq.write_table(table, building / f"{split.name}.parquet", row_group_size=ROWS_PER_GROUP, compression="zstd")
    return folder


def _read_split(name: str, captions: int, *, seed: int, limit_images: int | None) -> _Split:
    try:
        package = importlib.import_module("easy_vqa")
    except ImportError:
        raise DataError(
            "cannot prepare captions: the package easy-vqa, which holds the pictures, is not installed. "
            "Run: pip install 'dougong[demo]'"
        ) from None
    paths = getattr(package, f"get_{name}_image_paths")()
    kept = sorted(paths)[:limit_images]
    asked: dict[int, list[tuple[str, str]]] = {image_id: [] for image_id in kept}
    for question, answer, image_id in zip(*getattr(package, f"get_{name}_questions")(), strict=True):
        if image_id in asked:
            asked[image_id].append((question, answer))
    rows: list[dict[str, Any]] = []
    left_out = 0
    for image_id in kept:
        colour, shape = facts_of(asked[image_id])
        if colour is None or shape is None:
            left_out += 1
            continue
        path = Path(paths[image_id])
        picture = {"bytes": path.read_bytes(), "path": f"{name}/images/{path.name}"}
        random = np.random.default_rng(derive_seed(seed, "captions", name, image_id))
        for wording in random.choice(len(WORDINGS), captions, replace=False):
            rows.append(
                {
                    "image": picture,
                    "caption": WORDINGS[wording].format(colour=colour, shape=shape),
                    "named": f"{colour} {shape}",
                    "colour": colour,
                    "shape": shape,
                    "image_id": image_id,
                }
            )
    return _Split(name, rows, len(kept) - left_out, left_out)


def _describe(splits: list[_Split], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": NAME,
        "about": "Pictures of one coloured shape, with captions made of what the questions about each prove.",
        "versions": {"easy-vqa": importlib.metadata.version("easy-vqa")},
        "licences": {"pictures, questions, answers": "MIT, Victor Zhou (PyPI: easy-vqa)", "wordings": "ours"},
        "splits": {
            split.name: {"rows": len(split.rows), "images": split.num_pictures, "left_out": split.num_left_out}
            for split in splits
        },
        "settings": settings,
    }
