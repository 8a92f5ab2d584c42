"""The commands up to a trained model: demo, show, check, join, train, plan.

Here        one thin function per command, added to the others by `add_commands`.
Elsewhere   what they call (recipes/, data/); the other commands (cli/main.py); how results look on a
            terminal (cli/show.py).
Promise     as cli/main.py's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dougong.cli.options import Json, Settings, tell
from dougong.core.errors import ConfigError


def add_commands(app: typer.Typer) -> None:
    """All of them."""
    for command in (demo, show, check, join, train, plan):
        app.command()(command)


def demo(
    out: Annotated[Path, Option(help="The run's folder.")] = Path("runs/demo"),
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train on real pictures with questions, written and spoken; compare, save, predict, show. About 6 minutes."""
    from dougong.cli.show import print_comparison
    from dougong.recipes.compare import run_demo

    result = run_demo(out, settings or (), quiet=as_json)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print_comparison(result)


def show(
    recipe: Annotated[str, Argument(help="A recipe's name or YAML file; 'list' names them.")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Print a recipe as YAML, every setting included."""
    from dougong.core.config import to_yaml
    from dougong.recipes.known import KNOWN, read_any_recipe

    if recipe == "list":
        about = {name: (make.__doc__ or "").splitlines()[0] for name, make in KNOWN.items()}
        print(json.dumps(about) if as_json else "\n".join(f"{name:16} {line}" for name, line in about.items()))
        return
    found = read_any_recipe(recipe, settings or ())
    print(found.model_dump_json() if as_json else to_yaml(found), end="\n" if as_json else "")


def check(
    what: Annotated[str, Argument(help="A recipe's name or YAML file, or a table.")],
    target: Annotated[str | None, Option(help="A table's column to predict.")] = None,
    settings: Settings = None,
    pictures: Annotated[
        Path | None, Option(help="An .html file to show the worst media in, by each figure of their quality.")
    ] = None,
    profile: Annotated[
        bool,
        Option("--profile", help="Instead, carry out two steps: memory and time by block, and what would save most."),
    ] = False,
    out: Annotated[
        Path | None, Option(help="With --profile: the folder of its page. Default: runs/NAME-profile.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every record of a table, or all that a recipe needs, and say what is wrong, without training."""
    from dougong.cli.show import print_check, print_profile
    from dougong.recipes.check import check_recipe_or_table, read_recipe_or_table

    if out is not None and not profile:
        raise ConfigError(f"--out {out} says nothing without --profile. Add that, or leave it out.")
    if profile:
        from dougong.recipes.profile import check_profile, profile_recipe, write_profile
        from dougong.watch.profile import check_folder

        if pictures is not None:
            raise ConfigError(f"--pictures {pictures} shows records, which --profile does not read. Give one of them.")
        recipe = check_profile(read_recipe_or_table(what, target=target, settings=settings or ()))
        folder = out or Path("runs") / f"{recipe.name}-profile"
        check_folder(folder)
        profiled = profile_recipe(recipe, None if as_json else tell)
        page = write_profile(profiled, folder)
        if as_json:
            print(json.dumps({**profiled.as_json(), "page": str(page)}))
        else:
            print_profile(profiled.as_json(), page)
        return
    result = check_recipe_or_table(what, target=target, settings=settings or (), pictures=pictures)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print_check(result)


def join(
    tables: Annotated[list[Path], Argument(help="A table of records, more tables, and where to write: OUT.parquet.")],
    key: Annotated[
        str | None, Option("--by", help="A column of equal values; BASE=OTHER where its names differ.")
    ] = None,
    time: Annotated[str | None, Option(help="A column of times; BASE=OTHER where its names differ.")] = None,
    tolerance: Annotated[float | None, Option(help="Farther apart is no match; seconds for timestamps.")] = None,
    offset: Annotated[str, Option(help="Added to the others' times; 'estimate' finds it.")] = "0",
    unmatched: Annotated[str, Option(help="A record without a partner: keep or drop.")] = "keep",
    duplicates: Annotated[
        str, Option(help="A key that repeats in another table: refuse, or take the first.")
    ] = "refuse",
    prefix: Annotated[bool, Option("--prefix", help="Put each table's name before its columns.")] = False,
    as_json: Json = False,
) -> None:
    """Put records together from several tables, by key, by time or both; media are written into OUT."""
    from dougong.recipes.join import join_files

    if len(tables) < 3:
        raise ConfigError(f"join has {len(tables)} tables: name the records, at least one more table, and OUT.parquet.")
    report = join_files(
        tables[0],
        tables[1:-1],
        tables[-1],
        key=key,
        time=time,
        tolerance=tolerance,
        offset=offset,
        unmatched=unmatched,
        duplicates=duplicates,
        prefix=prefix,
    )
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(report["lines"]))


def train(
    recipe: Annotated[str, Argument(help="A recipe's name or YAML file.")],
    out: Annotated[Path | None, Option(help="The run's folder. Default: runs/NAME.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in that folder.")] = False,
    ranks: Annotated[int | None, Option(min=1, help="Start so many processes here that train it together.")] = None,
    restarts: Annotated[
        int | None, Option(min=0, help="With --ranks: times that all start again after one was lost. Default: 2.")
    ] = None,
    limit: Annotated[
        float | None, Option(help="Seconds that a rank may take for any one thing before it counts as lost: 600.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> int:
    """Train, judge, and write a run's folder: checkpoints, bundle, report. On many processes by --ranks or torchrun."""
    from dougong.cli.show import print_alignment, print_generation, print_run
    from dougong.engine.parallel.heartbeat import LIMIT_SECONDS
    from dougong.engine.parallel.ranks import announced_ranks, connected_ranks
    from dougong.engine.parallel.supervise import supervise
    from dougong.recipes.align import AlignResult, check_align_ranks, run_align
    from dougong.recipes.alignment import AlignRecipe
    from dougong.recipes.build import LaidOut
    from dougong.recipes.decode import DecodeResult, run_decode
    from dougong.recipes.decoding import DecodeRecipe
    from dougong.recipes.generate import GenerationResult, run_generation
    from dougong.recipes.generation import GenerateRecipe
    from dougong.recipes.known import read_any_recipe
    from dougong.recipes.run import RunResult, run_recipe
    from dougong.recipes.settle import SETTINGS, lay_out

    found = read_any_recipe(recipe, settings or ())
    folder = out or Path("runs") / found.name
    limit_seconds = LIMIT_SECONDS if limit is None else limit
    if ranks is None and restarts is not None:
        raise ConfigError(f"--restarts {restarts} says nothing without --ranks. Add that, or leave it out.")
    if ranks is None and limit is not None and "WORLD_SIZE" not in os.environ:
        raise ConfigError(f"--limit {limit:g} says nothing of one process. Add --ranks, or leave it out.")
    if ranks is not None:
        held = (folder / SETTINGS).is_file()  # another run's, which is not to be gone on with unasked

        def command(again: bool) -> list[str]:
            options = [f"--set={each}" for each in settings or ()] + ["--json"] * as_json
            goes_on = resume or (again and not held and (folder / SETTINGS).is_file())
            options += ["--out", str(folder), "--limit", str(limit_seconds), *["--resume"] * goes_on]
            return [sys.executable, "-m", "dougong", "train", *options, "--", recipe]

        def say(line: str) -> None:
            print(f"dougong: {line}", file=sys.stderr)

        return supervise(
            command,
            num_ranks=ranks,
            notes=folder / "ranks",
            restarts=2 if restarts is None else restarts,
            limit_seconds=limit_seconds,
            say=say,
        )
    announced = announced_ranks()
    if announced is not None and announced.world > 1 and announced.rank == 0:
        # While the others wait for it: what is refused here never becomes a process group.
        if isinstance(found, LaidOut):
            found = lay_out(found, folder, announced.world, per_node=announced.per_node, resume=resume)
        elif isinstance(found, AlignRecipe):
            check_align_ranks(found, folder, announced.world, per_node=announced.per_node, resume=resume)
    result: RunResult | AlignResult | GenerationResult | DecodeResult
    with connected_ranks(notes=folder / "ranks", limit_seconds=limit_seconds) as connected:
        if connected.world > 1 and isinstance(found, GenerateRecipe):
            raise ConfigError(f"{found.name} is pretrained in one process only. Start it without --ranks or torchrun.")
        if isinstance(found, AlignRecipe):
            result = run_align(found, folder, resume=resume, quiet=as_json, ranks=connected)
        elif isinstance(found, GenerateRecipe):
            result = run_generation(found, folder, resume=resume, quiet=as_json)
        elif isinstance(found, DecodeRecipe):
            result = run_decode(found, folder, resume=resume, quiet=as_json, ranks=connected)
        else:
            result = run_recipe(found, folder, resume=resume, quiet=as_json, ranks=connected)
    if not connected.first:
        return 0
    if as_json:
        print(json.dumps(result.as_json()))
    elif isinstance(result, AlignResult):
        print_alignment(result)
    elif isinstance(result, GenerationResult | DecodeResult):
        print_generation(result)
    else:
        print_run(result)
    return 0


def plan(
    recipe: Annotated[str, Argument(help="A recipe's name or YAML file; or llama-70b, by its sizes alone.")],
    devices: Annotated[int, Option(min=1, help="How many.")] = 8,
    cluster: Annotated[str, Option(help="What they are: cpu, a100-80g, h100, or a cluster's YAML file.")] = "cpu",
    memory: Annotated[str | None, Option(help="Of one device, like 80GiB. Default: what the kind has.")] = None,
    vary: Annotated[
        list[str] | None,
        Option(
            help="What else may be chosen: micro-batches, precision, recompute (of activations), offload (of the "
            "optimizer to the host, of all state to the disk), or all. May be repeated."
        ),
    ] = None,
    explain: Annotated[bool, Option("--explain", help="Print the formulas, with their sources.")] = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Say how a run is best laid out on many devices, what it takes in time and memory, and why. Nothing is trained."""
    from dougong.cli.show import print_plan
    from dougong.core.sizes import read_bytes
    from dougong.engine.planner import predict
    from dougong.engine.planner.shape import SHAPES
    from dougong.recipes.known import read_laid_out
    from dougong.recipes.plan import plan_recipe, plan_shape, read_cluster, read_varied

    if explain:
        print(predict.__doc__)
    found = read_cluster(cluster, devices, None if memory is None else read_bytes(memory))
    varied = read_varied(vary or ())
    if recipe in SHAPES:
        if settings:
            raise ConfigError(f"{recipe} is known by its sizes alone and has no settings. Leave --set out.")
        result = plan_shape(recipe, found, vary=varied)
    else:
        result = plan_recipe(read_laid_out(recipe, settings or ()), found, vary=varied)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print_plan(result)
