from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from dougong.data.position import Share
from dougong.objectives.contrastive import all_pairs_loss, contrastive_loss
from dougong.objectives.gathered import Side, gathered_all_pairs_loss, gathered_contrastive_loss

WIDTH = 5
TEMPERATURE = 0.2


class Records(NamedTuple):
    """A batch: which medium each record has on either side, None where it has none."""

    left: list[int | None]
    right: list[int | None]


BATCHES = {
    "each medium once": Records([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]),
    # 0 and 1 are on several ranks, and 0 has several partners.
    "media on several ranks": Records([0, 1, 0, 2, 0, 1, 1, 0], [0, 1, 2, 3, 0, 1, 4, 2]),
    "one rank lacks a side": Records([0, 1, 2, 3, 4, 5, 0, 1], [None, None, None, None, 0, 1, 2, 3]),
    "media without a partner": Records([0, 1, None, 2, None, None, 3, 4], [None, 1, 0, None, 2, 3, 4, 4]),
    "no record has both": Records([0, 1, 2, 3, None, None, None, None], [None, None, None, None, 0, 1, 2, 3]),
    "some ranks have no record": Records([0], [1]),
}


class Found(NamedTuple):
    loss: float
    left_grad: Tensor | None
    """Of the layers that make the vectors."""
    right_grad: Tensor | None
    temperature_grad: Tensor | None


def side(media: list[int | None], present_B: Tensor, layer: Tensor, *, seed: int) -> Side:
    """Vectors of the distinct media of some records, made by a layer that must learn; numbered as no place is."""
    random = torch.Generator().manual_seed(seed)
    content_UD = torch.randn(10, WIDTH, generator=random)
    here = list(dict.fromkeys(medium for medium in media if medium is not None))
    content_UD = content_UD[here].to(layer.dtype)
    vector_UD = functional.normalize(content_UD @ layer, dim=-1) if here else content_UD
    index_B = torch.tensor([0 if medium is None else here.index(medium) for medium in media], dtype=torch.int64)
    return Side(vector_UD, torch.tensor([977 - 13 * medium for medium in here], dtype=torch.int64), index_B[present_B])


def contrasted(records: Records) -> Found:
    """On this rank's share of the records; of all of them where there are no ranks."""
    group = dist.group.WORLD if dist.is_initialized() else None
    part = (Share() if group is None else Share(dist.get_rank(), dist.get_world_size())).of(len(records.left))
    left, right = records.left[part], records.right[part]
    layers = [torch.eye(WIDTH).requires_grad_(), torch.eye(WIDTH).requires_grad_()]
    temperature = torch.tensor(TEMPERATURE).requires_grad_()
    both = torch.tensor([a is not None and b is not None for a, b in zip(left, right, strict=True)], dtype=torch.bool)
    sides = [side(left, both, layers[0], seed=1), side(right, both, layers[1], seed=2)]
    if group is None:
        loss: Tensor | None = contrastive_loss(
            sides[0].vector_UD, sides[1].vector_UD, sides[0].index_B, sides[1].index_B, temperature=temperature
        )
    else:
        loss = gathered_contrastive_loss(*sides, group, temperature=temperature)
    assert loss is not None
    loss.backward()
    return Found(loss.item(), layers[0].grad, layers[1].grad, temperature.grad)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_add_up_to_those_of_one_process(name: str, world: int) -> None:
    want = contrasted(BATCHES[name])

    found = run_ranks(contrasted, BATCHES[name], world=world)

    assert sum(each.loss for each in found) == pytest.approx(want.loss, abs=1e-5)
    for place in (1, 2, 3):
        parts = [each[place] for each in found if each[place] is not None]
        torch.testing.assert_close(torch.stack(parts).sum(dim=0), want[place], rtol=1e-6, atol=1e-6)


def test_a_medium_on_two_ranks_is_not_its_own_negative() -> None:
    """All records have the same two media: nothing is to be told apart, wherever they are."""
    found = run_ranks(contrasted, Records([3, 3, 3, 3], [5, 5, 5, 5]), world=2)
    assert [each.loss for each in found] == [0.0, 0.0]


