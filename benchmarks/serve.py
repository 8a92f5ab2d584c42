"""Serving: batches by the load against fixed waits and other servers, and what a server must survive.

The parts (all but `policy` start servers on this machine's loopback, which should have nothing else to do):

policy      in simulated time, so the same everywhere: load x model, ours against fixed waits of 0, 2 and 5 ms; a step
            in the load against an oracle that knows all arrivals; twice as much as can be served
throughput  32 callers that wait for their answers, a simulated device (4 ms and 0.1 ms a record) and a perceptron on
            one core: ours, with validation, metrics, limits and deadlines, against the least that batches (uvicorn and
            thirty lines), against no batching, and against peers where PEERS names a Python that has them (litserve,
            bentoml, ray[serve], mosec; from PyPI, and for bundles what Dougong needs with its extra `compress`);
            requests a second, quantiles, milliseconds of processor a request, processor when idle
bundle      the same with trained bundles: one of pictures, text and a number, requests with some of them, and the int8
            graphs of easy-VQA's student, pictures and questions; the others around `model.predict`
compressed  a teacher of easy-VQA and what it was compressed to, over HTTP (serve_compressed.py)
latency     arrivals by chance: p50 at a fifth of what can be served without batching, beside no batching; p99 at four
            fifths of what the best peer (without peers: the least that batches) can serve, beside each that can; of the
            models and the bundles (these three parts are in serve_beside.py)
cells       load x model over HTTP: ours against its own fixed waits
step        50 to 500 requests a second and back, against an oracle that knew all arrivals; twice as much as can be
            served, and how soon the rest is refused
swap        versions of a trained bundle swapped, a worker killed (SIGKILL) and the server ended (SIGTERM), under load
attack      thousands of connections that say nothing, heads and bodies that never end, sockets half closed, pictures
            that claim to be huge or swell when unpacked: what they cost everybody else
leak        many mixed and partly malformed requests, as JSON and as forms: memory, and every answer against offline
            prediction; on a quiet machine it takes ten minutes

Medians of interleaved runs; the interval is the lowest and the highest. A wait or a peer is the baseline where its name
stands in the figure's. Without --quick, a part that was measured of these sources is taken from then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Kept, run
from parts import once
from serve_asking import (
    Side,
    as_form,
    as_json,
    body_of,
    closed,
    mixed_bundle,
    mixed_rows,
    numbers_bundle,
    opened,
    side,
    spread,
)
from serve_beside import bundles, latency, throughput

from dougong.core.config import parse
from dougong.core.figures import Figure
from dougong.serve.batcher import Batcher, BatcherConfig
from dougong.serve.engine import Engine
from dougong.serve.event_loop import run_fast
from dougong.serve.loadtest import Asker, run_load
from dougong.serve.rehearsal import Load, Service, closed_load, feasible, open_load, rehearse

PARTS = ("policy", "throughput", "bundle", "compressed", "latency", "cells", "step", "swap", "attack", "leak")
WAITS = (0.0, 0.002, 0.005)
MODELS: Mapping[str, tuple[float, float]] = {"device": (0.004, 0.0001), "perceptron": (0.0003, 0.00055)}
"""Seconds of a batch, and of each record: what the simulated cells take the models to be."""

TOO_MUCH = ((0.002, 0.001, 0.06, 25), (0.004, 0.0001, 0.05, 32), (0.02, 0.002, 0.25, 32), (0.0003, 0.00055, 0.05, 32))
"""Seconds of a batch and of a record, the objective, and the largest batch that can be waited for twice within it."""


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    known: dict[str, Callable[[bool], Iterator[Figure]]] = {
        "policy": _policy,
        "throughput": throughput,
        "bundle": bundles,
        "compressed": _compressed,
        "latency": latency,
        "cells": _cells,
        "step": _step,
        "swap": _swap,
        "attack": _attack,
        "leak": _leak,
    }
    kept = Kept("serve")
    for part in parts:
        print(f"{part} ...", file=sys.stderr)
        make = functools.partial(known[part], quick)
        yield from make() if quick else once(kept, f"{part} beside {os.environ.get('PEERS', 'no peers')}", make)


def _policy(quick: bool) -> Iterator[Figure]:
    requests, seconds = (500, 0.6) if quick else (6000, 6.0)
    worst_mean = worst_tail = worst_rate = 0.0
    for model, (fixed, item) in MODELS.items():
        most = 32 / (fixed + 32 * item)
        for share in (0.05, 0.2, 0.5, 0.8, 0.95):
            load = open_load([(requests / (share * most), share * most)], seed=3)
            ours, *waits = (_rehearsed(model, load, wait) for wait in (None, *WAITS))
            best = min(each.mean for each in waits)
            worst_mean = max(worst_mean, ours.mean / best)
            worst_tail = max(worst_tail, ours.quantile(0.99) / min(each.quantile(0.99) for each in waits))
            name = f"{model}, {share:.0%} of capacity: mean, simulated"
            yield Figure(name=name, value=1e3 * ours.mean, unit="ms", baseline=1e3 * best, seeds=1)
        for callers, think in ((1, (0.001, 0.002)), (8, (0.0005, 0.002)), (32, (0.0005, 0.002)), (32, (0.002, 0.004))):
            found = []
            for wait in (None, *WAITS):
                one = _rehearsed(model, closed_load(callers, seconds=seconds, think=think, seed=3), wait)
                found.append(len(one.seconds) / one.left_at)
            worst_rate = max(worst_rate, max(found[1:]) / found[0])
            name = f"{model}, {callers} callers back in {1e3 * think[0]:g}-{1e3 * think[1]:g} ms: simulated"
            yield Figure(name=name, value=found[0], unit="1/s", baseline=max(found[1:]), seeds=1)
    yield Figure(name="mean, of the best fixed wait, worst cell", value=worst_mean, unit="x", asked="<= 1.03")
    yield Figure(name="p99, of the best fixed wait, worst cell", value=worst_tail, unit="x", asked="<= 1.06")
    yield Figure(name="best fixed wait's rate, of ours, worst cell", value=worst_rate, unit="x", asked="<= 1.03")
    yield from _against_the_oracle(quick)


def _against_the_oracle(quick: bool) -> Iterator[Figure]:
    fixed, item, slo = 0.006, 0.001, 0.05
    times = (0.5, 1.2, 0.5) if quick else (3.0, 5.0, 3.0)
    attained, after_step = [], []
    for seed in range(1 if quick else 5):
        load = open_load(list(zip(times, (50.0, 500.0, 50.0), strict=True)), seed=seed)
        config = parse(BatcherConfig, {"slo_seconds": slo, "max_batch": 32}, where="benchmark")
        found = rehearse(Batcher(config), load, _affine(fixed, item), noise=0.05, seed=seed)
        best = feasible([each[0] for each in load.arrivals], lambda n: fixed + item * n, slo=slo, max_batch=24)
        attained.append((len(found.seconds) - found.late) / best)
        late = [at - times[0] for at, took in zip(found.answered_at, found.seconds, strict=True) if took > slo]
        after_step.append(max([each for each in late if each > 0], default=0.0))
    yield spread("in time under a step, of the oracle, simulated", attained, "x", asked=">= 0.99")
    yield spread("last late answer after the step, simulated", after_step, "s", asked="<= 2")
    for fixed, item, slo, largest in TOO_MUCH:
        goodput = []
        for seed in range(1 if quick else 5):
            config = parse(BatcherConfig, {"slo_seconds": slo, "max_batch": largest}, where="benchmark")
            most = largest / (fixed + item * largest)
            seconds = 2.0 if quick else 10.0
            load = open_load([(seconds, 2 * most)], seed=seed)
            found = rehearse(Batcher(config), load, _affine(fixed, item), noise=0.05, seed=seed)
            goodput.append((len(found.seconds) - found.late) / seconds / most)
        name = f"{1e3 * fixed:g} + {1e3 * item:g} n ms within {1e3 * slo:g}: good answers at twice the capacity, of it"
        yield spread(f"{name}, simulated", goodput, "x", asked=">= 0.95")


def _affine(fixed: float, item: float) -> Service:
    return lambda counts: fixed + item * sum(counts.values())


def _rehearsed(model: str, load: Load, wait: float | None) -> Any:
    values = {"slo_seconds": 0.1, "timeout_seconds": 5.0, "max_batch": 32, "refuse_late": False}
    config = parse(BatcherConfig, {**values, "fixed_wait_seconds": wait}, where="benchmark")
    return rehearse(Batcher(config), load, _affine(*MODELS[model]), noise=0.05, seed=1)


def _compressed(quick: bool) -> Iterator[Figure]:
    from serve_compressed import compressed  # trains, where that was not done before

    yield from compressed(quick)


def _cells(quick: bool) -> Iterator[Figure]:
    repeats, seconds = (1, 1.5) if quick else (3, 10.0)
    shares = (0.2,) if quick else (0.05, 0.2, 0.5, 0.8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = str(numbers_bundle(folder))
        for model in ("device",) if quick else tuple(MODELS):
            fixed, item = MODELS[model]
            most = min(2000.0, 32 / (fixed + 32 * item))
            for share in shares:
                found: dict[float | None, list[Any]] = {}
                for repeat in range(repeats):
                    for wait in (None, *WAITS):
                        more = [bundle, "" if wait is None else str(wait)]
                        with side("ours", model, *more, folder=folder) as started:
                            found.setdefault(wait, []).append(
                                run_fast(opened(started, share * most, seconds, 1.0, seed=repeat))
                            )
                for key in ("0.5", "0.99"):
                    ours = [1e3 * each.quantiles[key] for each in found[None]]
                    best = min(statistics.median(1e3 * each.quantiles[key] for each in found[wait]) for wait in WAITS)
                    name_of = f"{model}, {share:.0%} of capacity: p{100 * float(key):g}, best fixed wait beside it"
                    yield spread(name_of, ours, "ms", baseline=best, asked=f"<= {1.1 * best:.4g}")


def _step(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = str(numbers_bundle(folder))
        slo, seconds = 0.05, 1.5 if quick else 8.0
        shares, lasts = [], []
        for seed in range(1 if quick else 3):
            with side("ours", "device", bundle, "", str(slo), folder=folder) as started:
                share, last = run_fast(_stepped(started, slo, 0.7 if quick else 3.0, seed))
            shares.append(share)
            lasts.append(last)
        asked = "device, 50-500-50 a second: in time, of the oracle"
        yield spread(asked, shares, "x", asked=">= 0.99")
        yield spread("device, last late answer after a step up", lasts, "s", asked="<= 2")
        # A model that is slow enough that one core can ask for twice as much.
        goods, refusals, behind = [], [], []
        for seed in range(1 if quick else 3):
            with side("ours", "large-device", bundle, "", "0.25", folder=folder) as started:
                most = run_fast(closed(started, "ours", 64, seconds)).rate
                found = run_fast(opened(started, 2 * most, seconds, 0.25, seed=seed))
            goods.append(found.good_per_second / most)
            refusals.append(1e3 * (found.refused_quantile or 0.0))
            behind.append(1e3 * found.behind_quantile)
        yield spread("large device, twice too much: good", goods, "x of capacity", asked=">= 0.95")
        yield spread("large device, twice too much: p99 to a refusal", refusals, "ms", asked="<= 10")
        yield spread("large device, twice too much: p99 of what the asker is late itself", behind, "ms")


async def _stepped(found: Side, slo: float, seconds: float, seed: int) -> tuple[float, float]:
    """What share was answered in time, of what an oracle could; when after the step the last late one was due."""
    asker = Asker(found.url, most=512)
    requests = [body_of(asker, found.path, place / 7, "ours") for place in range(64)]
    due, late, good, start = list[float](), [0.0], 0, 0.0

    def note(at: float, took: float, status: int) -> None:
        nonlocal good
        due.append(start + at)
        if status == 200 and took <= slo:
            good += 1
        elif start:
            late.append(start + at - seconds)

    try:
        await run_load(asker, requests, 50.0, 1.0, slo, 99)  # to warm up
        for phase, rate in enumerate((50.0, 500.0, 50.0)):
            start = phase * seconds
            await run_load(asker, requests, rate, seconds, slo, 3 * seed + phase, timed=note)
    finally:
        asker.close()
    fixed, item = MODELS["device"]
    best = feasible(sorted(due), lambda number: fixed + item * number, slo=slo, max_batch=32)
    return good / best, max(late)


def _swap(quick: bool) -> Iterator[Figure]:
    from dougong.serve.models import Wanted
    from dougong.serve.server import Running
    from dougong.serve.settings import ServeConfig

    seconds = 6.0 if quick else 40.0
    swaps = 1 if quick else 5

    async def under_load(bundle: Path) -> tuple[list[tuple[int, bytes]], float, list[tuple[int, bytes]]]:
        config = parse(
            ServeConfig, {"port": 0, "batching": {"slo_seconds": 1.0}, "log_requests": False}, where="benchmark"
        )
        seen: list[tuple[int, bytes]] = []
        async with Running.start(config, [Wanted("model", "1", bundle)]) as running:
            asker = Asker(running.url, most=64)
            requests = [asker.frame("/v1/predict", as_json(row), "application/json") for row in mixed_rows()]
            load = asyncio.create_task(
                run_load(
                    asker, requests, 100.0, seconds, 1.0, 0, seen=lambda _, status, body: seen.append((status, body))
                )
            )
            for number in range(2, 2 + swaps):
                await asyncio.sleep(0.5)
                await running.models.load(Wanted("model", str(number), bundle))
            await load
            swapped = list(seen)
            seen.clear()
            load = asyncio.create_task(
                run_load(asker, requests, 100.0, 4.0, 1.0, 1, seen=lambda _, status, body: seen.append((status, body)))
            )
            await asyncio.sleep(0.5)
            (version,) = running.models.all
            while not version.engine.pids:
                await asyncio.sleep(0.001)
            killed = time.monotonic()
            os.kill(version.engine.pids[0], signal.SIGKILL)
            back = await _back(version.engine, killed)
            await load
            asker.close()
            return swapped, back, list(seen)

    with tempfile.TemporaryDirectory() as name:
        bundle = mixed_bundle(Path(name))
        swapped, back, after = run_fast(under_load(bundle))
        with side("ours", "bundle", str(bundle), "", "1.0", folder=Path(name)) as started:
            sent, lost, status = run_fast(_ended(started))
    failed = sum(status != 200 for status, _ in swapped)
    yield Figure(name=f"{swaps} swaps under 100 a second: failed", value=failed, unit="requests", asked="<= 0")
    versions = {json.loads(body)["version"] for status, body in swapped if status == 200}
    yield Figure(name="versions that answered", value=len(versions), unit="versions")
    yield Figure(name="worker killed: back", value=back, unit="s", asked="<= 5")
    yield Figure(name=f"SIGTERM under 100 a second: lost of {sent}", value=lost, unit="requests", asked="<= 0")
    yield Figure(name="SIGTERM: exit status", value=status, unit="", asked="<= 0")
    odd = sum(status not in (200, 429, 503) for status, _ in after)
    yield Figure(name="worker killed: other than answered, 429 or 503", value=odd, unit="requests", asked="<= 0")


async def _ended(found: Side) -> tuple[int, int, int]:
    """Requests sent, requests lost, exit status: SIGTERM in the middle, and callers that go on until the server says
    that it is no longer ready, as a balancer in front of it would."""
    asker, loop = Asker(found.url, most=64), asyncio.get_running_loop()
    requests = [asker.frame("/v1/predict", as_json(row), "application/json") for row in mixed_rows()]
    told = False

    async def end() -> None:
        nonlocal told
        await asyncio.sleep(1.0)
        found.process.send_signal(signal.SIGTERM)
        while (await asker.get("/v2/health/ready"))[0] == 200:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)  # a balancer is not at once either
        told = True

    ending = asyncio.create_task(end())
    try:
        result = await run_load(asker, requests, 100.0, 20.0, 1.0, 5, ended=lambda: told)
        await ending
    finally:
        asker.close()
    status = await loop.run_in_executor(None, found.process.wait, 40)
    return result.sent, result.sent - result.answered, status


async def _back(engine: Engine, killed: float) -> float:
    """Seconds from a kill until a worker is warm again."""
    for wanted in (False, True):
        while engine.ready is not wanted:
            await asyncio.sleep(0.002)
    return time.monotonic() - killed


def _attack(quick: bool) -> Iterator[Figure]:
    idle, seconds = (300, 2.0) if quick else (10_000, 20.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = str(mixed_bundle(folder))
        with side("ours", "bundle", bundle, "", "1.0", folder=folder) as started:
            calm = run_fast(opened(started, 50.0, seconds, 1.0, rows=mixed_rows()))
            before, under, refused = run_fast(_attacked(started, idle, seconds))
            alive = started.process.poll() is None
    ratio = under.quantiles["0.99"] / calm.quantiles["0.99"]
    yield Figure(
        name=f"p99 beside {before} hostile connections and bombs", value=ratio, unit="x of before", asked="<= 2"
    )
    failed = under.sent - under.answered
    yield Figure(name="others' requests that failed meanwhile", value=failed, unit="requests", asked="<= 0")
    odd = sum(number for status, number in refused.items() if status not in ("413", "415", "422", "429"))
    yield Figure(name=f"bombs of {sum(refused.values())} not refused as such", value=odd, unit="requests", asked="<= 0")
    yield Figure(name="server still up", value=float(alive), unit="", asked=">= 1")


async def _attacked(found: Side, idle: int, seconds: float) -> tuple[int, Any, dict[str, int]]:
    """Connections that were held, what others saw meanwhile, and what became of the bombs. The attacker is a process of
    its own: callers that share its event loop would be charged for its work."""
    attacker = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("serve_attacker.py")),
        *(found.url, str(idle), str(seconds + 5)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert attacker.stdout is not None
    try:
        held = int(await attacker.stdout.readline())
        result = await opened(found, 50.0, seconds, 1.0, seed=1, rows=mixed_rows())
        statuses: dict[str, int] = json.loads(await attacker.stdout.readline())
        return held, result, statuses
    finally:
        with contextlib.suppress(ProcessLookupError):
            attacker.kill()
        await attacker.wait()


def _leak(quick: bool) -> Iterator[Figure]:
    number, rate = (600, 200.0) if quick else (300_000, 500.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = mixed_bundle(folder)
        with side("ours", "bundle", str(bundle), "", "1.0", folder=folder) as started:
            wrong, statuses, memory = run_fast(_mixed(started, bundle, number, rate))
    yield Figure(name=f"{number} mixed requests: wrong answers", value=wrong, unit="answers", asked="<= 0")
    broken = sum(count for status, count in statuses.items() if status[0] == "5" or not status.isdigit())
    yield Figure(name=f"{number} mixed requests: 5xx or broken", value=broken, unit="requests", asked="<= 0")
    asked = {} if quick else {"asked": "<= 0.05"}
    tenth, half, end = memory
    yield Figure(name="memory after a tenth of them", value=tenth / 2**20, unit="MiB")
    yield Figure(name="memory grown since a tenth of them", value=end / tenth - 1, unit="x", **asked)
    yield Figure(name="memory grown since half of them", value=(end - half) / 2**20, unit="MiB")


async def _mixed(found: Side, bundle: Path, number: int, rate: float) -> tuple[int, dict[str, int], list[int]]:
    """Wrong answers, how many answers had each status, memory after a tenth, after half and in the end."""
    import dougong

    rows = mixed_rows()
    cells = [{key: {"bytes": v, "path": None} if isinstance(v, bytes) else v for key, v in row.items()} for row in rows]
    model = await asyncio.get_running_loop().run_in_executor(None, dougong.load, bundle)
    expected = [each.answer for each in model.predict(cells)]
    asker = Asker(found.url, most=128)
    requests = [asker.frame("/v1/predict", as_json(row), "application/json") for row in rows]
    requests += [asker.frame("/v1/predict", as_form(row), "multipart/form-data; boundary=edge") for row in rows]
    expected += expected
    malformed = (
        b"{",
        b"[]",
        b'{"photo": "%%"}',
        b'{"photo": "aGVsbG8="}',
        b'{"smell": 1}',
        b'{"weight": "x"}',
        b"\xff",
    )
    requests += [asker.frame("/v1/predict", body, "application/json") for body in malformed]
    wrong = 0

    def look(place: int, status: int, body: bytes) -> None:
        nonlocal wrong
        if place < len(expected):
            wrong += status == 200 and json.loads(body)["answer"] != expected[place]
        else:
            wrong += status == 200

    memory: list[int] = []
    statuses: dict[str, int] = {}
    try:
        for seed, share in enumerate((0.1, 0.4, 0.5)):
            part = await run_load(asker, requests, rate, share * number / rate, 1.0, seed, seen=look)
            memory.append(found.memory_bytes())
            for status, count in part.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
    finally:
        asker.close()
    return wrong, statuses, memory


if __name__ == "__main__":
    run("serve", "Serving: by the load, against fixed waits and other servers", measure, parts=PARTS)
