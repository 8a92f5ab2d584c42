from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B, schedules

from dougong.core.errors import ConfigError
from dougong.engine.parallel.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    Table,
    bubble,
    check_schedule,
    make_table,
    messages,
    most_held,
    rank_of_stage,
    timeline,
)

CHUNKS: dict[Schedule, tuple[int, ...]] = {
    "gpipe": (1,),
    "1f1b": (1,),
    "interleaved": (1, 2, 3),
    "zbv": (2,),
    "dualpipev": (2,),
}


def tables(schedule: Schedule) -> list[tuple[int, int, int, Table]]:
    """Of all sizes that this schedule can have, up to eight ranks and twenty micro-batches."""
    found = []
    for num_ranks in (1, 2, 3, 4, 8):
        for chunks in CHUNKS[schedule]:
            for num_batches in range(2 * num_ranks if schedule == "dualpipev" else 1, 21):
                found.append((num_ranks, chunks, num_batches, make_table(schedule, num_ranks, chunks, num_batches)))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_stage_meets_each_micro_batch_once_each_way_and_nobody_waits_forever(schedule: Schedule) -> None:
    for num_ranks, chunks, num_batches, table in tables(schedule):
        place = rank_of_stage(schedule, num_ranks, chunks)
        timeline(table, place)
        assert all(place[action.stage] == rank for rank, actions in enumerate(table) for action in actions)
        counted = Counter((a.kind, a.stage, a.batch) for actions in table for a in actions)
        assert set(counted.values()) == {1}
        for stage in range(num_ranks * chunks):
            for batch in range(num_batches):
                assert counted["forward", stage, batch] == 1
                cut = counted["input", stage, batch]
                assert counted["backward", stage, batch] + cut == 1
                assert counted["weight", stage, batch] == cut


def test_a_table_in_which_ranks_wait_for_each_other_is_found_out() -> None:
    table = [
        [Action("forward", 0, 0), Action("backward", 0, 0)],
        [Action("backward", 1, 0), Action("forward", 1, 0)],
    ]
    with pytest.raises(ValueError, match="rank 0 waits forever"):
        timeline(table, [0, 1])


@pytest.mark.parametrize(("num_ranks", "num_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_bubbles_are_as_published(num_ranks: int, num_batches: int) -> None:
    """With forwards of 1 and backwards of 2: (p - 1) / (m + p - 1), or with v stages to a rank a v-th part of p - 1."""

    def found(schedule: Schedule, chunks: int) -> float:
        table = make_table(schedule, num_ranks, chunks, num_batches)
        return bubble(timeline(table, rank_of_stage(schedule, num_ranks, chunks)))

    idle = num_ranks - 1
    assert found("gpipe", 1) == pytest.approx(idle / (num_batches + idle))
    assert found("1f1b", 1) == pytest.approx(idle / (num_batches + idle))
    for chunks in (2, 4):
        assert found("interleaved", chunks) == pytest.approx(idle / chunks / (num_batches + idle / chunks))
    # A backward cut in two: (p - 1) of 6 m + p - 1 half stages' times.
    assert found("dualpipev", 2) == pytest.approx(idle / (6 * num_batches + idle), rel=0.01)
    # Ours by list scheduling meets it up to four ranks, and is a little longer beyond.
    assert found("zbv", 2) == pytest.approx(idle / (6 * num_batches + idle), rel=0.01 if num_ranks <= 4 else 0.3)


@pytest.mark.parametrize("num_batches", [8, 20])
def test_activations_are_held_as_long_as_the_schedule_says(num_batches: int) -> None:
    def held(schedule: Schedule, chunks: int) -> list[int]:
        return [most_held(actions) for actions in make_table(schedule, 4, chunks, num_batches)]

    assert held("gpipe", 1) == [num_batches] * 4
    assert held("1f1b", 1) == [4, 3, 2, 1]
    # Counted in halves of a rank's blocks: as much as 1F1B's first rank.
    assert max(held("zbv", 2)) == 8
    assert max(held("dualpipev", 2)) == 9


def test_unequal_stages_are_filled_in_by_their_costs() -> None:
    def cost(stage: int, kind: Kind) -> float:
        return (3.0 if stage == 0 else 1.0) * (2.0 if kind == "backward" else 1.0)

    place = rank_of_stage("zbv", 2, 2)
    even = timeline(make_table("zbv", 2, 2, 8), place, cost)
    fitted = timeline(make_table("zbv", 2, 2, 8, cost), place, cost)

    assert max(row[-1].end for row in fitted) <= max(row[-1].end for row in even)


def theirs(kind: Any, num_ranks: int, chunks: int, num_batches: int, **more: Any) -> Table:
    """torch's own table, from its generator of one rank's actions."""
    stand_in = SimpleNamespace(pp_group_size=num_ranks, n_local_stages=chunks, _n_microbatches=num_batches, **more)
    names: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
    table: Table = []
    for rank in range(num_ranks):
        found = []
        for action in kind._calculate_single_rank_operations(stand_in, rank):
            if action is None:
                continue
            for each in action.sub_actions or (action,):
                found.append(Action(names[each.computation_type.value], each.stage_index, each.microbatch_index))
        table.append(found)
    return table


@pytest.mark.parametrize(("num_ranks", "num_batches"), [(2, 4), (2, 9), (3, 6), (4, 8), (4, 13), (8, 16)])
def test_dualpipev_is_torchs_own(num_ranks: int, num_batches: int) -> None:
    if num_batches >= 2 * num_ranks:
        expected = theirs(schedules.ScheduleDualPipeV, num_ranks, 2, num_batches)
        assert make_table("dualpipev", num_ranks, 2, num_batches) == expected


@pytest.mark.parametrize(("num_ranks", "chunks", "num_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (3, 2, 3)])
def test_interleaved_is_torchs_own(num_ranks: int, chunks: int, num_batches: int) -> None:
    rounds = max(1, num_batches // num_ranks)
    expected = theirs(
        ScheduleInterleaved1F1B, num_ranks, chunks, num_batches, microbatches_per_round=num_batches // rounds
    )
    assert make_table("interleaved", num_ranks, chunks, num_batches) == expected


def test_messages_of_a_pair_are_in_the_order_of_the_senders_work() -> None:
    place = rank_of_stage("zbv", 2, 2)
    table = make_table("zbv", 2, 2, 2)
    sent = [(source, to, action) for source, to, action in messages(table, place)]

    # Stages 1 and 2 live on one rank: nothing is sent between them.
    assert {action.stage for _, _, action in sent} == {0, 1, 2, 3}
    assert all(source != to for source, to, _ in sent)
    assert [a.batch for s, _, a in sent if s == 0 and a == Action("forward", 1, a.batch)] == [0, 1]
    assert len(sent) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("zbv", 2, 1, 4), "zbv has 2 stages on each rank, not 1"),
        (("1f1b", 2, 2, 4), "1f1b has 1 stage on each rank, not 2"),
        (("dualpipev", 4, 2, 7), "needs 8 micro-batches or more, and there are 7"),
    ],
)
def test_what_cannot_be_made_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule(*given)
