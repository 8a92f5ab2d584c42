"""The commands that keep a bundle learning: learn, tasks, registry, regress.

Here        one thin function per command, added to the others by `add_commands`.
Elsewhere   what they call (continual/); the other commands (cli/main.py).
Promise     as cli/main.py's; besides, a gate that refuses ends with status 1, so that a pipeline stops.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dougong.cli.options import Json
from dougong.core.errors import ConfigError

if TYPE_CHECKING:
    from dougong.continual.registry.versions import Registry
    from dougong.continual.suite.gate import Verdict
    from dougong.data.table import Table

Where = Annotated[Path, Option("--registry", help="The registry's folder.")]
Server = Annotated[
    str | None, Option("--server", envvar="DOUGONG_MLFLOW", help="URL of an MLflow server that keeps the entries.")
]
Bundle = Annotated[Path, Argument(help="A bundle's or a run's folder.")]
DEFAULT_REGISTRY = Path("registry")

tasks_app = typer.Typer(no_args_is_help=True, help="The tasks that a bundle was taught.")
registry_app = typer.Typer(no_args_is_help=True, help="Versions of bundles: which there are, which is in use, and why.")


def add_commands(app: typer.Typer) -> None:
    """All of them."""
    app.command()(learn)
    app.command()(regress)
    app.add_typer(tasks_app, name="tasks")
    app.add_typer(registry_app, name="registry")


def learn(
    bundle: Bundle,
    table: Annotated[Path, Argument(help="Records of the new task; with --watch, a folder of Parquet files.")],
    task: Annotated[str, Option(help="The task's name. One that is there learns more.")],
    about: Annotated[str, Option(help="What is asked, in words.")] = "",
    target: Annotated[str | None, Option(help="The column to predict.")] = None,
    column: Annotated[
        list[str] | None, Option(help="MODALITY=COLUMN, where names differ from the base's. May be repeated.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Teach a copy there. Default: the bundle itself, which gets files.")
    ] = None,
    original: Annotated[
        Path | None, Option(help="Records of what the bundle was made for, to know such by. Default: the run's.")
    ] = None,
    watch: Annotated[bool, Option("--watch", help="Go on learning as the folder grows.")] = False,
    minutes: Annotated[float | None, Option(min=0.01, help="With --watch: for so long. Default: 60.")] = None,
    memory: Annotated[str | None, Option(help="With --watch: records held at most, like 512MiB (the default).")] = None,
    rehearsal: Annotated[Path | None, Option(help="A folder for some encrypted records, learnt again later.")] = None,
    key: Annotated[Path | None, Option(help="With --rehearsal: the key's file, made if it is not there.")] = None,
    keep: Annotated[str, Option(help="With --rehearsal: its size at most.")] = "64MiB",
    resume: Annotated[bool, Option("--resume", help="Go on with learning that was stopped.")] = False,
    settings: Annotated[list[str] | None, Option("--set", help="Like budget=0.02 or train.epochs=10.")] = None,
    as_json: Json = False,
) -> None:
    """Teach a bundle one more task; all that it could stays bit for bit as it was."""
    from dougong.continual.learn import LearnConfig, learn_original
    from dougong.continual.learn import learn as learn_once
    from dougong.continual.rehearsal import RehearsalStore, read_key
    from dougong.continual.stream import learn_growing
    from dougong.continual.tasks import check_name, copy_bundle
    from dougong.core.bundle import bundle_in
    from dougong.core.config import override, parse
    from dougong.core.sizes import read_bytes
    from dougong.data.table import open_table
    from dougong.watch.progress import Progress

    check_name(task)
    if not watch and (minutes is not None or memory is not None):
        raise ConfigError("--minutes and --memory say nothing without --watch. Add that, or leave them out.")
    if rehearsal is None and key is not None:
        raise ConfigError("--key says nothing without --rehearsal. Add that, or leave it out.")
    config = parse(LearnConfig, override(LearnConfig().model_dump(), settings or ()), where="learn")
    columns = _columns(column or ())
    known = _original(bundle, original)
    place = bundle_in(bundle)
    store = None
    if rehearsal is not None:
        store = RehearsalStore(rehearsal, read_key(key), most_bytes=int(read_bytes(keep)), seed=config.seed)
    opened = None if watch else open_table(table)
    if out is not None and out.resolve() != place.resolve() and not (resume and (out / "bundle.json").exists()):
        copy_bundle(place, out)
    place = place if out is None else out
    if known is not None:
        learn_original(place, known)
    given: dict[str, Any] = {"description": about, "target": target, "columns": columns, "rehearsal": store}
    if opened is None:
        for found in learn_growing(
            place,
            task,
            table,
            config,
            seconds=60 * (minutes or 60.0),
            most_bytes=int(read_bytes(memory or "512MiB")),
            say=_say,
            **given,
        ):
            _print_learnt(
                found.learnt.as_json() | {"shards": list(found.shards), "bundle": str(place)}, as_json=as_json
            )
        return
    listeners = () if as_json else (Progress(),)
    learnt = learn_once(place, task, opened, config, resume=resume, listeners=listeners, **given)
    found_json = learnt.as_json() | {"bundle": str(place), "original_known": known is not None}
    _print_learnt(found_json, as_json=as_json)


def _print_learnt(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
    print(
        f"task {found['task']} (part {found['part']}): {figures} on {found['held_out']} held-out records\n"
        f"rank {found['rank']}, {found['parameters']:,} numbers, {100 * found['of_base']:.2f} % of the base\n"
        f"bundle {found['bundle']}"
    )
    if found.get("original_known") is False:
        print(
            "note: nothing is known of the original task's records: give --original TABLE, so that they are told apart."
        )


def _original(bundle: Path, table: Path | None) -> Table | None:
    """Records of what the bundle was made for: named, or those that its run was trained on."""
    from dougong.core.config import from_yaml, parse
    from dougong.data.table import open_table
    from dougong.recipes.build import open_records
    from dougong.recipes.recipe import Recipe
    from dougong.recipes.settle import SETTINGS

    if table is not None:
        return open_table(table)
    settings = (bundle if (bundle / SETTINGS).exists() else bundle.parent) / SETTINGS
    if not settings.is_file():
        return None  # it is a bundle by itself; what follows from that is said
    return open_records(
        parse(Recipe, from_yaml(settings.read_text(encoding="utf-8"), where=SETTINGS), where=SETTINGS)
    ).train


def _columns(given: list[str] | tuple[str, ...]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for text in given:
        modality, equals, column = text.partition("=")
        if not equals or not modality or not column:
            raise ConfigError(f"--column {text!r} has no MODALITY=COLUMN. Use for example --column speech=recording.")
        columns[modality] = column
    return columns


def _say(line: str) -> None:
    print(line, file=sys.stderr)


# Tasks -------------------------------------------------------------------------------------------------------


@tasks_app.command("list")
def list_tasks(bundle: Bundle, as_json: Json = False) -> None:
    """Which tasks a bundle was taught."""
    from dougong.continual.tasks import read_parts
    from dougong.core.bundle import bundle_in, read_bundle

    place = bundle_in(bundle)
    found = [part.task for part in read_parts(place, read_bundle(place))]
    if as_json:
        print(json.dumps([task.model_dump(mode="json") for task in found]))
        return
    for task in found:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in task.metrics.items())
        print(
            f"{task.key:24} {task.target.name} ({task.target.num_outputs}), reads {', '.join(task.modalities)}; "
            f"rank {task.rank}, {100 * task.of_base:.2f} %; {figures or 'not measured'}"
        )
    if not found:
        print("none yet: dougong learn")


@tasks_app.command("remove")
def remove(
    bundle: Bundle,
    task: Annotated[str, Argument(help="The task's name.")],
    last: Annotated[bool, Option("--last", help="Only what it learnt last.")] = False,
    as_json: Json = False,
) -> None:
    """Forget a task on purpose; what was before it is back, bit for bit."""
    from dougong.continual.tasks import remove_task
    from dougong.core.bundle import bundle_in

    gone = remove_task(bundle_in(bundle), task, last_part=last)
    print(json.dumps({"removed": gone}) if as_json else f"removed {', '.join(gone)}")


@tasks_app.command("merge")
def merge(
    bundle: Bundle,
    tasks: Annotated[list[str], Argument(help="Tasks that ask the same, two or more.")],
    into: Annotated[str, Option(help="The new task's name.")],
    as_json: Json = False,
) -> None:
    """Make one task of several; they stay. What that cost is to be measured."""
    from dougong.bundle.files import load_network_from
    from dougong.continual.tasks import merge_tasks
    from dougong.core.bundle import bundle_in

    place = bundle_in(bundle)
    made = merge_tasks(place, load_network_from(place).network, tasks, into)
    print(json.dumps(made.model_dump(mode="json")) if as_json else f"{into}, of {', '.join(tasks)}: measure it")


@tasks_app.command("export")
def export(
    bundle: Bundle,
    task: Annotated[str, Argument(help="The task's name.")],
    out: Annotated[Path, Argument(help="A folder that is not there.")],
    as_json: Json = False,
) -> None:
    """Write a task alone, without its base."""
    from dougong.continual.tasks import export_task
    from dougong.core.bundle import bundle_in
    from dougong.core.sizes import bytes_as_text

    size = export_task(bundle_in(bundle), task, out)
    print(json.dumps({"folder": str(out), "bytes": size}) if as_json else f"{out}: {bytes_as_text(size)}")


@tasks_app.command("add")
def add_task(
    bundle: Bundle, exported: Annotated[Path, Argument(help="What an export wrote.")], as_json: Json = False
) -> None:
    """Add a task that was learnt on the same base elsewhere."""
    from dougong.continual.tasks import import_task
    from dougong.core.bundle import bundle_in

    added = [task.key for task in import_task(bundle_in(bundle), exported)]
    print(json.dumps({"added": added}) if as_json else f"added {', '.join(added)}")


# Registry ----------------------------------------------------------------------------------------------------


def _registry(folder: Path, server: str | None) -> Registry:
    from dougong.continual.registry.versions import Registry

    return Registry(folder, server)


@registry_app.command("add")
def register(
    bundle: Bundle,
    name: Annotated[str | None, Option(help="Default: the bundle's own.")] = None,
    parent: Annotated[
        str | None, Option(help="The version it was made from. Default: the last of the same base.")
    ] = None,
    note: Annotated[str, Option(help="A word for those to come.")] = "",
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Keep a bundle as a new version, which becomes the candidate."""
    found = _registry(registry, server).register(bundle, name, parent=parent, note=note)
    print(json.dumps(found.as_json()) if as_json else f"{found.name} {found.number}")


