"""Files kept once each, by what is in them.

Here        ObjectStore: `put_bundle`, `restore`, `tree`, `num_bytes`.
Elsewhere   versions, aliases and where they come from (versions.py).
Promise     twenty versions that share a base cost one base; an object is whole or absent, whoever is killed; what comes
            back is checked against its sum, byte for byte what went in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dougong.core.bundle import MANIFEST, read_bundle
from dougong.core.errors import BundleError, RunError
from dougong.core.files import as_json, inside, sha256_of, sync_file, whole_folder

OBJECTS: Final = "objects"


class ObjectStore:
    """A folder of objects, each under its sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / OBJECTS

    def put_bundle(self, bundle: Path) -> str:
        """Keep every file of a bundle; returns the name of its tree, which lists them.

        Raises:
            BundleError: it is no whole bundle.
        """
        manifest = read_bundle(bundle)
        tree = {name: self.put(bundle / name, found.sha256) for name, found in sorted(manifest.files.items())}
        tree[MANIFEST] = self.put(bundle / MANIFEST, sha256_of(bundle / MANIFEST))
        content = as_json(tree).encode()
        name = hashlib.sha256(content).hexdigest()
        self._write(name, content)
        return name

    def put(self, file: Path, sha256: str) -> str:
        """Keep one file, or find that it is kept."""
        place = self._place(sha256)
        if not place.is_file():
            with self._temporary() as temporary:
                shutil.copyfile(file, temporary)
                if sha256_of(temporary) != sha256:
                    raise BundleError(f"{file} changed while it was read. Register the bundle when nobody writes it.")
                self._publish(temporary, place)
        return sha256

    def tree(self, name: str) -> dict[str, str]:
        """Sums of a bundle's files, by name.

        Raises:
            RunError: it is not here, or not what it was.
        """
        return {file: str(sha) for file, sha in json.loads(self.read(name)).items()}

    def read(self, sha256: str) -> bytes:
        """
        Raises:
            RunError: it is not here, or not what it was.
        """
        place = self._place(sha256)
        if not place.is_file():
            raise RunError(f"{self.folder.parent} lacks the object {sha256[:12]}. Copy the whole registry again.")
        content = place.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RunError(f"{place} was altered: its sum differs from its name. Copy it from a backup.")
        return content

    def restore(self, tree: str, out: Path) -> Path:
        """Write a bundle as it was registered.

        Raises:
            RunError: an object is missing or altered.
            BundleError: `out` holds something that is no bundle.
        """
        if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
            raise BundleError(f"{out} holds other things, which a bundle would replace. Name another folder.")
        files = self.tree(tree)
        with whole_folder(out) as building:
            for name, sha256 in files.items():
                place = inside(building, name)
                if place is None:
                    raise RunError(f"tree {tree[:12]} names {name!r}, which lies outside of it. Do not trust it.")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self.read(sha256))
        return out

    def num_bytes(self) -> int:
        """What all objects take."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def clear_leftovers(self) -> None:
        """Remove what killed processes left; while nobody else writes."""
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _place(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _temporary(self) -> _Temporary:
        self.folder.mkdir(parents=True, exist_ok=True)
        return _Temporary(self.folder)

    def _write(self, name: str, content: bytes) -> None:
        place = self._place(name)
        if not place.is_file():
            with self._temporary() as temporary:
                temporary.write_bytes(content)
                self._publish(temporary, place)

    def _publish(self, temporary: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        sync_file(temporary)
        temporary.chmod(0o444)
        temporary.replace(place)  # another process may have put the same there: it is the same


class _Temporary:
    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
        os.close(handle)
        self._path = Path(name)

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *details: object) -> None:
        self._path.unlink(missing_ok=True)


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, list[str]]:
    """Which files came, went and changed between two trees."""
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name] and name != MANIFEST),
    }
