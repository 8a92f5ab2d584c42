"""Holds data/sources/emoji.py and npm.py to their promises: subgroups held out whole, nothing too large read."""

import io
import itertools
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dougong.core.errors import DataError
from dougong.data.sources import npm
from dougong.data.sources.emoji import PICTURES, SECOND_PICTURES, TABLE, WORDS, prepare_emoji, split_emoji

SUBGROUPS = {"0": "face", "1": "animal", "2": "skin", "3": "tool"}
GROUPS = {"0": "smileys", "1": "component"}
EMOJI = [("1F600", "grinning", 0, 0), ("2764-FE0F", "heart", 0, 0), ("1F436", "dog", 1, 0), ("1F431", "cat", 1, 0)]
EMOJI += [
    ("1F3FB", "light", 2, 1),
    ("1F528", "hammer", 3, 0),
    ("1F529", "hammer too", 3, 0),
    ("1F52A", "no picture", 3, 0),
]


def drawn(seed: int, ending: str, size: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    content = io.BytesIO()
    picture.save(content, format=ending.upper(), **({"lossless": True} if ending == "webp" else {}))
    return content.getvalue()


def words(language: str) -> bytes:
    entries = [
        {
            "hexcode": hexcode,
            "label": f"{name} {language}",
            "tags": ["tag", name],
            "order": place,
            "subgroup": sub,
            "group": group,
        }
        for place, (hexcode, name, sub, group) in enumerate(EMOJI)
    ]
    entries[0]["skins"] = [{"hexcode": "1F600-1F3FB", "label": "grinning: light"}]  # type: ignore[assignment]
    entries.append({"hexcode": "1F1E6", "label": "a letter of no subgroup"})  # type: ignore[dict-item]
    return json.dumps(entries).encode()


def contents() -> dict[str, dict[str, bytes]]:
    groups = json.dumps({"groups": GROUPS, "subgroups": SUBGROUPS}).encode()
    # The two hammers look the same; the second package writes a heart's name without FE0F.
    seeds = {hexcode: place for place, (hexcode, *_) in enumerate(EMOJI[:-1])} | {"1F529": 5, "1F528": 5}
    return {
        WORDS.name: {
            "meta/groups.json": groups,
            "en/data.json": words("en"),
            "de/data.json": words("de"),
            "x.js": b"throw",
        },
        PICTURES.name: {f"assets/{one.lower()}.webp": drawn(seed, "webp", 300) for one, seed in seeds.items()},
        SECOND_PICTURES.name: {
            f"img/google/64/{one.lower().replace('-fe0f', '')}.png": drawn(100 + place, "png", 64)
            for place, one in enumerate(seeds)
        },
    }


def write_tgz(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"package.json": b"{}", **files}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    for package in (WORDS, PICTURES, SECOND_PICTURES):
        write_tgz(folder / f"{package.file_stem}-{package.version}.tgz", contents()[package.name])
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / TABLE).to_pylist()
    return rows


def test_rows_are_emoji_with_both_pictures_and_all_names(packages: Path, tmp_path: Path) -> None:
    rows = rows_of(prepare_emoji(tmp_path / "emoji", packages=packages))

    assert [row["hexcode"] for row in rows] == ["1F600", "2764-FE0F", "1F436", "1F431", "1F528", "1F529"]
    assert rows[1]["name"] == "heart en"
    assert rows[1]["name_de"] == "heart de"
    assert rows[1]["tags"] == "tag, heart"
    assert (rows[2]["subgroup"], rows[2]["group"]) == ("animal", "smileys")
    assert Image.open(io.BytesIO(rows[0]["picture"]["bytes"])).size == (256, 256)  # smaller than it was
    assert rows[0]["second_picture"]["bytes"] == drawn(100, "png", 64)  # as it was


def test_those_that_look_the_same_name_each_other(packages: Path, tmp_path: Path) -> None:
    rows = rows_of(prepare_emoji(tmp_path / "emoji", packages=packages))
    assert {row["hexcode"]: row["alike"] for row in rows if row["alike"]} == {"1F528": ["1F529"], "1F529": ["1F528"]}