@registry_app.command("list")
def list_versions(
    name: Annotated[str | None, Argument(help="Of this name alone.")] = None,
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """All versions."""
    from dougong.core.sizes import bytes_as_text

    found = _registry(registry, server).versions(name)
    if as_json:
        print(json.dumps([version.as_json() for version in found]))
        return
    for version in found:
        about = version.about
        print(
            f"{version.name:20} {version.number:>4}  {', '.join(version.aliases):22} {about.registered}  "
            f"{bytes_as_text(about.num_bytes):>9}  {'' if about.parent is None else f'from {about.parent}':9} "
            f"{', '.join(about.tasks)}"
        )


@registry_app.command("show")
def show_version(
    name: Annotated[str, Argument(help="What is registered.")],
    version: Annotated[str, Argument(help="A number, candidate or production.")] = "candidate",
    out: Annotated[Path | None, Option(help="Write its bundle there.")] = None,
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """All that is known of a version; with --out, its bundle, byte for byte."""
    kept = _registry(registry, server)
    found = kept.version(name, version)
    if out is not None:
        kept.restore(name, found.number, out)
    moves = [move.model_dump(mode="json") for move in kept.history(name) if move.after == found.number]
    value = found.as_json() | {"promotions": moves} | ({} if out is None else {"bundle": str(out)})
    _print_value(value, as_json=as_json)


@registry_app.command("diff")
def diff(
    name: Annotated[str, Argument(help="What is registered.")],
    old: Annotated[str, Argument(help="A number or an alias.")] = "production",
    new: Annotated[str, Argument(help="A number or an alias.")] = "candidate",
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """What differs between two versions."""
    _print_value(_registry(registry, server).diff(name, old, new), as_json=as_json)


@registry_app.command("lineage")
def lineage(
    name: Annotated[str, Argument(help="What is registered.")],
    version: Annotated[str, Argument(help="A number or an alias.")] = "candidate",
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """A version, what it was made from, and so on."""
    chain = _registry(registry, server).lineage(name, version)
    if as_json:
        print(json.dumps([each.as_json() for each in chain]))
        return
    for depth, each in enumerate(chain):
        tasks = f"  tasks {', '.join(each.about.tasks)}" if each.about.tasks else ""
        print(
            f"{'  ' * depth}{each.number}  {each.about.registered}  {each.about.code}  {each.about.data or ''}{tasks}"
        )


@registry_app.command("promote")
def promote(
    name: Annotated[str, Argument(help="What is registered.")],
    version: Annotated[str, Argument(help="A number or an alias.")] = "candidate",
    suite: Annotated[Path | None, Option(help="The suite to ask both versions.")] = None,
    override: Annotated[
        str | None, Option(help="Promote although it was refused, or not asked, for this reason.")
    ] = None,
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> int:
    """Put a version in use, if the gate lets it pass."""
    from dougong.continual.suite.gate import check_override

    reason = check_override(override)
    kept = _registry(registry, server)
    chosen, now = kept.version(name, version), kept.production(name)
    verdict = "first in production" if now is None and suite is None else ""
    if now is not None and suite is None:
        if reason is None:
            raise ConfigError(
                f"{name} {now.number} is in production, and nothing says that {chosen.number} is no worse. Give "
                '--suite FILE, or --override "why".'
            )
        verdict = "not asked"
    elif suite is not None:
        said = _ask_registry(kept, name, chosen.number, None if now is None else now.number, suite, quiet=as_json)
        if not said.passed and reason is None:
            print(
                json.dumps(said.as_json()) if as_json else said.in_words(), file=sys.stdout if as_json else sys.stderr
            )
            return 1
        verdict = said.in_words() if said.passed else f"overridden; {said.in_words()}"
    move = kept.promote(name, chosen.number, verdict=verdict, reason=reason or "")
    value = move.model_dump(mode="json")
    print(json.dumps(value) if as_json else f"{name}: {move.before or 'nothing'} -> {move.after}; {verdict}")
    return 0


@registry_app.command("rollback")
def rollback(
    name: Annotated[str, Argument(help="What is registered.")],
    reason: Annotated[str, Option(help="Recorded.")] = "",
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Put the version in use that was before."""
    move = _registry(registry, server).rollback(name, reason=reason)
    print(json.dumps(move.model_dump(mode="json")) if as_json else f"{name}: {move.before} -> {move.after}")


def _ask_registry(
    kept: Registry, name: str, version: int, production: int | None, suite: Path, *, quiet: bool
) -> Verdict:
    import tempfile

    from dougong.continual.suite.gate import gate
    from dougong.continual.suite.suite import read_suite
    from dougong.continual.taught import open_taught

    found = read_suite(suite)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        kept.restore(name, version, folder / "new")
        if production is not None:
            kept.restore(name, production, folder / "old")
        return gate(
            open_taught(folder / "new"),
            None if production is None else open_taught(folder / "old"),
            found,
            suite.parent,
            against=None if production is None else f"{name} {production}",
            announce=None if quiet else _tell,
        )


def _tell(what: str, done: int, total: int) -> None:
    print(f"{done + 1} of {total}: {what}", file=sys.stderr)


def _print_value(value: dict[str, Any], *, as_json: bool) -> None:
    import yaml

    print(json.dumps(value) if as_json else yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


# Regressions -------------------------------------------------------------------------------------------------


def regress(
    bundle: Bundle,
    suite: Annotated[Path, Option(help="The suite's file.")] = Path("suite.yaml"),
    against: Annotated[
        str | None, Option(help="production, another alias or number in the registry, or a bundle's folder.")
    ] = None,
    init: Annotated[bool, Option("--init", help="Write the suite from this run, in place of asking one.")] = False,
    data: Annotated[Path | None, Option(help="With --init: test records. Default: the run's own.")] = None,
    unit: Annotated[
        str | None, Option(help="With --init: a column whose equal values are alike, as a picture's.")
    ] = None,
    also: Annotated[
        list[Path] | None,
        Option(
            help="With --init: a run that is as good, of another seed; what they differ by is tolerated. Repeat it."
        ),
    ] = None,
    name: Annotated[str | None, Option(help="In the registry. Default: the bundle's own.")] = None,
    registry: Where = DEFAULT_REGISTRY,
    server: Server = None,
    junit: Annotated[Path | None, Option(help="Where to write JUnit XML.")] = None,
    markdown: Annotated[Path | None, Option(help="Where to write Markdown.")] = None,
    baselines: Annotated[Path | None, Option(help="A file of time and memory by version, which gets a line.")] = None,
    trend: Annotated[Path | None, Option(help="With --baselines: a picture of them, .png or .svg.")] = None,
    as_json: Json = False,
) -> int:
    """Ask a version what it must still do, beside another one. Ends with 1 where it is refused."""
    from dougong.continual.suite.begin import begin_suite
    from dougong.continual.suite.gate import gate
    from dougong.continual.suite.report import as_junit, as_markdown
    from dougong.continual.suite.suite import read_suite
    from dougong.continual.taught import open_taught
    from dougong.core.bundle import bundle_in
    from dougong.core.files import write_atomic
    from dougong.data.table import open_table
    from dougong.recipes.judge import table_to_judge_on

    if init:
        taught = open_taught(bundle)
        found = table_to_judge_on(bundle, data)
        table = open_table(found) if isinstance(found, Path) else found
        others = [open_taught(each) for each in also or ()]
        made = begin_suite(taught, table, suite, name=name or taught.manifest.name, unit=unit, also=others)
        told = {"suite": str(suite), "checks": [check.name for check in made.checks]}
        print(json.dumps(told) if as_json else f"{suite}: {len(made.checks)} checks. Keep it under version control.")
        return 0
    if data is not None or unit is not None or also:
        raise ConfigError("--data, --unit and --also say nothing without --init. Add that, or leave them out.")
    if trend is not None and baselines is None:
        raise ConfigError("--trend draws what --baselines FILE has. Add that, or leave it out.")
    asked = read_suite(suite)
    taught = open_taught(bundle)
    production, told_against = _against(against, name or taught.manifest.name, registry, server)
    verdict = gate(taught, production, asked, suite.parent, against=told_against, announce=None if as_json else _tell)
    if junit is not None:
        write_atomic(junit, as_junit(verdict))
    if markdown is not None:
        write_atomic(markdown, as_markdown(verdict))
    value = verdict.as_json()
    if baselines is not None:
        value |= _baseline(taught, bundle_in(bundle), asked, suite.parent, baselines, trend)
    if as_json:
        print(json.dumps(value))
    else:
        _print_verdict(verdict)
    return 0 if verdict.passed else 1


def _baseline(
    taught: Any, bundle: Path, suite: Any, folder: Path, baselines: Path, trend: Path | None
) -> dict[str, Any]:
    from dougong.continual.suite.ask import rows_for
    from dougong.continual.suite.performance import measure, remember, remembered, trend_picture
    from dougong.core.bundle import MANIFEST
    from dougong.core.files import sha256_of
    from dougong.data.table import open_table

    first = next(iter(suite.data.values()))
    rows = rows_for(open_table(folder / first.table), 16)
    # By all that it lists: two versions of one base differ in their tasks alone.
    found = measure(taught, rows, f"{taught.manifest.name} {sha256_of(bundle / MANIFEST)[:8]}", bundle)
    remember(baselines, found)
    value: dict[str, Any] = {"performance": found.model_dump(mode="json")}
    if trend is not None:
        value["trend"] = str(trend_picture(remembered(baselines), trend))
    return value


def _against(against: str | None, name: str, registry: Path, server: str | None) -> tuple[Any, str | None]:
    import tempfile

    from dougong.continual.taught import open_taught

    if against is None:
        return None, None
    if (Path(against) / "bundle.json").is_file() or (Path(against) / "bundle").is_dir():
        return open_taught(Path(against)), against
    kept = _registry(registry, server)
    version = kept.version(name, against)
    with tempfile.TemporaryDirectory() as made:
        kept.restore(name, version.number, Path(made) / "old")
        return open_taught(Path(made) / "old"), f"{name} {version.number}"


def _print_verdict(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn()
    for column in ("check", "condition", "records", "before", "after", "loss", "p", "seen from", ""):
        drawn.add_column(column, justify="left" if column in ("check", "condition", "") else "right")
    for one in verdict.comparisons:
        seen = "" if one.detectable > 1 else f"{one.detectable:.3f}"
        drawn.add_row(
            one.name,
            one.condition,
            str(one.num_records),
            "" if one.before is None else f"{one.before:.4f}",
            f"{one.after:.4f}",
            f"{one.loss:+.4f}",
            f"{one.p:.2g}",
            seen,
            "REFUSED" if one.refused else "",
        )
    Console(markup=False).print(drawn)
    for one in verdict.refusals:
        rows = ", ".join(str(row) for row, _, _ in one.changed)
        print(f"{one.name}: {one.reason}{f'; {one.num_changed} records changed, first {rows}' if rows else ''}")
    print(verdict.in_words().splitlines()[0])
