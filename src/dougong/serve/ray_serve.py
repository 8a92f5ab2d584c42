"""The same server on Ray Serve: as many replicas as the load needs, on as many machines as there are.

Here        serve_on_ray, deployment; `app`, which a cluster's configuration names (deploy/kuberay.yaml).
Elsewhere   the application in each replica (app.py), with its own batcher and worker.
Promise     a replica is the server of one machine: the same protocol, limits and answers. Ray only shares out requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dougong.core.config import parse
from dougong.core.errors import ConfigError, RunError
from dougong.serve.models import Wanted
from dougong.serve.settings import ServeConfig

BUNDLES: Final = "DOUGONG_BUNDLES"
"""Where a cluster's configuration names what to serve: bundles as on the command line, with spaces between."""

MOST_REPLICAS: Final = 16
CHANGED_ELSEWHERE: Final = "on Ray, what is served is changed in its own configuration: a request reaches one replica"
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104, where Ray's proxy listens: nothing here binds to it
ONGOING: Final = 64
"""Requests that a replica has at once before Ray wishes for another one: about a full batch waiting behind one."""


def deployment(config: ServeConfig, wanted: Sequence[Wanted], *, most_replicas: int = MOST_REPLICAS) -> Any:
    """A Ray Serve application.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError:
        raise ConfigError("--ray needs Ray Serve. Use: pip install 'ray[serve]'") from None

    settings = config.model_dump(mode="json")
    bundles = [(each.name, each.version, str(each.folder.resolve())) for each in wanted]

    class Replica:
        """One server's application, without its port."""

        async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
            from dougong.serve.app import App
            from dougong.serve.metrics import Metrics
            from dougong.serve.models import Models

            own = parse(ServeConfig, settings, where="ray")
            metrics = Metrics()
            self._models = Models(own, heard=metrics.batch)
            for name, version, folder in bundles:
                await self._models.load(Wanted(name, version, Path(folder)), take_over=False)
            self._app = App(own, self._models, metrics, changed_elsewhere=CHANGED_ELSEWHERE)

        async def __call__(self, request: Any) -> Any:
            return await through(self._app, request)

        async def check_health(self) -> None:
            if not self._models.ready:
                raise RuntimeError("no worker is warm")

        async def __del__(self) -> None:
            await self._models.drain(10.0)
            await self._models.close()

    deployed: Any = serve.deployment(
        Replica,
        name="dougong",
        max_ongoing_requests=config.batching.max_queue,
        graceful_shutdown_timeout_s=config.drain_seconds,
        ray_actor_options={"num_cpus": config.threads * config.replicas},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": most_replicas,
            "target_ongoing_requests": ONGOING,
            "upscale_delay_s": 2.0,
            "downscale_delay_s": 60.0,
        },
    )
    return deployed.bind()


async def through(app: Any, request: Any) -> Any:
    """One Starlette request, as Ray hands it over, through an ASGI application. An answer whose length is not known
    at its start is passed on piece by piece, as words are written."""
    from starlette.responses import Response, StreamingResponse  # Ray brings it

    body = await request.body()
    given = False
    gone = asyncio.Event()
    messages: asyncio.Queue[Any] = asyncio.Queue(1)

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    running = asyncio.create_task(app(request.scope, receive, messages.put))
    start = await _next(messages, running)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            more = True
            while more:
                message = await _next(messages, running)
                more = message.get("more_body", False)
                yield message.get("body", b"")
            await running
        finally:
            gone.set()
            running.cancel()

    headers = list(start["headers"])
    response: Any
    if any(name == b"content-length" for name, _ in headers) or start["status"] == 204:
        response = Response(b"".join([piece async for piece in pieces()]), status_code=start["status"])
    else:
        response = StreamingResponse(pieces(), status_code=start["status"])
    response.raw_headers = headers
    return response


async def _next(messages: asyncio.Queue[Any], running: asyncio.Task[Any]) -> Any:
    """What the application sends next; its error, where it fails in place of that."""
    waiting = asyncio.create_task(messages.get())
    await asyncio.wait((waiting, running), return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done() and messages.empty():
        waiting.cancel()
        running.result()
        raise RunError("the application ended in the middle of an answer.")
    return await waiting


def serve_on_ray(config: ServeConfig, wanted: Sequence[Wanted], *, tell: Callable[[str], None] | None = None) -> None:
    """Serve on the cluster that RAY_ADDRESS names, or on one of this machine, until interrupted.

    Raises:
        ConfigError: Ray is not installed, or an option says nothing there.
    """
    if config.certificate is not None or config.grpc_port is not None:
        raise ConfigError("--ray has its own proxy: TLS and gRPC are set up there. Leave those options out.")
    application = deployment(config, wanted)
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(logging_level="WARNING", include_dashboard=False)
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(application, name="dougong", route_prefix="/")
    if tell is not None:
        tell(f"http://{config.host}:{config.port}")
    try:
        threading.Event().wait()
    finally:
        serve.shutdown()


def app(arguments: dict[str, Any]) -> Any:
    """What a cluster's configuration names as its `import_path`; `args` are settings, and `bundles`. Its proxy listens
    on every node, so there are keys, unless `host: 127.0.0.1` says that something else asks for one.

    Raises:
        ConfigError: no bundle is named, or no key.
    """
    from dougong.serve.models import read_wanted

    given = dict(arguments)
    bundles = given.pop("bundles", None) or os.environ.get(BUNDLES, "").split()
    if isinstance(bundles, str):
        bundles = json.loads(bundles) if bundles.startswith("[") else bundles.split()
    if not bundles:
        raise ConfigError(f"no bundle is named. Set args: {{bundles: [...]}} or the variable {BUNDLES}.")
    most = int(given.pop("max_replicas", MOST_REPLICAS))
    given.setdefault("host", EVERYWHERE)
    return deployment(parse(ServeConfig, given, where="args"), read_wanted(bundles), most_replicas=most)
