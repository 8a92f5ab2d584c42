"""Kills at random moments of register, promote, rollback and learn: what is broken or lost afterwards; 200 versions.

Here        800 kills of what changes a registry or a bundle, 200 of learning itself, what is checked after each, and
            the time to list and compare many versions (claim 11 of docs/claims.md).
Elsewhere   the registry (src/dougong/continual/registry/), tasks in a bundle (continual/tasks.py); harness.py.
Promise     each kill is SIGKILL to a process at work, at a moment drawn evenly; it had confirmed what it had done
            through a pipe, and all of that must be there afterwards.

registry    a process registers a bundle that has one task more, promotes it, rolls back, adds a task to a bundle (what
            learning ends with) and removes one, again and again. Checked: every version reads and restores with its
            sums; every confirmed version is there; the aliases mean versions; the bundle is whole and has every
            confirmed task; the next process goes on without any repair.
learn       a process learns a task from records, from loading the bundle to its new manifest, and is killed; the next
            one goes on with `--resume`, until the task is there; then it is removed, and all begins again. Checked
            after each kill: the bundle reads, and answers its own records as ever; in the end that each task is, to
            the byte, the one that learning without a kill has led to.
many        200 versions of one base: listed and compared, by the registry and as a command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from harness import run

from dougong.bundle.model import load
from dougong.continual.learn import LearnConfig, learn
from dougong.continual.registry.versions import CANDIDATE, PRODUCTION, Registry
from dougong.continual.tasks import Task, add_part, base_sum, read_parts, remove_task, tasks_in
from dougong.core.bundle import read_bundle
from dougong.core.config import override, parse
from dougong.core.errors import DougongError
from dougong.core.figures import Figure
from dougong.core.signature import Target
from dougong.data.table import table_of_rows
from dougong.recipes.known import read_recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.tables import open_tables

KILLS: Final = 800
LEARNING_KILLS: Final = 200
VERSIONS: Final = 200
MEASURED_EVERY: Final = 10
MOST_TASKS: Final = 4
TURNS: Final = 2.0
"""Of the work, as long as one turn was measured to take here: a kill comes at any moment of them."""
NAME: Final = "kills"
TAUGHT: Final = "parity"


def small_bundle(folder: Path) -> Path:
    recipe = read_recipe("xor", ["train.steps=2", "train.evaluate_every=2"])
    child(lambda said: run_recipe(recipe, folder / "run", quiet=True))
    return folder / "run" / "bundle"


def made_up(name: str, base: str) -> Task:
    """A task that nobody learnt: as files it is like any other."""
    target = Target(name="y", task="single_label", labels=("a", "b"))
    return Task(
        name=name,
        base=base,
        target=target,
        modalities=("image",),
        rank=1,
        prompts=0,
        prompt_width=1,
        num_parameters=1,
        of_base=0.0,
    )


def work(registry: Path, bundle: Path, said: int, number: int, turns: int = 1000) -> None:
    """What the killed process does, again and again; `said` is told what is done."""

    def tell(what: str) -> None:
        os.write(said, f"{what}\n".encode())

    kept = Registry(registry)
    base = base_sum(read_bundle(bundle))
    for turn in range(turns):
        name = f"task-{number}-{turn}"
        task = made_up(name, base)
        add_part(bundle, task, {"x": torch.full((64,), float(number) + turn)}, None)
        tell(f"task {name}")
        tell(f"version {kept.register(bundle, NAME).tree}")
        with contextlib.suppress(DougongError):
            kept.promote(NAME, CANDIDATE)
        if turn % 2:
            with contextlib.suppress(DougongError):
                kept.rollback(NAME)
        if len(tasks_in(read_bundle(bundle))) > MOST_TASKS:
            gone = tasks_in(read_bundle(bundle))[0].split("/")[1]
            tell(f"removing {gone}")
            remove_task(bundle, gone)


def measure_registry(quick: bool) -> Iterator[Figure]:
    kills = 10 if quick else KILLS
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bundle = small_bundle(folder)
        registry = folder / "registry"
        # MLflow takes seconds to load: here once for all that are forked, or most kills would come before any work.
        Registry(folder / "another").register(bundle, NAME)
        child(lambda said: Registry(registry).register(bundle, NAME))
        longest = 0.0
        broken, lost, late = 0, 0, 0
        versions: set[str] = set()
        tasks: set[str] = set()
        removed: set[str] = set()
        for number in range(kills):
            if number % MEASURED_EVERY == 0:  # a registry that grows, and a machine that is busy, take longer
                started = time.perf_counter()
                child(lambda said, n=number: work(registry, bundle, said, -1 - n, turns=1))
                longest = TURNS * (time.perf_counter() - started)
            seconds = float(random.uniform(0.0, longest))
            lines = child(lambda said, n=number: work(registry, bundle, said, n), seconds)
            late += any(line.startswith("version") for line in lines)
            for line in lines:
                what, _, value = line.partition(" ")
                {"version": versions, "task": tasks, "removing": removed}[what].add(value)
            problem = wrong(registry, bundle, folder, whole=number % 50 == 49)
            broken += problem is not None
            here = {version.tree for version in Registry(registry).versions(NAME)}
            there = {inner.split("/")[1] for inner in tasks_in(read_bundle(bundle))}
            missing = (versions - here) | (tasks - removed - there)
            lost += len(missing)
            if problem or missing:
                print(f"kill {number} after {seconds:.3f} s: {problem or sorted(missing)[:3]}", file=sys.stderr)
            if number % 50 == 49:
                print(f"{number + 1} of {kills} kills, {len(here)} versions", file=sys.stderr)
            # Who was killed has seldom removed what he added: without this the bundle would grow, and turns with it.
            for gone in sorted(there)[: max(0, len(there) - MOST_TASKS)]:
                removed.add(gone)
                remove_task(bundle, gone)
        yield Figure(
            name=f"{kills} kills: states that cannot be read", value=broken, unit="", asked="<= 0", seeds=kills
        )
        yield Figure(
            name=f"{kills} kills: confirmed versions and tasks that are lost", value=lost, unit="", asked="<= 0"
        )
        yield Figure(name="kills that came after a version was confirmed", value=late, unit="", seeds=kills)
        yield Figure(name="versions registered meanwhile", value=len(Registry(registry).versions(NAME)), unit="")


def measure_many(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bundle = small_bundle(folder)
        many = folder / "many"
        child(lambda said: fill(many, bundle, 20 if quick else VERSIONS))
        started = time.perf_counter()
        fresh = Registry(many)
        found = fresh.versions(NAME)
        assert len(found) == (20 if quick else VERSIONS)
        listed = time.perf_counter() - started
        started = time.perf_counter()
        fresh.diff(NAME, found[0].number, found[-1].number)
        yield Figure(name=f"list {len(found)} versions", value=listed, unit="s", asked="<= 1")
        yield Figure(name="diff of two of them", value=time.perf_counter() - started, unit="s", asked="<= 1")
        for command in (["list", NAME], ["diff", NAME, "1", str(len(found))]):
            started = time.perf_counter()
            arguments = [sys.executable, "-m", "dougong", "registry", *command, "--registry", str(many), "--json"]
            subprocess.run(arguments, check=True, capture_output=True)  # noqa: S603, our own command
            seconds = time.perf_counter() - started
            yield Figure(name=f"dougong registry {command[0]}, from start to end", value=seconds, unit="s")
        ratio = fresh.store.num_bytes() / found[0].about.num_bytes
        yield Figure(name=f"bytes of {len(found)} versions of one base, beside one bundle's", value=ratio, unit="x")


def measure_learn(quick: bool) -> Iterator[Figure]:
    kills = 4 if quick else LEARNING_KILLS
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bundle = small_bundle(folder)
        rows = records(120)
        plain = Path(shutil.copytree(bundle, folder / "plain"))
        started = time.perf_counter()
        child(lambda said: teach(plain, rows))
        longest = time.perf_counter() - started
        wanted = sums(plain)
        asked = rows.slice(0, 20)
        before = load(bundle).predict(asked.to_pylist())
        broken = other = done = begun = 0
        for number in range(kills):
            child(lambda said: teach(bundle, rows), float(random.uniform(0.0, longest)))
            there: list[str] = []
            try:
                there = tasks_in(read_bundle(bundle))
                read_parts(bundle, read_bundle(bundle))
                same = load(bundle).predict(asked.to_pylist()) == before
            except DougongError as error:
                same = False
                print(f"kill {number}: {error}", file=sys.stderr)
            broken += not same
            begun += any(bundle.parent.glob(".*.learning/*/*"))
            if there:
                done, other = done + 1, other + (sums(bundle) != wanted)
                remove_task(bundle, TAUGHT)
            if number % 50 == 49:
                print(f"{number + 1} of {kills} kills inside learning", file=sys.stderr)
        child(lambda said: teach(bundle, rows))
        done, other = done + 1, other + (sums(bundle) != wanted)
        yield Figure(
            name=f"{kills} kills inside learning: bundles that are broken or answer otherwise",
            value=broken,
            unit="",
            asked="<= 0",
            seeds=kills,
        )
        yield Figure(name="of these with learning under way, gone on with by the next", value=begun, unit="")
        yield Figure(
            name=f"{done} tasks learnt through kills: unlike the one without, to the byte",
            value=other,
            unit="",
            asked="<= 0",
            seeds=done,
        )


def records(number: int) -> pa.Table:
    """A question about the pictures of the recipe xor that its bundle was not made for."""
    recipe = read_recipe("xor")
    table = open_tables(recipe.data, seed=recipe.seed).train
    rows = table.head(number)
    name = recipe.data.target or "answer"
    answers = ["odd" if place % 2 else "even" for place in range(rows.num_rows)]
    return rows.set_column(rows.column_names.index(name), "parity", pa.array(answers))


def teach(bundle: Path, rows: pa.Table) -> None:
    """Learn, or go on with learning that was killed."""
    texts = ["train.steps=30", "train.evaluate_every=10", "train.checkpoint_every=3", "budget=0.3"]
    config = parse(LearnConfig, override(LearnConfig().model_dump(), texts), where="learn")
    learn(bundle, TAUGHT, table_of_rows(rows, Path(".")), config, target="parity", resume=True)


def sums(bundle: Path) -> dict[str, str]:
    """Of what was learnt; how long it took, and when, is in none of them."""
    return {name: found.sha256 for name, found in read_bundle(bundle).files.items() if name.startswith("tasks/")}


PARTS: Final = ("registry", "learn", "many")


def measure(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Figure]:
    torch.set_num_threads(1)
    named = {"registry": measure_registry, "learn": measure_learn, "many": measure_many}
    for part in parts:
        yield from named[part](quick)


def fill(folder: Path, bundle: Path, count: int) -> None:
    """Versions of one base that differ in a task; every fifth time an older one goes."""
    own = Path(shutil.copytree(bundle, folder.with_name("filled")))
    registry = Registry(folder)
    base = base_sum(read_bundle(own))
    for number in range(count):
        add_part(own, made_up(f"more-{number}", base), {"x": torch.full((4096,), float(number))}, None)
        registry.register(own, NAME, note=f"number {number}")
        if number % 5 == 4:
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
    run(
        "registry_kills",
        "A registry and a taught bundle under kills, and 200 versions of one base.",
        measure,
        parts=PARTS,
    )
