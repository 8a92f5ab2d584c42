"""Runs whose weights have 16 bits, or whose optimizer's state has few: whole, stopped, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import WIDTH, TinyModel, interrupt_at, losses_of, same_weights, train_tiny, watch_scores
from torch import nn

from dougong.core.errors import CheckpointError
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Weights
from dougong.engine.trainer import TrainConfig
from dougong.engine.weights import read_weights

WAYS: tuple[Weights, ...] = ("bf16-stochastic", "bf16-kahan", "bf16-masters")


class Wide(TinyModel):
    """Has a matrix that is large enough for few bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2), nn.BatchNorm1d(64))])
        self.last = nn.Linear(64, 3)


def trained(folder: Path, weights: Weights, states: States = "fp32", **more: Any) -> tuple[Any, TinyModel]:
    return train_tiny(
        folder,
        model=Wide(),
        weights=weights,
        **{"precision": "bf16", "optimizer": {"states": states, "learning_rate": 3e-3}, "steps": 10, **more},
    )


@pytest.mark.parametrize("weights", ["fp32", *WAYS])
@pytest.mark.parametrize("states", ["fp32", "8bit", "4bit"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, weights: Weights, states: States) -> None:
    _, whole = trained(tmp_path / "whole", weights, states, ema=0.9)
    trained(tmp_path / "stopped", weights, states, ema=0.9, hear=interrupt_at(5))
    assert len(losses_of(tmp_path / "stopped")) == 5
    _, resumed = trained(tmp_path / "stopped", weights, states, ema=0.9, resume=True)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("weights", WAYS)
def test_a_run_leaves_the_best_known_weights_in_fp32(tmp_path: Path, weights: Weights) -> None:
    _, model = trained(tmp_path, weights)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    folder = best_weights(tmp_path)
    loaded = Wide()
    load_weights(loaded, folder)
    assert same_weights(loaded, model)
    kept = read_weights(folder / "model.safetensors")
    assert kept["last.weight"].dtype == torch.bfloat16
    narrow = torch.equal(model.last.weight, kept["last.weight"].float())
    assert narrow is (weights == "bf16-stochastic")
    assert torch.allclose(model.last.weight, kept["last.weight"].float(), rtol=2**-8)


def test_an_average_of_narrow_weights_is_fp32(tmp_path: Path) -> None:
    _, model = trained(tmp_path, "bf16-kahan", ema=0.9, watch=watch_scores(*[0.5] * 9))
    kept = read_weights(best_weights(tmp_path) / "average.safetensors")
    assert kept["last.weight"].dtype == torch.float32
    load_weights(model, best_weights(tmp_path))
    assert torch.equal(model.last.weight, kept["last.weight"])


def test_another_format_is_not_gone_on_with(tmp_path: Path) -> None:
    trained(tmp_path, "bf16-kahan", hear=interrupt_at(2))
    with pytest.raises(CheckpointError, match="another format of weights: bf16-kahan there, bf16-masters here"):
        trained(tmp_path, "bf16-masters", resume=True)
    with pytest.raises(CheckpointError, match="another format of the optimizer's state: fp32 there, 8bit here"):
        trained(tmp_path, "bf16-kahan", "8bit", resume=True)


def test_narrow_weights_are_multiplied_in_bf16(tmp_path: Path) -> None:
    result, _ = trained(tmp_path, "bf16-masters", precision="auto", steps=1)
    assert result.precision.precision == "bf16"
    assert result.precision.ratio is None
    with pytest.raises(ValueError, match="weights=bf16-kahan are multiplied in bf16, and precision=fp16 is not"):
        TrainConfig(weights="bf16-kahan", precision="fp16")
