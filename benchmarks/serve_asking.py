"""Servers to be measured, started and asked.

Here        `side` (a server that runs, ours or another), `closed` (callers that wait for their answers), `opened`
            (arrivals by chance); bundles and records to ask about; `spread`, a figure of several runs.
Elsewhere   what is measured (serve.py, serve_compressed.py); what a side runs (serve_sides.py).
Promise     a server and all that it started are ended by their numbers, whatever happens.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from harness import ROOT

from dougong.core.errors import RunError
from dougong.core.figures import Figure
from dougong.serve.event_loop import run_fast
from dougong.serve.loadtest import Asker, picture, run_load

PEERS = ("mosec", "litserve", "bentoml", "ray")
CALLERS = 32


def spread(name: str, values: Sequence[float], unit: str, **more: Any) -> Figure:
    middle = statistics.median(values)
    return Figure(name=name, value=middle, unit=unit, low=min(values), high=max(values), seeds=len(values), **more)


class Side(NamedTuple):
    """A server that runs."""

    url: str
    path: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Of all its processes until now."""
        return sum(_cpu_seconds(pid) for pid in _family(self.process.pid))

    def memory_bytes(self) -> int:
        """Of all its processes; what some of them share counts once."""
        return sum(_share_bytes(pid) for pid in _family(self.process.pid))


@contextlib.contextmanager
def side(name: str, model: str, *more: str, folder: Path, python: str = sys.executable) -> Iterator[Side]:
    """Start a server; at the end it and all that it started are ended, by their numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(ROOT / "benchmarks")] + ([str(ROOT / "src")] if name == "ours" or model == "bundle" else [])
    paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ and name in ("ours", "minimal", "none") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if model == "bundle" and more:
        environment["SIDE_BUNDLE"] = more[0]
    code = "import sys, serve_sides; serve_sides.run_side(sys.argv[1:])"
    log = (folder / f"{name}-{model}.log").open("ab")
    process = subprocess.Popen(  # noqa: S603, our own script
        [python, "-c", code, name, str(port), model, *more],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    found = Side(f"http://127.0.0.1:{port}", "/v1/predict" if name == "ours" else "/", process)
    try:
        if name == "mosec":
            found = found._replace(path="/inference")
        if name == "litserve":
            found = found._replace(path="/predict")
        run_fast(_wait_for(found, name, log.name))
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in _group(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()


async def _wait_for(found: Side, name: str, log: str) -> None:
    for _ in range(600):
        if found.process.poll() is not None:
            break
        asker = Asker(found.url, most=1)
        try:
            async with asyncio.timeout(5):
                ready = asker.get("/v2/health/ready") if name == "ours" else None
                status, _ = await (ready or asker.ask(body_of(asker, found.path, 1.0, name)))
            if status == 200:
                return
        except (OSError, TimeoutError):
            pass
        finally:
            asker.close()
        await asyncio.sleep(0.2)
    raise RunError(f"{name} did not start: see {log}. Is it installed where PEERS says?")


def body_of(asker: Asker, path: str, value: float, name: str) -> bytes:
    body = {"x": [value]} if name == "bentoml" else {"x": value}
    return asker.frame(path, json.dumps(body).encode(), "application/json")


def _requests(asker: Asker, path: str, name: str, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Of these records, as this server takes them; of numbers where there are none."""
    if not rows:
        return [body_of(asker, path, place / 7, name) for place in range(64)]
    bodies = (as_json(row) for row in rows)
    if name == "bentoml":
        bodies = (b'{"x": [' + body + b"]}" for body in bodies)
    return [asker.frame(path, body, "application/json") for body in bodies]


def numbers_bundle(folder: Path) -> Path:
    """A bundle of one column of numbers, for the columns that our side checks."""
    import dougong

    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"x": x / 50, "y": "high" if x > 50 else "low"}) + "\n" for x in range(100)))
        dougong.fit(rows, target="y", steps=5, out=folder / "run", quiet=True)
    return folder / "run" / "bundle"


class Closed(NamedTuple):
    """What callers that wait for their answers saw."""

    rate: float
    seconds: list[float]
    cpu_milliseconds: float


async def closed(
    found: Side, name: str, callers: int, seconds: float, rows: Sequence[Mapping[str, Any]] = ()
) -> Closed:
    asker = Asker(found.url, most=callers)
    requests = _requests(asker, found.path, name, rows)
    took, dice = list[float](), random.Random(0)  # noqa: S311, no secret
    until = monotonic() + 0.5  # to warm up

    async def caller() -> None:
        while monotonic() < until:
            started = monotonic()
            status, _ = await asker.ask(dice.choice(requests))
            if status == 200:
                took.append(monotonic() - started)

    await asyncio.gather(*(caller() for _ in range(callers)))
    took.clear()
    before, began = found.cpu_seconds(), monotonic()
    until = began + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    lasted = monotonic() - began
    cpu = found.cpu_seconds() - before
    asker.close()
    return Closed(len(took) / lasted, took, 1e3 * cpu / max(1, len(took)))


async def opened(
    found: Side,
    rate: float,
    seconds: float,
    slo: float,
    *,
    seed: int = 0,
    name: str = "ours",
    rows: Sequence[Mapping[str, Any]] = (),
) -> Any:
    asker = Asker(found.url, most=512)
    requests = _requests(asker, found.path, name, rows)
    try:
        await run_load(asker, requests, min(rate, 200.0), 1.0, slo, 99)  # to warm up
        return await run_load(asker, requests, rate, seconds, slo, seed)
    finally:
        asker.close()


def mixed_bundle(folder: Path) -> Path:
    """A bundle of pictures, text and a number, learnt in a few steps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import dougong

    dice = random.Random(0)  # noqa: S311, no secret
    rows = [
        {
            "photo": {"bytes": picture(24, 24, dice), "path": None},
            "remark": f"it is {x % 7} now",
            "weight": x / 9,
            "y": "ab"[x % 2],
        }
        for x in range(80)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    dougong.fit(folder / "rows.parquet", target="y", steps=5, out=folder / "mixed", quiet=True)
    return folder / "mixed" / "bundle"


def mixed_rows() -> list[dict[str, Any]]:
    """Records of which each modality is there more often than not."""
    dice = random.Random(1)  # noqa: S311, no secret
    rows: list[dict[str, Any]] = []
    for place in range(60):
        row = {"photo": picture(24, 24, dice), "remark": f"it is {place} now", "weight": place / 5}
        rows.append({name: value for name, value in row.items() if dice.random() < 0.7})
    return rows


def as_json(row: Mapping[str, Any]) -> bytes:
    plain = {key: base64.b64encode(v).decode() if isinstance(v, bytes) else v for key, v in row.items()}
    return json.dumps(plain).encode()


def as_form(row: Mapping[str, Any]) -> bytes:
    body = b""
    for name, value in row.items():
        content = value if isinstance(value, bytes) else str(value).encode()
        more = '; filename="a.png"' if isinstance(value, bytes) else ""
        body += f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--edge--\r\n"


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [pid]
    while ahead:
        found.append(ahead.pop())
        ahead += children.get(found[-1], [])
    return found


def _group(leader: int) -> list[int]:
    """Processes of the session that a side began, those included whose parents have gone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(entry.name))
    return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _share_bytes(pid: int) -> int:
    """A process's own memory, and its share of what it has together with those that it was forked from. Files that are
    mapped do not count: who else reads them has a share, and may end."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
