"""How results look on a terminal.

Here        one function per kind of result.
Elsewhere   the results (recipes/); for programs every command has --json instead.
Promise     figures are printed as they were measured, each table with the number of its records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dougong.core.sizes import bytes_as_text

MOST_PARTS: Final = 8
"""Of a profile: those that hold most, and those that take longest."""

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dougong.bundle.contribution import Contribution
    from dougong.compress.delivery import Delivered
    from dougong.engine.robustness import Robustness
    from dougong.recipes.align import AlignResult
    from dougong.recipes.check import CheckResult
    from dougong.recipes.compare import Comparison
    from dougong.recipes.decode import DecodeResult
    from dougong.recipes.generate import GenerationResult
    from dougong.recipes.plan import PlanResult
    from dougong.recipes.run import RunResult
    from dougong.recipes.try_fix import Trial
    from dougong.serve.loadtest import LoadResult
    from dougong.watch.diagnose.report import Diagnosis


def print_comparison(result: Comparison) -> None:
    """The demo's table, the gain, and what to open next."""
    console = Console(markup=False)
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
    _print_places(result)


def print_compression(found: dict[str, Any], folder: Path) -> None:
    """What was measured of the candidates that learnt, or the closest ones; and what the chosen one lost."""
    console = Console(markup=False)
    metric = str(found["metric"]).replace("_", " ")
    chosen = found["chosen"]
    learnt = sorted((p for p in found["points"] if p["loss"] is not None), key=lambda p: p["latency_seconds"])
    shown = [found["teacher"], *(learnt or found["closest"])]
    what = "candidates that learnt" if learnt else "the closest candidates, none of which has learnt"
    table = Table(title=f"{what}; {metric} on the records that choose")
    for name in ("candidate", "parameters", "size", "ms", "times as fast", metric, "loss"):
        table.add_column(name, justify="left" if name == "candidate" else "right")
    front = {point["what"] for point in found["front"]}
    for place, point in enumerate(shown):
        marks = (" *" if place and point["what"] in front else "") + (" <- chosen" if point == chosen else "")
        table.add_row(
            "the teacher" if place == 0 else f"{point['what']}{marks}",
            f"{point['num_parameters']:,}",
            bytes_as_text(point["size_bytes"]),
            f"{1000 * point['latency_seconds']:.2f}",
            f"{point['speedup']:.2f}",
            "" if point["metric"] is None else f"{point['metric']:.4f}",
            "" if point["loss"] is None else f"{point['loss']:+.4f}",
        )
    console.print(table)
    if learnt:
        console.print("*: no other one is better in time, size and loss together")
    if chosen is not None:
        judged = Table(title="the chosen one, on records that nothing was learnt from or chosen by")
        for name in ("condition", "teacher", "compressed", "loss", "95 % interval"):
            judged.add_column(name, justify="left" if name == "condition" else "right")
        for condition, figures in found["judged"].items():
            between = f"{figures['low']:+.4f} to {figures['high']:+.4f}" if "low" in figures else ""
            values = (figures["teacher"], figures["compressed"])
            judged.add_row(condition, *(f"{value:.4f}" for value in values), f"{figures['loss']:+.4f}", between)
        console.print(judged)
        console.print(f"bundle {folder / 'bundle'}", highlight=False)
        if found["learnt"] is not None:
            console.print(
                f"before its bits were chosen, to teach or to look into: {found['learnt']}",
                highlight=False,
            )
    for bind in found["binds"]:
        console.print(f"not met: {bind}", highlight=False)
    console.print(f"picture {folder / 'points.svg'}", highlight=False)