def nothing_to_learn(has_left: bool) -> bool:
    group = dist.group.WORLD
    assert group is not None
    count = 2 if has_left else 0
    left = Side(torch.eye(count, WIDTH), torch.arange(count), torch.empty(0, dtype=torch.int64))
    right = Side(torch.zeros(0, WIDTH), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    return gathered_contrastive_loss(left, right, group) is None


@pytest.mark.parametrize("has_left", [True, False])
def test_where_no_rank_has_one_side_there_is_no_loss_on_any(has_left: bool) -> None:
    assert run_ranks(nothing_to_learn, has_left, world=2) == [True, True]


# Any number of sides ----------------------------------------------------------------------------------------------


class Many(NamedTuple):
    """A batch of four sides, each as in Records, of which nobody has the last; and the records' keys."""

    a: list[int | None]
    b: list[int | None]
    c: list[int | None]
    key: list[int]


NOBODY: list[int | None] = [None] * 8
MANY = {
    "each medium once": Many([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [*range(8)], [0, 0, 1, 1, 2, 3, 3, 0]),
    "media on several ranks": Many(
        [0, 1, 0, 2, 0, 1, 1, 0], [0, 1, 2, 3, 0, 1, 4, 2], [5, None, 5, 5, None, 1, 1, 1], [0, 1, 5, 2, 2, 1, 1, 0]
    ),
    "no rank has the third": Many([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], NOBODY, [0, 1, 2, 3, 0, 1, 2, 3]),
    "no rank has the second": Many([*range(8)], NOBODY, [0, 1, 1, 0, 4, 5, 6, 7], [0, 1, 0, 1, 3, 3, 4, 5]),
    "no record has two": Many(
        [0, 1, 2, None, None, None, None, None],
        [None, None, None, 0, 1, None, None, None],
        [None, None, None, None, None, 0, 1, 2],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ),
    "some ranks have one side alone": Many([0, 1, 0, 1, None, None, 2, 3], [None] * 4 + [0, 1, 2, 3], NOBODY, [0] * 8),
    "one side alone": Many([0, 1, 2, 3, 4, 5, 6, 7], NOBODY, NOBODY, [0, 0, 1, 1, 2, 2, 3, 3]),
    "nobody has anything": Many(NOBODY, NOBODY, NOBODY, [0] * 8),
    "some ranks have no record": Many([0], [1], [2], [4]),
}
HOW: dict[str, dict[str, Any]] = {
    "all pairs": {},
    "named pairs": {"pairs": (("a", "b"), ("c", "b"))},
    "a pair that nobody has": {"pairs": (("a", "b"), ("c", "d"))},
    "spared": {"keyed": True},
    "spared by degrees": {"keyed": True, "by_degrees": True, "pairs": (("a", "b"), ("a", "c"))},
}


class FoundAll(NamedTuple):
    loss: float
    grads: tuple[Tensor | None, ...]
    """Of each side's layer and of the temperature."""


def near_keys(key_K: Tensor) -> Tensor:
    """Keys that are near are held against each other less."""
    return ((key_K[:, None] - key_K).abs() / 3).clamp(max=1.0).float()


def all_contrasted(how: str) -> list[FoundAll]:
    """Of each batch of MANY what `contrasted` says of two sides."""
    return [_all_contrasted(records, **HOW[how]) for records in MANY.values()]


def _all_contrasted(
    records: Many, *, pairs: tuple[tuple[str, str], ...] = (), keyed: bool = False, by_degrees: bool = False
) -> FoundAll:
    group = dist.group.WORLD if dist.is_initialized() else None
    part = (Share() if group is None else Share(dist.get_rank(), dist.get_world_size())).of(len(records.key))
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64).requires_grad_()
    layers, vectors, index, there, ids = {}, {}, {}, {}, {}
    for number, name in enumerate("abcd"):
        media = [None] * len(records.key[part]) if name == "d" else getattr(records, name)[part]
        layers[name] = torch.eye(WIDTH, dtype=torch.float64).requires_grad_()
        there[name] = torch.tensor([medium is not None for medium in media], dtype=torch.bool)
        made = side(media, torch.ones(len(media), dtype=torch.bool), layers[name], seed=number)
        index[name], ids[name] = made.index_B, made.id_U
        if len(made.id_U):
            vectors[name] = made.vector_UD
    settings: dict[str, Any] = {"pairs": pairs, "temperature": temperature}
    settings["key_B"] = torch.tensor(records.key[part]) if keyed else None
    settings["weight_of"] = near_keys if by_degrees else None
    if group is None:
        loss = all_pairs_loss(vectors, index, there, **settings)
    else:
        loss = gathered_all_pairs_loss(vectors, index, there, ids, group, width=WIDTH, **settings)
    loss.backward()
    return FoundAll(loss.item(), (*(layers[name].grad for name in "abcd"), temperature.grad))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("how", HOW)
def test_all_pairs_add_up_to_those_of_one_process(how: str, world: int) -> None:
    everywhere = run_ranks(all_contrasted, how, world=world)

    for place, (name, want) in enumerate(zip(MANY, all_contrasted(how), strict=True)):
        found = [rank[place] for rank in everywhere]
        assert sum(each.loss for each in found) == pytest.approx(want.loss, abs=1e-10), name
        for which, grad in enumerate(want.grads):
            parts = [each.grads[which] for each in found if each.grads[which] is not None]
            # What nobody has a gradient of must have none here either: an optimizer must not decay it.
            assert bool(parts) == (grad is not None), f"{name}: {which}"
            if grad is not None:
                torch.testing.assert_close(torch.stack(parts).sum(dim=0), grad, rtol=1e-10, atol=1e-10)
