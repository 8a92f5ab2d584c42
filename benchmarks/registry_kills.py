"""Kills at random moments of register, promote, rollback and learn: what is broken or lost afterwards; 200 versions.

Here        the kills, what is checked after each, and the time to list and compare many versions (claim 11 of
            docs/claims.md).
Elsewhere   the registry (src/dougong/continual/registry/), tasks in a bundle (continual/tasks.py); harness.py.
Promise     each kill is SIGKILL to a process at work, at a moment drawn evenly; it had confirmed what it had done
            through a pipe, and all of that must be there afterwards.

Work        a process registers a bundle that has one task more, promotes it, rolls back, adds a task to a bundle (what
            learning ends with) and removes one, again and again. Learning itself writes into a run's folder, whose
            kills tests/engine/test_kill.py has.
Checked     every version reads and restores with its sums; every confirmed version is there; the aliases mean versions;
            the bundle is whole and has every confirmed task; the next process goes on without any repair.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from harness import run

from dougong.continual.registry.versions import CANDIDATE, PRODUCTION, Registry
from dougong.continual.tasks import add_part, base_sum, read_parts, remove_task, tasks_in
from dougong.core.bundle import read_bundle
from dougong.core.config import parse
from dougong.core.errors import DougongError
from dougong.core.figures import Figure
from dougong.core.signature import Target
from dougong.recipes.known import read_recipe
from dougong.recipes.run import run_recipe

KILLS: Final = 1000
VERSIONS: Final = 200
TURNS: Final = 2.0
"""Of the work, as long as one turn was measured to take here: a kill comes at any moment of them."""
NAME: Final = "kills"


def small_bundle(folder: Path) -> Path:
    run_recipe(read_recipe("xor", ["train.steps=2", "train.evaluate_every=2"]), folder / "run", quiet=True)
    return folder / "run" / "bundle"


def work(registry: Path, bundle: Path, said: int, number: int, turns: int = 1000) -> None:
    """What the killed process does, again and again; `said` is told what is done."""
    from dougong.continual.tasks import Task

    def tell(what: str) -> None:
        os.write(said, f"{what}\n".encode())

    kept = Registry(registry)
    base = base_sum(read_bundle(bundle))
    for turn in range(turns):
        name = f"task-{number}-{turn}"
        task = parse(
            Task,
            {
                "name": name,
                "base": base,
                "target": Target(name="y", task="single_label", labels=("a", "b")).model_dump(),
                "modalities": ("picture",),
                "rank": 1,
                "prompts": 0,
                "prompt_width": 1,
                "num_parameters": 1,
                "of_base": 0.0,
            },
            where="task",
        )
        add_part(bundle, task, {"x": torch.full((64,), float(number) + turn)}, None)
        tell(f"task {name}")
        tell(f"version {kept.register(bundle, NAME).tree}")
        with contextlib.suppress(DougongError):
            kept.promote(NAME, CANDIDATE)
        if turn % 2:
            with contextlib.suppress(DougongError):
                kept.rollback(NAME)
        if len(tasks_in(read_bundle(bundle))) > 4:
            gone = tasks_in(read_bundle(bundle))[0].split("/")[1]
            tell(f"removing {gone}")
            remove_task(bundle, gone)


def measure(quick: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    kills = 20 if quick else KILLS
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bundle = small_bundle(folder)
        registry = folder / "registry"
        child(lambda said: Registry(registry).register(bundle, NAME))  # also what MLflow needs is loaded once
        spent = []
        for number in (-3, -2, -1):
            started = time.perf_counter()
            child(lambda said, n=number: work(registry, bundle, said, n, turns=1))
            spent.append(time.perf_counter() - started)
        longest = TURNS * min(spent)
        broken, lost = 0, 0
        versions: set[str] = set()
        tasks: set[str] = set()
        removed: set[str] = set()
        for number in range(kills):
            seconds = float(random.uniform(0.0, longest))
            lines = child(lambda said, n=number: work(registry, bundle, said, n), seconds)
            for line in lines:
                what, _, value = line.partition(" ")
                {"version": versions, "task": tasks, "removing": removed}[what].add(value)
            problem = wrong(registry, bundle, folder, whole=number % 20 == 0)
            broken += problem is not None
            here = {version.tree for version in Registry(registry).versions(NAME)}
            there = {inner.split("/")[1] for inner in tasks_in(read_bundle(bundle))}
            missing = (versions - here) | (tasks - removed - there)
            lost += len(missing)
            if problem or missing:
                print(f"kill {number} after {seconds:.3f} s: {problem or sorted(missing)[:3]}", file=sys.stderr)
            if number % 50 == 49:
                print(f"{number + 1} of {kills} kills, {len(here)} versions", file=sys.stderr)
        yield Figure(
            name=f"{kills} kills: states that cannot be read", value=broken, unit="", asked="<= 0", seeds=kills
        )
        yield Figure(
            name=f"{kills} kills: confirmed versions and tasks that are lost", value=lost, unit="", asked="<= 0"
        )
        yield Figure(name="versions registered meanwhile", value=len(Registry(registry).versions(NAME)), unit="")
        many = folder / "many"
        child(lambda said: fill(many, bundle, 20 if quick else VERSIONS))
        started = time.perf_counter()
        fresh = Registry(many)
        found = fresh.versions(NAME)
        listed = time.perf_counter() - started
        started = time.perf_counter()
        fresh.diff(NAME, found[0].number, found[-1].number)
        yield Figure(name=f"list {len(found)} versions", value=listed, unit="s", asked="<= 1")
        yield Figure(name="diff of two of them", value=time.perf_counter() - started, unit="s", asked="<= 1")
        ratio = fresh.store.num_bytes() / found[0].about.num_bytes
        yield Figure(name=f"bytes of {len(found)} versions of one base, beside one bundle's", value=ratio, unit="x")


def fill(folder: Path, bundle: Path, count: int) -> None:
    own = folder.with_name("filled")
    shutil.copytree(bundle, own)
    registry = Registry(folder)
    task = read_parts(own, read_bundle(own))
    for number in range(count):
        if task:
            add_part(own, task[0].task.model_copy(update={"name": f"more-{number}"}), task[0].weights, None)
        registry.register(own, NAME, note=f"number {number}")
        if task and number % 5 == 4:
            remove_task(own, f"more-{number - 1}")


def child(work_: object, seconds: float | None = None) -> list[str]:
    """Carry it out in a process of its own, killed after so many seconds; the lines it confirmed.

    A fork: to start MLflow anew for each kill would take an hour.
    """
    read, write = os.pipe()
    started = os.fork()
    if started == 0:
        os.close(read)
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            assert callable(work_)
            work_(write)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(started, signal.SIGKILL)
    _, status = os.waitpid(started, 0)
    content = b""
    while piece := os.read(read, 65536):
        content += piece
    os.close(read)
    if seconds is None and status:
        raise RuntimeError(f"a process that was not killed ended with {status}")
    whole = content.decode().split("\n")
    return whole[:-1]


def wrong(registry: Path, bundle: Path, folder: Path, *, whole: bool) -> str | None:
    """What cannot be read; with `whole`, every version is restored, else the newest."""
    try:
        kept = Registry(registry)
        versions = kept.versions(NAME)
        for version in versions if whole else versions[-1:]:
            out = folder / "restored"
            kept.restore(NAME, version.number, out)
            read_bundle(out)
            shutil.rmtree(out)
        now = kept.production(NAME)
        history = kept.history(NAME)
        moved = [move.after for move in history if move.alias == PRODUCTION]
        if moved and (now is None or now.number != moved[-1]):
            return f"production is {now and now.number}, and the last move was to {moved[-1]}"
        read_parts(bundle, read_bundle(bundle))
    except DougongError as error:
        return str(error)
    return None


if __name__ == "__main__":
    run("registry_kills", "A registry and a taught bundle under kills, and 200 versions of one base.", measure)
