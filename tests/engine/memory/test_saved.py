"""What autograd saves may be put elsewhere, or rounded, until the backward."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from stacks import RECORDS, batches, build, loss_of
from torch import Tensor

from dougong.core.errors import ConfigError, RunError
from dougong.data.position import Share
from dougong.engine.memory.account import Account
from dougong.engine.memory.recompute import all_alike, apply_recompute
from dougong.engine.memory.saved import apply_saved, check_saved
from dougong.engine.memory.spill import Spill
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.prepare import prepare_model
from dougong.engine.step import TrainParts, train_step

SMALL = 1024


class After:
    """A model after two steps, and what the third held."""

    def __init__(
        self, kind: str, saved: Any, *, recompute: bool = False, precision: Any = "fp32", saved_as: Any = "same"
    ) -> None:
        self.model = build(kind).train()
        if recompute:
            apply_recompute(self.model, all_alike("nothing", len(self.model.blocks)))
        self.counted = apply_saved(self.model, saved, saved_as, small_bytes=SMALL)
        parts = TrainParts(self.model, loss_of, OptimizerConfig().build(self.model), precision=precision)
        own = batches(kind, Share())
        torch.manual_seed(1)  # dropout
        self.reports = [train_step(parts, own, num_records=RECORDS) for _ in range(2)]
        account = Account(self.model, parts.optimizer)
        with account:
            train_step(parts, own, num_records=RECORDS)
        self.bytes = account.bytes.activations


@pytest.mark.parametrize(
    ("kind", "recompute", "precision"),
    [
        ("decoder", False, "fp32"),
        pytest.param("sandwich", False, "bf16", marks=pytest.mark.slow),
        ("sandwich", True, "fp32"),
        ("convnet", False, "fp32"),
        ("convnet", True, "bf16"),
        pytest.param("decoder", True, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_bit_equal_with_what_is_saved_on_disk(kind: str, recompute: bool, precision: str) -> None:
    kept, moved = (After(kind, saved, recompute=recompute, precision=precision) for saved in ("kept", "disk"))
    assert moved.counted.moved > 0
    assert moved.reports == kept.reports
    for (name, value), wanted in zip(moved.model.state_dict().items(), kept.model.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize(("recompute", "share"), [(False, 0.3), pytest.param(True, 0.9, marks=pytest.mark.slow)])
def test_less_is_in_memory(recompute: bool, share: float) -> None:
    kept, moved = (After("sandwich", saved, recompute=recompute) for saved in ("kept", "disk"))
    assert moved.bytes < share * kept.bytes


@pytest.mark.slow
def test_layouts_are_bit_equal_with_what_is_saved_on_disk() -> None:
    run_ranks(as_kept_on_ranks, world=2)


def as_kept_on_ranks() -> None:
    for plan in (PlanConfig(pipeline=2), PlanConfig(pipeline=2, chunks=2, schedule="zbv"), PlanConfig(tensor=2)):
        reports: dict[str, Any] = {}
        for saved in ("kept", "disk"):
            model = build("sandwich").train()
            layout = prepare_model(model, plan, Ranks(dist.group.WORLD), accumulation=4, saved=saved)  # type: ignore[arg-type]
            parts = layout.parts(loss_of, OptimizerConfig().build(model))
            own = batches("sandwich", layout.mesh.share)
            reports[saved] = [train_step(parts, own, num_records=RECORDS) for _ in range(2)]
        assert reports["disk"] == reports["kept"], plan


def grads(kind: str, saved_as: Any) -> Tensor:
    model, batch = build(kind).train(), batches(kind, Share())[0]
    counted = apply_saved(model, "kept", saved_as, small_bytes=SMALL)
    torch.manual_seed(1)
    loss = loss_of(model(batch), batch)
    loss.backward()
    assert (counted.rounded > 0) == (saved_as == "bf16")
    found = [loss.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["decoder", "sandwich"])
def test_gradients_of_rounded_activations_are_as_near_as_is_stated(kind: str) -> None:
    exact, rounded = grads(kind, "same"), grads(kind, "bf16")
    assert rounded[0] == exact[0]  # the loss: the forward saves, and reads nothing back
    error = (rounded - exact).norm() / exact[1:].norm()
    assert 0 < error < 0.01


def test_rounding_keeps_less() -> None:
    kept, rounded = After("decoder", "kept"), After("decoder", "kept", saved_as="bf16")
    assert rounded.bytes < 0.85 * kept.bytes


def test_space_is_used_again_and_freed_without_a_backward_or_after_an_error(tmp_path: Path) -> None:
    spill = Spill(tmp_path, piece_bytes=1 << 16)
    assert list(tmp_path.iterdir()) == []  # it has no name
    for _ in range(20):
        held = [spill.put(torch.full((n,), n % 251, dtype=torch.uint8)) for n in (5000, 70, 9000, 1)]
        assert [int(each.take().sum()) for each in held] == [n * (n % 251) for n in (5000, 70, 9000, 1)]
        assert spill.used_bytes > 14000
        del held
    assert spill.used_bytes == 0
    assert spill.file_bytes == 1 << 16
    with pytest.raises(ZeroDivisionError):
        _broken(spill)
    gc.collect()
    assert spill.used_bytes == 0


def _broken(spill: Spill) -> None:
    held = spill.put(torch.ones(5000, dtype=torch.uint8))
    assert held.take().sum() == 5000
    raise ZeroDivisionError


def test_a_forward_alone_lets_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Spill] = []

    def spill(folder: Path | None) -> Spill:
        made.append(Spill(folder))
        return made[-1]

    monkeypatch.setattr("dougong.engine.memory.saved.Spill", spill)
    model, batch = build("sandwich").train(), batches("sandwich", Share())[0]
    apply_saved(model, "disk", folder=tmp_path, small_bytes=SMALL)
    output = model(batch)
    assert made[0].used_bytes > 0
    del output
    gc.collect()
    assert made[0].used_bytes == 0


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spill = Spill(tmp_path, piece_bytes=1 << 16)
    first = spill.put(torch.ones(60000, dtype=torch.uint8))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"has no room for 64 KiB beside the 64 KiB that a step has saved there") as told:
        spill.put(torch.ones(60000, dtype=torch.uint8))
    assert "\n" not in str(told.value)
    assert first.take().sum() == 60000


def test_memory_saved_twice_is_written_once() -> None:
    model = build("convnet").train()
    x = torch.randn(8, 8, 16, 16, requires_grad=True)

    def twice(_: Tensor) -> Tensor:
        y = x.detach() * 2.0
        return (y * x).sum() + (y[1:] * x[1:]).sum()

    model.blocks[0].forward = twice
    counted = apply_saved(model, "disk", small_bytes=SMALL)
    found = model.blocks[0](x)
    assert counted.moved == x.nbytes
    wanted = torch.cat([2 * x[:1], 4 * x[1:]])
    assert torch.equal(torch.autograd.grad(found, x)[0], wanted)


def test_weights_stay_where_and_as_they_are() -> None:
    for saved, saved_as in (("disk", "same"), ("kept", "bf16")):
        model = build("convnet").train()
        model.blocks[0] = torch.nn.Linear(64, 64)
        x = torch.randn(128, 64, requires_grad=True)
        counted = apply_saved(model, saved, saved_as, small_bytes=SMALL)  # type: ignore[arg-type]
        y = model.blocks[0](x)  # saves both its input and its weights
        assert counted.moved + counted.rounded == x.nbytes
        gradient = torch.autograd.grad(y.sum(), x)[0]
        assert torch.equal(gradient, torch.ones_like(y) @ model.blocks[0].weight)


def test_host_needs_a_device() -> None:
    with pytest.raises(ConfigError, match=r"memory.saved=host moves activations from a device"):
        apply_saved(build("convnet"), "host")
    check_saved("host", "same", "cuda")
    for given in (("disk", "same"), ("kept", "bf16")):
        with pytest.raises(ConfigError, match=r"with plan shard=2 weights come and go"):
            check_saved(*given, "cpu", shard=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_is_bit_equal_with_what_is_saved_on_the_host() -> None:
    found = []
    for saved in ("kept", "host"):
        torch.manual_seed(0)
        model = build("convnet").train().cuda()
        block = model.blocks[1]
        if saved == "host":
            apply_saved(model, "host", small_bytes=SMALL)
        x = torch.randn(8, 8, 64, 64, device="cuda", requires_grad=True)
        block(model.blocks[0](x)).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])
