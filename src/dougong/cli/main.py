"""The commands.

Here        one thin function per command, and the exit status.
Elsewhere   what they call (recipes/, bundle/); how results look on a terminal (cli/show.py).
Promise     0 it worked; 2 the user can mend it, said in one line on stderr; 3 a rank was lost, and --resume goes on;
            anything else is our bug, with its traceback. `--help` loads no tensor library.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dougong.cli.teach import add_commands
from dougong.core.errors import ConfigError, DougongError, RankError

app = typer.Typer(
    name="dougong",
    help="From records of several modalities to a trained, explained and usable model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, Option("--json", help="Print for programs.")]
Settings = Annotated[
    list[str] | None, Option("--set", help="A setting laid over the recipe, like train.steps=200. May be repeated.")
]


# What typer raises at a typing mistake. It brings click as a part of its own or as another package, by version.
ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

# Heavy parts are imported inside commands, so that --help and a typing mistake answer at once.


@app.command()
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


@app.command()
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


@app.command()
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
        profiled = profile_recipe(recipe, None if as_json else _tell)
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


@app.command()
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


@app.command()
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
    from dougong.recipes.align import AlignResult, run_align
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
    if announced is not None and announced.world > 1 and announced.rank == 0 and isinstance(found, LaidOut):
        # While the others wait for it: what is refused here never becomes a process group.
        found = lay_out(found, folder, announced.world, per_node=announced.per_node, resume=resume)
    result: RunResult | AlignResult | GenerationResult | DecodeResult
    with connected_ranks(notes=folder / "ranks", limit_seconds=limit_seconds) as connected:
        if connected.world > 1 and not isinstance(found, LaidOut):
            raise ConfigError(f"{found.name} is pretrained in one process only. Start it without --ranks or torchrun.")
        if isinstance(found, AlignRecipe):
            result = run_align(found, folder, resume=resume, quiet=as_json)
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


@app.command()
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


@app.command()
def evaluate(
    model: Annotated[Path, Argument(help="A bundle's or a run's folder.")],
    data: Annotated[Path | None, Option(help="A table with the target in it. Default: the run's test table.")] = None,
    missing: Annotated[list[str] | None, Option(help="A modality to withhold. May be repeated.")] = None,
    corrupt: Annotated[
        list[str] | None,
        Option(help="Spoil MODALITY=LEVEL or MODALITY:KIND=LEVEL, 0 to 1; may be repeated. Or all: level by level."),
    ] = None,
    baseline: Annotated[
        Path | None, Option(help="With --corrupt all: a model to take effective robustness against.")
    ] = None,
    contribution: Annotated[bool, Option("--contribution", help="Measure how much each modality counts.")] = False,
    as_json: Json = False,
) -> None:
    """Judge a model on a table: with everything, with modalities withheld, and with media spoilt on purpose."""
    from dougong.cli.show import print_contribution, print_figures, print_robustness
    from dougong.data.corruption import parse_corruption
    from dougong.recipes.judge import judge, judge_contribution
    from dougong.recipes.robust import sweep

    graded = corrupt == ["all"]
    if baseline is not None and not graded:
        raise ConfigError("--baseline says nothing without --corrupt all. Add that, or leave it out.")
    if not graded and "all" in (corrupt or ()):
        raise ConfigError("--corrupt all goes through every modality by itself. Leave the other ones out.")
    corruptions = [] if graded else [parse_corruption(text) for text in corrupt or ()]
    exported = _export_in(model)
    if exported is not None:
        from dougong.compress.export import judge_export

        if graded or contribution:
            raise ConfigError(
                f"{'--corrupt all' if graded else '--contribution'} asks a bundle's own network, and {model} holds an "
                "export. Give the bundle that it was exported from."
            )
        figures = judge_export(exported, data, missing or (), corruptions)
    else:
        figures = judge(model, data, missing or (), corruptions)
    curves = sweep(model, data, missing or (), baseline=baseline, announce=None if as_json else _tell) if graded else []
    counted = judge_contribution(model, data) if contribution else None
    if as_json:
        more: dict[str, Any] = {"robustness": [curve._asdict() for curve in curves]} if graded else {}
        more |= {} if counted is None else {"contribution": counted.model_dump()}
        print(json.dumps({**figures, **more}))
        return
    print_figures(figures)
    if graded:
        print_robustness(curves)
    if counted is not None:
        print_contribution(counted)


def _export_in(model: Path) -> Path | None:
    """The export that a folder is, or has in the place of a run's bundle."""
    from dougong.core.bundle import bundle_in, is_bundle, kind_of

    folder = bundle_in(model)
    return folder if is_bundle(folder) and kind_of(folder) == "export" else None


