"""The process around the application: starting, listening, and ending without losing anything.

Here        serve: what `dougong serve` calls; Running, for tests and benchmarks in the same process.
Elsewhere   the application (app.py); the same on Ray (ray_serve.py).
Promise     the port is open only when every model is warm. After SIGTERM whatever comes is still answered while callers
            learn that this server ends; the port closes when nothing has come for a moment. A second SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from dougong.core.errors import ConfigError
from dougong.serve.event_loop import run_fast
from dougong.serve.settings import ServeConfig

if TYPE_CHECKING:
    import uvicorn

    from dougong.serve.app import App
    from dougong.serve.models import Models, Wanted
    from dougong.serve.workers import Workers


def check_installed() -> None:
    """Raises:
    ConfigError: what serving needs is not installed."""
    try:
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed. Use: pip install 'dougong[serve]'"
        ) from None


def serve(
    config: ServeConfig,
    wanted: Sequence[Wanted],
    *,
    tell: Callable[[str, int | None], None] | None = None,
    quiet: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT. `tell` hears where, and gRPC's port, once every model is warm.

    Raises:
        DougongError: a bundle cannot be loaded, or the port is taken.
    """
    check_installed()
    from dougong.serve.logs import start_logging

    if not quiet:
        start_logging()

    async def run() -> None:
        async with Running.start(config, wanted, log=config.log_requests and not quiet) as running:
            if tell is not None:
                tell(running.url, running.grpc_port)
            await running.until_ended()

    run_fast(run())


class Running:
    """A server that runs on this event loop."""

    def __init__(self, app: App, models: Models, server: uvicorn.Server, url: str) -> None:
        self.app = app
        self.models = models
        self.url = url
        self.grpc_port: int | None = None
        self._server = server
        self._task: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        config: ServeConfig,
        wanted: Sequence[Wanted],
        *,
        log: bool = False,
        workers: Callable[[Wanted], Workers] | None = None,
        signals: bool = True,
    ) -> AsyncIterator[Running]:
        """Load, warm, listen; at the end, everything is closed.

        Raises:
            DougongError: a bundle cannot be loaded, or the port is taken.
        """
        check_installed()
        from dougong.serve.app import App
        from dougong.serve.logs import RequestLog
        from dougong.serve.metrics import Metrics
        from dougong.serve.models import Models
        from dougong.serve.telemetry import start_spans

        metrics = Metrics()
        models = Models(config, heard=metrics.batch, workers=workers)
        request_log = RequestLog() if log else None
        spans = start_spans() if config.telemetry else None
        listening = _listen(config)  # first: loading takes long, and a port that is taken is known at once
        grpc = None
        try:
            for each in wanted:
                await models.load(each, take_over=False)
            app = App(config, models, metrics, log=request_log, spans=spans)
            server = _uvicorn(config, app)
            scheme = "https" if config.certificate is not None else "http"
            host, port = listening.getsockname()[:2]
            running = cls(app, models, server, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
            if config.grpc_port is not None:
                from dougong.serve.grpc_server import start_grpc

                grpc = await start_grpc(config, app)
                running.grpc_port = grpc.port
            listening.listen(4096)
            running._task = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started and not running._task.done():
                await asyncio.sleep(0.005)
            with running._signals() if signals else contextlib.nullcontext():
                try:
                    yield running
                finally:
                    server.should_exit = True
                    await running._task
        finally:
            if grpc is not None:
                await grpc.stop(1.0)
            await models.close()
            listening.close()
            if request_log is not None:
                request_log.flush()

    async def until_ended(self) -> None:
        """Wait for the end."""
        assert self._task is not None
        await asyncio.shield(self._task)

    def drain(self) -> None:
        """Begin to end; a second call ends at once."""
        if self._draining is not None:
            self._server.should_exit = self._server.force_exit = True
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        app, config = self.app, self.app.config
        app.draining = True
        began = time.monotonic()
        # Requests may be on their way on connections that are open: those are answered, with Connection: close.
        while time.monotonic() - began < config.drain_seconds:
            quiet_since = max(began, app.last_request)
            if app.in_flight == 0 and time.monotonic() - quiet_since >= config.settle_seconds:
                break
            await asyncio.sleep(0.02)
        self._server.should_exit = True

    @contextlib.contextmanager
    def _signals(self) -> Any:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port} ({reason}). Use another --port; 0 takes one that is free."
        ) from None
    return found


def _uvicorn(config: ServeConfig, app: App) -> uvicorn.Server:
    import uvicorn

    from dougong.serve.connections import protocol

    class Server(uvicorn.Server):
        """Signals are ours: uvicorn would close the port at once."""

        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            yield

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            return

    if config.certificate is not None:
        for path in (config.certificate, config.certificate_key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path} is no file. Give --certificate and --certificate-key in PEM format.")
    try:
        settings = uvicorn.Config(
            app,
            http=protocol(config.limits, app),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=4096,
            timeout_graceful_shutdown=int(max(1, config.drain_seconds)),
            ssl_certfile=None if config.certificate is None else str(config.certificate),
            ssl_keyfile=None if config.certificate_key is None else str(config.certificate_key),
        )
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{config.certificate} cannot be used ({error}). Give a certificate and its key as PEM."
        ) from None
    return Server(settings)
