"""Gradients whose angles are known by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.watch.conflict import conflicts, of_modalities


def test_losses_that_pull_against_each_other_are_told_with_their_angle() -> None:
    w = torch.zeros(2, requires_grad=True)
    losses: dict[str, Callable[[], Tensor]] = {
        "one": lambda: w[0],
        "other": lambda: -2 * w[0] + 2 * w[1],
        "none": lambda: 0.0 * w.sum(),
    }

    found = conflicts([w], losses)

    assert found.norm == pytest.approx({"one": 1.0, "other": math.sqrt(8), "none": 0.0})
    assert found.cosine["one", "other"] == pytest.approx(-math.sqrt(0.5))
    assert found.cosine["one", "none"] is None
    assert found.worst() == ("one", "other")
    assert w.grad is None
    with pytest.raises(ConfigError, match="1 losses of 1 trained parameters"):
        conflicts([w], {"one": losses["one"]})


def sandwich() -> Sandwich:
    torch.manual_seed(0)
    inputs = {"photo": ImageInput(height=16, width=16), "words": TextInput(vocabulary_size=9, max_tokens=16)}
    target = Target(name="kind", task="single_label", labels=("a", "b"))
    return SandwichConfig(width=16).build(Signature(inputs=inputs, target=target)).eval()


def batch(photo_says: int) -> Batch:
    """Four records of one class, one photo and one sentence."""
    every, there = torch.arange(4), torch.ones(4).bool()
    media = {
        "photo": MediaBatch({"pixels_UCHW": torch.full((4, 3, 16, 16), 0.5)}, every, there),
        "words": MediaBatch({"ids_UT": torch.full((4, 4), 3), "mask_UT": torch.ones(4, 4).bool()}, every, there),
    }
    return Batch(media, torch.tensor([photo_says] * 4))


def test_modalities_that_are_asked_for_opposite_answers_are_in_conflict() -> None:
    network = sandwich()

    def same(output: Tensor, given: Batch) -> Tensor:
        assert given.target is not None
        return functional.cross_entropy(output, given.target)

    def opposite(output: Tensor, given: Batch) -> Tensor:
        flipped = bool(given.media["photo"].present_B.any())
        assert given.target is not None
        return functional.cross_entropy(output, 1 - given.target if flipped else given.target)

    agreeing = of_modalities(network, batch(0), same).cosine["photo", "words"]
    against = of_modalities(network, batch(0), opposite).cosine["photo", "words"]

    assert agreeing is not None
    # Of two classes, the gradient of the one is that of the other turned round.
    assert against == pytest.approx(-agreeing, abs=1e-5)
    assert abs(agreeing) > 0.01
    assert all(parameter.grad is None for parameter in network.parameters())
