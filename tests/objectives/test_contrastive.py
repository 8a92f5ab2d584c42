import math

import pytest
import torch
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.model.mining import Keyed, spared
from dougong.objectives.contrastive import all_pairs_loss, contrastive_loss, held_against, negative_weights


def unit(*shape: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape), dim=-1)


def test_where_every_medium_has_one_partner_it_is_clip() -> None:
    left_UD, right_VD, order = unit(6, 8), unit(6, 8), torch.randperm(6)

    found = contrastive_loss(left_UD, right_VD, torch.arange(6), order, temperature=0.1)

    score_UV = left_UD @ right_VD.T / 0.1
    there = functional.cross_entropy(score_UV, order, reduction="sum")
    back = functional.cross_entropy(score_UV.T, order.argsort(), reduction="sum")
    torch.testing.assert_close(found, (there + back) / 2)


def test_two_voices_of_one_sentence_are_never_held_against_each_other() -> None:
    sentence_D, other_D = unit(2, 8)
    voices_UD = torch.stack([sentence_D, sentence_D, other_D])
    right_VD = torch.stack([sentence_D, other_D])

    found = contrastive_loss(voices_UD, right_VD, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), temperature=0.01)

    assert found == pytest.approx(0.0, abs=1e-4)


def test_records_that_repeat_a_pair_count_each() -> None:
    left_UD, right_VD = unit(3, 8), unit(3, 8)
    once = contrastive_loss(left_UD, right_VD, torch.arange(3), torch.arange(3))
    twice = contrastive_loss(left_UD, right_VD, torch.arange(3).repeat(2), torch.arange(3).repeat(2))
    torch.testing.assert_close(twice, 2 * once)


def test_a_medium_without_a_partner_is_something_to_be_told_from_and_no_more() -> None:
    left_UD, right_VD = unit(3, 8).requires_grad_(), unit(2, 8).requires_grad_()

    loss = contrastive_loss(left_UD, right_VD, torch.tensor([0, 1]), torch.tensor([0, 1]))
    loss.backward()

    assert left_UD.grad is not None
    assert left_UD.grad.isfinite().all()
    assert left_UD.grad[2].abs().sum() > 0
    assert (
        contrastive_loss(left_UD, right_VD, torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)) == 0
    )


def test_a_negative_that_weighs_nothing_is_as_if_it_were_not_there() -> None:
    left_UD, right_VD = unit(3, 8).requires_grad_(), unit(4, 8).requires_grad_()
    order = torch.arange(3)
    negative_UV = torch.ones(3, 4)
    negative_UV[:, 3] = 0.0

    spared = contrastive_loss(left_UD, right_VD, order, order, negative_UV=negative_UV)
    spared.backward()

    torch.testing.assert_close(spared, contrastive_loss(left_UD, right_VD[:3], order, order))
    assert right_VD.grad is not None
    assert right_VD.grad[3].abs().sum() == 0
    assert right_VD.grad.isfinite().all()


def test_a_negative_that_weighs_half_has_half_its_share_of_the_softmax() -> None:
    left_UD = torch.tensor([[1.0, 0.0]])
    right_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    found = contrastive_loss(
        left_UD,
        right_VD,
        torch.tensor([0]),
        torch.tensor([0]),
        temperature=1.0,
        negative_UV=torch.tensor([[0.25, 0.5]]),  # the partner weighs 1, whatever is said of it
    )

    # To the right log(e + e^0 / 2) - 1; to the left there is one medium alone, and nothing to be wrong about.
    assert found == pytest.approx(0.5 * (math.log(math.e + 0.5) - 1.0))


def test_weights_that_are_themselves_learnt_have_gradients_where_they_are_nothing() -> None:
    weight_UV = torch.tensor([[1.0, 0.0, 0.5], [0.5, 1.0, 0.0], [0.0, 1.0, 1.0]], requires_grad=True)
    own = torch.arange(3)
    x_UD = functional.normalize(torch.randn(3, 4), dim=1)

    contrastive_loss(x_UD, x_UD.flip(0), own, own, negative_UV=weight_UV).backward()

    assert weight_UV.grad is not None
    assert weight_UV.grad.isfinite().all()
    assert weight_UV.grad[0, 2] > 0


def test_two_too_alike_are_held_against_each_other_less_and_less() -> None:
    weights = negative_weights(torch.tensor([[0.0, 0.5, 0.7, 0.9, 1.0]]), low=0.5, high=0.9)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0]]))
    with pytest.raises(ConfigError, match="low=0.9 must be below high=0.5"):
        negative_weights(torch.zeros(1, 1), low=0.9, high=0.5)


def test_records_of_one_key_are_spared() -> None:
    left = Keyed(torch.tensor([0, 1, 2]), torch.tensor([7, 7, 9]), 4)
    found = spared(left, Keyed(torch.tensor([0, 1, 1]), torch.tensor([7, 7, 9]), 2))
    # Media 0 and 1 are of key 7, as are right 0 and 1; right 1 is of key 9 too; left 3 is nobody's.
    assert found.tolist() == [[True, True], [True, True], [False, True], [False, False]]


