import itertools
import math
from pathlib import Path

import pytest
import torch
from tiny_run import TinyLoader, TinyModel, tiny_loss
from torch import nn

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig, train


def test_only_matrices_decay() -> None:
    model = TinyModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    OptimizerConfig(learning_rate=0.5, weight_decay=0.1).build(model).step()

    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert {p.ndim for p in model.parameters()} == {1, 2}


def test_the_first_step_is_adams() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)

    OptimizerConfig(learning_rate=0.01, weight_decay=0.0, betas=(0.8, 0.95)).build(model).step()

    torch.testing.assert_close(model.weight.detach(), before + 0.01)


def test_frozen_parameters_are_left_out() -> None:
    model = TinyModel()
    model.first.requires_grad_(False)
    held = {p for group in OptimizerConfig().build(model).param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert model.first.weight not in held


def test_the_settings_reach_every_group() -> None:
    groups = OptimizerConfig(learning_rate=0.02, betas=(0.5, 0.6), weight_decay=0.3).build(TinyModel()).param_groups
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in groups] == [
        (0.02, (0.5, 0.6), 0.3),
        (0.02, (0.5, 0.6), 0.0),
    ]
    assert all(group["fused"] for group in groups)


def test_the_rate_rises_to_its_height_and_falls_to_its_end() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.1, final_ratio=0.25)
    rates = [config.learning_rate_at(step, 100) for step in range(100)]

    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert rates[10] == 2.0
    assert all(left > right for left, right in itertools.pairwise(rates[10:]))
    assert rates[10 + 44] == pytest.approx(2.0 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 44 / 89))))
    assert rates[99] == pytest.approx(0.5)


def test_a_constant_rate_stays() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.1, schedule="constant")
    assert {config.learning_rate_at(step, 100) for step in range(10, 100)} == {2.0}
    assert config.learning_rate_at(0, 100) < 0.2


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 1.0])
def test_the_shortest_runs_have_a_rate_too(total_steps: int, warmup_ratio: float) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=warmup_ratio)
    rates = [config.learning_rate_at(step, total_steps) for step in range(total_steps)]
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert rates[0] > 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("learning_rate", 0.0, "must be above 0 and finite. Use for example 1e-3"),
        ("learning_rate", math.inf, "must be above 0 and finite"),
        ("betas", (0.9, 1.0), "must both be in [0, 1)"),
        ("weight_decay", -0.1, "must not be below 0. Use 0 for none"),
        ("weight_decay", math.nan, "must not be below 0"),
        ("warmup_ratio", 1.1, "must be a ratio, from 0 to 1"),
        ("final_ratio", -0.1, "must be a ratio, from 0 to 1"),
        ("schedule", "linear", "'cosine' or 'constant'"),
    ],
)
def test_nonsense_is_refused_by_name(setting: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(OptimizerConfig, {setting: value}, where="optimizer")
    assert setting in str(refused.value)
    assert message in str(refused.value)


class Parted(TinyModel):
    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"first": list(self.first.parameters()), "last": list(self.last.parameters())}


def test_a_part_may_learn_faster_than_the_others() -> None:
    model = Parted()
    groups = OptimizerConfig(multipliers={"first": 4.0}).build(model).param_groups

    multiplier_of = {id(p): group["multiplier"] for group in groups for p in group["params"]}

    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(multiplier_of[id(p)] == 4.0 for p in model.first.parameters())
    assert all(multiplier_of[id(p)] == 1.0 for p in model.last.parameters())


def test_the_trainer_obeys_the_multipliers(tmp_path: Path) -> None:
    slow, model = Parted(), Parted()
    before = slow.first.weight.clone()
    for each, multiplier in ((slow, 1.0), (model, 4.0)):
        config = TrainConfig(
            steps=1,
            precision="fp32",
            optimizer=OptimizerConfig(warmup_ratio=0, weight_decay=0, multipliers={"first": multiplier}),
        )
        train(each, tiny_loss, TinyLoader(), config, folder=tmp_path / str(multiplier))

    torch.testing.assert_close(model.first.weight - before, 4 * (slow.first.weight - before), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(model.last.weight, slow.last.weight)


def test_a_multiplier_for_no_part_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="multipliers names 'third', which is no part of the model. Use some of first, last"
    ):
        OptimizerConfig(multipliers={"third": 2.0}).build(Parted())
    with pytest.raises(ValueError, match="first: 0.0 must be above 0"):
        OptimizerConfig(multipliers={"first": 0.0})
