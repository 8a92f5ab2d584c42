import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from dougong.engine.parallel.parcel import Parcel, Post, pack, unpack


class Inner(NamedTuple):
    x: Tensor
    name: str | None


class Outer(NamedTuple):
    parts: dict[str, Inner]
    rest: tuple[Tensor, ...]
    count: int


def value() -> Outer:
    generator = torch.Generator().manual_seed(0)
    return Outer(
        {
            "a": Inner(torch.randn(3, 5, generator=generator).requires_grad_(), None),
            "b": Inner(torch.ones(0, 2), "empty"),
        },
        (torch.tensor([True, False, True]), torch.arange(7), torch.tensor(2.5, dtype=torch.float64)),
        4,
    )


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        alike = found.dtype == expected.dtype and found.requires_grad == expected.requires_grad
        return alike and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, tuple):
        return type(found) is type(expected) and all(map(same, found, expected))
    return bool(found == expected)


def test_what_is_packed_is_unpacked() -> None:
    assert same(unpack(pack(value()), (Inner, Outer)), value())


def test_nothing_holds_on_to_tensors_that_have_been_passed_on() -> None:
    given = Outer({"a": Inner(torch.ones(3), "a")}, (torch.ones(2),), 1)
    gc.collect()
    gc.disable()  # what only it would free makes a step's memory a matter of luck
    try:
        held = [weakref.ref(given.rest[0]), weakref.ref(given.parts["a"].x)]
        unpack(pack(given), (Inner, Outer))
        del given
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


def sent() -> list[bool]:
    group = dist.group.WORLD
    assert group is not None
    post, rank = Post(group, torch.device("cpu")), dist.get_rank()
    found = []
    if rank == 0:
        for count in range(3):  # of which none waits for the one before
            post.send(pack([torch.full((count, 2), float(count)), value()]), 1)
    else:
        for count in range(3):
            numbers, other = unpack(post.receive(0), (Inner, Outer))
            found += [torch.equal(numbers, torch.full((count, 2), float(count))), same(other, value())]
    told = post.spread(pack(value()) if rank == 1 else None, 1)
    post.settle()
    return [*found, same(unpack(told, (Inner, Outer)), value())]


def test_what_is_sent_arrives_in_order_bit_for_bit_and_needs_the_same_gradients() -> None:
    found = run_ranks(sent, world=2)
    assert found == [[True], [True] * 7]


def test_no_other_type_is_made_of_an_outline() -> None:
    with pytest.raises(TypeError, match="Inner is none of the model's state_types: Outer"):
        unpack(pack(value()), (Outer,))
    with pytest.raises(TypeError, match="a state cannot hold a set"):
        pack({"a": {1, 2}})
    with pytest.raises(TypeError, match="Popen is none"):
        unpack(Parcel({"named": "Popen", "of": []}, []), (Inner,))
