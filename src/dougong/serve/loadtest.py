"""Asking a server at a steady rate, and how long its answers take.

Here        load_test, LoadConfig, LoadResult, draw_load; Asker, the client; payloads.
Elsewhere   the server (server.py); the measured claims (benchmarks/serve.py).
Promise     requests come when they were to come, whether or not the server keeps up, and each is timed from the moment
            at which it was due, not from when a connection was free: a server that stands still for a second is
            charged for all who would have asked meanwhile (coordinated omission; Tene 2013).
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import ssl
import struct
import wave
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic  # the loop's own clock may count whole milliseconds (uvloop's does)
from typing import Any, Final
from urllib.parse import quote, urlsplit

from pydantic import field_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError, DataError, RunError
from dougong.serve.event_loop import run_fast

QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
GIVE_UP_SECONDS: Final = 30.0
MOST_PAYLOADS: Final = 512
WORDS: Final = ("is", "there", "a", "red", "blue", "green", "circle", "in", "the", "picture", "what", "colour", "not")


class LoadConfig(Config):
    """A load."""

    url: str
    rates: tuple[float, ...] = (50.0,)
    """Requests a second, one rate after the other."""

    seconds: float = 10.0
    """For each rate."""

    mix: str | None = None
    records: Path | None = None
    model: str | None = None
    slo_seconds: float = 0.05
    connections: int = 256
    seed: int = 0

    @field_validator("rates")
    @classmethod
    def _above_zero(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or min(rates) <= 0 or max(rates) > 1e6:
            raise ValueError(f"{min(rates, default=0):g} must be above 0: requests a second. Use for example 200.")
        return rates

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server. Use for example http://127.0.0.1:8000.")
        return url


class LoadResult(Config):
    """What one rate came to. Seconds are from when a request was due until its whole answer."""

    rate: float
    sent: int
    answered: int
    """With status 200."""

    good_per_second: float
    """Answered within the objective."""

    answered_per_second: float
    quantiles: dict[str, float]
    """Of the answered requests' seconds, by share."""

    refused_quantile: float | None
    """Seconds to a refusal, 99 of 100; None where none was refused."""

    statuses: dict[str, int]
    """By status; `failed`: the connection broke; `timeout`: no answer within half a minute."""

    most_waiting: int
    """Requests that waited for a connection at once, at most: above 0 the load was held up by --connections."""

    behind_quantile: float
    """Seconds, 99 of 100, from when a request was due until this side came to make it: what it adds itself."""


