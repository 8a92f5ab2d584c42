from collections.abc import Callable, Mapping

import pytest

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.serve.batcher import Batcher, BatcherConfig, Refusal, Ticket
from dougong.serve.rehearsal import Load, Rehearsed, closed_load, feasible, open_load, rehearse
from dougong.serve.service_time import ServiceTime, Shape

Service = Callable[[Mapping[Shape, int]], float]
WAITS = (0.0, 0.002, 0.005)


def affine(fixed: float, item: float) -> Service:
    return lambda counts: fixed + item * sum(counts.values())


DEVICE, PERCEPTRON = affine(0.004, 0.0001), affine(0.0003, 0.00055)
"""A device that likes large batches, and a small network on one core: what benchmarks/serve.py serves too."""


TOO_MUCH = ((0.002, 0.001, 0.06, 25), (0.004, 0.0001, 0.05, 32), (0.02, 0.002, 0.25, 32), (0.0003, 0.00055, 0.05, 32))
"""Seconds of a batch and of a record, the objective, and the largest batch that can be waited for twice within it."""


def batcher(service: Service | None = None, *, replicas: int = 1, **settings: object) -> Batcher:
    known = ServiceTime()
    for number in (1, 2, 4, 8, 16, 32) * 5 if service else ():
        known.observe({Shape(): number}, service({Shape(): number}))
    return Batcher(parse(BatcherConfig, settings, where="test"), known, replicas=replicas)


def taken(found: Ticket | Refusal) -> Ticket:
    assert isinstance(found, Ticket), found
    return found


def payloads(batch: tuple[Ticket, ...]) -> list[object]:
    return [ticket.payload for ticket in batch]


def run(service: Service, load: Load, wait: float | None = None, noise: float = 0.05, **settings: object) -> Rehearsed:
    held = {"max_batch": 32, "fixed_wait_seconds": wait, "refuse_late": False} | settings
    return rehearse(batcher(**held), load, service, noise=noise, seed=1)


