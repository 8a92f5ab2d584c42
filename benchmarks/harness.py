"""What every benchmark script does around its measuring.

Here        `run`: options, printing, and the file in benchmarks/results/.
Elsewhere   the measuring (each script); `dougong bench NAME` calls the scripts.
Promise     the written result names its command, commit, machine and versions; a quick run says so and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from dougong.core.figures import Figure, as_markdown

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "pyarrow")


def run(name: str, about: str, measure: Callable[[bool], Iterable[Figure]]) -> None:
    """Parse the options, measure, and print; `measure` is told whether to be quick."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; not a figure to quote")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    figures = list(measure(options.quick))
    if options.json:
        print(json.dumps([figure.model_dump() for figure in figures]))
    else:
        print(f"{about}{' (quick: not to be quoted)' if options.quick else ''}\n\n{as_markdown(figures)}")
    if options.write and not options.quick:
        print(f"written to {_write(name, about, figures)}", file=sys.stderr)


def _write(name: str, about: str, figures: Sequence[Figure]) -> Path:
    hardware = f"{os.cpu_count()}-core-{platform.machine()}"
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{name}_{hardware}_{day}.md"
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        f"# {name}",
        "",
        about,
        "",
        f"- command: `python benchmarks/{name}.py --write`",
        f"- commit: {_git('rev-parse', '--short', 'HEAD')}{' with changes' if _git('status', '--porcelain') else ''}",
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
