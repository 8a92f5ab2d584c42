from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from dougong.engine.parallel.hierarchical import FORMS, Form, Hierarchy, _fastest, groups_in_nodes

SIZES = (1, 7, 1000, 3_000_001)
"""Numbers: fewer than ranks, no multiple of them, and several chunks."""


def numbers(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size % 997))


def in_nodes(per_node: int, wire: Any) -> Hierarchy:
    group = dist.group.WORLD
    assert group is not None
    return Hierarchy(group, *groups_in_nodes([list(range(dist.get_world_size()))], per_node), wire=wire)


def added_up(per_node: int, form: Form, wire: str) -> list[Any]:
    hierarchy = in_nodes(per_node, wire)
    found = []
    for size in SIZES:
        x = numbers(dist.get_rank(), size)
        hierarchy.all_reduce(x, form=form)
        found.append(x.numpy())
    return found


@pytest.mark.parametrize("per_node", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_adds_up_and_every_rank_has_the_same(per_node: int, form: Form) -> None:
    found = run_ranks(added_up, per_node, form, "fp32", world=8)

    for place, size in enumerate(SIZES):
        want = torch.stack([numbers(rank, size) for rank in range(8)]).sum(dim=0)
        for each in found:
            torch.testing.assert_close(torch.from_numpy(each[place]), want, rtol=1e-5, atol=1e-5)
            assert (each[place] == found[0][place]).all()


def rounded(per_node: int, steps: int) -> list[Any]:
    hierarchy = in_nodes(per_node, "bf16")
    total, last = torch.zeros(1000), torch.zeros(1000)
    for _ in range(steps):
        last = numbers(dist.get_rank(), 1000)
        hierarchy.all_reduce(last, form="scatter", name="gradients")
        total += last
    return [last.numpy(), total.numpy()]


def test_what_rounding_loses_in_one_step_comes_in_the_next() -> None:
    steps = 32
    want = torch.stack([numbers(rank, 1000) for rank in range(4)]).sum(dim=0)

    found = run_ranks(rounded, 2, steps, world=4)

    for last, total in found:
        assert (last == found[0][0]).all()
        one = (torch.from_numpy(last) - want).abs()
        many = (torch.from_numpy(total) / steps - want).abs()
        assert one.max() < 0.05  # bf16 keeps 8 bits
        assert many.mean() < one.mean() / 5  # were it lost for good, the mean would be as far off


def chosen() -> tuple[dict[int, Form], list[Form]]:
    hierarchy = in_nodes(2, "fp32")
    before = [hierarchy.form_of(100)]
    hierarchy.measure(sizes=(1024, 65536), repeats=2)
    assert {each.form for each in hierarchy.measured} == set(FORMS)
    return hierarchy.choice, [*before, hierarchy.form_of(10), hierarchy.form_of(10**9)]


def test_all_ranks_choose_alike_and_flat_where_nothing_was_measured() -> None:
    found = run_ranks(chosen, world=4)

    choice, forms = found[0]
    assert all(each == found[0] for each in found)
    assert forms == ["flat", choice[1024], choice[65536]]


@pytest.mark.parametrize(
    ("leader", "scatter", "chosen"),
    [
        ([0.8] * 20, [0.7] * 20, "scatter"),
        ([0.97] * 20, [1.2] * 20, "flat"),  # too little to be sure of
        ([0.5] * 12 + [2.0] * 8, [1.1] * 20, "flat"),  # faster in the middle, and in four of ten turns far slower
        ([0.9, 3.0, 3.0], [0.95, 0.96, 0.96], "leader"),  # of few, what disturbed the others tells nothing
    ],
)
def test_another_form_than_flat_is_taken_where_it_was_surely_faster(
    leader: list[float], scatter: list[float], chosen: str
) -> None:
    assert _fastest({"flat": [1.0] * len(leader), "leader": leader, "scatter": scatter}) == chosen
