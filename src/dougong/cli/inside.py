"""The commands that look inside: watch, diagnose.

Here        one thin function per command, added to the others by `add_commands`.
Elsewhere   what they call (watch/); the other commands (cli/main.py); how results look on a
            terminal (cli/show.py).
Promise     as cli/main.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dougong.cli.options import Json, tell
from dougong.core.errors import ConfigError


def add_commands(app: typer.Typer) -> None:
    """All of them."""
    for command in (watch, diagnose):
        app.command()(command)


def watch(
    what: Annotated[Path, Argument(help="A run's or a bundle's folder, or one that holds many runs.")],
    record: Annotated[
        list[int] | None, Option(help="A record to look into, by its number from 0. May be repeated.")
    ] = None,
    data: Annotated[Path | None, Option(help="The table that holds it. Default: the run's test table.")] = None,
    out: Annotated[Path | None, Option(help="A page to write, .html, in place of serving one.")] = None,
    contribution: Annotated[
        bool, Option("--contribution", help="With --out: also measure what each modality counts.")
    ] = False,
    host: Annotated[str, Option(help="Where to serve; anything but this machine asks for a token.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to serve on.")] = 8765,
    token: Annotated[str | None, Option(help="What a browser must know, in ?token=. Drawn where needed.")] = None,
    mlflow: Annotated[
        str | None, Option(metavar="STORE", help="Write the run into MLflow instead: sqlite:///runs.db, or a server.")
    ] = None,
    experiment: Annotated[
        str | None, Option(help="With --mlflow: whose runs it is added to. Default: dougong.")
    ] = None,
    as_json: Json = False,
) -> None:
    """See inside: what a model looked at in a record; or runs side by side, live, in a browser on this machine."""
    if mlflow is not None:
        if record or contribution or data is not None or out is not None:
            raise ConfigError("--mlflow writes a run's events and nothing else. Leave out what else is asked for.")
        from dougong.watch.mlflow_export import export_run

        exported = export_run(what, mlflow, experiment=experiment or "dougong")
        new = f"{exported.num_events} new events, {exported.num_figures} figures"
        print(json.dumps(exported._asdict()) if as_json else f"MLflow run {exported.run_id}: {new}")
        return
    if experiment is not None:
        raise ConfigError(f"--experiment {experiment} says nothing without --mlflow. Add --mlflow sqlite:///runs.db.")
    if record:
        told = _look_at_records(what, record, data, page := out or Path("inside.html"))
        print(json.dumps({**told, "page": str(page)}) if as_json else f"page {page}")
        return
    if data is not None and not contribution:
        raise ConfigError(f"--data {data} says nothing without --record or --contribution. Add one, or leave it out.")
    if out is not None:
        from dougong.watch.pages import check_page
        from dougong.watch.summary import summarise, write_summary

        check_page(out)
        counted = None
        if contribution:
            from dougong.bundle.files import load_network_from
            from dougong.recipes.judge import table_to_judge_on
            from dougong.watch.contribution import as_json as told_of
            from dougong.watch.contribution import study

            counted = told_of(study(load_network_from(what), table_to_judge_on(what, data)))
        summary = summarise(what, counted)
        write_summary(out, summary)
        print(json.dumps({**summary, "page": str(out)}) if as_json else f"page {out}")
        return
    if contribution:
        raise ConfigError("--contribution says nothing without --out. Add --out page.html.")
    from dougong.watch.dashboard import serve

    serve(what, host=host, port=port, token=token, tell=(lambda line: None) if as_json else print)


def _look_at_records(what: Path, rows: list[int], data: Path | None, page: Path) -> dict[str, Any]:
    """The page of what a model that decides, writes or compares looked at."""
    from dougong.bundle import aligner, describer, generator
    from dougong.bundle.files import load_network_from
    from dougong.core.bundle import bundle_in, is_bundle, kind_of
    from dougong.data.table import Table, open_table
    from dougong.recipes.judge import table_to_judge_on
    from dougong.watch.inside import look_at_records, write_inside
    from dougong.watch.pages import check_page
    from dougong.watch.pairs import look_at_pairs, write_pairs
    from dougong.watch.word_by_word import look_at_texts, write_texts

    check_page(page)
    place = bundle_in(what)
    kind = kind_of(place) if is_bundle(place) else None
    model: Any
    look: Any
    write: Any
    if kind in (describer.KIND, generator.KIND):
        model, look, write = describer.load_writing(place), look_at_texts, write_texts
    elif kind == aligner.KIND:
        model, look, write = aligner.load_aligner(place), look_at_pairs, write_pairs
    else:
        model, look, write = load_network_from(what), look_at_records, write_inside
    found = table_to_judge_on(what, data)
    table = found if isinstance(found, Table) else open_table(found)
    told: dict[str, Any] = look(model, table, rows)
    write(page, told)
    return told


def diagnose(
    run: Annotated[Path, Argument(help="A run's folder, or one that watch() wrote in a script of yours.")],
    fix: Annotated[bool, Option("--try-fix", help="Carry out short paired trials of what would mend it.")] = False,
    steps: Annotated[int, Option(min=1, help="With --try-fix: steps of each trial.")] = 60,
    records: Annotated[
        bool, Option("--records", help="Also ask its first training records whether inputs belong to their targets.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Name what is wrong with a training: the fault, its place, the evidence, and what would mend it."""
    from dougong.watch.diagnose.report import diagnose_run

    examined = None
    if records:
        from dougong.cli.records import examine_run

        examined = examine_run(run)
    found = diagnose_run(run, examined)
    trials = []
    if fix and found.findings:
        from dougong.recipes.try_fix import try_fix

        trials = try_fix(run, found.findings, steps=steps, tell=None if as_json else tell)
    if as_json:
        print(json.dumps({**found.as_json(), "trials": [trial.as_json() for trial in trials]}))
    else:
        from dougong.cli.show import print_diagnosis

        print_diagnosis(found, trials)