@pytest.mark.parametrize("by_degrees", [False, True])
def test_a_medium_whose_record_lacks_the_other_side_is_spared_as_any(by_degrees: bool) -> None:
    """Records 0 and 2 are of one key, and 2 has no words."""
    vectors = {"picture": unit(3, 8), "words": unit(2, 8)}
    index = {"picture": torch.tensor([0, 1, 2]), "words": torch.tensor([0, 1, 0])}
    there = {"picture": torch.tensor([True] * 3), "words": torch.tensor([True, True, False])}

    def unequal(key_K: torch.Tensor) -> torch.Tensor:
        return (key_K[:, None] != key_K).float()

    key_B, weight_of = torch.tensor([5, 6, 5]), unequal if by_degrees else None
    found = all_pairs_loss(vectors, index, there, key_B=key_B, weight_of=weight_of)

    negative_UV = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    own = torch.arange(2)
    torch.testing.assert_close(
        found, contrastive_loss(vectors["picture"], vectors["words"], own, own, negative_UV=negative_UV)
    )


def test_all_pairs_are_averaged_and_one_can_be_named() -> None:
    vectors = {name: unit(4, 8) for name in ("a", "b", "c")}
    index = {"a": torch.arange(4), "b": torch.tensor([1, 0, 3, 2]), "c": torch.tensor([3, 3, 0, 0])}
    there = {name: torch.ones(4, dtype=torch.bool) for name in vectors}
    there["c"] = torch.tensor([True, False, True, True])

    def one(left: str, right: str) -> torch.Tensor:
        both = there[left] & there[right]
        return contrastive_loss(vectors[left], vectors[right], index[left][both], index[right][both])

    torch.testing.assert_close(
        all_pairs_loss(vectors, index, there), (one("a", "b") + one("a", "c") + one("b", "c")) / 3
    )
    torch.testing.assert_close(all_pairs_loss(vectors, index, there, pairs=[("b", "c")]), one("b", "c"))
    with pytest.raises(ConfigError, match="names 'd', which is no modality here. Use two of a, b, c"):
        all_pairs_loss(vectors, index, there, pairs=[("a", "d")])


def test_a_modality_that_the_batch_lacks_is_in_no_pair() -> None:
    vectors = {"a": unit(2, 8).requires_grad_()}
    index = {name: torch.zeros(2, dtype=torch.long) for name in ("a", "b")}
    there = {"a": torch.ones(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)}

    loss = all_pairs_loss(vectors, index, there)
    loss.backward()

    assert loss == 0
    assert vectors["a"].grad is not None


def test_equal_keys_reach_the_loss() -> None:
    vectors = {"a": unit(2, 8), "b": unit(2, 8)}
    index = {name: torch.arange(2) for name in vectors}
    there = {name: torch.ones(2, dtype=torch.bool) for name in vectors}

    # Two records of one key: nothing is left to be told apart.
    assert all_pairs_loss(vectors, index, there, key_B=torch.tensor([5, 5])) == pytest.approx(0.0, abs=1e-6)
    apart = all_pairs_loss(vectors, index, there, key_B=torch.tensor([5, 6]))
    torch.testing.assert_close(apart, all_pairs_loss(vectors, index, there))


def test_scores_are_not_rounded_where_products_are() -> None:
    torch.manual_seed(0)
    left, right = (functional.normalize(torch.randn(16, 32), dim=-1).requires_grad_() for _ in range(2))
    order = torch.arange(16)

    exact = contrastive_loss(left, right, order, order, temperature=0.01)
    (wanted,) = torch.autograd.grad(exact, left)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(left, right, order, order, temperature=0.01)
    (gradient,) = torch.autograd.grad(found, left)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("vectors", [{}, {"a": torch.ones(2, 8)}])
def test_a_batch_without_any_pair_can_be_learnt_from_all_the_same(vectors: dict[str, torch.Tensor]) -> None:
    index = {name: torch.zeros(2, dtype=torch.long) for name in ("a", "b")}
    there = {"a": torch.tensor([bool(vectors)] * 2), "b": torch.zeros(2, dtype=torch.bool)}

    loss = all_pairs_loss(vectors, index, there, temperature=torch.tensor(0.1))
    loss.backward()

    assert loss == 0
    with torch.no_grad():
        assert not all_pairs_loss(vectors, index, there).requires_grad


def test_media_are_held_against_each_other_as_the_most_alike_of_their_records() -> None:
    def weight_of(key_K: torch.Tensor) -> torch.Tensor:
        assert key_K.tolist() == [3, 7, 9]
        return torch.tensor([[0.0, 0.5, 1.0], [0.5, 0.0, 0.25], [1.0, 0.25, 0.0]])

    # Left 0 is of keys 7 and 9, left 1 of 3; right 0 of 7, right 1 of 9 and 3; left 2 and right 2 are nobody's.
    key_B = torch.tensor([7, 9, 3])
    left, right = Keyed(torch.tensor([0, 0, 1]), key_B, 3), Keyed(torch.tensor([0, 1, 1]), key_B, 3)
    found = held_against(left, right, weight_of)

    assert found.tolist() == [[0.0, 0.0, 1.0], [0.5, 0.0, 1.0], [1.0, 1.0, 1.0]]


def test_weights_of_nothing_but_equal_keys_spare_what_keys_alone_spare() -> None:
    vectors = {name: unit(4, 8) for name in ("a", "b")}
    index = {name: torch.arange(4) for name in vectors}
    there = {name: torch.ones(4, dtype=torch.bool) for name in vectors}
    key_B = torch.tensor([5, 6, 5, 8])

    found = all_pairs_loss(vectors, index, there, key_B=key_B, weight_of=lambda key_K: 1 - torch.eye(len(key_K)))

    torch.testing.assert_close(found, all_pairs_loss(vectors, index, there, key_B=key_B), rtol=0, atol=0)
    half = all_pairs_loss(vectors, index, there, key_B=key_B, weight_of=lambda key_K: 0.5 - 0.5 * torch.eye(len(key_K)))
    assert half < found