def print_alignment(result: AlignResult) -> None:
    """The same of a run that drew modalities together: one line per figure, since there are many."""
    table = Table()
    for name in ("sides", "figure", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for sides, found in result.evaluations.items():
        for name, value in found.metrics.items():
            table.add_row(sides, name.replace("_", " "), f"{value:.4f}")
    Console(markup=False).print(table)
    _print_places(result)


def print_generation(result: GenerationResult | DecodeResult) -> None:
    """The same of a run that learnt to write."""
    print_figures(
        {name: {"metrics": e.metrics, "num_records": e.num_records} for name, e in result.evaluations.items()}
    )
    _print_places(result)


def _print_places(result: RunResult | AlignResult | GenerationResult | DecodeResult) -> None:
    """What to know of the figures, and where things are."""
    console = Console(markup=False)
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
    Console(markup=False).print(table)


def print_delivered(delivered: Delivered) -> None:
    """What was exported, at which bits, and what was measured of it."""
    console = Console(markup=False)
    if delivered.plan is not None:
        table = Table()
        for name in ("layer", "bits", "ran as"):
            table.add_column(name)
        for name, choice in delivered.plan.layers.items():
            table.add_row(name, choice, delivered.precisions.get(name, "-"))
        console.print(table)
    for name, value in delivered.figures.items():
        told = f"{value * 1e3:.3f} ms" if name.startswith("seconds of ") else f"{value:.6f}"
        console.print(f"{name.removeprefix('seconds of '):24} {told}", highlight=False)
    if delivered.memory_bytes is not None:
        console.print(f"{'memory of answering':24} {bytes_as_text(delivered.memory_bytes)}", highlight=False)
    console.print(f"{'graphs':24} {bytes_as_text(delivered.num_bytes)}, {delivered.to}", highlight=False)
    console.print(f"{'export':24} {delivered.folder}", highlight=False, soft_wrap=True)


def print_robustness(curves: list[Robustness]) -> None:
    """What is left at each level, and what that comes to, beside the clean figure."""
    title = f"{curves[0].metric.replace('_', ' ')} with media spoilt, all kinds mixed, by level"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # eight figures in 80 columns
    table.add_column("spoilt")
    effective = any(curve.effective is not None for curve in curves)
    names = [f"{level:g}" for level in curves[0].levels[1:]]
    for name in ("clean", *names, "relative", *(["effective"] if effective else [])):
        table.add_column(name, justify="right")
    for curve in curves:
        last = [] if curve.effective is None else [f"{curve.effective:+.3f}"]
        table.add_row(curve.what, *(f"{score:.3f}" for score in (*curve.scores, curve.relative)), *last)
    Console(markup=False).print(table)


def print_quality(console: Console, result: CheckResult) -> None:
    """Of each modality's figures the median and the worst, and the records to look at first."""
    for part, report in result.reports.items():
        table = Table(title=f"{part}: quality")
        for name in ("modality", "figure", "median", "worst 5 %", "worst rows"):
            table.add_column(name, justify="right" if name in ("median", "worst 5 %") else "left")
        for modality, figures in report.quality.items():
            for figure in figures:
                sign = {"low": "\N{LESS-THAN OR EQUAL TO}", "high": "\N{GREATER-THAN OR EQUAL TO}"}[figure.side]
                rows = ", ".join(str(row) for row, _ in figure.rows[:4])
                table.add_row(modality, figure.name, f"{figure.median:.3f}", f"{sign} {figure.worst:.3f}", rows)
        if report.quality:
            console.print(table)
        for modality, troubles in report.troubles.items():
            for trouble in troubles:
                rows = ", ".join(map(str, trouble.rows[:8]))
                text = f"{part}, {modality}: {trouble.num_records} x letters {trouble.name} (rows {rows})"
                console.print(text, highlight=False)


def print_relations(result: CheckResult) -> None:
    """What stands twice, what leaks, and what does not belong together."""
    console = Console(markup=False)
    if result.duplicates:
        media = Table(title="the same, or nearly")
        for name in ("column", "media", "repeats", "exact across parts", "near groups", "near across parts"):
            media.add_column(name, justify="left" if name == "column" else "right")
        for found in result.duplicates:
            counts = (found.num_media, found.num_repeats, found.num_exact_across, found.num_near, found.num_near_across)
            media.add_row(found.column, *map(str, counts))
        console.print(media)
        for found in result.duplicates:
            for group in [group for group in found.groups if group.num_media > 1][:3]:
                rows = "; ".join(f"{part} {', '.join(map(str, rows))}" for part, rows in group.rows.items())
                console.print(f"{found.column}, nearly the same, rows: {rows}", highlight=False)
    if result.alignments:
        pairs = Table(title="what belongs together, true pairs against shuffled ones")
        for name in ("pair", "AUC", "p", "found"):
            pairs.add_column(name, justify="right" if name in ("AUC", "p") else "left")
        for pair in result.alignments:
            pairs.add_row(f"{pair.left}, {pair.right}", f"{pair.auc:.3f}", f"{pair.p_value:.3f}", pair.verdict)
        console.print(pairs)
        for row, names in list(result.suspicious_rows.items())[:10]:
            console.print(f"train row {row} does not fit: {'; '.join(names)}", highlight=False)
        if len(result.suspicious_rows) > 10:
            console.print(f"... {len(result.suspicious_rows) - 10} more; --json lists them")


def print_contribution(found: Contribution) -> None:
    """One row per modality, and what all of them make together."""
    metric = found.metric.replace("_", " ")
    table = Table(title=f"what each modality counts for the {metric}, {found.num_records} records")
    for name in ("modality", "Shapley value", "share", "perceptual score", "of the model's", "share of tokens"):
        table.add_column(name, justify="left" if name == "modality" else "right")
    for name, each in found.modalities.items():
        relative = "-" if each.perceptual_of_model is None else f"{each.perceptual_of_model:.4f}"
        table.add_row(
            name,
            f"{each.shapley:+.4f}",
            f"{each.share:.1%}",
            f"{each.perceptual:+.4f}",
            relative,
            f"{each.token_share:.1%}",
        )
    console = Console(markup=False)
    console.print(table)
    console.print(f"{metric} with everything {found.all:.4f}, with nothing {found.none:.4f}", highlight=False)
    console.print(
        f"without what modalities say only together (EMAP): {found.additive:.4f}, the model itself "
        f"{found.additive_original:.4f}, {found.num_projected} records",
        highlight=False,
    )


def print_check(result: CheckResult) -> None:
    """Columns, parts, the first bad records, warnings."""
    console = Console(markup=False)
    columns = Table(title=result.name)
    for name in ("column", "role", "because"):
        columns.add_column(name)
    for name, (role, reason) in result.roles.items():
        columns.add_row(name, role, reason)
    console.print(columns)
    parts = Table()
    for name in ("", *result.reports):
        parts.add_column(name, justify="right" if name else "left")
    parts.add_row("records", *(str(report.num_rows) for report in result.reports.values()))
    parts.add_row("bad", *(str(report.num_bad) for report in result.reports.values()))
    for name in next(iter(result.reports.values())).num_present:
        parts.add_row(f"with {name}", *(str(report.num_present.get(name, "-")) for report in result.reports.values()))
    console.print(parts)
    for part, report in result.reports.items():
        for record in report.bad[:20]:
            console.print(f"{part} row {record.row}, {record.column}: {record.reason}", highlight=False)
        if report.num_bad > 20:
            console.print(f"... {report.num_bad - 20} more; --json lists up to 1000")
    print_quality(console, result)
    print_relations(result)
    if result.num_parameters is not None:
        console.print(f"model: {result.num_parameters:,} parameters")
    for note in result.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def print_profile(told: dict[str, Any], page: Path) -> None:
    """What a step holds at most and of what, its largest parts, and what would make it less."""
    from dougong.watch.profile import composition, cost_in_words, during, seconds_as_text

    console = Console(markup=False)
    batches = f" in {told['micro_batches']} micro-batches" if told["micro_batches"] > 1 else ""
    console.print(
        f"{told['recipe']}: a step of {told['records']} records{batches}, {told['precision']}, holds "
        f"{bytes_as_text(told['peak_bytes'])} at most, {during(told)}, and takes "
        f"{seconds_as_text(told['step_seconds'])}",
        highlight=False,
        soft_wrap=True,
    )
    made = Table(title="when it holds most")
    for name in ("of it", "bytes", "share"):
        made.add_column(name, justify="left" if name == "of it" else "right")
    for row in composition(told):
        made.add_row(row.name, bytes_as_text(row.bytes), f"{row.share:.1%}")
    console.print(made)
    parts = Table(title="part by part")
    for name in ("part", "of", "activations then", "forward ms", "backward ms"):
        parts.add_column(name, justify="left" if name in ("part", "of") else "right")
    met = [part for part in told["parts"] if part["most_bytes"] or part["forward_seconds"]]
    large = sorted(met, key=lambda part: -part["bytes_at_peak"])[:MOST_PARTS]
    large += sorted(met, key=lambda part: -part["forward_seconds"] - part["backward_seconds"])[:MOST_PARTS]
    for part in met:
        if part in large:
            times = [f"{1e3 * part[name]:.3g}" for name in ("forward_seconds", "backward_seconds")]
            whose = part["modality"] or part["kind"]
            parts.add_row(part["name"], whose, bytes_as_text(part["bytes_at_peak"]), *times)
    parts.add_row("optimizer", "", "", "", f"{1e3 * told['optimizer_seconds']:.3g}")
    console.print(parts)
    unshown = sum(part not in large for part in met)
    if unshown:
        console.print(f"smaller parts that are left out: {unshown}; --json and the page have them")
    if not told["offered"]:
        console.print("no setting that was tried lowers the peak by a hundredth or more")
    for change in told["offered"]:
        share = change["saved_bytes"] / told["peak_bytes"]
        console.print(
            f"{' '.join(f'--set {setting}' for setting in change['settings'])}\n    saves "
            f"{bytes_as_text(change['saved_bytes'])} ({share:.0%} of the peak); costs "
            f"{cost_in_words(change, told['step_seconds'])}. {change['about']}",
            highlight=False,
            soft_wrap=True,
        )
    for note in told["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False)
    console.print(f"page  {page}", highlight=False, soft_wrap=True)


def print_plan(result: PlanResult) -> None:
    """One row per layout, the fastest first, and why it is."""
    told = result.as_json()
    table = Table(title=f"{told['recipe']} on {told['cluster']['devices']} devices, {told['parameters']:,} parameters")
    table.add_column("predicted layout", min_width=26)
    for name in ("ms a step", "records/s", "waiting", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in told["layouts"]:
        table.add_row(
            found["layout"],
            f"{1e3 * found['seconds']:.4g}",
            f"{found['records_per_second']:.4g}",
            f"{found['waiting_ratio']:.0%}",
            bytes_as_text(max(found["memory_bytes"])),
        )
    console = Console(markup=False)
    console.print(table)
    console.print(f"{told['considered']} layouts considered. {told['reason']}", highlight=False, soft_wrap=True)
    for note in told["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    for place, held in enumerate(told["rehearsed"]):
        parts = ", ".join(f"{name} {bytes_as_text(size)}" for name, size in held.items() if name != "peak")
        console.print(
            f"rehearsed, pipeline rank {place}: {bytes_as_text(held['peak'])} at most ({parts})", soft_wrap=True
        )
    first = told["layouts"][0]
    for where, size in (("host's memory", first["host_bytes"]), ("disk", first["disk_bytes"])):
        if size:
            console.print(f"the first layout needs {bytes_as_text(size)} of each {where}", soft_wrap=True)
    if result.recipe is None:
        return
    if not first["can_be_carried_out"]:
        console.print("predicted only: the engine cannot do all of the first layout yet", soft_wrap=True)
        return
    chosen = " ".join(f"--set {setting}" for setting in first["settings"])
    console.print(f"to carry it out: {chosen or 'no setting is needed'}", highlight=False, soft_wrap=True)


def print_load(found: Sequence[LoadResult]) -> None:
    """One row for each rate."""
    table = Table(title="milliseconds from when a request was due until its answer")
    for name in ("asked/s", "answered/s", "in time/s", "p50", "p90", "p99", "p99.9", "others"):
        table.add_column(name, justify="right")
    for each in found:
        others = ", ".join(f"{status}: {number}" for status, number in each.statuses.items() if status != "200")
        shares = [f"{1e3 * each.quantiles[key]:.3g}" if key in each.quantiles else "" for key in map(str, _SHARES)]
        rates = (each.rate, each.answered_per_second, each.good_per_second)
        table.add_row(*(f"{rate:.4g}" for rate in rates), *shares, others)
    console = Console(markup=False)
    console.print(table)
    held = max(each.most_waiting for each in found)
    if held:
        console.print(f"{held} requests waited for a connection at once: give more --connections", highlight=False)
    behind = max(each.behind_quantile for each in found)
    if behind > _BEHIND_SECONDS:
        console.print(
            f"requests were made up to {1e3 * behind:.3g} ms late (99 of 100 less): this machine cannot ask so fast, "
            "and its lateness is in the figures",
            highlight=False,
        )


_SHARES = (0.5, 0.9, 0.99, 0.999)
_BEHIND_SECONDS = 0.02


def print_diagnosis(found: Diagnosis, trials: Sequence[Trial]) -> None:
    """What is wrong, the surest first, and whether remedies helped."""
    from dougong.watch.diagnose.catalogue import CATALOGUE

    console = Console(markup=False)
    seen = f"{found.num_steps} steps, {found.num_measured} measured from within"
    if not found.findings:
        console.print(f"{found.run}: nothing is known to be wrong ({seen})")
    for finding in found.findings:
        known = CATALOGUE[finding.cause]
        console.print(f"{known.title}: {finding.place} ({finding.confidence:.0%} sure)", style="bold")
        console.print(f"  after step {finding.step}: {finding.evidence}")
        console.print(f"  {known.remedy}")
    if not found.num_measured:
        console.print("Only the curves could be judged. Train with --set train.flow={} to be measured from within.")
    for trial in trials:
        verdict = "helped" if trial.helped else "did not help with every seed"
        before, after = (", ".join(f"{value:.4f}" for value in each) for each in (trial.before, trial.after))
        console.print(f"{trial.setting} {verdict}: {trial.metric} after {trial.steps} steps {before} -> {after}")