class Asker:
    """Connections to one server, kept open: HTTP/1.1 by hand, since a client must cost less than what it measures."""

    def __init__(self, url: str, *, most: int, key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._host, self._base = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._head = f"host: {parts.netloc}\r\n".encode()
        if key is not None:
            self._head += f"authorization: Bearer {key}\r\n".encode()
        self._free: deque[_Connection] = deque()
        self._all: set[_Connection] = set()
        self._most = most
        self._queue: deque[asyncio.Future[None]] = deque()
        self.most_waiting = 0

    def frame(self, path: str, body: bytes, content_type: str, more: str = "") -> bytes:
        """A whole request."""
        start = f"POST {self._base}{path} HTTP/1.1\r\n".encode() + self._head
        middle = f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode()
        return start + middle + body

    async def get(self, path: str) -> tuple[int, bytes]:
        """The answer at an address."""
        return await self.ask(f"GET {self._base}{path} HTTP/1.1\r\n".encode() + self._head + b"\r\n")

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError: the connection cannot be made, or breaks.
        """
        connection = await self._connection()
        try:
            answer = await connection.ask(request)
        except BaseException:
            self._all.discard(connection)
            connection.close()
            self._let_next()
            raise
        if connection.ends:
            self._all.discard(connection)
            connection.close()
        else:
            self._free.append(connection)
        self._let_next()
        return answer

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.close()

    async def _connection(self) -> _Connection:
        while True:
            while self._free:
                connection = self._free.popleft()
                if not connection.lost:
                    return connection
                self._all.discard(connection)
            if len(self._all) < self._most:
                break
            waiting = asyncio.get_running_loop().create_future()
            self._queue.append(waiting)
            self.most_waiting = max(self.most_waiting, len(self._queue))
            await waiting
        connection = _Connection()
        self._all.add(connection)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: connection, self._host, self._port, ssl=self._tls
            )
        except BaseException:
            self._all.discard(connection)
            self._let_next()
            raise
        return connection

    def _let_next(self) -> None:
        while self._queue:
            waiting = self._queue.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.lost = self.ends = False
        self._transport: asyncio.Transport | None = None
        self._held = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a socket it is one that writes too

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._held = self._held + data if self._held else data
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._held[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            stop = head.find(b"\r\n", at)
            size = int(head[at + 15 : stop if stop >= 0 else None])
            whole = self._held[end + 4 : end + 4 + size] if len(self._held) >= end + 4 + size else None
        elif b"transfer-encoding: chunked" in head:
            whole, size = _of_chunks(self._held, end + 4)
        else:
            whole, size = b"", 0
        if whole is None or self._answer is None:
            return
        self.ends = b"connection: close" in head
        body, self._held = whole, self._held[end + 4 + size :]
        if not self._answer.done():
            self._answer.set_result((int(head[9:12]), body))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        assert self._transport is not None
        if self.lost:
            raise ConnectionResetError("the server closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _of_chunks(held: bytes, at: int) -> tuple[bytes | None, int]:
    """The body whose chunks begin there, None where they have not all come, and how many bytes they take."""
    found, begin = b"", at
    while (line := held.find(b"\r\n", at)) >= 0:
        size = int(held[at:line].partition(b";")[0], 16)
        at = line + 2 + size + 2
        if len(held) < at:
            break
        if not size:
            return found, at - begin
        found += held[line + 2 : at - 2]
    return None, 0


def load_test(
    config: LoadConfig, *, key: str | None = None, tell: Callable[[str, int, int], None] | None = None
) -> list[LoadResult]:
    """Ask at each rate in turn.

    Raises:
        ConfigError: the mix names what the model does not read.
        RunError: there is no server, or it does not let this caller in.
    """
    return run_fast(_load_test(config, key, tell))


async def _load_test(
    config: LoadConfig, key: str | None, tell: Callable[[str, int, int], None] | None
) -> list[LoadResult]:
    asker = Asker(config.url, most=config.connections, key=key)
    try:
        about = await _about(asker, config)
        records = _records(config, about["columns"])
        path = f"/v1/predict?model={quote(about['name'], safe='')}"
        requests = [asker.frame(path, _json_body(record), "application/json") for record in records]
        found = []
        for place, rate in enumerate(config.rates):
            found.append(await run_load(asker, requests, rate, config.seconds, config.slo_seconds, config.seed + place))
            if tell is not None:
                tell(f"{rate:g} requests a second", place + 1, len(config.rates))
        return found
    finally:
        asker.close()


async def run_load(
    asker: Asker,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    slo_seconds: float,
    seed: int,
    *,
    seen: Callable[[int, int, bytes], None] | None = None,
    timed: Callable[[float, float, int], None] | None = None,
    ended: Callable[[], bool] | None = None,
) -> LoadResult:
    """Poisson arrivals at one rate; `seen` is told each request's place, status and answer, `timed` when it was due
    (seconds from the beginning), what it took and its status. `ended` is asked before each whether to go on."""
    dice = random.Random(seed)  # noqa: S311, no secret
    took: list[float] = []
    refused: list[float] = []
    behind: list[float] = []
    statuses: Counter[str] = Counter()
    tasks: set[asyncio.Task[None]] = set()
    asker.most_waiting = 0

    async def one(due: float, place: int) -> None:
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                status, body = await asker.ask(requests[place])
        except TimeoutError:
            statuses["timeout"] += 1
            return
        except OSError:
            statuses["failed"] += 1
            return
        statuses[str(status)] += 1
        lasted = monotonic() - due
        (took if status == 200 else refused).append(lasted)
        if timed is not None:
            timed(due - began, lasted, status)
        if seen is not None:
            seen(place, status, body)

    began = due = monotonic()
    while True:
        due += dice.expovariate(rate)
        if due - began > seconds or (ended is not None and ended()):
            break
        if (ahead := due - monotonic()) > 0:
            await asyncio.sleep(ahead)
        now = monotonic()
        behind.append(max(0.0, now - due))
        # A loop's clock may wake it a little too soon: nobody is answered before asking.
        task = asyncio.create_task(one(min(due, now), dice.randrange(len(requests))))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    lasted = max(seconds, monotonic() - began)
    return LoadResult(
        rate=rate,
        sent=sum(statuses.values()),
        answered=len(took),
        good_per_second=sum(each <= slo_seconds for each in took) / lasted,
        answered_per_second=len(took) / lasted,
        quantiles={f"{share:g}": quantile(took, share) for share in QUANTILES} if took else {},
        refused_quantile=quantile(refused, 0.99) if refused else None,
        statuses=dict(sorted(statuses.items())),
        most_waiting=asker.most_waiting,
        behind_quantile=quantile(behind, 0.99) if behind else 0.0,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _about(asker: Asker, config: LoadConfig) -> dict[str, Any]:
    try:
        async with asyncio.timeout(10):
            status, body = await asker.get("/v1/models")
    except (OSError, TimeoutError):
        raise RunError(f"no server answers at {config.url}. Start one with: dougong serve BUNDLE.") from None
    if status == 401:
        raise RunError(f"{config.url} needs a key. Give --key KEY, or set DOUGONG_KEY.")
    try:
        models = json.loads(body)["models"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{config.url} is not a server of Dougong: it has no list of models.") from None
    names = [each["name"] for each in models]
    if config.model is None and len(models) == 1:
        return dict(models[0])
    if config.model not in names:
        raise ConfigError(f"--model {config.model} is not served there. Use one of {', '.join(names)}.")
    return dict(models[names.index(config.model)])


def _records(config: LoadConfig, columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What is asked, mixed as was wished."""
    kinds = {each["name"]: each["kind"] for each in columns}
    dice = random.Random(config.seed)  # noqa: S311, no secret
    shares = read_mix(config.mix, list(kinds))
    if config.records is not None:
        rows = _table_rows(config.records, list(kinds))
    else:
        rows = [{name: made_up(kind, dice) for name, kind in kinds.items()} for _ in range(64)]
    chosen = dice.choices(list(shares), list(shares.values()), k=min(MOST_PAYLOADS, 8 * len(rows)))
    return [{name: dice.choice(rows).get(name) for name in carried} for carried in chosen]


def read_mix(text: str | None, columns: Sequence[str]) -> dict[tuple[str, ...], float]:
    """`photo+question=3,question=1` as columns by weight; without one, all columns together.

    Raises:
        ConfigError: a column is not the model's, or a weight is no number.
    """
    if text is None:
        return {tuple(columns): 1.0}
    shares: dict[tuple[str, ...], float] = {}
    for part in text.split(","):
        names, _, weight = part.partition("=")
        carried = tuple(name.strip() for name in names.split("+") if name.strip())
        strange = next((name for name in carried if name not in columns), None)
        if strange is not None:
            raise ConfigError(f"--mix {text!r}: the model reads no {strange!r}. Use some of {', '.join(columns)}.")
        try:
            shares[carried] = float(weight or 1)
        except ValueError:
            raise ConfigError(f"--mix {text!r}: {weight!r} is no weight. Write for example {columns[0]}=3.") from None
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf"):
        raise ConfigError(f"--mix {text!r} has no weight above 0. Write for example {columns[0]}=3.")
    return shares


def _table_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    from dougong.core.files import inside
    from dougong.data.table import open_table

    table = open_table(path)
    known = [name for name in columns if name in table.schema.names]
    if not known:
        raise DataError(f"{path} has none of the model's columns: {', '.join(columns)}.")
    rows = table.read(0, known).slice(0, MOST_PAYLOADS).to_pylist()
    for row in rows:
        for name, cell in row.items():
            if isinstance(cell, dict) and cell.get("bytes") is not None:
                row[name] = cell["bytes"]
            elif isinstance(cell, dict) and cell.get("path"):
                file = inside(table.folder, cell["path"])
                row[name] = None if file is None else file.read_bytes()
    return [dict(row) for row in rows]


def made_up(kind: str, dice: random.Random) -> Any:
    """A value of this kind that a model can read, if not understand."""
    if kind == "text":
        return " ".join(dice.choices(WORDS, k=dice.randint(3, 10)))
    if kind == "number":
        return round(dice.gauss(0, 1), 4)
    if kind == "category":
        return dice.choice(WORDS)
    if kind == "image":
        return picture(64, 64, dice)
    if kind == "audio":
        return sound(dice)
    return None


def picture(width: int, height: int, dice: random.Random) -> bytes:
    """A PNG file of a few coloured stripes."""
    lines = b"".join(b"\0" + bytes(dice.choices(range(256), k=3)) * width for _ in range(height))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def sound(dice: random.Random) -> bytes:
    """A WAV file of half a second to a second of noise, 8,000 samples a second."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(dice.randbytes(2 * dice.randint(4000, 8000)))
    return content.getvalue()


def _json_body(record: Mapping[str, Any]) -> bytes:
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in record.items()
        if value is not None
    }
    return json.dumps(plain, default=str).encode()


def draw_load(found: Sequence[LoadResult], path: Path) -> None:
    """Throughput against latency, a point for each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for share in ("0.5", "0.99"):
        points = [(each.answered_per_second, 1e3 * each.quantiles[share]) for each in found if each.quantiles]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"p{100 * float(share):g}") if points else None
    axes.set_xlabel("answered a second")
    axes.set_ylabel("milliseconds from when a request was due")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if any(each.quantiles for each in found):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--picture {path} cannot be written ({error.strerror}). Name another file.") from None
