"""A model that makes activations anew trains as one that keeps them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from stacks import RECORDS, batches, build, loss_of
from torch import Tensor

from dougong.data.position import Share
from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.memory.recompute import KEEPS, Keep, apply_recompute
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.step import TrainParts, train_step

KINDS = ("decoder", "sandwich", "convnet")


class After(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    bytes: StepBytes


def trained(kind: str, keep: Keep | list[Keep], precision: Any = "fp32") -> After:
    model = build(kind).train()
    apply_recompute(model, [keep] * len(model.blocks) if isinstance(keep, str) else keep)
    parts = TrainParts(model, loss_of, OptimizerConfig().build(model), precision=precision)
    own = batches(kind, Share())
    torch.manual_seed(1)  # dropout
    reports = [train_step(parts, own, num_records=RECORDS) for _ in range(3)]
    account = Account(model, parts.optimizer)
    with account:
        train_step(parts, own, num_records=RECORDS)
    return After([r.loss for r in reports], [r.grad_norm for r in reports], dict(model.state_dict()), account.bytes)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param(kind, precision, marks=() if precision == "fp32" and kind != "sandwich" else pytest.mark.slow)
        for kind in KINDS
        for precision in ("fp32", "bf16")
    ],
)
def test_a_step_is_bit_equal_whatever_is_kept(kind: str, precision: str) -> None:
    whole = trained(kind, "all", precision)
    for keep in KEEPS[1:]:
        found = trained(kind, keep, precision)
        assert found.losses == whole.losses
        assert found.norms == whole.norms
        assert list(found.state) == list(whole.state)
        for name, value in found.state.items():
            assert torch.equal(value, whole.state[name]), name


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "decoder" else ()) for kind in KINDS]
)
def test_less_is_held_the_less_is_kept(kind: str) -> None:
    whole, products, nothing = (trained(kind, keep).bytes for keep in KEEPS)
    assert nothing.activations < products.activations < whole.activations
    assert nothing.weights == whole.weights
    assert nothing.gradients == whole.gradients


def test_blocks_may_keep_different_things() -> None:
    model = build("sandwich")
    mixed: list[Keep] = [KEEPS[place % 3] for place, _ in enumerate(model.blocks)]
    assert trained("sandwich", mixed).losses == trained("sandwich", "all").losses
    with pytest.raises(ValueError, match=f"2 things to keep for {len(model.blocks)} blocks"):
        apply_recompute(model, ["all", "nothing"])


def test_nothing_is_made_anew_without_gradients() -> None:
    model = build("convnet").eval()
    batch = batches("convnet", Share())[0]
    with torch.no_grad():
        before = model(batch).output_BC
        apply_recompute(model, ["products", "nothing", "nothing"])
        assert torch.equal(model(batch).output_BC, before)
