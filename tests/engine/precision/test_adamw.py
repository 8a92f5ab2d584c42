"""Weights of 16 bits and state of 8 and 4, stepped: beside torch's AdamW, and beside torchao's formats."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from stacks import RECORDS, batches, build, loss_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dougong.core.errors import ConfigError
from dougong.data.position import Share
from dougong.engine.memory.account import Account
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.precision import states as states_module
from dougong.engine.precision.adamw import NarrowAdamW
from dougong.engine.precision.states import BLOCKS, StateFormat, States
from dougong.engine.precision.weights import Weights, apply_weights, round_randomly, widen_weights
from dougong.engine.step import TrainParts, train_step
from dougong.nn.experts import Router

WAYS: tuple[Weights, ...] = ("bf16-stochastic", "bf16-kahan", "bf16-masters")


class Parts(nn.Module):
    """One of everything that a rule speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.answer = nn.Linear(4, 5, bias=False)
        self.answer.weight = self.words.weight
        self.router = Router(width=4, num_experts=2, num_chosen=1)
        self.frozen.weight.requires_grad_(False)
        self.place = nn.Parameter(torch.randn(1, 3, 4))


def one(value: float, how: Weights, **settings: object) -> tuple[nn.Linear, NarrowAdamW]:
    """A matrix of this number, and what steps it."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, value)
    config = OptimizerConfig(weight_decay=0.0, **settings)  # type: ignore[arg-type]
    optimizer = config.build(model, apply_weights(model, how))
    assert isinstance(optimizer, NarrowAdamW)
    return model, optimizer


def test_trained_matrices_alone_become_narrow() -> None:
    model = Parts()
    apply_weights(model, "bf16-kahan")
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert narrow == {"first.weight", "place"}
    assert model.second.weight is model.first.weight
    assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())


def test_rounding_by_chance_is_right_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1 + 2**-7 / 5, -(3 + 2**-6 * 0.75), 1e-30, 6e4 * (1 + 2**-9)):
        x = torch.full((200_000,), value)
        rounded = round_randomly(x, generator)
        assert rounded.dtype == torch.bfloat16
        step = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
        assert len(rounded.unique()) == 2
        assert (rounded.double() - value).abs().max() < step
        assert abs(rounded.double().mean().item() - value) < 6 * step / 2 / 200_000**0.5
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_randomly(exact.float(), generator), exact)


@pytest.mark.parametrize("how", WAYS)
def test_steps_below_the_last_bit_arrive(how: Weights) -> None:
    """200 of 1e-4, where 1 has neighbours in bf16 at a distance of 4e-3 and 8e-3."""
    model, optimizer = one(1.0, how, learning_rate=1e-4)
    for _ in range(200):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    within = {"bf16-stochastic": 5e-4, "bf16-kahan": 2e-4, "bf16-masters": 1e-5}[how]
    exact = optimizer.exact_weights()[model.weight]
    assert abs(exact.mean().item() - 0.98) < within
    assert abs(model.weight.float().mean().item() - 0.98) < (within if how == "bf16-stochastic" else 2**-8)

    lost = nn.Linear(64, 64, bias=False).bfloat16()  # as torch steps it
    nn.init.constant_(lost.weight, 1.0)
    plain = OptimizerConfig(weight_decay=0.0, learning_rate=1e-4).build(lost)
    for _ in range(200):
        lost.weight.grad = torch.ones_like(lost.weight)
        plain.step()
    assert (lost.weight == 1.0).all()


def test_masters_are_fp32_weights_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, plain = nn.Linear(48, 32), nn.Linear(48, 32)
    plain.load_state_dict(model.state_dict())
    narrowed = apply_weights(model, "bf16-masters")
    config = OptimizerConfig(weight_decay=0.1)
    ours, theirs = config.build(model, narrowed), config.build(plain)
    assert isinstance(ours, NarrowAdamW)
    for _ in range(5):
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.float()
        ours.step()
        theirs.step()
    widen_weights(ours.exact_weights())
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)


@pytest.mark.parametrize("how", WAYS)
def test_rounding_draws_from_no_generator_of_the_run(how: Weights) -> None:
    found = []
    for seed in (0, 0, 1):
        model = nn.Linear(64, 64, bias=False)
        nn.init.constant_(model.weight, 1.0)
        optimizer = OptimizerConfig(learning_rate=1e-3).build(model, apply_weights(model, how), seed=seed)
        before = torch.get_rng_state()
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) is (how != "bf16-stochastic")


@pytest.mark.parametrize("how", WAYS)
def test_its_state_comes_back_in_its_own_formats(how: Weights) -> None:
    (model, first), (other, second) = one(1.0, how, states="8bit"), one(1.0, how, states="8bit")
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        first.step()
    second.load_state_dict(first.state_dict())
    kept, found = first.state[model.weight], second.state[other.weight]
    assert kept.keys() == found.keys()
    for key, value in kept.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
        assert found[key] is not value


@pytest.mark.parametrize("accumulation", [1, 256])
def test_micro_batches_are_added_up_in_fp32(accumulation: int) -> None:
    model = nn.Linear(2, 2, bias=False)
    apply_weights(model, "bf16-kahan", accumulation=accumulation)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    for place in range(accumulation):
        (model(x).sum() * (1.0 if place == 0 else 2**-9)).backward()  # each is lost beside 1 in bf16
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == (torch.bfloat16 if accumulation == 1 else torch.float32)
    assert model.weight.grad.tolist() == [[1 + (accumulation - 1) / 512] * 2] * 2


@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("signed", [True, False])
def test_state_of_few_bits_is_torchaos(states: States, signed: bool) -> None:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    theirs = {"8bit": OptimState8bit, "4bit": OptimState4bit}[states].zeros((64, 80), signed, BLOCKS[states])
    ours = StateFormat(states)
    weight, kept = torch.zeros(64, 80), {}
    ours.begin(kept, "mean", weight)
    assert ours.read(kept, "mean", weight, signed=signed).abs().max() == 0
    x = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 64)[:, None]
    x = x if signed else x.square()
    ours.write(kept, "mean", x, signed=signed)
    theirs.copy_(x)
    assert torch.equal(kept["mean_scale"], theirs.scale)
    assert (kept["mean_codes"] != theirs.codes.flatten()).sum() <= 2  # on the middle between two codes
    theirs.codes.copy_(kept["mean_codes"].view(theirs.codes.shape))
    assert torch.equal(ours.read(kept, "mean", weight, signed=signed), theirs.dequantize())


@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_a_rehearsal_without_numbers_leaves_no_trace(states: States) -> None:
    states_module._codes.cache_clear()
    x = torch.rand(64, 80, generator=torch.Generator().manual_seed(0)) + 0.1

    def kept_for_a_step(format_: StateFormat, value: torch.Tensor, signed: bool) -> torch.Tensor:
        kept: dict[str, torch.Tensor] = {}
        format_.begin(kept, "mean", value)
        format_.write(kept, "mean", value, signed=signed)
        return format_.read(kept, "mean", value, signed=signed)

    for signed in (True, False):
        outside = StateFormat(states)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for rehearsed in (outside, StateFormat(states)):
                assert isinstance(kept_for_a_step(rehearsed, torch.zeros(64, 80), signed), FakeTensor)
        for real in (outside, StateFormat(states)):
            found = kept_for_a_step(real, x, signed)
            assert type(found) is torch.Tensor
            assert (found - x).abs().max() < 0.15


@pytest.mark.parametrize("shape", [(63, 65), (64, 63), (64, 65)])
def test_what_is_small_or_no_whole_number_of_blocks_keeps_fp32(shape: tuple[int, int]) -> None:
    few = shape[0] * shape[1] >= 4096 and shape[0] * shape[1] % 128 == 0
    kept: dict[str, torch.Tensor] = {}
    StateFormat("4bit").begin(kept, "mean", torch.zeros(shape).bfloat16())
    assert ("mean" in kept) is not few
    assert few or kept["mean"].dtype == torch.float32  # a second mean stands still in bf16


@pytest.mark.parametrize("how", ["fp32", *WAYS])
def test_bytes_are_what_they_say(how: Weights) -> None:
    counted = {}
    for states in ("fp32", "8bit", "4bit"):
        model = nn.Linear(512, 512, bias=False)
        narrowed = apply_weights(model, how)
        optimizer = OptimizerConfig(states=states).build(model, narrowed)
        del narrowed
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        account = Account(model, optimizer)
        counted[states] = account.bytes.optimizer / model.weight.numel()
        assert account.bytes.weights == model.weight.numel() * (4 if how == "fp32" else 2)
    besides = {"fp32": 0, "bf16-stochastic": 0, "bf16-kahan": 2, "bf16-masters": 4}[how]
    assert counted["fp32"] == pytest.approx(8 + besides, abs=1e-3)
    assert counted["8bit"] == pytest.approx(2 + 2 * 4 / 256 + besides, abs=1e-3)
    assert counted["4bit"] == pytest.approx(1 + 2 * 4 / 128 + besides, abs=1e-3)


@pytest.mark.parametrize("kind", ["decoder", "sandwich", "convnet"])
def test_every_model_computes_with_narrow_weights(kind: str) -> None:
    losses: list[list[float]] = []
    how: Weights
    for how in ("fp32", "bf16-kahan"):
        model = build(kind).train()
        narrowed = apply_weights(model, how)
        optimizer = OptimizerConfig(learning_rate=3e-3).build(model, narrowed)
        parts = TrainParts(model, loss_of, optimizer, precision="fp32" if how == "fp32" else "bf16")
        torch.manual_seed(1)
        own = batches(kind, Share(0, 2))[:1]
        losses.append([train_step(parts, own, num_records=RECORDS).loss for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_an_optimizer_of_few_bits_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    states_module._codes.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"states=8bit needs the package torchao.* Install dougong\[lowbit\], or use"):
        OptimizerConfig(states="8bit").build(nn.Linear(2, 2))
