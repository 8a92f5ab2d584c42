"""Files that are whole or absent, and paths that stay in their folder.

Here        atomic writes of files and folders, sha256 sums, `inside`.
Elsewhere   what is written, and when (the areas above).
Promise     a reader never sees half of a file or folder, even after the power fails; a path taken from data
            never leads out of its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling file to write; on success it replaces `path`, else nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave what was there before."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, for people to read as well."""
    write_atomic(path, as_json(value))


def as_json(value: Any) -> str:
    """The text of a JSON file that people may read as well."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; on success it replaces `path`, else nothing is left of it.

    Every file is on the disk before the folder gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        finish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def finish_folder(temporary: Path, path: Path) -> None:
    """Give a folder that has been written beside `path` its name, once all of it is on the disk."""
    for file in temporary.rglob("*"):
        if file.is_file():
            sync_file(file)
        else:
            _sync_folder(file)
    temporary.chmod(0o755)
    _sync_folder(temporary)
    if path.exists():
        # rename(2) replaces no folder that has files: the old one steps aside first.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.rename(aside / "old")
        temporary.rename(path)
        shutil.rmtree(aside)
    else:
        temporary.rename(path)
    _sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until what was written is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folders; NTFS journals the rename itself.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 sum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path | None:
    """The file that `name` means inside `folder`, or None where it would lead out of it (links followed)."""
    if not name or "\0" in name:
        return None
    root = folder.resolve()
    path = (root / name).resolve()
    return path if path.is_relative_to(root) and path != root else None
