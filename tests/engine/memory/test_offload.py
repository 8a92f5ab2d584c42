"""A model of whose state some lies on the disk trains as one that is in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from stacks import RECORDS, batches, build, loss_of
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.data.position import Share
from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.memory.offload import OffloadConfig, Offloaded, apply_offload
from dougong.engine.memory.recompute import all_alike, apply_recompute
from dougong.engine.memory.shelf import Shelf, Slot, weights_in
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.prepare import check_model, prepare_model
from dougong.engine.step import TrainParts, train_step
from dougong.engine.weights import local_part

ALL = OffloadConfig(optimizer="disk", gradients="disk", weights="disk")


class After(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    bytes: StepBytes


def trained(kind: str, config: OffloadConfig | None, folder: Path, *, recompute: bool = False) -> After:
    model = build(kind).train()
    if recompute:
        apply_recompute(model, all_alike("nothing", len(model.blocks)))
    anew = [recompute] * len(model.blocks)
    optimizer = OptimizerConfig().build(model)
    offloaded = None if config is None else apply_offload(model, config, folder, anew=anew)
    if offloaded is not None:
        offloaded.take(optimizer)
    parts = TrainParts(model, loss_of, optimizer, max_grad_norm=0.1, elsewhere=offloaded)
    own = batches(kind, Share())
    torch.manual_seed(1)  # dropout
    reports = [train_step(parts, own, num_records=RECORDS) for _ in range(3)]
    account = Account(model, optimizer)
    with account:
        train_step(parts, own, num_records=RECORDS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"{key}/{n}": v.clone() for n, p in model.named_parameters() for key, v in optimizer.state[p].items()}
    if offloaded is not None:
        offloaded.close()
        assert not folder.exists()
    return After([r.loss for r in reports], [r.grad_norm for r in reports], state, account.bytes)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        pytest.param(kind, where, marks=() if where == "all" or kind == "convnet" else pytest.mark.slow)
        for kind in ("decoder", "sandwich", "convnet")
        for where in ("optimizer", "gradients", "weights", "all")
    ],
)
def test_a_step_is_bit_equal_wherever_its_state_lies(kind: str, where: str, tmp_path: Path) -> None:
    config = ALL if where == "all" else OffloadConfig.model_validate({where: "disk"})
    whole = trained(kind, None, tmp_path)
    for recompute in (False, True):
        found = trained(kind, config, tmp_path / "shelf", recompute=recompute)
        assert found.losses == whole.losses
        assert found.norms == whole.norms
        for name, value in found.state.items():
            assert torch.equal(value, whole.state[name]), name


def test_weights_lie_in_their_files_again_after_each_work(tmp_path: Path) -> None:
    model = build("decoder").train()
    apply_recompute(model, all_alike("nothing", len(model.blocks)))
    optimizer = OptimizerConfig().build(model)
    offloaded = apply_offload(model, ALL, tmp_path / "shelf", anew=[True] * len(model.blocks))
    offloaded.take(optimizer)
    (batch, *_) = batches("decoder", Share())

    def lying() -> bool:
        places = {p.data_ptr() for (_, _), p in _shelved(offloaded)}
        return all(p.data_ptr() in places for p in model.parameters())

    assert lying()
    loss_of(model(batch), batch).backward()
    assert lying()
    optimizer.step()
    assert lying()
    with torch.no_grad():
        model(batch)
    assert lying()
    offloaded.close()


def _shelved(offloaded: Offloaded) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for file in offloaded.shelf._files.values():
        yield from ((key, tensor) for key, tensor in file.tensors.items() if key[0] == "weight")


def test_gradients_are_held_one_at_a_time(tmp_path: Path) -> None:
    whole = trained("decoder", None, tmp_path)
    found = trained("decoder", OffloadConfig(gradients="disk"), tmp_path / "shelf")
    largest = max(p.nbytes for p in build("decoder").parameters())
    # Counted as activations: until it is put away, a gradient is no weight's.
    assert found.bytes.peak - found.bytes.weights - found.bytes.optimizer < whole.bytes.activations + 2 * largest
    assert whole.bytes.peak - found.bytes.peak > 0.5 * whole.bytes.gradients


def test_files_are_safetensors_of_each_block(tmp_path: Path) -> None:
    model = build("decoder")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    offloaded = apply_offload(model, ALL, tmp_path / "shelf")
    offloaded.shelf.settle()
    for name, parameter in model.named_parameters():
        unit = f"block-{name.split('.')[1]}" if name.startswith("blocks.") else "rest"
        assert parameter.data_ptr() == offloaded.shelf.tensor(unit, "weight", name).data_ptr(), name
    there = sorted(path.name for path in (tmp_path / "shelf").iterdir())
    assert there == [*(f"block-{place}.safetensors" for place in range(4)), "rest.safetensors"]
    seen = set()
    for name in there:
        with safe_open(tmp_path / "shelf" / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dict
                kind, _, weight = key.partition("/")
                if kind == "weight":
                    assert torch.equal(file.get_tensor(key), weights[weight])
                    seen.add(weight)
    assert seen == set(weights)
    offloaded.close()


def test_weights_are_built_in_files(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(1024, 600)
            self.second = torch.nn.Linear(1024, 600)
            self.second.weight = self.first.weight

    torch.manual_seed(3)
    plain = Wide()
    torch.manual_seed(3)
    with weights_in(tmp_path):
        built = Wide()
    assert built.first.weight is built.second.weight
    for (name, a), b in zip(plain.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b), name
    start, size = built.first.weight.data_ptr(), built.first.weight.nbytes
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    assert any(first <= start and start + size <= last for first, last in ranges)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", no_room)


@pytest.mark.usefixtures("full")
def test_no_room_is_told_before_anything_is_moved(tmp_path: Path) -> None:
    model = build("decoder")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"takes .* which cannot be had there \(No space left on device\)"):
        apply_offload(model, ALL, tmp_path / "shelf")
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not (tmp_path / "shelf").exists()


def test_more_than_is_free_is_told(tmp_path: Path) -> None:
    slot = Slot(torch.float32, (2**48,))
    with pytest.raises(ConfigError, match=r"are free"):
        Shelf(tmp_path / "shelf", {"rest": {"weight": {"x": slot}}})


def test_what_is_written_is_read_through_the_tensor(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", {"rest": {"weight": {"x": Slot(torch.bfloat16, (3, 5))}}})
    given = torch.randn(5, 3).to(torch.bfloat16).t()
    shelf.write("rest", "weight", "x", given)
    assert torch.equal(shelf.tensor("rest", "weight", "x"), given)
    shelf.behind("rest")
    shelf.settle()
    shelf.close()


def test_shorthand_and_refusals() -> None:
    assert OffloadConfig.model_validate("disk") == ALL
    with pytest.raises(ValueError, match="has no effect"):
        OffloadConfig(folder="somewhere")


def test_a_device_that_cannot_map_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model is on meta. Train on the processor, or spread"):
        apply_offload(build("decoder").to("meta"), ALL, tmp_path / "shelf")


def test_an_optimizer_that_keeps_something_else_is_refused(tmp_path: Path) -> None:
    model = build("decoder")
    offloaded = apply_offload(model, ALL, tmp_path / "shelf")
    with pytest.raises(ConfigError, match="the optimizer is SGD"):
        offloaded.take(torch.optim.SGD(model.parameters()))
    offloaded.close()


LAYOUTS = {
    "copies": (PlanConfig(), ALL),
    "tensor": (PlanConfig(tensor=2), ALL),
    "pipeline": (PlanConfig(pipeline=2), ALL),
    "zero3": (PlanConfig(shard=2, gathered_bytes=0), OffloadConfig(optimizer="disk")),
    "zero2 by the step": (PlanConfig(shard=2, sharding="zero2"), OffloadConfig(optimizer="disk")),
}


def stepped(plan: PlanConfig, config: OffloadConfig, ranks: Ranks, folder: Path) -> list[Tensor]:
    layout = prepare_model(build("decoder").train(), plan, ranks, accumulation=4, offload=config, folder=folder)
    optimizer = OptimizerConfig().build(layout.model)
    layout.share_out(optimizer)
    parts = layout.parts(loss_of, optimizer)
    own = batches("decoder", layout.mesh.share)
    for _ in range(3):
        train_step(parts, own, num_records=RECORDS)
    found = [local_part(p.detach()).clone() for p in layout.trained.values()]
    found += [local_part(optimizer.state[p]["exp_avg"]).clone() for p in layout.trained.values()]
    if layout.shelved is not None:
        layout.shelved.close()
    return found


def differing(folder: Path) -> list[str]:
    ranks = Ranks(torch.distributed.group.WORLD)
    wrong = []
    for name, (plan, config) in LAYOUTS.items():
        whole = stepped(plan, OffloadConfig(), ranks, folder)
        found = stepped(plan, config, ranks, folder)
        if not all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)):
            wrong.append(name)
    return wrong


@pytest.mark.slow
def test_layouts_are_bit_equal_wherever_their_state_lies(tmp_path: Path) -> None:
    assert run_ranks(differing, tmp_path, world=2, limit_seconds=120.0) == [[], []]


def test_weights_that_are_spread_cannot_lie_on_the_disk() -> None:
    with pytest.raises(ConfigError, match=r"weights=disk with plan shard=2.* Use memory.offload.optimizer alone"):
        check_model(build("decoder"), PlanConfig(shard=2), ALL)
    with pytest.raises(ConfigError, match=r"sharding=zero1 and shard=2: what each rank steps is cut.* Use sharding: z"):
        check_model(build("decoder"), PlanConfig(shard=2, sharding="zero1"), OffloadConfig(optimizer="disk"))
