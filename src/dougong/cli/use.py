"""The commands for a trained model: evaluate, predict, export, generate, compress.

Here        one thin function per command, added to the others by `add_commands`.
Elsewhere   what they call (recipes/, bundle/, compress/); the other commands (cli/main.py); how results look on a
            terminal (cli/show.py).
Promise     as cli/main.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dougong.cli.options import Json, say, tell
from dougong.core.errors import ConfigError


def add_commands(app: typer.Typer) -> None:
    """All of them."""
    for command in (evaluate, predict, export, generate, compress):
        app.command()(command)


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
    figures = judge(model, data, missing or (), corruptions)
    curves = sweep(model, data, missing or (), baseline=baseline, announce=None if as_json else tell) if graded else []
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
        summary = predict_file(model, records, answers, withhold or ())
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


def export(
    model: Annotated[Path, Argument(help="A bundle's or a run's folder.")],
    out: Annotated[Path, Option(help="The folder to write.")],
    to: Annotated[
        str,
        Option(
            help="openvino, onnx, torch, inductor (compiled for this machine), or auto: which of the first three is "
            "measured to be fastest here."
        ),
    ] = "auto",
    bits: Annotated[
        str | None,
        Option(help="16, 8 or 4 for all layers, w8a16 for weights alone, or mixed: chosen by --size and --latency."),
    ] = None,
    plan: Annotated[
        Path | None, Option(help="In place of --bits: a JSON file with a choice for each layer, as --json tells it.")
    ] = None,
    compute: Annotated[
        str | None, Option(help="With bits: f32, or bf16, which processors with units for it do faster.")
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
        "compute": compute,
        "most_bytes": None if size is None else read_bytes(size),
        "most_seconds": None if latency is None else read_seconds(latency),
        "batch_size": batch,
        "num_records": records,
        "quantise": {"method": method},
        "edge": edge,
        "recover": None if recover is None else {"steps": recover},
        "engine": {"threads": threads},
    }
    delivered = deliver(model, out, parse(ExportRequest, values, where="export"), data, None if as_json else tell)
    if as_json:
        print(json.dumps(delivered.as_json()))
    else:
        print_delivered(delivered)


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
        str,
        Option(
            help="What may carry it out: eager (torch), openvino, openvino-bf16, onnx, or auto, all that are here. "
            "All but the first may end with graphs: an export, which is asked and served like any bundle."
        ),
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
    from dougong.compress.outcome import BudgetError
    from dougong.compress.run import compress_bundle, read_ratio
    from dougong.compress.search_config import SearchConfig
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
            say=(lambda line: None) if as_json else say,
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
