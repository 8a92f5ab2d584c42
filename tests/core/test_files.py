from pathlib import Path

import pytest

from dougong.core.files import inside, sha256_of, whole_folder, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 7)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_one_before_it(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with whole_folder(tmp_path / "new") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "", ".", "a\0b", "link/secret"])
def test_a_path_from_data_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    assert inside(folder, name) is None


def test_a_path_inside_is_found(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/./b.png") == tmp_path.resolve() / "a" / "b.png"


def test_the_sum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")
