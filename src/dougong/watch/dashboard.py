"""Runs side by side in a browser, live, with what goes on inside them.

Here        `build_app` (the pages and what they ask for), `serve`.
Elsewhere   reading runs (watch/runs.py), and keeping what is worked out of them (watch/behind.py); what a run's page
            shows (watch/summary.py); how the page looks and what it does (watch/dashboard.html).
Promise     nothing is asked of any other machine, and nothing is changed: every answer is read from the folder that was
            named. On another address than this machine's own nobody is answered who does not know the token; a browser
            that was led here under another name (DNS rebinding) is not answered either.
"""

from __future__ import annotations

import hmac
import importlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from dougong.core.errors import ConfigError, RunError
from dougong.watch.behind import Behind
from dougong.watch.pages import page_template
from dougong.watch.runs import MOST_RUNS, Reader, Runs
from dougong.watch.summary import filled, summary_of, summary_template

LOCAL: Final = ("127.0.0.1", "localhost", "::1")
COOKIE: Final = "dougong_token"
LEAST_TOKEN: Final = 16
MOST_PAGES: Final = 32
"""Of runs that were looked at last."""

STILL: Final = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
"""A page that shows what stands in it and does nothing."""


def build_app(root: Path, *, host: str = "127.0.0.1", token: str | None = None) -> Any:
    """The dashboard of all runs below a folder, as an ASGI application.

    Raises:
        ConfigError: fastapi is not installed, or the token is too short to be one.
        RunError: there is no such folder.
    """
    try:
        fastapi: Any = importlib.import_module("fastapi")
        responses: Any = importlib.import_module("fastapi.responses")
    except ImportError:
        raise ConfigError("the dashboard needs fastapi. Run: pip install 'dougong[watch]'") from None
    if token is not None and len(token) < LEAST_TOKEN:
        raise ConfigError(f"--token has {len(token)} characters, which can be guessed. Use {LEAST_TOKEN} or more.")
    if token is None and host not in LOCAL:
        raise ConfigError(f"--host {host} can be reached by others: give --token, or let `dougong watch` draw one.")
    runs = Runs(root)

    def draw(reader: Reader, run: str) -> str:
        told = summary_of(reader, run)
        return summary_template().render(**filled(told), whole=False)

    def count_findings(reader: Reader, _run: str) -> int:
        return len(reader.findings())

    worker = ThreadPoolExecutor(1, thread_name_prefix="behind")
    pages, findings = Behind(draw, worker, MOST_PAGES), Behind(count_findings, worker, MOST_RUNS)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def refuse(text: str, status: int) -> Any:
        return responses.JSONResponse({"error": text}, status_code=status)

    async def guard(request: Any, call_next: Callable[[Any], Any]) -> Any:
        name = (request.headers.get("host") or "").rpartition(":")[0] or request.headers.get("host") or ""
        if name.strip("[]") not in (*LOCAL, host, "testserver"):
            return refuse("this name is not this server's", 421)
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            return refuse("add ?token= and the token that dougong watch printed", 401)
        response = await call_next(request)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if token is not None:
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return response

    def index() -> Any:
        nonce = secrets.token_urlsafe(12)
        page = page_template("dashboard.html").render(root=str(runs.root.name), nonce=nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'"
        )
        return responses.HTMLResponse(page, headers={"Content-Security-Policy": policy})

    def listed() -> Any:
        readers = {name: runs.get(name) for name in runs.names()}
        told = [{"name": run, **each.told(), "findings": findings.get(each, run)} for run, each in readers.items()]
        return responses.JSONResponse(told)

    def curves(run: str) -> Any:
        try:
            return responses.JSONResponse(runs.get(run).curves())
        except RunError as error:
            return refuse(str(error), 404)

    def view(run: str) -> Any:
        try:
            return responses.HTMLResponse(pages.get(runs.get(run), run))
        except RunError as error:
            return refuse(str(error), 404)

    def export(run: str) -> Any:
        try:
            told = summary_of(runs.get(run), run)
        except RunError as error:
            return refuse(str(error), 404)
        page = summary_template().render(**filled(told), whole=True)
        return responses.HTMLResponse(page, headers={"Content-Disposition": 'attachment; filename="run.html"'})

    def records(run: str) -> Any:
        try:
            path = runs.get(run).folder / "report.html"
        except RunError as error:
            return refuse(str(error), 404)
        if not path.is_file():
            return refuse("this run has no report yet: it is written when training ends", 404)
        # It holds no script of its own, and none may run in it.
        return responses.HTMLResponse(
            path.read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": STILL},
        )

    app.middleware("http")(guard)
    for path, answer in (
        ("/", index),
        ("/api/runs", listed),
        ("/api/curves", curves),
        ("/view", view),
        ("/export", export),
        ("/records", records),
    ):
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    return app


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    tell: Callable[[str], object] = print,
) -> None:
    """Serve until interrupted; says where.

    Raises:
        ConfigError: fastapi or uvicorn is not installed, or the token is too short.
        RunError: there is no such folder.
    """
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(24)
    app = build_app(root, host=host, token=token)
    try:
        uvicorn: Any = importlib.import_module("uvicorn")
    except ImportError:
        raise ConfigError("the dashboard needs uvicorn. Run: pip install 'dougong[watch]'") from None
    tell(f"http://{host}:{port}/{'' if token is None else f'?token={token}'}  (end with Ctrl-C)")
    uvicorn.run(app, host=host, port=port, log_level="warning")
