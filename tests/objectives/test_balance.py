"""Each formula against values worked out by hand, and the two backward passes against plain gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dougong.engine.step import TrainParts, plain_backward
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.balance import (
    Losses,
    ModulatedBackward,
    ParetoBackward,
    blending_weights,
    modulation,
    pareto_weights,
)


def test_the_stronger_modality_is_held_back_by_its_lead() -> None:
    right_BM = torch.tensor([[0.9, 0.3], [0.6, 0.2]])
    factor_M = modulation(right_BM, torch.ones(2, 2, dtype=torch.bool), alpha=0.5)
    torch.testing.assert_close(factor_M, torch.tensor([1 - math.tanh(0.5 * 1.5 / 0.5), 1.0]))


def test_of_three_the_ratio_is_to_the_others_mean() -> None:
    factor_M = modulation(torch.tensor([[0.8, 0.4, 0.2]]), torch.ones(1, 3, dtype=torch.bool), alpha=0.1)
    torch.testing.assert_close(factor_M, torch.tensor([1 - math.tanh(0.1 * 0.8 / 0.3), 1.0, 1.0]))


def test_records_that_lack_a_modality_say_nothing_of_skill() -> None:
    right_BM = torch.tensor([[0.9, 0.3], [0.0, 0.9], [0.0, 0.9], [0.0, 0.9]])
    present_BM = torch.tensor([[True, True], [False, True], [False, True], [False, True]])
    factor_M = modulation(right_BM, present_BM, alpha=0.5)
    torch.testing.assert_close(factor_M, torch.tensor([1 - math.tanh(1.5), 1.0]))
    alone_BM = torch.tensor([[False, True]])
    torch.testing.assert_close(modulation(right_BM[:1], alone_BM, alpha=0.5), torch.ones(2))


def test_blending_weighs_what_generalises_and_does_not_overfit() -> None:
    weights = blending_weights(
        train_before={"a": 2.0, "b": 2.0},
        train_after={"a": 1.0, "b": 0.2},
        held_out_before={"a": 2.0, "b": 2.0},
        held_out_after={"a": 1.2, "b": 1.0},
    )
    # a: gained .8, gap grew by .2: 20. b: gained 1.0, gap grew by .8: 1.5625.
    assert weights["a"] == pytest.approx(20 / 21.5625)
    assert weights["b"] == pytest.approx(1.5625 / 21.5625)


def test_a_head_that_gets_worse_weighs_nothing() -> None:
    before = {"a": 1.0, "b": 1.0}
    weights = blending_weights(before, {"a": 0.5, "b": 0.1}, before, {"a": 0.8, "b": 1.4})
    assert weights == {"a": 1.0, "b": 0.0}
    assert blending_weights(before, before, before, {"a": 1.1, "b": 1.2}) == {"a": 0.5, "b": 0.5}


def test_gradients_that_agree_are_added() -> None:
    assert pareto_weights(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == (0.5, 0.5)


def test_gradients_that_conflict_meet_in_the_shortest_vector() -> None:
    whole, own = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    share, rest = pareto_weights(whole, own)
    shortest = share * whole + rest * own
    # The foot of the perpendicular from the origin to the line through (1, 0) and (-1, 1): (.2, .4).
    torch.testing.assert_close(shortest, torch.tensor([0.2, 0.4]))
    assert float(shortest @ whole) > 0
    assert float(shortest @ own) > 0


def test_when_one_is_far_the_longer_it_is_the_shorter_alone_that_counts() -> None:
    assert pareto_weights(torch.tensor([0.1, 0.0]), torch.tensor([-5.0, 0.0]))[0] == pytest.approx(5 / 5.1)


class Said(NamedTuple):
    output_BC: Tensor
    own_BMC: Tensor


class Two(BlockStack[Any, Said]):
    """Two linear encoders, a head of each, and one on their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.encoders = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        self.whole = nn.Linear(4, 2)

    def embed(self, batch: Batch) -> Any:
        return [encoder(media.values["x"]) for encoder, media in zip(self.encoders, batch.media.values(), strict=True)]

    def head(self, state: Any) -> Said:
        own = [head(x) for head, x in zip(self.heads, state, strict=True)]
        return Said(self.whole(state[0] + state[1]), torch.stack(own, dim=1))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(encoder.parameters()) for name, encoder in zip("ab", self.encoders, strict=True)}


