"""The commands that answer requests: serve, loadtest.

Here        one thin function per command, added to the others by `add_commands`.
Elsewhere   what they call (serve/); the other commands (cli/main.py); how results look on a
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
    for command in (serve, loadtest):
        app.command()(command)


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
    found = load_test(config, key=key, tell=None if as_json else tell)
    if picture is not None:
        draw_load(found, picture)
    if as_json:
        print(json.dumps([each.model_dump() for each in found]))
    else:
        print_load(found)