def _tell(what: str, done: int, total: int) -> None:
    print(f"{done} of {total}: {what}", file=sys.stderr)


@app.command()
def predict(
    model: Annotated[Path, Argument(help="A bundle's or a run's folder.")],
    records: Annotated[Path, Argument(help="A table of records.")],
    answers: Annotated[Path, Argument(help="Where to write: .jsonl, .csv or .parquet.")],
    withhold: Annotated[list[str] | None, Option(help="A modality to answer without. May be repeated.")] = None,
    task: Annotated[
        str | None, Option(help="Of a bundle that was taught: a task's name, or auto, which finds each record's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer every record of a table; a record that cannot be read gets its reason."""
    from dougong.bundle.files import predict_file

    if task is None:
        asked: Any = model  # what it holds is loaded by torch
        exported = _export_in(model)
        if exported is not None:
            from dougong.compress.export import load_export

            asked = load_export(exported)
        summary = predict_file(asked, records, answers, withhold or ())
    else:
        from dougong.continual.taught import Answer, open_taught

        if withhold:
            raise ConfigError(
                f"--withhold {withhold[0]} cannot take effect beside --task. Leave its column out instead."
            )
        taught = open_taught(model)
        taught.check(task)
        summary = predict_file(model, records, answers, answer=lambda table: taught.answers(table, task), kind=Answer)
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"{summary['answered']} answered, {summary['refused']} could not be read: {answers}")


@app.command()
def export(
    model: Annotated[Path, Argument(help="A bundle's or a run's folder.")],
    out: Annotated[Path, Option(help="The folder to write.")],
    to: Annotated[
        str, Option(help="openvino, onnx, torch, or auto: whichever is measured to be fastest here.")
    ] = "auto",
    bits: Annotated[
        str | None,
        Option(help="16, 8 or 4 for all layers, w8a16 for weights alone, or mixed: chosen by --size and --latency."),
    ] = None,
    plan: Annotated[
        Path | None, Option(help="In place of --bits: a JSON file with a choice for each layer, as --json tells it.")
    ] = None,
    size: Annotated[str | None, Option(help="With --bits mixed: the graphs' most bytes, like 8MB.")] = None,
    latency: Annotated[str | None, Option(help="With --bits mixed: a batch's most time, like 5ms.")] = None,
    batch: Annotated[int, Option(min=1, max=64, help="Records of the batch that is timed.")] = 1,
    data: Annotated[Path | None, Option(help="A table of records to calibrate with and to measure on.")] = None,
    records: Annotated[int, Option(min=2, help="How many of them at most: half for each.")] = 256,
    method: Annotated[
        str, Option(help="How layers are scored: fisher or trace (one pass), or output (one for each).")
    ] = "fisher",
    recover: Annotated[
        int | None, Option(min=1, help="With --bits: steps of teaching the rounded model to answer as before.")
    ] = None,
    edge: Annotated[
        bool, Option("--edge", help="Measure the memory of answering, and state it in the folder.")
    ] = False,
    threads: Annotated[int | None, Option(min=1, help="Of the engine. Default: its own choice.")] = None,
    as_json: Json = False,
) -> None:
    """Write a bundle as graphs that run without Dougong, at the bits that each layer needs."""
    from dougong.cli.show import print_delivered
    from dougong.compress.delivery import ExportRequest, deliver
    from dougong.compress.plan import read_plan
    from dougong.core.config import parse
    from dougong.core.sizes import read_bytes, read_seconds

    values = {
        "to": to,
        "bits": bits,
        "plan": None if plan is None else read_plan(plan),
        "most_bytes": None if size is None else read_bytes(size),
        "most_seconds": None if latency is None else read_seconds(latency),
        "batch_size": batch,
        "num_records": records,
        "quantise": {"method": method},
        "edge": edge,
        "recover": None if recover is None else {"steps": recover},
        "engine": {"threads": threads},
    }
    delivered = deliver(model, out, parse(ExportRequest, values, where="export"), data, None if as_json else _tell)
    if as_json:
        print(json.dumps(delivered.as_json()))
    else:
        print_delivered(delivered)


@app.command()
def generate(
    model: Annotated[Path, Argument(help="A bundle's or a run's folder, of a model that writes.")],
    text: Annotated[str | None, Option(help="What to draw; the picture goes to --out.")] = None,
    image: Annotated[Path | None, Option(help="A picture to say in words.")] = None,
    out: Annotated[Path, Option(help="Where to write the picture.")] = Path("picture.png"),
    temperature: Annotated[float | None, Option(help="Below 1 safer, above 1 freer, 0 the likeliest always.")] = None,
    top_p: Annotated[float | None, Option(help="Only the likeliest tokens that together have this chance.")] = None,
    top_k: Annotated[int | None, Option(help="Only so many of the likeliest tokens.")] = None,
    guidance: Annotated[float | None, Option(help="Above 1: closer to what was asked, less varied.")] = None,
    seed: Annotated[int, Option(help="The same seed writes the same.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw what a text says, or say what a picture shows. What is not set is as the bundle says."""
    from dougong.bundle.describer import Describer, load_writing
    from dougong.core.config import parse
    from dougong.model.sampling import SamplingConfig

    if (text is None) == (image is None):
        raise ConfigError("generate needs one of --text and --image. Give --text 'a red circle', or --image x.png.")
    generator = load_writing(model)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "guidance": guidance}
    if isinstance(generator, Describer):
        if text is not None:
            raise ConfigError(f"{model} writes words and draws nothing. Give --image x.png in place of --text.")
        if guidance is not None:
            raise ConfigError(f"{model} has no --guidance: it writes from what it reads alone. Leave it out.")
        usual = generator.sampling
    else:
        usual = generator.sampling.caption if text is None else generator.sampling.draw
    values = usual.model_dump() | {name: value for name, value in given.items() if value is not None}
    sampling = parse(SamplingConfig, values, where="generate")
    if image is not None:
        (caption,) = generator.caption([image], sampling=sampling, seed=seed)
        print(json.dumps({"caption": caption}) if as_json else caption)
    elif text is not None and not isinstance(generator, Describer):
        (picture,) = generator.draw([text], sampling=sampling, seed=seed)
        try:
            picture.save(out)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out {out} cannot be written ({error}). Name a .png file in a folder.") from None
        print(json.dumps({"picture": str(out)}) if as_json else f"picture {out}")


@app.command()
def compress(
    bundle: Annotated[Path, Argument(help="A bundle's or a run's folder.")],
    data: Annotated[Path, Option(help="A table of records to learn from; the target may be missing.")],
    size: Annotated[str | None, Option(help="What the weights may take, like 8MB.")] = None,
    latency: Annotated[str | None, Option(help="What an answer may take on this machine, like 5ms.")] = None,
    speedup: Annotated[str | None, Option(help="How many times as fast as now, like 10x.")] = None,
    max_loss: Annotated[float, Option(help="Of the task's figure, on records that nothing is learnt from.")] = 0.01,
    judge: Annotated[Path | None, Option(help="A table to judge on at the end. Default: some of --data.")] = None,
    out: Annotated[Path | None, Option(help="Where to write. Default: runs/NAME-compressed.")] = None,
    engine: Annotated[
        str, Option(help="What may carry it out: eager (torch), openvino, onnx, or auto: all that are installed.")
    ] = "auto",
    time_limit: Annotated[str | None, Option(help="Like 10min: less is tried where time is short.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the search in that folder.")] = False,
    settings: Annotated[
        list[str] | None, Option("--set", help="A setting of the search, like distil.train.steps=200. May be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle smaller and faster, to a budget, and prove what it lost."""
    from dougong.cli.show import print_compression
    from dougong.compress.backends import backends_named
    from dougong.compress.candidate import Budget
    from dougong.compress.run import compress_bundle, read_ratio
    from dougong.compress.search import BudgetError, SearchConfig
    from dougong.core.config import override, parse
    from dougong.core.sizes import read_bytes, read_seconds
    from dougong.watch.progress import Progress

    if size is None and latency is None and speedup is None:
        raise ConfigError("no budget is given. Use --size 8MB, --latency 5ms or --speedup 10x.")
    values = {
        "size_bytes": None if size is None else read_bytes(size),
        "latency_seconds": None if latency is None else read_seconds(latency, "--latency"),
        "speedup": None if speedup is None else read_ratio(speedup, "--speedup"),
        "max_loss": max_loss,
    }
    budget = parse(Budget, values, where="compress")
    config = parse(SearchConfig, override(SearchConfig().model_dump(mode="json"), settings or ()), where="compress")
    seconds = None if time_limit is None else read_seconds(time_limit, "--time-limit")
    name = bundle.resolve().parent.name if bundle.name == "bundle" else bundle.name
    folder = out or Path("runs") / f"{name}-compressed"
    try:
        result = compress_bundle(
            bundle,
            data,
            budget,
            folder,
            config,
            judge=judge,
            resume=resume,
            time_limit=seconds,
            say=(lambda line: None) if as_json else _say,
            listeners=() if as_json else (Progress(),),
            backends=backends_named(engine),
        )
    except BudgetError:
        found = (folder / "compress.json").read_text(encoding="utf-8")
        if as_json:
            print(json.dumps(json.loads(found)))
        else:
            print_compression(json.loads(found), folder)
        raise
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print_compression(result.as_json(), folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def serve(
    bundles: Annotated[list[str], Argument(help="Bundles or runs: FOLDER, NAME=FOLDER or NAME:VERSION=FOLDER.")],
    host: Annotated[
        str, Option(help="Address to listen on. Others than this machine's own need --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    grpc_port: Annotated[int | None, Option(min=0, max=65535, help="Speak gRPC there as well.")] = None,
    slo: Annotated[
        str, Option(help="Within what requests are to be answered, like 50ms; what cannot be is refused.")
    ] = "50ms",
    timeout: Annotated[str, Option(help="After what a request is given up, like 2s.")] = "2s",
    max_batch: Annotated[int, Option(min=1, help="Records that a model takes at once.")] = 64,
    max_queue: Annotated[int, Option(min=1, help="Records that wait at most.")] = 2048,
    replicas: Annotated[int, Option(min=1, help="Workers of each model.")] = 1,
    threads: Annotated[int, Option(min=1, help="Processor cores of each worker.")] = 1,
    keys: Annotated[Path | None, Option(help="A JSON file of callers' keys, as sha256 sums.")] = None,
    models: Annotated[Path | None, Option(help="A folder NAME/VERSION/ of bundles that may be loaded later.")] = None,
    fetch_from: Annotated[
        list[str] | None, Option(help="A host whose URLs in records are fetched. May be repeated.")
    ] = None,
    cors: Annotated[list[str] | None, Option(help="A page's origin that may call. May be repeated.")] = None,
    certificate: Annotated[Path | None, Option(help="For TLS, as PEM.")] = None,
    certificate_key: Annotated[Path | None, Option(help="Its key, as PEM.")] = None,
    max_body: Annotated[str, Option(help="The largest request, like 16MiB.")] = "16MiB",
    quiet: Annotated[bool, Option("--quiet", help="Write no line for each request.")] = False,
    telemetry: Annotated[bool, Option("--telemetry", help="Send OpenTelemetry traces.")] = False,
    ray: Annotated[bool, Option("--ray", help="On Ray Serve, with replicas by the load.")] = False,
    as_json: Json = False,
) -> None:
    """Answer requests over HTTP, in batches that fit the load, within an agreed time."""
    from dougong.core.config import parse
    from dougong.core.sizes import read_bytes, read_seconds
    from dougong.serve.models import read_wanted
    from dougong.serve.settings import ServeConfig, read_keys

    batching = {
        "slo_seconds": read_seconds(slo),
        "timeout_seconds": read_seconds(timeout),
        "max_batch": max_batch,
        "max_queue": max_queue,
    }
    values = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "replicas": replicas,
        "threads": threads,
        "batching": batching,
        "limits": {"body_bytes": read_bytes(max_body)},
        "keys": () if keys is None else read_keys(keys),
        "cors_origins": tuple(cors or ()),
        "fetch_from": tuple(fetch_from or ()),
        "models_folder": models,
        "certificate": certificate,
        "certificate_key": certificate_key,
        "log_requests": not quiet,
        "telemetry": telemetry,
    }
    config = parse(ServeConfig, values, where="serve")
    if models is not None and not models.is_dir():
        raise ConfigError(f"--models {models} is no folder. Name the one in which NAME/VERSION bundles lie.")
    wanted = read_wanted(bundles)
    if ray:
        from dougong.serve.ray_serve import serve_on_ray

        serve_on_ray(config, wanted, tell=_tell_where(as_json))
        return
    from dougong.serve.server import serve as run_server

    run_server(config, wanted, tell=_tell_where(as_json))


def _tell_where(as_json: bool) -> Any:
    def tell(url: str, grpc_port: int | None = None) -> None:
        if as_json:
            print(json.dumps({"url": url, "grpc_port": grpc_port}), flush=True)
            return
        print(f"serving at {url}  (a form to try it is there too)", flush=True)
        if grpc_port is not None:
            print(f"gRPC at port {grpc_port}", flush=True)

    return tell


@app.command()
def loadtest(
    url: Annotated[str, Argument(help="Of a server, like http://127.0.0.1:8000.")],
    rate: Annotated[list[float] | None, Option(help="Requests a second. May be repeated: one after the other.")] = None,
    seconds: Annotated[float, Option(min=0.1, help="For each rate.")] = 10.0,
    mix: Annotated[
        str | None, Option(help="What requests carry, by weight: photo+question=3,question=1. Default: all columns.")
    ] = None,
    records: Annotated[Path | None, Option(help="A table to take records from. Default: made-up ones.")] = None,
    model: Annotated[str | None, Option(help="Where several are served.")] = None,
    slo: Annotated[str, Option(help="Within what an answer counts as good.")] = "50ms",
    key: Annotated[str | None, Option(envvar="DOUGONG_KEY", help="Where the server asks for one.")] = None,
    connections: Annotated[int, Option(min=1, help="At most so many at once.")] = 256,
    picture: Annotated[Path | None, Option(help="Draw throughput against latency into this .png or .svg.")] = None,
    seed: Annotated[int, Option(help="Of arrivals and mix.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a server at a steady rate, whether or not it keeps up, and say how long answers took."""
    from dougong.cli.show import print_load
    from dougong.core.config import parse
    from dougong.core.sizes import read_seconds
    from dougong.serve.loadtest import LoadConfig, draw_load, load_test

    values = {
        "url": url,
        "rates": tuple(rate or (50.0,)),
        "seconds": seconds,
        "mix": mix,
        "records": records,
        "model": model,
        "slo_seconds": read_seconds(slo),
        "connections": connections,
        "seed": seed,
    }
    config = parse(LoadConfig, values, where="loadtest")
    if picture is not None and picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--picture {picture} is no .png, .svg or .pdf. Name one of those.")
    found = load_test(config, key=key, tell=None if as_json else _tell)
    if picture is not None:
        draw_load(found, picture)
    if as_json:
        print(json.dumps([each.model_dump() for each in found]))
    else:
        print_load(found)


@app.command()
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
        from dougong.bundle.files import load_from
        from dougong.data.table import Table, open_table
        from dougong.recipes.judge import table_to_judge_on
        from dougong.watch.inside import check_page, look_at_records, write_inside

        page = out or Path("inside.html")
        check_page(page)
        model = load_from(what)
        table = table_to_judge_on(what, data)
        told = look_at_records(model, table if isinstance(table, Table) else open_table(table), record)
        write_inside(page, told)
        print(json.dumps({**told, "page": str(page)}) if as_json else f"page {page}")
        return
    if data is not None and not contribution:
        raise ConfigError(f"--data {data} says nothing without --record or --contribution. Add one, or leave it out.")
    if out is not None:
        from dougong.watch.inside import check_page
        from dougong.watch.summary import summarise, write_summary

        check_page(out)
        counted = None
        if contribution:
            from dougong.bundle.files import load_from
            from dougong.recipes.judge import table_to_judge_on
            from dougong.watch.contribution import as_json as told_of
            from dougong.watch.contribution import study

            counted = told_of(study(load_from(what), table_to_judge_on(what, data)))
        summary = summarise(what, counted)
        write_summary(out, summary)
        print(json.dumps({**summary, "page": str(out)}) if as_json else f"page {out}")
        return
    if contribution:
        raise ConfigError("--contribution says nothing without --out. Add --out page.html.")
    from dougong.watch.dashboard import serve

    serve(what, host=host, port=port, token=token, tell=(lambda line: None) if as_json else print)


@app.command()
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

        trials = try_fix(run, found.findings, steps=steps, tell=None if as_json else _tell)
    if as_json:
        print(json.dumps({**found.as_json(), "trials": [trial.as_json() for trial in trials]}))
    else:
        from dougong.cli.show import print_diagnosis

        print_diagnosis(found, trials)


@app.command()
def bench(
    name: Annotated[str | None, Argument(help="A benchmark; without one, all of them.")] = None,
    listed: Annotated[bool, Option("--list", help="Name them and what they measure.")] = False,
    quick: Annotated[bool, Option("--quick", help="Fewer repetitions; not to be quoted.")] = False,
    check_figures: Annotated[bool, Option("--check", help="Exit 1 if a figure falls short.")] = False,
    as_json: Json = False,
) -> int:
    """Measure the claims: each script's figures beside what was asked of them."""
    from dougong.cli.bench import about, print_measured, run_script, scripts

    known = scripts()
    if listed:
        lines = {key: about(path) for key, path in known.items()}
        print(json.dumps(lines) if as_json else "\n".join(f"{key:16} {line}" for key, line in lines.items()))
        return 0
    if name is not None and name not in known:
        raise ConfigError(f"{name!r} is no benchmark. Use one of {', '.join(known)}.")
    chosen = {key: path for key, path in known.items() if name in (None, key)}
    found = {key: run_script(path, quick=quick) for key, path in chosen.items()}
    measured = {key: figures for key, figures in found.items() if figures is not None}
    if as_json:
        print(json.dumps({key: [figure.model_dump() for figure in figures] for key, figures in measured.items()}))
    else:
        print_measured(measured, quick=quick)
    if len(measured) < len(found):
        left_out = ", ".join(key for key in found if key not in measured)
        print(f"dougong: not measured, for what it said above: {left_out}.", file=sys.stderr)
        return 2
    short = any(figure.holds is False for figures in measured.values() for figure in figures)
    return 1 if check_figures and short else 0


add_commands(app)


def main(arguments: list[str] | None = None) -> int:
    """Exit 0 if it worked, 2 if the user can mend it, 3 if another rank was lost. Anything else is our bug, with its
    traceback."""
    try:
        status: Any = app(args=arguments, standalone_mode=False)
    except DougongError as error:
        lost = isinstance(error, RankError)
        if lost and "DOUGONG_LAUNCHER" in os.environ:
            return 3  # the launcher knows more of it, and says it once for all
        rank = os.environ.get("RANK", "0")  # of torchrun's processes, the first speaks for all that need no other name
        print(f"dougong{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 3 if lost else 2
    except ClickError as error:
        # Without a message, the help was printed already: nothing was asked for.
        if error.format_message():
            print(f"dougong: {error.format_message()} See dougong --help.", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("dougong: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return status if isinstance(status, int) else 0
