import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import Slow

from dougong.core.errors import RunError
from dougong.serve.backend import Backend, Outcome, answer_batch
from dougong.serve.batcher import BatcherConfig
from dougong.serve.engine import BatchDone, Engine, Refused
from dougong.serve.service_time import Shape
from dougong.serve.workers import Answers, Died, ProcessWorkers, ThreadWorkers, Worker

RELAXED = BatcherConfig(refuse_late=False, timeout_seconds=5.0, slo_seconds=1.0, max_batch=16)


def run(test: Callable[[Engine], Any], backend: Backend, config: BatcherConfig = RELAXED, **settings: Any) -> Any:
    async def whole() -> Any:
        engine = Engine(settings.pop("workers", None) or ThreadWorkers(lambda: backend), config, **settings)
        try:
            await engine.start()
            return await test(engine)
        finally:
            await engine.close()

    return asyncio.run(whole())


async def ask(engine: Engine, remark: str, **settings: Any) -> Outcome:
    return await engine.outcome(engine.submit({"remark": remark}, Shape(("remark",)), **settings))


def test_requests_that_come_together_are_one_batch() -> None:
    backend, heard = Slow(), list[BatchDone]()

    async def test(engine: Engine) -> list[Outcome]:
        return await asyncio.gather(*(ask(engine, str(number)) for number in range(10)))

    found = run(test, backend, heard=heard.append)

    assert [b'"said": "%d"' % number in outcome.body for number, outcome in enumerate(found)] == [True] * 10
    assert backend.batches == [10]
    assert heard[0].size == 10
    assert heard[0].shapes == {Shape(("remark",)): 10}


def test_one_poisonous_record_fails_alone_and_its_text_goes_nowhere() -> None:
    async def test(engine: Engine) -> list[Outcome]:
        return await asyncio.gather(*(ask(engine, "poison" if number == 3 else "fine") for number in range(8)))

    found = run(test, Slow())

    assert [outcome.status for outcome in found] == [200, 200, 200, 500, 200, 200, 200, 200]
    assert b"what else" not in found[3].body
    assert b"ValueError" in found[3].body


def test_halving_asks_no_more_than_it_must() -> None:
    backend = Slow(seconds=0.0)

    outcomes = answer_batch(backend, [{"remark": "poison" if number == 5 else "fine"} for number in range(8)])

    assert [outcome.status for outcome in outcomes].count(500) == 1
    assert backend.batches == [8, 4, 4, 2, 1, 1, 2]


def test_who_goes_away_leaves_the_queue() -> None:
    backend = Slow(seconds=0.05)

    async def test(engine: Engine) -> None:
        first = asyncio.create_task(ask(engine, "first"))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(ask(engine, "gone"))
        last = asyncio.create_task(ask(engine, "last"))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(first, last)
        assert engine.outstanding == 0
        assert await engine.drain(1.0)

    run(test, backend)

    assert backend.batches == [1, 1]


