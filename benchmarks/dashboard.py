"""How long the dashboard takes to answer about a long run of a large network, and how much memory it holds meanwhile.

Here        a run of 100,000 steps and 500 blocks as its events would lie there (made up: figures are random), measured
            from within every 100 steps, which grows while it is looked at; `dougong watch` in a process of its own,
            asked as its page asks.
Elsewhere   the server (watch/dashboard.py), reading runs (watch/runs.py); options and the written result (harness.py).
Promise     times are those of whole requests, seen from another process; the first opening of the run, which reads the
            file once, is told beside. Memory is the server's highest resident size since it began.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from harness import run

from dougong.core.errors import RunError
from dougong.core.figures import Figure

STEPS: Final = 100_000
BLOCKS: Final = 500
EVERY: Final = 100
ROUNDS: Final = 60
LIVE_SECONDS: Final = 0.05
"""Between two steps of the run while it is looked at."""

START_SECONDS: Final = 300.0
LAYERS: Final = (("attention", "Linear"), ("norm", "LayerNorm"), ("wide", "Linear"), ("narrow", "Linear"))
PATHS: Final = {
    "the page": "/",
    "the list of runs": "/api/runs",
    "the curves": "/api/curves?run=long",
    "what goes on inside": "/view?run=long",
}


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long" / "events.jsonl"
        steps, blocks = (10_000, 50) if quick else (STEPS, BLOCKS)
        flow = _write(path, steps, blocks)
        yield Figure(name="the run's events", value=path.stat().st_size / 2**20, unit="MiB")
        port = _free_port()
        command = [sys.executable, "-m", "dougong", "watch", folder, "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603
        ended = threading.Event()
        grower = threading.Thread(target=_grow, args=(path, steps, flow, ended), daemon=True)
        try:
            _wait_for(server, port)
            first = {what: _ask(port, asked) for what, asked in PATHS.items()}
            grower.start()
            seconds: dict[str, list[float]] = {what: [] for what in PATHS}
            for _ in range(10 if quick else ROUNDS):
                for what, asked in PATHS.items():
                    seconds[what].append(_ask(port, asked))
            peak = _peak(server.pid)
        finally:
            ended.set()
            server.terminate()
            server.wait(30)
    for what, took in seconds.items():
        middle, high = np.quantile(took, (0.5, 0.95))
        name = f"{what}: 95 of 100 answers within"
        yield Figure(
            name=name, value=1000 * float(high), unit="ms", asked="<= 100", low=1000 * float(middle),
            high=1000 * max(took), seeds=len(took),
        )  # fmt: skip
    yield Figure(name="opening the run for the first time", value=sum(first.values()), unit="s")
    yield Figure(name="memory of the server, at most", value=peak / 1e6, unit="MB", asked="<= 300")


def _write(path: Path, steps: int, blocks: int) -> str:
    """The file; and one measurement as text, with STEP where its step belongs."""
    path.parent.mkdir(parents=True)
    random = np.random.default_rng(0)
    flow = json.dumps(_flow(blocks, random))
    losses = 4.0 * np.exp(-np.arange(steps) / (steps / 5)) + 0.1 * random.random(steps)
    with path.open("w", encoding="utf-8") as file:
        file.write(
            json.dumps({"kind": "RunStarted", "step": 0, "time": 0.0, "total_steps": 2 * steps, "precision": "fp32",
                        "num_parameters": 10**9, "resumed": False}) + "\n"
        )  # fmt: skip
        for step in range(1, steps + 1):
            file.write(_step(step, float(losses[step - 1])))
            if step % EVERY == 0:
                file.write(flow.replace('"STEP"', str(step)) + "\n")
            if step % (steps // 20) == 0:
                file.write(
                    json.dumps({"kind": "Evaluated", "step": step, "time": float(step), "split": "validation",
                                "condition": "all", "metrics": {"accuracy": step / steps}, "num_records": 9,
                                "seconds": 1.0}) + "\n"
                )  # fmt: skip
    return flow


def _step(step: int, loss: float) -> str:
    return (
        f'{{"kind": "StepDone", "step": {step}, "time": {float(step)}, "loss": {loss}, "grad_norm": 1.0, '
        f'"learning_rate": 0.001, "num_records": 32, "epoch": 0, "seconds": 0.1, "wait_seconds": 0.0}}\n'
    )


def _flow(blocks: int, random: np.random.Generator) -> dict[str, object]:
    places, activations, attention = [], {}, []
    for block in range(blocks):
        modality = ("image", "text", "")[min(2, 3 * block // blocks)]
        attention.append({"place": f"blocks.{block}.attention", "entropy": float(random.random()), "scale_ratio": 1.0,
                          "holders": [], "num_keys": 64, "num_queries": 64, "has_mask": True})  # fmt: skip
        for layer, kind in LAYERS:
            name = f"blocks.{block}.{layer}"
            activations[name] = {"spread": 1.0, "largest": 4.0 + float(random.random())}
            places.append(
                {"name": name, "modality": modality, "kind": kind, "count": 4096, "weight": 10.0,
                 "gradient": 0.1 * float(random.random()), "update": 0.01 * float(random.random()), "spread": 0.1,
                 "dims": 2, "fan_in": 64, "bits": 32, "trained": True, "held": True, "without_gradient": 0}
            )  # fmt: skip
    return {
        "kind": "FlowMeasured", "step": "STEP", "time": 0.0, "places": places[:: max(1, len(places) // 400)],
        "activations": activations, "attention": attention, "inputs": {}, "output": {"classes": 10.0},
        "targets": {}, "gate": {"mean image": 0.4, "mean text": 0.6, "saturated": 0.0, "spread": 0.1},
        "loss_terms": [], "dropout": {}, "optimizer": {"lr": 0.001, "beta1": 0.9}, "probes": {},
        "conflicts": [
            {"of": "objectives", "one": one, "other": other, "cosine": float(random.normal()) / 3,
             "one_norm": 1.0, "other_norm": 2.0}
            for one, other in (("decision", "alignment"), ("decision", "gate"), ("alignment", "gate"))
        ],
        "exponents": {
            what: {
                side: {"lowest": -30, "counts": random.integers(1, 1000, 40).tolist(), "zeros": 9, "not_finite": 0}
                for side in ("image", "text", "shared")
            }
            for what in ("activations", "weights", "gradients")
        },
        "first_not_finite": None, "facts": {"gradient_norm": 1.0, "loss": 1.0}, "seconds": 0.1,
    }  # fmt: skip


def _grow(path: Path, step: int, flow: str, ended: threading.Event) -> None:
    """The run goes on."""
    with path.open("a", encoding="utf-8", buffering=1) as file:
        while not ended.wait(LIVE_SECONDS):
            step += 1
            file.write(_step(step, 0.1))
            if step % 20 == 0:  # more often than in a run, so that all rounds see some
                file.write(flow.replace('"STEP"', str(step)) + "\n")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            told = server.stderr.read().decode(errors="replace").strip() if server.stderr else ""
            raise RunError(f"dougong watch ended with {server.returncode}: {told.splitlines()[-1:]}")
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RunError(f"dougong watch did not answer within {START_SECONDS:.0f} s. Try again on a machine at rest.")


def _ask(port: int, path: str, clock: Callable[[], float] = time.perf_counter) -> float:
    asking = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = clock()
    asking.request("GET", path)
    answer = asking.getresponse()
    answer.read()
    took = clock() - started
    asking.close()
    if answer.status != 200:
        raise RunError(f"{path} was answered with {answer.status}.")
    return took


def _peak(pid: int) -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"the kernel does not tell the memory of process {pid}. Use Linux.")


if __name__ == "__main__":
    run("dashboard", "How fast and small the dashboard of a long run of a large network is.", measure)