def test_unpacked_packages_make_the_same_table(packages: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "node_modules"
    for name, files in contents().items():
        for file, content in {"package.json": b"{}", **files}.items():
            path = unpacked / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    first = prepare_emoji(tmp_path / "one", packages=packages)
    second = prepare_emoji(tmp_path / "two", packages=unpacked)

    assert (first / TABLE).read_bytes() == (second / TABLE).read_bytes()


def test_a_folder_prepared_before_is_left_as_it_is(packages: Path, tmp_path: Path) -> None:
    folder = prepare_emoji(tmp_path / "emoji", packages=packages)
    heard: list[str] = []
    prepare_emoji(folder, packages=packages, announce=lambda what, _done, _total: heard.append(what))
    assert heard == []


# Splits ----------------------------------------------------------------------------------------------------------


def made_up() -> tuple[list[str], list[str], list[list[str]]]:
    """Ten subgroups of 1 to 10 rows; the first row of each looks like the first of the next."""
    subgroups = [f"s{number}" for number in range(10) for _ in range(number + 1)]
    hexcodes = [str(place) for place in range(len(subgroups))]
    firsts = [subgroups.index(f"s{number}") for number in range(10)]
    alike: list[list[str]] = [[] for _ in subgroups]
    for one, other in itertools.pairwise(firsts):
        alike[one].append(hexcodes[other])
        alike[other].append(hexcodes[one])
    return subgroups, hexcodes, alike


@pytest.mark.parametrize("seed", range(8))
def test_nothing_of_a_held_out_subgroup_is_in_training(seed: int) -> None:
    subgroups, hexcodes, alike = made_up()

    split = split_emoji(subgroups, hexcodes, alike, seed=seed, num_held_out=3, num_validation=2)

    held = {subgroups[row] for row in split.test}
    validation = {subgroups[row] for row in split.validation}
    assert held == set(split.held_out)
    assert len(held) == 3
    assert sorted(split.test) == [row for row, name in enumerate(subgroups) if name in held]  # whole
    for row in split.train:
        assert subgroups[row] not in held | validation
        assert not {subgroups[int(other)] for other in alike[row]} & (held | validation)
    for row in split.validation:
        assert not {subgroups[int(other)] for other in alike[row]} & held
    assert split.num_alike > 0


def test_seeds_draw_other_subgroups_and_a_number_of_rows_can_be_asked_for() -> None:
    columns = made_up()
    drawn_by = {split_emoji(*columns, seed=seed, num_held_out=3, num_validation=1).held_out for seed in range(6)}
    assert len(drawn_by) > 3
    for seed in range(4):
        assert (
            18 <= len(split_emoji(*columns, seed=seed, num_held_out=3, num_validation=1, between=(18, 20)).test) <= 20
        )
    with pytest.raises(DataError, match="no 3 of 10 subgroups have 1 to 2 rows together"):
        split_emoji(*columns, seed=0, num_held_out=3, num_validation=1, between=(1, 2))
    with pytest.raises(DataError, match="8 and 2 of 10 subgroups cannot be held out"):
        split_emoji(*columns, seed=0, num_held_out=8, num_validation=2)


# What may go wrong -----------------------------------------------------------------------------------------------


def test_no_npm_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda _name: None)
    with pytest.raises(DataError, match=r"^there is no npm to fetch emojibase-data@17.0.0 .* Install it") as caught:
        prepare_emoji(tmp_path / "emoji")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "emoji").exists()


def test_a_fetch_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda _name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "\nnpm error code ENOTFOUND\nnpm error more\n")
    monkeypatch.setattr(npm.subprocess, "run", lambda *_args, **_more: failed)
    with pytest.raises(
        DataError, match=r"^npm cannot fetch emojibase-data@17.0.0 \(npm error code ENOTFOUND\)"
    ) as caught:
        prepare_emoji(tmp_path / "emoji")
    assert "\n" not in str(caught.value)


def test_what_npm_packs_is_what_is_read(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pack(command: list[str], *, cwd: Path, **_more: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        name, _, version = command[2].rpartition("@")
        file = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
        (cwd / file).write_bytes((packages / file).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(npm.shutil, "which", lambda _name: "npm")
    monkeypatch.setattr(npm.subprocess, "run", pack)

    rows = rows_of(prepare_emoji(tmp_path / "emoji"))

    assert len(rows) == 6
    assert all("--ignore-scripts" in command for command in asked)


def test_what_is_no_package_is_refused(packages: Path, tmp_path: Path) -> None:
    archive = packages / f"{PICTURES.file_stem}-{PICTURES.version}.tgz"
    whole = archive.read_bytes()
    for content, message in ((whole[: len(whole) // 2], "is no whole .tgz file"), (b"text", "is no whole .tgz file")):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=message):
            prepare_emoji(tmp_path / "emoji", packages=packages)
    archive.unlink()
    with pytest.raises(DataError, match="has no package @lobehub/fluent-emoji-3d"):
        prepare_emoji(tmp_path / "emoji", packages=packages)
    with pytest.raises(DataError, match="is no folder"):
        prepare_emoji(tmp_path / "emoji", packages=tmp_path / "nowhere")


def test_sizes_are_limited_and_only_plain_files_are_read(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npm, "LARGEST_FILE_BYTES", 50)
    with pytest.raises(DataError, match="of a package has over 0 MiB. Do not trust"):
        prepare_emoji(tmp_path / "emoji", packages=packages)
    monkeypatch.undo()
    monkeypatch.setattr(npm, "LARGEST_PACKAGE_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than any package"):
        prepare_emoji(tmp_path / "emoji", packages=packages)
    monkeypatch.undo()

    secret = tmp_path / "secret.webp"
    secret.write_bytes(drawn(1, "webp", 8))
    archive = packages / f"{PICTURES.file_stem}-{PICTURES.version}.tgz"
    with tarfile.open(archive, "w:gz") as members:
        link = tarfile.TarInfo("package/assets/1f600.webp")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        members.addfile(link)
    with pytest.raises(DataError, match="holds none of the files"):
        prepare_emoji(tmp_path / "emoji", packages=packages)


def test_words_of_another_shape_are_refused(packages: Path, tmp_path: Path) -> None:
    files = contents()[WORDS.name] | {"en/data.json": b'[{"label": "no hexcode"}]'}
    write_tgz(packages / f"{WORDS.file_stem}-{WORDS.version}.tgz", files)
    with pytest.raises(DataError, match="emojibase-data is not as version 17.0.0 is"):
        prepare_emoji(tmp_path / "emoji", packages=packages)