def test_what_waits_too_long_is_told_so() -> None:
    config = BatcherConfig(refuse_late=False, slo_seconds=0.02, timeout_seconds=0.03, max_batch=1)

    async def test(engine: Engine) -> list[Any]:
        tasks = [asyncio.create_task(ask(engine, str(number))) for number in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, _, last = run(test, Slow(seconds=0.1), config)

    assert first.status == 200
    assert isinstance(last, Refused)
    assert last.reason == "expired"


def test_draining_answers_what_has_come_and_takes_nothing_more() -> None:
    async def test(engine: Engine) -> list[Outcome]:
        tasks = [asyncio.create_task(ask(engine, str(number))) for number in range(5)]
        await asyncio.sleep(0)
        assert await engine.drain(5.0)
        with pytest.raises(Refused, match="closed"):
            engine.submit({}, Shape())
        return await asyncio.gather(*tasks)

    assert [outcome.status for outcome in run(test, Slow())] == [200] * 5


class Mortal:
    """Workers of which the first so many die of their first batch, and of a poison always."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.started = self.killed = 0

    async def load(self) -> None:
        return

    async def start(self) -> Worker:
        self.started += 1
        return _MortalWorker(self)  # type: ignore[return-value]  # writes nothing

    async def close(self) -> None:
        return


class _MortalWorker:
    pid = None

    def __init__(self, all_of_them: Mortal) -> None:
        self._all = all_of_them

    async def ask(self, kind: str, records: Sequence[Mapping[str, Any]], options: Any = None) -> Answers:
        await asyncio.sleep(3600 if records[0]["remark"] == "endless" else 0.001)
        if self._all.deaths or any(record["remark"] == "poison" for record in records):
            self._all.deaths = max(0, self._all.deaths - 1)
            raise Died
        return Answers([Outcome(200, record["remark"].encode()) for record in records], 0.001, {})

    def end(self) -> None:
        return

    def kill(self) -> None:
        self._all.killed += 1


def test_who_waits_behind_a_worker_that_hangs_is_told_in_time() -> None:
    workers, config = Mortal(deaths=0), BatcherConfig(refuse_late=False, slo_seconds=0.05, timeout_seconds=0.1)

    async def test(engine: Engine) -> tuple[Any, float]:
        hung = asyncio.create_task(ask(engine, "endless"))
        await asyncio.sleep(0.02)
        started = asyncio.get_running_loop().time()
        (behind,) = await asyncio.gather(ask(engine, "behind"), return_exceptions=True)
        took = asyncio.get_running_loop().time() - started
        assert workers.killed == 0
        with pytest.raises(Refused, match="expired|died"):
            await hung
        assert (await ask(engine, "after")).body == b"after"
        return behind, took

    behind, took = run(test, Slow(), config, workers=workers, patience_seconds=0.6)

    assert isinstance(behind, Refused)
    assert behind.reason == "expired"
    assert took < 0.5
    assert workers.killed == 1


def test_requests_of_a_worker_that_dies_are_answered_by_the_next() -> None:
    workers = Mortal(deaths=1)

    async def test(engine: Engine) -> list[Outcome]:
        return await asyncio.gather(*(ask(engine, str(number)) for number in range(4)))

    found = run(test, Slow(), workers=workers)

    assert [outcome.body for outcome in found] == [b"0", b"1", b"2", b"3"]
    assert workers.started == 2


def test_a_record_that_kills_every_worker_is_given_up_and_nobody_else() -> None:
    workers = Mortal(deaths=0)

    async def test(engine: Engine) -> list[Any]:
        remarks = ["a", "poison", "b", "c"]
        return await asyncio.gather(*(ask(engine, remark) for remark in remarks), return_exceptions=True)

    first, guilty, *others = run(test, Slow(), workers=workers)

    assert isinstance(guilty, Refused)
    assert guilty.reason == "died"
    assert [each.body for each in (first, *others)] == [b"a", b"b", b"c"]
    assert workers.started == 3


def test_a_worker_that_dies_while_its_model_leaves_is_replaced() -> None:
    workers = Mortal(deaths=1)

    async def test(engine: Engine) -> list[Outcome]:
        tasks = [asyncio.create_task(ask(engine, str(number))) for number in range(3)]
        await asyncio.sleep(0)
        assert await engine.drain(5.0)
        return await asyncio.gather(*tasks)

    assert [outcome.body for outcome in run(test, Slow(), workers=workers)] == [b"0", b"1", b"2"]


def test_where_no_worker_comes_again_who_waits_is_told_in_time() -> None:
    class Last(Mortal):
        async def start(self) -> Worker:
            if self.started:
                await asyncio.sleep(3600)
            return await super().start()

    config = BatcherConfig(refuse_late=False, slo_seconds=0.05, timeout_seconds=0.1)

    async def test(engine: Engine) -> list[Any]:
        tasks = [asyncio.create_task(ask(engine, str(number))) for number in range(2)]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 1.0)

    found = run(test, Slow(), config, workers=Last(deaths=1))

    assert [str(each) for each in found] == ["expired", "expired"]


def test_who_is_being_answered_when_the_engine_closes_is_told() -> None:
    told: list[Any] = []

    async def test(engine: Engine) -> None:
        engine.submit({"remark": "endless"}, Shape(("remark",)), then=told.append)
        await asyncio.sleep(0.02)
        await engine.close()
        assert engine.outstanding == 0

    run(test, Slow(), workers=Mortal(deaths=0))

    assert [str(each) for each in told] == ["closed"]


def test_a_worker_that_ends_before_it_is_ready_is_told_of() -> None:
    class Stillborn(Mortal):
        async def start(self) -> Worker:
            raise Died

    async def test(engine: Engine) -> None:
        raise AssertionError("it did not start")

    with pytest.raises(RunError, match="made ready"):
        run(test, Slow(), workers=Stillborn(deaths=0))


def test_what_cannot_be_sent_to_a_worker_costs_nobody_the_server() -> None:
    class Fussy(_MortalWorker):
        async def ask(self, kind: str, records: Sequence[Mapping[str, Any]], options: Any = None) -> Answers:
            if any(record["remark"] == "deep" for record in records):
                raise RecursionError
            return await super().ask(kind, records, options)

    class FussyWorkers(Mortal):
        async def start(self) -> Worker:
            await super().start()
            return Fussy(self)  # type: ignore[return-value]  # writes nothing

    async def test(engine: Engine) -> list[Any]:
        return await asyncio.gather(ask(engine, "deep"), ask(engine, "beside"), return_exceptions=True)

    deep, beside = run(test, Slow(), workers=FussyWorkers(deaths=0))

    assert str(deep) == "died"
    assert beside.body == b"beside"


def test_who_asks_alone_has_his_turn_beside_a_backlog() -> None:
    async def test(engine: Engine) -> list[float]:
        async def flood() -> None:
            while True:
                await ask(engine, "flood")

        floods = [asyncio.create_task(flood()) for _ in range(4)]
        await asyncio.sleep(0.05)
        took = []
        for _ in range(5):
            started = asyncio.get_running_loop().time()
            assert (await engine.explain({"remark": "alone"})).status == 200
            took.append(asyncio.get_running_loop().time() - started)
        before = asyncio.get_running_loop().time()
        await ask(engine, "still served")
        took.append(asyncio.get_running_loop().time() - before)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return took

    config = RELAXED.model_copy(update={"max_batch": 1})

    assert max(run(test, Slow(seconds=0.005), config)) < 0.5


def test_who_asks_alone_waits_no_longer_than_others_and_counts_among_them() -> None:
    config = BatcherConfig(refuse_late=False, slo_seconds=0.05, timeout_seconds=0.1, max_queue=2)

    async def test(engine: Engine) -> list[str]:
        hung = asyncio.create_task(ask(engine, "endless"))
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(engine.explain({"remark": "alone"})) for _ in range(3)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert engine.outstanding == 1  # the one that hangs
        hung.cancel()
        return sorted(map(str, found))

    assert run(test, Slow(), config, workers=Mortal(deaths=0)) == ["expired", "expired", "full"]


def test_a_short_limit_of_the_callers_is_kept_behind_a_long_batch() -> None:
    config = BatcherConfig(refuse_late=False, slo_seconds=0.5, timeout_seconds=2.0)

    async def test(engine: Engine) -> float:
        hung = asyncio.create_task(ask(engine, "endless"))
        await asyncio.sleep(0.01)
        usual = asyncio.create_task(ask(engine, "usual"))  # whose time is up later
        await asyncio.sleep(0.01)
        started = asyncio.get_running_loop().time()
        with pytest.raises(Refused, match="expired"):
            await ask(engine, "short", within_seconds=0.1)
        hung.cancel()
        usual.cancel()
        return asyncio.get_running_loop().time() - started

    assert run(test, Slow(), config, workers=Mortal(deaths=0)) < 0.5


def test_whose_place_is_taken_is_told() -> None:
    config = BatcherConfig(refuse_late=False, slo_seconds=0.5, timeout_seconds=2.0, max_queue=3)

    async def test(engine: Engine) -> list[Any]:
        hung = asyncio.create_task(ask(engine, "endless"))
        await asyncio.sleep(0.01)
        greedy = [asyncio.create_task(ask(engine, "more", client="greedy")) for _ in range(3)]
        await asyncio.sleep(0)
        modest = engine.submit({"remark": "modest"}, Shape(("remark",)), client="modest")
        assert modest.state == "waiting"
        await asyncio.sleep(0)
        told = [str(task.exception()) if task.done() else "waits" for task in greedy]
        for task in (hung, *greedy):
            task.cancel()
        return told

    assert run(test, Slow(), config, workers=Mortal(deaths=0)) == ["waits", "waits", "full"]


def test_nothing_runs_where_nothing_is_asked() -> None:
    async def test(engine: Engine) -> int:
        await ask(engine, "one")
        await asyncio.sleep(0.05)
        polls, real = 0, engine.batcher.poll

        def counted(*arguments: Any) -> Any:
            nonlocal polls
            polls += 1
            return real(*arguments)

        engine.batcher.poll = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.2)
        return polls

    assert run(test, Slow()) == 0


def test_answers_go_out_before_anything_is_learnt_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def test(engine: Engine) -> None:
        monkeypatch.setattr(engine.batcher, "learn", lambda ran: seen.append(f"learnt of {sum(ran.counts.values())}"))
        engine.submit({"remark": "first"}, Shape(("remark",)), then=lambda _: seen.append("told"))
        await asyncio.sleep(0.05)

    run(test, Slow())

    assert seen == ["told", "learnt of 1"]


def test_workers_outlive_what_ends_the_server() -> None:
    """A signal to a whole group reaches them, too, while the server still answers what has come."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from dougong.serve.worker import main
from serving import Slow

sys.exit(main(make=lambda settings: Slow()))
"""

    async def test(engine: Engine) -> Outcome:
        (pid,) = engine.pids
        workers = engine._workers
        assert isinstance(workers, ProcessWorkers)
        assert workers._process is not None
        for each in (pid, workers._process.pid):
            os.kill(each, signal.SIGTERM)
        await asyncio.sleep(0.1)
        found = await ask(engine, "after it")
        assert engine.pids == [pid]
        return found

    found = run(test, Slow(), workers=ProcessWorkers({}, command=[sys.executable, "-c", code]))

    assert b"after it" in found.body


def test_workers_leave_what_they_share_alone() -> None:
    """What was there at the fork is none of their collectors' business: to look at it is to copy it."""
    code = f"""
import gc, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from dougong.serve.backend import Outcome
from dougong.serve.worker import main
from serving import Slow

class Counting(Slow):
    def answer(self, records):
        return [Outcome(200, b"%d" % gc.get_freeze_count()) for _ in records]

def make(settings):
    backend = Counting()
    backend.shared = [[] for _ in range(100_000)]
    return backend

sys.exit(main(make=make))
"""

    async def test(engine: Engine) -> Outcome:
        return await ask(engine, "how many")

    found = run(test, Slow(), workers=ProcessWorkers({}, command=[sys.executable, "-c", code]))

    assert int(found.body) > 100_000
