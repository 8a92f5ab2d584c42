"""Where a pipeline is cut, by what its blocks cost."""

import itertools

import pytest

from dougong.core.errors import ConfigError
from dougong.engine.parallel.pipeline import stage_bounds
from dougong.engine.parallel.schedule import Kind, Schedule, make_table, rank_of_stage, timeline


def loads(costs: list[float], ranks: list[int], bounds: list[int]) -> list[float]:
    found = dict.fromkeys(ranks, 0.0)
    for rank, (first, last) in zip(ranks, itertools.pairwise(bounds), strict=True):
        assert last > first  # none is empty
        found[rank] += sum(costs[first:last])
    return sorted(found.values())


HEAVY = [6.0, 6.0, 3.0, *[1.0] * 12, 2.0]
"""Encoders, then light blocks, then a head."""


def test_one_stage_to_a_rank_has_the_least_largest_sum_there_is() -> None:
    ranks = rank_of_stage("1f1b", 3, 1)
    every = [[0, *inner, len(HEAVY)] for inner in itertools.combinations(range(1, len(HEAVY)), 2)]
    least = min(max(loads(HEAVY, ranks, bounds)) for bounds in every)
    assert max(loads(HEAVY, ranks, stage_bounds(HEAVY, ranks))) == least


@pytest.mark.parametrize(("schedule", "chunks"), [("zbv", 2), ("dualpipev", 2), ("interleaved", 2)])
def test_where_ranks_have_two_stages_what_each_has_in_all_is_even(schedule: Schedule, chunks: int) -> None:
    ranks = rank_of_stage(schedule, 3, chunks)
    bounds = stage_bounds(HEAVY, ranks)
    by_stage = stage_bounds(HEAVY, list(range(6)))  # as if each had a rank of its own

    mean = sum(HEAVY) / 3
    assert max(loads(HEAVY, ranks, bounds)) < 1.1 * mean
    assert max(loads(HEAVY, ranks, bounds)) <= max(loads(HEAVY, ranks, by_stage))

    def seconds(cut: list[int]) -> float:
        costs = [sum(HEAVY[first:last]) for first, last in itertools.pairwise(cut)]

        def cost(stage: int, kind: Kind) -> float:
            return (2.0 if kind == "backward" else 1.0) * costs[stage]

        table = make_table(schedule, 3, chunks, 12, cost=cost)
        return max(span.end for row in timeline(table, ranks, cost) for span in row)

    assert seconds(bounds) <= seconds(by_stage)


def test_fewer_blocks_than_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 stages needs as many blocks, and the model has 3. Use 3 stages or fewer"):
        stage_bounds([1.0] * 3, [0, 1, 2, 3])
