"""What run_ranks promises to the tests that rest on it."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, run_ranks


def whoami(add: int) -> tuple[int, int, int]:
    total = torch.tensor(dist.get_rank() + add)
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a bad day")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_each_rank_answers_and_the_same_processes_serve_again() -> None:
    first = run_ranks(whoami, 10, world=2)
    four = run_ranks(whoami, 0, world=4)
    again = run_ranks(whoami, 0, world=2)

    assert [rank for rank, _, _ in first] == [0, 1]
    assert [total for _, _, total in first] == [21, 21]
    assert [total for _, _, total in four] == [6, 6, 6, 6]
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in four][:2] == [pid for _, pid, _ in again]
    assert os.getpid() not in [pid for _, pid, _ in four]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_raises_is_named_and_the_others_do_not_hang() -> None:
    pids = [pid for _, pid, _ in run_ranks(whoami, 0, world=2)]
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"fail_on_rank_one: rank 1 of 2 raised ValueError: a bad day"):
        run_ranks(fail_on_rank_one, world=2)
    assert time.monotonic() - started < 10
    assert not any(alive(pid) for pid in pids)
    assert [total for _, _, total in run_ranks(whoami, 0, world=2)] == [1, 1]


def test_a_rank_that_hangs_fails_the_test_and_says_where_it_stood() -> None:
    pids = [pid for _, pid, _ in run_ranks(whoami, 0, world=2)]
    with pytest.raises(RankFailure, match=r"rank 1 of 2 has not answered within 0.5 seconds. It stood at") as caught:
        run_ranks(hang_on_rank_one, world=2, limit_seconds=0.5)
    assert "hang_on_rank_one" in str(caught.value)
    assert "rank 0" not in str(caught.value)
    assert not any(alive(pid) for pid in pids)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 ended with exit status 7"):
        run_ranks(die_on_rank_one, world=2)


def test_only_a_function_with_a_name_can_be_run() -> None:
    with pytest.raises(TypeError, match="cannot be found by its name elsewhere"):
        run_ranks(lambda: None, world=2)
