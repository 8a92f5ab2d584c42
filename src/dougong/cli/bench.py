"""Runs the scripts that measure claims.

Here        scripts, run_script, print_figures.
Elsewhere   the scripts (benchmarks/ in a checkout); what a figure is (core/figures.py).
Promise     a script runs in a process of its own, so that one never warms another up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import dougong
from dougong.core.config import parse
from dougong.core.errors import ConfigError, RunError
from dougong.core.figures import Figure

RUN = re.compile(r'"__main__":.*\brun\(', re.DOTALL)
"""How a script ends that measures a claim (benchmarks/harness.py)."""


def scripts() -> dict[str, Path]:
    """The benchmark scripts by name.

    Raises:
        ConfigError: this is no checkout, so there are none.
    """
    folder = Path(dougong.__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        raise ConfigError("no benchmarks/ stands beside src/: install from a checkout, with pip install -e .")
    # Others beside them are parts that several share, or do work for them in a process of its own.
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    return {name: folder / f"{name}.py" for name, text in found.items() if RUN.search(text)}


def about(script: Path) -> str:
    """The first line of a script's docstring."""
    return script.read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0]


def run_script(script: Path, *, quick: bool) -> list[Figure] | None:
    """Measure. What the script says on the way goes to stderr; None where it lacks what the user may give it.

    Raises:
        RunError: the script failed.
    """
    command = [sys.executable, str(script), "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603, our own script
    if done.returncode == 2:
        return None
    if done.returncode:
        raise RunError(f"benchmark {script.stem} ended with status {done.returncode}: see above. Nothing is measured.")
    rows = json.loads(done.stdout)
    known = Figure.model_fields
    return [parse(Figure, {key: row[key] for key in known if key in row}, where=script.stem) for row in rows]


def print_measured(measured: dict[str, list[Figure]], *, quick: bool) -> None:
    """One table for all."""
    title = "quick: fewer repetitions, not to be quoted" if quick else None
    table = Table(title=title)
    for name in ("benchmark", "figure", "value", "asked", "holds", "interval", "baseline"):
        table.add_column(name, justify="left" if name in ("benchmark", "figure") else "right")
    for name, figures in measured.items():
        for figure in figures:
            interval = "" if figure.low is None or figure.high is None else f"{figure.low:.4g} to {figure.high:.4g}"
            table.add_row(
                name,
                figure.name,
                f"{figure.value:.4g} {figure.unit}",
                figure.asked or "",
                {None: "", True: "yes", False: "NO"}[figure.holds],
                interval,
                "" if figure.baseline is None else f"{figure.baseline:.4g}",
            )
    Console(markup=False).print(table)
