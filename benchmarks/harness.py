"""What every benchmark script does around its measuring.

Here        `run`: options, printing, and the file in benchmarks/results/; `Kept`: the parts of a long one, so that it
            may be stopped and gone on with.
Elsewhere   the measuring (each script); `dougong bench NAME` calls the scripts.
Promise     the written result names its command, commit, machine and versions; a quick run says so and writes nothing.
            A part is taken from an earlier run only where every source of ours that was loaded when it was measured is
            the same to the letter; what draws pages and prints (watch/, cli/) changes no figure and does not count.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dougong.core.errors import DougongError
from dougong.core.figures import Figure, as_markdown
from dougong.core.files import write_json
from dougong.recipes.tables import cache_folder

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
DRAWN = ("src/dougong/watch", "src/dougong/cli")
PACKAGES = ("torch", "transformers", "numpy", "pyarrow")
ENGINES = ("openvino", "nncf", "onnxruntime", "torchao", "scipy")
"""What else computes, where it is installed."""


def run(name: str, about: str, measure: Callable[..., Iterable[Figure]], *, parts: Sequence[str] = ()) -> None:
    """Parse the options, measure, and print; `measure` is told whether to be quick.

    Of a long benchmark the caller may ask for some `parts` alone: `measure` is then told which, and the written result
    has their names.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; not a figure to quote")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    if parts:
        parser.add_argument("--part", action="append", choices=parts, help="only this part; may be repeated")
    options = parser.parse_args()
    chosen = [part for part in parts if part in (getattr(options, "part", None) or parts)]
    try:
        figures = list(measure(options.quick, chosen) if parts else measure(options.quick))
    except DougongError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    if options.json:
        print(json.dumps([figure.model_dump() for figure in figures]))
    else:
        print(f"{about}{' (quick: not to be quoted)' if options.quick else ''}\n\n{as_markdown(figures)}")
    if options.write and not options.quick:
        some = chosen if len(chosen) < len(parts) else []
        print(f"written to {_write(name, about, figures, some)}", file=sys.stderr)


class Kept:
    """What is measured already, by name, of exactly these sources."""

    def __init__(self, name: str) -> None:
        self._script = Path(__file__).with_name(f"{name}.py")
        self._parts = cache_folder() / "bench" / name / "parts"
        self._sources: dict[str, str] = {}
        self._notice()

    @functools.cached_property
    def folder(self) -> Path:
        """For what a script keeps itself, and must know before it is made: of every source that it could reach."""
        digest = hashlib.sha256(",".join(_versions()).encode())
        for name, found in _digests(reached(self._script)).items():
            digest.update(f"{name}\0{found}".encode())
        return self._parts.with_name(digest.hexdigest()[:16])

    def get(self, key: str) -> Any:
        file = self._file(key)
        if not file.is_file():
            return None
        part = json.loads(file.read_text(encoding="utf-8"))
        same = part["versions"] == _versions() and part["sources"] == _digests(ROOT / name for name in part["sources"])
        return part["value"] if same else None

    def put(self, key: str, value: Any) -> None:
        """To be called in the process that measured: what ran is what it has loaded."""
        self._notice()
        write_json(self._file(key), {"key": key, "value": value, "versions": _versions(), "sources": self._sources})

    def _notice(self) -> None:
        """As they were when first seen: a source that is changed meanwhile is not what ran."""
        modules = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        files = {self._script, *(Path(file) for file in modules if file)}
        ours = {file for file in files if any(file.is_relative_to(ROOT / each) for each in ("src", "benchmarks"))}
        counted = {file for file in ours if not any(file.is_relative_to(ROOT / each) for each in DRAWN)}
        self._sources = _digests(counted) | self._sources

    def _file(self, key: str) -> Path:
        return self._parts / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _versions() -> list[str]:
    found = [f"{package} {version(package)}" for package in PACKAGES]
    for package in ENGINES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        for file in sorted(files)
    }


def reached(script: Path) -> list[Path]:
    """This script and all of ours that it imports, also inside functions and by way of others, sorted."""
    found: set[Path] = set()
    ahead = [script.resolve()]
    while ahead:
        file = ahead.pop()
        if file in found or any(file.is_relative_to(ROOT / drawn) for drawn in DRAWN):
            continue
        found.add(file)
        for module in _imported(file):
            # Importing a.b runs a's and a.b's files.
            parts = module.split(".")
            for root, length in itertools.product((ROOT / "src", ROOT / "benchmarks"), range(1, len(parts) + 1)):
                place = root.joinpath(*parts[:length])
                ahead += [each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()]
    return sorted(found)


@functools.cache
def _imported(file: Path) -> tuple[str, ...]:
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file} imports by a relative name"
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(each.value) for each in node.args if isinstance(each, ast.Constant))


def _write(name: str, about: str, figures: Sequence[Figure], parts: Sequence[str]) -> Path:
    hardware = f"{os.cpu_count()}-core-{platform.machine()}"
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{'-'.join((name, *parts))}_{hardware}_{day}.md"
    packages = ", ".join(_versions())
    lines = [
        f"# {name}",
        "",
        about,
        "",
        f"- command: `python benchmarks/{' '.join((f'{name}.py', *(f'--part {part}' for part in parts)))} --write`",
        f"- commit: {_git('rev-parse', '--short', 'HEAD')}{' with changes' if _changed() else ''}",
        f"- machine: {_processor()}, {os.cpu_count()} cores",
        f"- versions: Python {platform.python_version()}, {packages}",
        "",
        as_markdown(figures),
    ]
    RESULTS.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)  # noqa: S603, S607
    return done.stdout.strip()


def _changed() -> bool:
    """Whether there is anything but results that is not committed."""
    return bool(_git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
