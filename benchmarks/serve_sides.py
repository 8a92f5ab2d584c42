"""The servers that benchmarks/serve.py asks, each in a process of its own, with the same model behind it.

Here        `run_side`: ours, the minimal batcher, no batching, and the peers; the models; `worker`, which ours forks.
Elsewhere   asking them and reckoning (serve.py).
Promise     every side runs the same function on a batch, one worker of one core; nothing but its own batching differs.

A peer is imported from the environment that it is started in. Dougong is imported by our own side and for bundles.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST = 32
"""Records that every side puts into a batch at most."""

WAIT_SECONDS = 0.002
"""What a peer waits for a batch to fill, where it has to be told."""

Compute = Callable[[Sequence[Any]], list[Any]]


def device(fixed: float = 0.004, item: float = 0.0001) -> Compute:
    """A simulated accelerator: seconds of a batch and of each record, without the processor."""

    def compute(values: Sequence[float]) -> list[float]:
        time.sleep(fixed + item * len(values))
        return [2.0 * value for value in values]

    return compute


def asked(document: Any) -> Any:
    """What a request asks about: a number where it names one, otherwise the record that it is."""
    return document.get("x", document)


def large_device() -> Compute:
    """With a large model: slow enough that one core can ask for twice as much as it can answer."""
    return device(0.02, 0.002)


def perceptron() -> Compute:
    """Three layers of 1024 on one core."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    wide = [torch.nn.Linear(1024, 1024), torch.nn.ReLU()]
    network = torch.nn.Sequential(torch.nn.Linear(1, 1024), torch.nn.ReLU(), *wide, torch.nn.Linear(1024, 1)).eval()

    def compute(values: Sequence[float]) -> list[float]:
        with torch.inference_mode():
            found: list[float] = network(torch.tensor(list(values), dtype=torch.float32)[:, None])[:, 0].tolist()
        return found

    return compute


def bundle() -> Compute:
    """The bundle that SIDE_BUNDLE names, of records whose pictures are base64: what a server without Dougong's would
    have to do itself."""
    import base64
    import os
    from pathlib import Path

    import torch

    from dougong.bundle.exported import EngineConfig
    from dougong.bundle.files import load_from

    torch.set_num_threads(1)
    model = load_from(Path(os.environ["SIDE_BUNDLE"]), EngineConfig(threads=1))
    pictures = [name for name, each in model.preparation.signature().inputs.items() if each.kind == "image"]

    def compute(values: Sequence[Any]) -> list[Any]:
        records = [dict(value) if isinstance(value, dict) else {} for value in values]
        for record in records:
            for name in pictures:
                if name in record:
                    record[name] = {"bytes": base64.b64decode(record[name]), "path": None}
        found = model.predict(records, batch_size=len(records))
        return [json.loads(each.model_dump_json(exclude={"row", "error"})) for each in found]

    return compute


MODELS: Mapping[str, Callable[[], Compute]] = {
    "device": device,
    "large-device": large_device,
    "perceptron": perceptron,
    "bundle": bundle,
}


def run_side(arguments: Sequence[str]) -> None:
    """SIDE PORT MODEL [BUNDLE [WAIT]]: serve until ended."""
    side, port, model, *rest = arguments
    sides: dict[str, Callable[..., None]] = {
        "ours": _ours,
        "minimal": _minimal,
        "none": _none,
        "litserve": _litserve,
        "bentoml": _bentoml,
        "ray": _ray,
        "mosec": _mosec,
    }
    sides[side](int(port), model, *rest)