def losses(said: Said, batch: Batch) -> Losses:
    assert batch.target is not None
    entropy = nn.functional.cross_entropy
    own = {name: entropy(said.own_BMC[:, m], batch.target, reduction="sum") for m, name in enumerate("ab")}
    return Losses({"decision": entropy(said.output_BC, batch.target, reduction="sum")}, own)


def total(said: Said, batch: Batch) -> Tensor:
    found = losses(said, batch)
    return found.whole + sum(found.own.values())


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    media = {
        name: MediaBatch(
            {"x": torch.randn(6, 3, generator=generator)}, torch.arange(6), torch.ones(6, dtype=torch.bool)
        )
        for name in "ab"
    }
    return Batch(media, torch.tensor([0, 1, 0, 1, 1, 0]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def taken(model: Two, backward: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    parts = TrainParts(model, total, torch.optim.SGD(model.parameters()))
    loss = backward(parts, batch, 6)
    return float(loss), gradients(model)


def test_modulation_scales_one_encoder_and_nothing_else(batch: Batch) -> None:
    torch.manual_seed(0)
    model = Two()
    said = model(batch)
    assert batch.target is not None
    right_BM = said.own_BMC.detach().softmax(-1)[torch.arange(6), :, batch.target]
    factor_M = modulation(right_BM, torch.ones(6, 2, dtype=torch.bool), alpha=0.7)
    assert (factor_M < 1).any()

    loss, plain = taken(model, plain_backward, batch)
    same, held = taken(model, ModulatedBackward(model.parts(), alpha=0.7, noise=False), batch)

    assert same == pytest.approx(loss)
    for name, gradient in held.items():
        place = int(name.split(".")[1]) if name.startswith("encoders") else None
        factor = 1.0 if place is None else float(factor_M[place])
        torch.testing.assert_close(gradient, plain[name] * factor)


def test_the_noise_is_as_wide_as_the_gradient(batch: Batch) -> None:
    torch.manual_seed(0)
    model = Two()
    backward = ModulatedBackward(model.parts(), alpha=100.0)  # nothing is left of the stronger one's gradient
    _, plain = taken(model, plain_backward, batch)
    drawn = [taken(model, backward, batch)[1] for _ in range(200)]
    noisy = [n for n in plain if not torch.equal(drawn[0][n], plain[n])]
    assert noisy == [name for name in plain if name.startswith("encoders")]  # as in the paper, all encoders'
    for name in noisy:
        values = torch.stack([each[name] for each in drawn])
        if plain[name].numel() > 1:
            torch.testing.assert_close((values - values.mean(dim=0)).std(), plain[name].std(), rtol=0.15, atol=1e-7)


def test_pareto_mixes_each_encoder_and_leaves_the_heads(batch: Batch) -> None:
    torch.manual_seed(0)
    model = Two()
    loss, plain = taken(model, plain_backward, batch)
    same, mixed = taken(model, ParetoBackward(model.parts(), losses), batch)
    assert same == pytest.approx(loss)

    found = losses(model(batch), batch)
    encoder = list(model.encoders[0].parameters())
    whole = torch.autograd.grad(found.whole / 6, encoder, retain_graph=True)
    own = torch.autograd.grad(found.own["a"] / 6, encoder)
    whole_F, own_F = (torch.cat([g.flatten() for g in each]) for each in (whole, own))
    a, b = pareto_weights(whole_F, own_F)
    want_F = 2 * a * whole_F + 2 * b * own_F
    want_F = want_F * 1.5 * max(1.0, float((whole_F + own_F).norm() / want_F.norm()))
    torch.testing.assert_close(torch.cat([mixed["encoders.0.weight"].flatten(), mixed["encoders.0.bias"]]), want_F)
    for name in ("whole.weight", "heads.0.weight", "heads.1.bias"):
        torch.testing.assert_close(mixed[name], plain[name])


@pytest.mark.parametrize("kind", ["modulated", "pareto"])
def test_micro_batches_add_up(batch: Batch, kind: str) -> None:
    torch.manual_seed(0)
    model = Two()
    backward: Any = (
        ModulatedBackward(model.parts(), alpha=0.7, noise=False)
        if kind == "modulated"
        else ParetoBackward(model.parts(), losses)
    )
    _, once = taken(model, backward, batch)
    parts = TrainParts(model, total, torch.optim.SGD(model.parameters()))
    backward(parts, batch, 6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])
