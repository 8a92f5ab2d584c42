"""Holds data/modality/medium.py to its promise: BadValue and nothing else, and no path out of the folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from dougong.data.modality import medium
from dougong.data.modality.medium import BadValue, media_bytes, media_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table's folder with one file and several traps, and a secret beside it."""
    folder = tmp_path / "table"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "a.png").write_bytes(b"content")
    (folder / "empty.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize(
    "cell", [b"content", "a.png", {"bytes": b"content", "path": "gone.png"}, {"bytes": None, "path": "a.png"}]
)
def test_bytes_and_paths_alone_or_in_a_struct_are_read(cell: Any, folder: Path) -> None:
    assert media_bytes(cell, folder) == b"content"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("../secret.png", "path '../secret.png' leads out of the table's folder"),
        ("/etc/passwd", "path '/etc/passwd' leads out of the table's folder"),
        ("link.png", "path 'link.png' leads out of the table's folder"),
        ("up/secret.png", "path 'up/secret.png' leads out of the table's folder"),
        ("a\0.png", r"path 'a\x00.png' leads out of the table's folder"),
        ({"bytes": None, "path": "../secret.png"}, "path '../secret.png' leads out of the table's folder"),
        ("circle.png", "path 'circle.png' cannot be read (Symlink loop)"),
        ("x" * 5000, f"path '{'x' * 57}...' cannot be read (File name too long)"),
        ("\ud800.png", r"path '\ud800.png' cannot be read ('utf-8' codec can't encode character"),
        ("gone.png", "there is no file 'gone.png'"),
        ("pipe.png", "there is no file 'pipe.png'"),
        ("empty.png", "is an empty file"),
        (b"", "is an empty file"),
        (7, "holds int, not a file's bytes or path"),
        ([1.0], "holds list, not a file's bytes or path"),
        ({"bytes": None, "path": None}, "holds NoneType, not a file's bytes or path"),
        ({"byte": b"a", "name": "b"}, "holds a struct of byte, name, not of bytes and path"),
        ({"bytes": None, "path": 7}, "holds int, not a file's bytes or path"),
    ],
)
def test_what_cannot_be_read_is_a_bad_value_with_its_reason(cell: Any, reason: str, folder: Path) -> None:
    with pytest.raises(BadValue) as caught:
        media_bytes(cell, folder)
    assert str(caught.value).startswith(reason)


def test_a_file_too_large_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "vast.png").open("wb") as file:
        file.truncate(medium.LARGEST_FILE_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(BadValue, match=r"file 'vast\.png' has over 256 MiB"):
        media_bytes("vast.png", folder)


def test_bytes_too_large_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medium, "LARGEST_FILE_BYTES", 2**20)
    with pytest.raises(BadValue, match="has over 1 MiB"):
        media_bytes(bytes(2**20 + 1), folder)


def test_the_key_follows_the_bytes_and_else_the_path() -> None:
    assert media_key({"bytes": b"one", "path": "a"}) == media_key({"bytes": b"one", "path": "b"}) == media_key(b"one")
    assert media_key({"bytes": b"one", "path": "a"}) != media_key({"bytes": b"two", "path": "a"})
    assert media_key({"bytes": None, "path": "a"}) == media_key("a") != media_key("b")


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}, {"bytes": None, "path": ""}, {}])
def test_nothing_has_no_key(cell: Any) -> None:
    assert media_key(cell) is None


def test_a_long_name_has_a_short_key_of_its_own() -> None:
    one, two = (media_key("x" * 10_000 + end) for end in "ab")
    assert one != two
    assert isinstance(one, bytes)
    assert len(one) < 100


@pytest.mark.parametrize("cell", [7, [1.0], {"byte": b"a"}, {"bytes": None, "path": [7]}])
def test_what_is_of_a_wrong_type_has_a_key_so_that_it_is_not_taken_for_nothing(cell: Any) -> None:
    assert hash(media_key(cell)) is not None
    assert media_key(cell) is not None
