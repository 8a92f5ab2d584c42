"""The deployable artifact: a folder with a manifest that names every file and its sum.

Here        Manifest, write_bundle, read_bundle; kind_of and bundle_in, to find out what a folder holds.
Elsewhere   what the files hold (bundle/model.py writes and reads them with a tensor library).
Promise     a bundle appears whole or not at all; reading refuses a file that was altered, is missing,
            or that lies outside the folder; nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from dougong.core.config import Config, parse
from dougong.core.errors import BundleError, ConfigError
from dougong.core.files import inside, sha256_of, whole_folder, write_json
from dougong.core.signature import Signature

FORMAT: Final = "dougong-bundle"
FORMAT_VERSION: Final = 2
MANIFEST: Final = "bundle.json"
LARGEST_MANIFEST_BYTES: Final = 64 * 2**20


class FileSum(Config):
    """What a file must be."""

    sha256: str
    num_bytes: int


class Manifest(Config):
    """bundle.json."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    name: str
    signature: Signature
    """Inputs and output, with the labels."""

    model: dict[str, Any]
    """What rebuilds the model, in the words of its kind."""

    provenance: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: recipe, data, versions, seed."""

    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Measured figures by condition."""

    files: dict[str, FileSum] = Field(default_factory=dict)
    """Every other file of the bundle."""

    @property
    def kind(self) -> str | None:
        """What kind of model this is; None of one that decides."""
        kind = self.model.get("kind", self.provenance.get("kind"))  # the latter of one that gives vectors
        return None if kind is None else str(kind)


@contextmanager
def write_bundle(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Give an empty folder to put the files in; on success it becomes `folder`, with its manifest.

    Raises:
        BundleError: `folder` holds something that is not a bundle, and would be lost.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())):
        raise BundleError(
            f"{folder} holds other things, which a bundle would replace. Name a folder that is not there yet."
        )
    with whole_folder(folder) as building:
        yield building
        files = {
            path.relative_to(building).as_posix(): FileSum(sha256=sha256_of(path), num_bytes=path.stat().st_size)
            for path in sorted(building.rglob("*"))
            if path.is_file()
        }
        write_json(building / MANIFEST, manifest.model_copy(update={"files": files}).model_dump(mode="json"))


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (folder / MANIFEST).is_file()


def read_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle whose every file is as it was written.

    Raises:
        BundleError: no bundle, another format version, or a missing, altered or strayed file.
    """
    manifest = _manifest(folder)
    for name, wanted in manifest.files.items():
        _check_file(folder, name, wanted)
    return manifest


def kind_of(folder: Path) -> str | None:
    """What kind of model a bundle says it holds; None of one that decides. Its files are not looked at.

    Raises:
        BundleError: no bundle, or another format version.
    """
    return _manifest(folder).kind


def bundle_in(folder: Path) -> Path:
    """The folder itself, or the bundle of the run that it holds."""
    return folder / "bundle" if not is_bundle(folder) and (folder / "bundle").is_dir() else folder


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}. Give the folder that a run or save() wrote.")
    if path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than any manifest. Take the bundle from its source again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BundleError(f"{path} is not JSON. Take the bundle from its source again.") from None
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise BundleError(f"{path} is not a manifest of a Dougong bundle.")
    if values.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has bundle format {values.get('format_version')!r}, and this version reads {FORMAT_VERSION}. "
            "Use the Dougong that wrote it, or write it again."
        )
    try:
        return parse(Manifest, values, where=MANIFEST)
    except ConfigError as error:
        raise BundleError(f"{folder}: {error}. Take the bundle from its source again.") from None


def _check_file(folder: Path, name: str, wanted: FileSum) -> None:
    file = inside(folder, name)
    if file is None:
        raise BundleError(f"{folder} names the file {name!r}, which lies outside of it. Do not trust this bundle.")
    if not file.is_file():
        raise BundleError(f"{folder} lacks its file {name!r}. Copy the whole folder again.")
    if file.stat().st_size != wanted.num_bytes or sha256_of(file) != wanted.sha256:
        raise BundleError(f"{folder}: {name!r} is not the file that was saved (its sha256 differs). Copy it again.")