def worker() -> None:
    """What our side forks its workers from."""
    from dougong.serve.backend import Outcome
    from dougong.serve.worker import main

    class Backend:
        def __init__(self, name: str) -> None:
            self._compute = MODELS[name]()

        def warm(self) -> None:
            self._compute([1.0])

        def answer(self, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
            found = self._compute([record.get("x", 0.0) for record in records])
            return [Outcome(200, json.dumps({"answer": value}).encode()) for value in found]

        def explain(self, record: Mapping[str, Any]) -> Outcome:
            return self.answer([record])[0]

        def quality(self, record: Mapping[str, Any]) -> Mapping[str, float]:
            return {}

        def write(self, record: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
            raise NotImplementedError

        def draw(self, text: str, options: Mapping[str, Any]) -> Outcome:
            raise NotImplementedError

    sys.exit(main(make=lambda settings: Backend(settings["model"])))


def _ours(port: int, model: str, bundle: str, wait: str = "", slo: str = "1.0") -> None:
    from pathlib import Path

    import uvloop

    from dougong.core.config import parse
    from dougong.serve.models import Wanted
    from dougong.serve.server import Running
    from dougong.serve.settings import ServeConfig
    from dougong.serve.workers import ProcessWorkers, Workers

    def workers(wanted: Wanted) -> Workers:
        command = [sys.executable, "-c", "import serve_sides; serve_sides.worker()"]
        return ProcessWorkers({"model": model}, command=command)

    batching = {
        "max_batch": MOST,
        "slo_seconds": float(slo),
        "timeout_seconds": max(2.0, float(slo)),
        "fixed_wait_seconds": float(wait) if wait else None,
    }
    config = parse(ServeConfig, {"port": port, "batching": batching, "log_requests": False}, where="benchmark")

    async def run() -> None:
        wanted = [Wanted("model", "1", Path(bundle))]
        make = None if model == "bundle" else workers
        async with Running.start(config, wanted, workers=make) as running:
            await running.until_ended()

    uvloop.run(run())


def _uvicorn(port: int, answer: Callable[[Any], Any]) -> None:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        document = json.loads(body) if body else {}
        found = json.dumps({"answer": await answer(asked(document))}).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(found))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": found})

    uvicorn.run(app, port=port, log_level="error", access_log=False, lifespan="off")


def _minimal(port: int, model: str, *rest: str) -> None:
    """The least that batches: whatever waits when the worker is free."""
    from concurrent.futures import ThreadPoolExecutor

    compute, pool = MODELS[model](), ThreadPoolExecutor(1)
    waiting: list[tuple[Any, asyncio.Future[Any]]] = []
    busy = False

    async def run() -> None:
        nonlocal busy
        busy = True
        await asyncio.sleep(0)
        while waiting:
            batch = waiting[:MOST]
            del waiting[:MOST]
            found = await asyncio.get_running_loop().run_in_executor(pool, compute, [value for value, _ in batch])
            for (_, future), value in zip(batch, found, strict=True):
                future.set_result(value)
            await asyncio.sleep(0)
        busy = False

    tasks: set[Any] = set()

    async def answer(value: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        waiting.append((value, future))
        if not busy:
            task = asyncio.create_task(run())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return await future

    _uvicorn(port, answer)


def _none(port: int, model: str, *rest: str) -> None:
    """One at a time."""
    from concurrent.futures import ThreadPoolExecutor

    compute, pool = MODELS[model](), ThreadPoolExecutor(1)

    async def answer(value: Any) -> Any:
        found = await asyncio.get_running_loop().run_in_executor(pool, compute, [value])
        return found[0]

    _uvicorn(port, answer)


def _litserve(port: int, model: str, *rest: str) -> None:
    import os

    os.environ["SIDE_MODEL"] = model
    import serve_litserve  # only in the peers' environment

    serve_litserve.run(port)


def _bentoml(port: int, model: str, *rest: str) -> None:
    import os
    import subprocess

    environment = {**os.environ, "SIDE_MODEL": model, "BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-m", "bentoml", "serve", "serve_bentoml:Served", "--port", str(port)]
    subprocess.run(command, env=environment, check=False)  # noqa: S603, our own file


def _ray(port: int, model: str, *rest: str) -> None:
    import ray  # only in the peers' environment
    from ray import serve

    @serve.deployment(  # type: ignore[untyped-decorator, unused-ignore]
        max_ongoing_requests=256, ray_actor_options={"num_cpus": 1}, logging_config={"enable_access_log": False}
    )
    class Served:
        def __init__(self) -> None:
            self.compute = MODELS[model]()

        @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=WAIT_SECONDS)  # type: ignore[untyped-decorator, unused-ignore]
        async def many(self, values: Any) -> Any:
            return self.compute(values)

        async def __call__(self, request: Any) -> Any:
            return {"answer": await self.many(asked(await request.json()))}

    ray.init(include_dashboard=False, logging_level="ERROR")
    serve.start(http_options={"port": port})
    deployed: Any = Served
    serve.run(deployed.bind())
    while True:
        time.sleep(3600)


def _mosec(port: int, model: str, *rest: str) -> None:
    import os

    os.environ["SIDE_MODEL"] = model
    import serve_mosec  # only in the peers' environment

    serve_mosec.run(port)
