"""How results look on a terminal.

Here        one function per kind of result.
Elsewhere   the results (recipes/); for programs every command has --json instead.
Promise     figures are printed as they were measured, each table with the number of its records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dougong.recipes.check import CheckResult
    from dougong.recipes.compare import Comparison
    from dougong.recipes.generate import GenerationResult
    from dougong.recipes.run import RunResult


def print_comparison(result: Comparison) -> None:
    """The demo's table, the gain, and what to open next."""
    console = Console()
    conditions = list(result.gains)
    table = Table(title=f"{result.num_records} test records, accuracy")
    table.add_column("model")
    for name in (*conditions, "parameters", "seconds"):
        table.add_column(name, justify="right")
    for row in result.rows:
        figures = [f"{row.figures[name]:.4f}" if name in row.figures else "-" for name in conditions]
        table.add_row(row.name, *figures, f"{row.parameters:,}", f"{row.seconds:.0f}")
    console.print(table)
    for name, gain in result.gains.items():
        console.print(
            f"sandwich over late concat, {name}: {100 * gain.value:+.1f} points "
            f"(95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, pictures resampled)"
        )
    console.print(f"{result.seconds:.0f} seconds in all")
    print_run(result.run)


def print_run(result: RunResult) -> None:
    """The figures of a run, what to know of them, and where things are."""
    print_figures(
        {
            name: {"metrics": e.metrics, "num_records": e.num_records, "gate": e.gate}
            for name, e in result.evaluations.items()
        }
    )
    console = Console()
    for note in result.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    console.print(f"bundle  {result.folder / 'bundle'}", highlight=False, soft_wrap=True)
    console.print(f"report  {result.folder / 'report.html'}", highlight=False, soft_wrap=True)


def print_generation(result: GenerationResult) -> None:
    """The same of a run that learnt to write."""
    print_figures({name: found._asdict() for name, found in result.evaluations.items()})
    console = Console()
    for note in result.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    console.print(f"bundle  {result.folder / 'bundle'}", highlight=False, soft_wrap=True)
    console.print(f"report  {result.folder / 'report.html'}", highlight=False, soft_wrap=True)


def print_figures(figures: dict[str, Any]) -> None:
    """One row per condition."""
    names = sorted({name for found in figures.values() for name in found["metrics"]})
    table = Table()
    table.add_column("condition")
    for name in (*names, "records"):
        table.add_column(name.replace("_", " "), justify="right")
    for condition, found in figures.items():
        values = [f"{found['metrics'][name]:.4f}" if name in found["metrics"] else "-" for name in names]
        table.add_row(condition, *values, str(found["num_records"]))
    Console().print(table)


def print_check(result: CheckResult) -> None:
    """Columns, parts, the first bad records, warnings."""
    console = Console()
    columns = Table(title=result.name)
    for name in ("column", "role", "because"):
        columns.add_column(name)
    for name, (role, reason) in result.roles.items():
        columns.add_row(name, role, reason)
    console.print(columns)
    parts = Table()
    for name in ("part", "records", "bad", *result.inputs):
        parts.add_column(name, justify="left" if name == "part" else "right")
    for part, report in result.reports.items():
        present = [f"{report.num_present.get(name, 0)}" for name in result.inputs]
        parts.add_row(part, str(report.num_rows), str(report.num_bad), *present)
    console.print(parts)
    for part, report in result.reports.items():
        for record in report.bad[:20]:
            console.print(f"{part} row {record.row}, {record.column}: {record.reason}", highlight=False, markup=False)
        if report.num_bad > 20:
            console.print(f"... {report.num_bad - 20} more; --json lists up to 1000")
    if result.num_parameters is not None:
        console.print(f"model: {result.num_parameters:,} parameters")
    for note in result.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
