"""Runs a function on many CPU processes that are connected by gloo.

Processes are started once and serve every test: what takes seconds is loading torch. They are kept by the tests' own
process (`make test` has two, each with its ranks), are given a function by its file and name, and end with the tests.
Between tests of another number of ranks only the process group is made anew.
"""

import contextlib
import datetime
import faulthandler
import importlib.util
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

LIMIT_SECONDS = 60.0
GRACE_SECONDS = 1.0
"""For the other ranks, after one has failed: they may fail by themselves, or wait for it forever."""


class RankFailure(AssertionError):
    """A rank failed, hung or ended; the message says which, and where."""


class _Job(NamedTuple):
    file: str
    module: str
    name: str
    args: tuple[Any, ...]
    world: int
    store: str
    stacks: str
    """A file for where the rank stood when its time was over."""
    limit_seconds: float
    path: list[str]


class _Answer(NamedTuple):
    value: Any
    failure: str | None


def run_ranks(function: Callable[..., Any], *args: Any, world: int, limit_seconds: float = LIMIT_SECONDS) -> list[Any]:
    """What `function(*args)`, a module's own function, returns on each of `world` connected ranks.

    Raises:
        RankFailure: a rank raised, ended, or did not answer in time. All processes are then ended, and the next
            call starts others.
    """
    if "<" in function.__qualname__ or "." in function.__qualname__:
        raise TypeError(f"{function.__qualname__} cannot be found by its name elsewhere. Give a module's own function.")
    pool = _pool()
    try:
        return pool.run(function, args, world, limit_seconds)
    except BaseException:
        close_ranks()
        raise


def close_ranks() -> None:
    """End all processes."""
    while _open:
        _open.pop().close()


_open: list["_Pool"] = []


def _pool() -> "_Pool":
    if not _open:
        _open.append(_Pool())
    return _open[0]


class _Pool:
    def __init__(self) -> None:
        # Forked from a process that has loaded torch and done nothing else: no locks of threads are copied.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "dougong.recipes.run"])
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._count = itertools.count()
        self._store = ""
        self._world = 0

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], world: int, limit_seconds: float) -> list[Any]:
        self._grow(world)
        if world != self._world:
            self._world, self._store = world, str(self._folder / f"store-{next(self._count)}")
        job = _Job(
            function.__code__.co_filename,
            function.__module__,
            function.__name__,
            args,
            world,
            self._store,
            str(self._folder / "stack"),
            limit_seconds,
            sys.path,
        )
        # Those that have no part in it leave the group of the job before.
        for rank, (_, connection) in enumerate(self._workers):
            connection.send((rank if rank < world else None, job))
        answers = self._answers(job)
        failures = [f"rank {rank} of {world} {found.failure}" for rank, found in answers.items() if found.failure]
        if failures or len(answers) < world:
            silent = [rank for rank in range(world) if rank not in answers]
            failures += [self._silence(rank, job, alone=not failures) for rank in silent]
            raise RankFailure(f"{function.__name__}: " + "\n".join(failures))
        return [answers[rank].value for rank in range(world)]

    def _grow(self, world: int) -> None:
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _answers(self, job: _Job) -> dict[int, _Answer]:
        answers: dict[int, _Answer] = {}
        rank_of = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        waiting = [connection for _, connection in self._workers]
        deadline = time.monotonic() + job.limit_seconds + 1.0  # after the ranks have written where they stand
        failed = False
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(waiting, left):
                assert isinstance(connection, Connection)
                waiting.remove(connection)
                try:
                    found = connection.recv()
                except EOFError:
                    process = self._workers[rank_of[connection]][0]
                    process.join()
                    found = _Answer(None, f"ended with exit status {process.exitcode}")
                if rank_of[connection] < job.world or found.failure:
                    answers[rank_of[connection]] = found
                if found.failure and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        return dict(sorted(answers.items()))

    def _silence(self, rank: int, job: _Job, *, alone: bool) -> str:
        stack = Path(f"{job.stacks}-{rank}")
        where = f" It stood at\n{stack.read_text()}" if alone and stack.exists() else ""
        if not alone:
            return f"rank {rank} of {job.world} still waited for it"
        return f"rank {rank} of {job.world} has not answered within {job.limit_seconds:g} seconds.{where}"

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        self._workers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(connection: Connection) -> None:
    """A rank: does jobs until the tests end."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own process ends it
    torch.set_num_threads(1)
    store = ""
    while True:
        try:
            rank, job = connection.recv()
        except EOFError:
            os._exit(0)
        failure, value = None, None
        try:
            if store and (rank is None or store != job.store):
                dist.destroy_process_group()
                store = ""
            if rank is not None:
                sys.path[:] = job.path
                with _stack_told(Path(f"{job.stacks}-{rank}"), job.limit_seconds):
                    if not store:
                        limit = datetime.timedelta(seconds=600)  # the tests' own process is the one that gives up
                        dist.init_process_group(
                            "gloo", init_method=f"file://{job.store}", rank=rank, world_size=job.world, timeout=limit
                        )
                        store = job.store
                    value = _find(job)(*job.args)
                    _end_subgroups()
        except BaseException as error:
            failure = f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
        try:
            connection.send(_Answer(value, failure))
        except Exception as error:  # the answer cannot be sent
            connection.send(_Answer(None, f"returned what cannot be sent: {error}"))


def _end_subgroups() -> None:
    """Groups that the job has made: each keeps threads of its own, and a hundred jobs later there are thousands."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):  # torch has no other list of them
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def _stack_told(file: Path, limit_seconds: float) -> Iterator[None]:
    with file.open("w") as opened:
        faulthandler.dump_traceback_later(limit_seconds, file=opened)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _find(job: _Job) -> Callable[..., Any]:
    """The function, from its file: pytest's modules are not on the path. Under the tests' name for it, so that what it
    returns means the same there."""
    if job.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(job.module, job.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[job.module] = module
        spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(sys.modules[job.module], job.name)
    return found
