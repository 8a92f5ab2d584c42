"""Gradients whose angles are known by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.engine.flow.conflict import conflicts, conflicts_told, of_modalities, of_terms
from dougong.model.sandwich import Sandwich, SandwichConfig, SandwichOutput
from dougong.nn.batch import Batch, MediaBatch, first_records


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

    def same(output: SandwichOutput, given: Batch) -> Tensor:
        assert given.target is not None
        return functional.cross_entropy(output.output_BC, given.target)

    def opposite(output: SandwichOutput, given: Batch) -> Tensor:
        flipped = bool(given.media["photo"].present_B.any())
        assert given.target is not None
        return functional.cross_entropy(output.output_BC, 1 - given.target if flipped else given.target)

    agreeing = of_modalities(network, batch(0), same).cosine["photo", "words"]
    against = of_modalities(network, batch(0), opposite).cosine["photo", "words"]

    assert agreeing is not None
    # Of two classes, the gradient of the one is that of the other turned round.
    assert against == pytest.approx(-agreeing, abs=1e-5)
    assert abs(agreeing) > 0.01
    assert all(parameter.grad is None for parameter in network.parameters())


def terms(output: SandwichOutput, given: Batch) -> dict[str, Tensor]:
    assert given.target is not None
    decision = functional.cross_entropy(output.output_BC, given.target, reduction="sum")
    return {"decision": decision, "its opposite": -2 * decision, "nothing": torch.zeros(())}


def test_terms_of_a_loss_are_compared_by_one_forward() -> None:
    network, calls = sandwich(), []
    network.register_forward_hook(lambda *_: calls.append(1))

    found = of_terms(network, batch(0), terms)

    assert found.cosine["decision", "its opposite"] == pytest.approx(-1.0, abs=1e-6)
    assert found.norm["its opposite"] == pytest.approx(2 * found.norm["decision"], rel=1e-5)
    assert found.cosine["decision", "nothing"] is None
    assert len(calls) == 1


def test_in_training_both_are_told_and_random_state_and_buffers_are_as_they_were() -> None:
    network, seen = sandwich().train(), []
    network.register_forward_hook(lambda *_: seen.append(torch.rand(1)))  # who listens is not to hear of it
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()

    told = conflicts_told(network, batch(0), terms)

    assert [(row["of"], row["one"], row["other"]) for row in told] == [
        ("objectives", "decision", "its opposite"),
        ("modalities", "photo", "words"),
    ]
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_first_records_have_their_own_media_alone() -> None:
    whole = batch(1)
    photo = whole.media["photo"]._replace(
        index_B=torch.tensor([2, 2, 0, 1]), present_B=torch.tensor([True, True, False, True])
    )
    whole = whole._replace(media={**whole.media, "photo": photo})

    few = first_records(whole, 2)

    assert few.num_records == 2
    assert few.media["photo"].values["pixels_UCHW"].shape[0] == 1
    assert few.media["photo"].index_B.tolist() == [0, 0]
    assert few.media["words"].values["ids_UT"].shape[0] == 2
    assert first_records(whole, 4) is whole
