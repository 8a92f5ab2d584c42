import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import TinyLoader, TinyModel, TinyOutput, same_weights, tiny_loss, weights
from torch import Tensor

from dougong.engine.precision import choice as precision
from dougong.engine.precision.choice import Chosen, PrecisionChoice, autocast, choose_precision, measure_precision
from dougong.engine.random_state import random_state
from dougong.nn.batch import Batch


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the clock say how long each format takes, pair by pair."""

    def say(*pairs: tuple[float, float]) -> None:
        seconds = iter([each for pair in pairs for each in pair])

        def take(run: Callable[[Chosen], bool], chosen: Chosen) -> float:
            run(chosen)
            return next(seconds)

        monkeypatch.setattr(precision, "_seconds", take)

    return say


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "fp32"), (1.09, "fp32"), (1.1, "bf16"), (3.0, "bf16")])
def test_bf16_is_chosen_only_where_it_is_clearly_faster(
    measured: Callable[..., None], ratio: float, chosen: Chosen
) -> None:
    measured(*[(ratio, 1.0)] * 5)
    choice = choose_precision(TinyModel(), tiny_loss, TinyLoader().all_tensors())
    assert choice == PrecisionChoice(chosen, ratio)


def test_one_disturbed_pair_decides_nothing(measured: Callable[..., None]) -> None:
    measured((1.0, 1.0), (50.0, 1.0), (1.0, 1.0), (1.0, 1.0), (40.0, 1.0))
    assert measure_precision(lambda chosen: True) == PrecisionChoice("fp32", 1.0)


def test_the_formats_take_turns_and_the_first_turns_are_not_timed(measured: Callable[..., None]) -> None:
    measured(*[(1.0, 1.0)] * 3)
    turns: list[Chosen] = []

    def run(chosen: Chosen) -> bool:
        turns.append(chosen)
        return True

    measure_precision(run, pairs=3)
    assert turns == ["fp32", "bf16"] * 4


def test_a_loss_that_bf16_makes_infinite_settles_it(measured: Callable[..., None]) -> None:
    measured()

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        return output.output_BC.sum() * (float("inf") if output.output_BC.dtype == torch.bfloat16 else 1.0)

    choice = choose_precision(TinyModel(), loss, TinyLoader().all_tensors())
    assert choice == PrecisionChoice("fp32", None)


def test_a_spent_budget_leaves_one_pair(measured: Callable[..., None]) -> None:
    measured((2.0, 1.0))
    assert measure_precision(lambda chosen: True, budget_seconds=0.0) == PrecisionChoice("bf16", 2.0)


def test_measuring_leaves_no_trace() -> None:
    model, batch = TinyModel(), TinyLoader().all_tensors()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = weights(model), random_state()

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        return tiny_loss(output, batch) * (1 + random.random() + np.random.rand())

    choice = choose_precision(model, loss, batch, pairs=2)

    assert choice.ratio is not None
    assert same_weights(model, before)
    assert random_state() == state
    assert all(parameter.grad is not None and bool((parameter.grad == 1).all()) for parameter in model.parameters())


class Exchanged(torch.autograd.Function):
    """Stands for an exchange whose backward other ranks wait in; here it leads to no parameter."""

    backwards = 0

    @staticmethod
    def forward(_: Any, anchor: Tensor) -> Tensor:
        return anchor.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        Exchanged.backwards += 1
        return gradient


@pytest.mark.parametrize("alone", [False, True])
def test_an_exchange_that_leads_to_no_parameter_has_its_backward_all_the_same(alone: bool) -> None:
    model, batch = TinyModel(), TinyLoader().all_tensors()
    Exchanged.backwards = 0

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        exchanged: Tensor = Exchanged.apply(torch.zeros((), requires_grad=True))
        return exchanged if alone else exchanged + tiny_loss(output, batch)

    choose_precision(model, loss, batch, pairs=1)

    assert Exchanged.backwards == 4  # two untimed turns, and a pair


@pytest.mark.parametrize(("chosen", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_format_and_weights_stay_in_fp32(chosen: Chosen, dtype: torch.dtype) -> None:
    model = TinyModel()
    with autocast(chosen, "cpu"):
        assert model(TinyLoader().all_tensors()).output_BC.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
