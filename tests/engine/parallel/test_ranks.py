import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dougong.core.errors import ConfigError, DataError, RunError
from dougong.engine.parallel.ranks import ALONE, Ranks, connected_ranks


def agreements() -> dict[str, Any]:
    ranks = Ranks(dist.group.WORLD)
    works: list[int] = []
    uneven = torch.arange(3.0).reshape(1, 3) if ranks.rank == 1 else torch.empty(0)
    return {
        "sums": ranks.sums(ranks.rank, 5),
        "every": (ranks.every(ranks.rank >= 0), ranks.every(ranks.rank == 0)),
        "tell": ranks.tell({"rank": ranks.rank, "text": "ü" * ranks.rank}),
        "nothing": ranks.tell(None),
        "says": ranks.first_says(lambda: f"from {ranks.rank}"),
        "after": ranks.after_first(lambda: (works.append(ranks.rank), len(works))[1]),
        "rows": ranks.rows(uneven),
        "flags": ranks.rows(torch.tensor([ranks.first])),
        "no rows": ranks.rows(torch.empty(0, 2)),
        "share": ranks.share,
    }


def test_all_ranks_know_the_same() -> None:
    first, second, third = run_ranks(agreements, world=3)
    for found in (first, second, third):
        assert found["sums"] == (3, 15)
        assert found["every"] == (True, False)
        assert found["tell"] == [{"rank": rank, "text": "ü" * rank} for rank in range(3)]
        assert found["nothing"] == [None, None, None]
        assert found["says"] == "from 0"
        assert found["after"] == 1
        assert found["rows"].tolist() == [[0.0, 1.0, 2.0]]
        assert found["flags"].tolist() == [True, False, False]
        assert found["no rows"].shape == (0, 2)
    assert [found["share"] for found in (first, second, third)] == [(0, 3), (1, 3), (2, 3)]


def mistaken() -> list[str]:
    ranks = Ranks(dist.group.WORLD)
    told = []

    def work() -> None:
        if ranks.first:
            raise DataError("a table that is none")

    for ask in (ranks.after_first, ranks.first_says):
        try:
            ask(work)
        except DataError as error:
            told.append(str(error))
    return told


def test_a_mistake_that_the_first_rank_meets_is_raised_on_all() -> None:
    assert run_ranks(mistaken, world=2) == [["a table that is none"] * 2] * 2


def test_one_process_alone_sends_nothing() -> None:
    assert not dist.is_initialized()  # whatever it sent would fail
    told = {"any": object()}
    assert ALONE.tell(told) == [told]
    assert ALONE.tell(told)[0] is told
    assert ALONE.sums(3, 4) == (3, 4)
    assert ALONE.every(True)
    assert not ALONE.every(False)
    assert ALONE.first
    x = torch.ones(2, 3)
    assert ALONE.rows(x) is x
    ALONE.wait()
    with pytest.raises(RunError, match="as it was"):
        ALONE.first_says(lambda: (_ for _ in ()).throw(RunError("as it was")))


def test_without_torchrun_a_process_is_alone() -> None:
    with connected_ranks({}) as ranks:
        assert ranks is ALONE


def test_an_environment_that_lacks_something_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="WORLD_SIZE=2 is set and MASTER_ADDR is not"),
        connected_ranks({"WORLD_SIZE": "2", "RANK": "0"}),
    ):
        pass


def hidden() -> bool:
    """Whatever a rank is told stays text: an object that would do something when unpickled is not even sent."""

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (1,)

    try:
        Ranks(dist.group.WORLD).tell(Harmful())
    except TypeError:
        return True
    return False


def test_objects_are_never_sent() -> None:
    assert run_ranks(hidden, world=2) == [True, True]
