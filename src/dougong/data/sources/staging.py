"""What the sources share: when a folder is already prepared, which one may be replaced, the media column.

Here        is_prepared, staged_folder, source.json, MEDIA.
Elsewhere   whole folders or none (core/files.py); what goes into them (easy_vqa.py, digits.py).
Promise     whatever stops a preparation, the folder keeps what it had; files that no source wrote are never replaced.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from dougong.core.errors import DataError
from dougong.core.files import whole_folder, write_json

SOURCE_FILE: Final = "source.json"
MEDIA: Final = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
"""Pictures and sound in a cell, as the `datasets` library writes them: inline bytes, or a path and no bytes."""


def is_prepared(folder: Path, *, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether source `name` prepared the folder before, with these very settings."""
    source = _stored_source(folder)
    # Through JSON and back, because a tuple is stored as a list.
    wanted: object = json.loads(json.dumps(settings))
    return source.get("name") == name and bool(source.get("settings") == wanted)


def check_folder(folder: Path, *, name: str) -> None:
    """Refuse a folder that holds anything but what source `name` prepared earlier."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"cannot prepare {name} in {folder}: it is a file. Name a folder that does not exist yet.")
    if folder.is_dir() and any(folder.iterdir()) and _stored_source(folder).get("name") != name:
        raise DataError(
            f"cannot prepare {name} in {folder}: it holds other files, which would be lost. "
            "Name an empty folder, or one that does not exist yet."
        )


@contextmanager
def staged_folder(folder: Path, source: dict[str, Any]) -> Iterator[Path]:
    """Give an empty folder to build in; on success it takes the place of `folder`, with `source` as its source.json.

    `source` needs `name` and `settings`; the block may add what it finds out while building.
    """
    check_folder(folder, name=source["name"])
    with whole_folder(folder) as building:
        yield building
        write_json(building / SOURCE_FILE, source)


def _stored_source(folder: Path) -> dict[str, Any]:
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return source if isinstance(source, dict) else {}