@pytest.mark.parametrize("service", [DEVICE, PERCEPTRON], ids=["device", "perceptron"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_an_open_load_is_answered_as_fast_as_by_the_best_fixed_wait(service: Service, share: float) -> None:
    load = open_load([(600 / (share * 32 / service({Shape(): 32})), share * 32 / service({Shape(): 32}))], seed=3)

    ours = run(service, load)
    fixed = [run(service, load, wait) for wait in WAITS]

    assert ours.mean <= 1.03 * min(each.mean for each in fixed)
    assert ours.quantile(0.99) <= 1.06 * min(each.quantile(0.99) for each in fixed)


@pytest.mark.parametrize("service", [DEVICE, PERCEPTRON], ids=["device", "perceptron"])
@pytest.mark.parametrize(("callers", "think"), [(1, (0.001, 0.002)), (8, (0.0005, 0.002)), (32, (0.0005, 0.002))])
def test_callers_that_wait_are_answered_as_often_as_by_the_best_fixed_wait(
    service: Service, callers: int, think: tuple[float, float]
) -> None:
    def rate(wait: float | None) -> float:
        found = run(service, closed_load(callers, seconds=1.0, think=think, seed=3), wait)
        return len(found.seconds) / found.left_at

    assert rate(None) >= 0.97 * max(map(rate, WAITS))


def test_callers_that_come_back_together_are_waited_for() -> None:
    load = closed_load(32, seconds=1.0, think=(0.0005, 0.002), seed=3)

    ours, at_once = run(DEVICE, load), run(DEVICE, closed_load(32, seconds=1.0, think=(0.0005, 0.002), seed=3), 0.0)

    assert len(ours.seconds) > 1.15 * len(at_once.seconds)


def test_a_step_in_the_load_is_met_as_by_one_who_knew_of_it() -> None:
    load = open_load([(0.5, 50.0), (1.2, 500.0), (0.5, 50.0)], seed=5)
    service = affine(0.006, 0.001)

    found = run(service, load, refuse_late=True, slo_seconds=0.05)

    best = feasible([each[0] for each in load.arrivals], lambda n: 0.006 + 0.001 * n, slo=0.05, max_batch=16)
    assert best >= 0.99 * len(load.arrivals)
    assert len(found.seconds) - found.late >= 0.99 * best


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("factor", [1.2, 2.0, 5.0])
@pytest.mark.parametrize(("fixed", "item", "slo", "largest"), TOO_MUCH)
def test_what_is_too_much_is_refused_at_once_and_the_rest_is_answered_in_time(
    fixed: float, item: float, slo: float, largest: int, factor: float, noise: float
) -> None:
    service = affine(fixed, item)
    most = largest / service({Shape(): largest})
    load = open_load([(4.0, factor * most)], seed=5)

    found = run(service, load, noise=noise, refuse_late=True, slo_seconds=slo)

    in_time = len(found.seconds) - found.late
    assert in_time >= 0.95 * 4.0 * most
    assert found.expired == 0
    assert in_time + found.late + found.refused == len(load.arrivals)


def test_the_oracle_leaves_out_as_few_as_can_be() -> None:
    def seconds(number: int) -> float:
        return 1.0 + 0.1 * number

    assert feasible([0.0, 0.1, 0.2], seconds, slo=1.9, max_batch=8) == 3  # together at 0.2, until 1.5
    assert feasible([0.0, 0.1, 0.2], seconds, slo=1.9, max_batch=1) == 1  # another ends at 2.2, later than 2.1
    assert feasible([0.0, 5.0], seconds, slo=1.1, max_batch=8) == 2
    assert feasible([0.0, 0.5], seconds, slo=1.15, max_batch=8) == 1


def test_no_caller_is_held_up_by_anothers_backlog() -> None:
    queue = batcher(DEVICE, max_batch=8, refuse_late=False)
    for number in range(100):
        taken(queue.admit(0.0, ("greedy", number), client="greedy"))
    for number in range(3):
        taken(queue.admit(0.001, ("modest", number), client="modest"))

    first = payloads(queue.poll(0.001, 1).batch)
    second = payloads(queue.poll(0.001, 1).batch)

    assert ("modest", 0) in first
    assert {("modest", 1), ("modest", 2)} <= {*first, *second}
    greedy = [each for each in first if each not in {("modest", n) for n in range(3)}]
    assert greedy == [("greedy", number) for number in range(len(greedy))]


def test_a_light_caller_is_fast_beside_a_flood() -> None:
    load = open_load([(2.0, 6000.0)], seed=2, clients={"flood": 59.0, "light": 1.0})

    found = run(DEVICE, load, refuse_late=False, max_queue=500, max_batch=16)

    light, flood = sorted(found.by_client["light"]), sorted(found.by_client["flood"])
    assert light[len(light) // 2] < 0.25 * flood[len(flood) // 2]


def test_a_higher_priority_goes_first_and_a_lower_one_is_not_left_for_ever() -> None:
    queue = batcher(DEVICE, max_batch=1, refuse_late=False, slo_seconds=0.05)
    taken(queue.admit(0.0, "old and low", priority=-1))
    taken(queue.admit(0.01, "normal"))
    taken(queue.admit(0.01, "high", priority=1))
    taken(queue.admit(0.3, "late and high", priority=1, client="another"))

    order = [payloads(queue.poll(0.3, 1).batch)[0] for _ in range(4)]

    assert order == ["high", "normal", "old and low", "late and high"]


def test_a_request_that_cannot_make_it_is_refused_when_it_comes() -> None:
    queue = batcher(affine(0.01, 0.005), max_batch=4, slo_seconds=0.1)

    found = [queue.admit(0.0, number) for number in range(40)]

    refused = [each for each in found if isinstance(each, Refusal)]
    assert 8 <= len(found) - len(refused) <= 14  # 3 batches of 4 take 90 milliseconds
    assert all(each.reason == "late" and each.retry_after_seconds > 0 for each in refused)
    assert isinstance(queue.admit(0.0, "patient", within_seconds=1.0), Ticket)
    assert isinstance(queue.admit(0.0, "impatient", within_seconds=0.001), Refusal)


def test_a_rare_record_that_takes_long_refuses_nobody_else() -> None:
    plain, dear = Shape(("words",), 4), Shape(("words",), 30)
    known = ServiceTime()
    for number in (1, 2, 4, 8) * 5:
        known.observe({plain: number}, 0.005 + 0.001 * number)
        known.observe({dear: 1}, 0.4)
    batcher = Batcher(parse(BatcherConfig, {"slo_seconds": 1.0}, where="test"), known)

    def answered(now: float, shape: Shape, seconds: float) -> None:
        taken(batcher.admit(now, None, shape=shape))
        batcher.learn(batcher.done(now + seconds, batcher.poll(now, 1).batch))

    for place in range(20):
        answered(float(place), plain, 0.006)
    answered(20.0, dear, 0.4)

    taken(batcher.admit(21.0, "dear", shape=dear))
    batch = batcher.poll(21.0, 1).batch
    for place in range(6):  # if each took as long as the one that came last, the third would be late
        assert isinstance(batcher.admit(21.01, place, shape=plain), Ticket)
    batcher.learn(batcher.done(21.4, batch))
    assert len(batcher.poll(21.4, 1).batch) == 6


def test_what_has_become_common_is_common_and_what_is_rare_is_forgotten() -> None:
    batcher = Batcher(parse(BatcherConfig, {"refuse_late": False, "max_queue": 10_000}, where="test"))
    for place in range(1200):  # as many as are remembered, and more
        taken(batcher.admit(0.0, None, shape=Shape((f"column {place}",))))
    assert len(batcher._met) <= 1000
    for _ in range(3000):  # where weights have been made small again
        taken(batcher.admit(1.0, None, shape=Shape(("words",))))

    assert batcher._most_common() == Shape(("words",))
    assert list(batcher._met) == [Shape(("words",))]
    assert batcher._weight < 1e10


def test_a_full_queue_says_when_to_come_again() -> None:
    queue = batcher(DEVICE, max_queue=3, refuse_late=False)
    for number in range(3):
        taken(queue.admit(0.0, number))

    refused = queue.admit(0.0, 3)

    assert isinstance(refused, Refusal)
    assert refused.reason == "full"
    assert refused.retry_after_seconds > 0


def test_a_full_queue_has_a_place_for_who_has_fewer_in_it() -> None:
    queue = batcher(max_queue=4, refuse_late=False, max_batch=1)
    taken(queue.admit(0.0, "running", client="greedy"))
    queue.poll(0.0, 1)
    for number in range(4):
        taken(queue.admit(0.0, f"greedy {number}", client="greedy", within_seconds=1e6))

    first, second = (taken(queue.admit(0.01, f"modest {n}", client="modest")) for n in range(2))
    third = queue.admit(0.01, "modest 2", client="modest")

    out = [each.instead_of for each in (first, second)]
    assert [each.payload for each in out if each is not None] == ["greedy 3", "greedy 2"]
    assert {each.state for each in out if each is not None} == {"gone"}
    assert isinstance(third, Refusal)  # by then both have as many
    assert isinstance(queue.admit(0.01, "greedy 4", client="greedy"), Refusal)
    assert len(queue) == 4


def test_no_limit_of_a_callers_is_longer_than_the_timeout() -> None:
    queue = batcher(timeout_seconds=0.5, refuse_late=False, max_batch=1)
    taken(queue.admit(0.0, "running"))
    queue.poll(0.0, 1)

    taken(queue.admit(0.0, "patient", within_seconds=1e6))

    assert [ticket.payload for ticket in queue.poll(0.6, 0).expired] == ["patient"]


def test_what_waits_too_long_expires_once() -> None:
    queue = batcher(DEVICE, timeout_seconds=0.2, refuse_late=False)
    ticket = taken(queue.admit(0.0, "a"))

    assert queue.poll(0.1, 0) == ((), (), 0.2)
    assert queue.poll(0.2, 0).expired == (ticket,)
    assert queue.poll(0.3, 1) == ((), (), None)


def test_who_cancels_leaves_the_queue_and_who_runs_does_not() -> None:
    queue = batcher(DEVICE, refuse_late=False, max_batch=2)
    tickets = [taken(queue.admit(0.0, number, client=str(number % 2))) for number in range(5)]

    assert queue.cancel(tickets[1])
    assert not queue.cancel(tickets[1])
    batch = queue.poll(0.0, 1).batch
    assert payloads(batch) == [0, 2]
    assert not queue.cancel(tickets[0])
    assert len(queue) == 2
    assert [*queue.drop_all()] == [tickets[3], tickets[4]]
    assert queue.poll(9.0, 1) == ((), (), None)


def test_like_goes_with_like_where_padding_would_cost_more_than_a_batch() -> None:
    short, long = Shape(("text",), 6), Shape(("text",), 14)
    known = ServiceTime()
    for _ in range(40):
        for number in (1, 4, 8):
            known.observe({short: number}, 0.001 + 0.0005 * number)
            known.observe({long: number}, 0.001 + 0.008 * number)
    queue = Batcher(BatcherConfig(max_batch=16, slo_seconds=1.0, refuse_late=False), known)
    for number in range(6):
        taken(queue.admit(0.0, number, shape=(short, long)[number % 2]))

    assert payloads(queue.poll(0.0, 1).batch) == [0, 2, 4]
    assert payloads(queue.poll(0.0, 1).batch) == [1, 3, 5]


def test_unlike_goes_together_where_a_batch_costs_more_than_that() -> None:
    one, other = Shape(("image", "text"), 6), Shape(("text",), 6)
    known = ServiceTime()
    for _ in range(40):
        for number in (1, 4, 8):
            known.observe({one: number}, 0.02 + 0.0005 * number)
            known.observe({other: number}, 0.02 + 0.0002 * number)
    queue = Batcher(BatcherConfig(max_batch=16, slo_seconds=1.0, refuse_late=False), known)
    for number in range(6):
        taken(queue.admit(0.0, number, shape=(one, other)[number % 2]))

    assert sorted(map(int, map(str, payloads(queue.poll(0.0, 1).batch)))) == [0, 1, 2, 3, 4, 5]


def test_after_a_workers_death_its_requests_run_alone_once_more() -> None:
    queue = batcher(DEVICE, refuse_late=False)
    tickets = [taken(queue.admit(0.0, number)) for number in range(3)]
    batch = queue.poll(0.0, 1).batch

    assert queue.retry(0.1, batch) == ()
    alone = queue.poll(0.1, 1).batch
    assert alone == (tickets[0],)
    assert queue.retry(0.2, alone) == (tickets[0],)  # it was alone: it is the poison
    assert [payloads(queue.poll(0.2, 1).batch) for _ in range(2)] == [[1], [2]]
    assert len(queue) == 0


def test_two_replicas_answer_nearly_twice_as_much() -> None:
    one, two = (
        rehearse(
            batcher(DEVICE, replicas=replicas, max_batch=16, slo_seconds=0.05),
            open_load([(1.0, 8000.0)], seed=1),
            DEVICE,
        )
        for replicas in (1, 2)
    )

    assert len(two.seconds) > 1.8 * len(one.seconds)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="timeout_seconds 0.01 is below slo_seconds 0.05"):
        batcher(timeout_seconds=0.01)
    with pytest.raises(ConfigError, match="0 must be above 0"):
        batcher(max_batch=0)


def test_a_wrong_forecast_is_tried_and_mended() -> None:
    known = ServiceTime()
    for _ in range(20):
        known.observe({Shape(): 1}, 0.5)  # as it was before, or as a pause made it seem
    queue = Batcher(BatcherConfig(slo_seconds=0.05), known)

    now = 0.0
    for _ in range(30):
        taken(queue.admit(now, None))
        batch = queue.poll(now, 1).batch
        now += 0.002
        queue.learn(queue.done(now, batch))
        now += 0.01
    assert known.seconds({Shape(): 1}) < 0.01
    assert isinstance(queue.admit(now, None, within_seconds=0.02), Ticket)
