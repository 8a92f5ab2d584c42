import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import (
    TinyLoader,
    TinyModel,
    interrupt_at,
    kinds_of,
    losses_of,
    same_weights,
    tiny_loss,
    train_tiny,
    weights,
)
from torch.optim import AdamW

from dougong.core.errors import CheckpointError
from dougong.core.events import read_events
from dougong.engine import checkpoint
from dougong.engine.average import WeightAverage
from dougong.engine.checkpoint import (
    RunState,
    best_weights,
    check_checkpoint,
    latest_checkpoint,
    load_weights,
    prune_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from dougong.engine.step import TrainParts, train_step

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "state.json",
    "random.json",
    "manifest.json",
)


def state(step: int, **values: Any) -> RunState:
    return RunState(
        step=step, epoch=0, batch=step, batches_per_epoch=5, seed=0, precision="fp32", precision_ratio=None, **values
    )


def trained() -> tuple[TinyModel, AdamW]:
    """A model and an optimizer that have taken a step."""
    model = TinyModel()
    optimizer = AdamW(model.parameters(), lr=0.1)
    train_step(TrainParts(model, tiny_loss, optimizer), [TinyLoader().all_tensors()], num_records=40)
    return model, optimizer


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyModel]:
    """A run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_tiny(folder, ema=0.9)[1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped at step 12, with checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("stopped")
    train_tiny(folder, ema=0.9, hear=interrupt_at(12))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    return folder


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # more than the last line end


def empty(path: Path) -> None:
    os.truncate(path, 0)


def edit(path: Path) -> None:
    """Still JSON, and only one digit is another: the last one."""
    text = path.read_text()
    place = max(i for i in range(len(text)) if text[i] in "12345678")
    path.write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :])
    json.loads(path.read_text())


DAMAGE = [
    *[(flip, name) for name in FILES[:3]],
    *[(damage, name) for damage in (truncate, empty, Path.unlink) for name in FILES],
    *[(edit, name) for name in FILES[3:]],
]


@pytest.mark.parametrize(("damage", "name"), DAMAGE, ids=[f"{d.__name__} {n}" for d, n in DAMAGE])
def test_a_damaged_checkpoint_is_skipped_and_told_and_the_run_goes_on_from_the_one_before(
    whole: tuple[Path, TinyModel], stopped: Path, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    damaged = folder / "checkpoints" / "step-00000012"
    damage(damaged / name)

    result, model = train_tiny(folder, ema=0.9, resume=True)

    assert result.step == 20
    skipped = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "CheckpointSkipped"]
    assert [(event["step"], event["path"]) for event in skipped] == [(8, str(damaged))]
    if name == "manifest.json":
        assert skipped[0]["reason"] in ("manifest.json is missing or damaged", "state.json differs from its sha256 sum")
    else:
        assert (
            skipped[0]["reason"] == f"{name} {'is missing' if damage is Path.unlink else 'differs from its sha256 sum'}"
        )
    assert losses_of(folder) == losses_of(whole[0])
    assert same_weights(model, whole[1])
    assert (folder / "checkpoints" / "step-00000012.damaged").exists()


def test_where_every_checkpoint_is_damaged_the_run_begins_again(
    whole: tuple[Path, TinyModel], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for name in ("step-00000008", "step-00000012"):
        flip(folder / "checkpoints" / name / "model.safetensors")

    train_tiny(folder, ema=0.9, resume=True)

    assert kinds_of(folder).count("CheckpointSkipped") == 2
    assert losses_of(folder) == losses_of(whole[0])


def test_a_half_written_checkpoint_is_never_loaded_and_is_cleared_away(
    whole: tuple[Path, TinyModel], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000012", checkpoints / ".step-00000016.abc.tmp")
    (checkpoints / ".step-00000004.pruned").mkdir()

    train_tiny(folder, ema=0.9, resume=True)

    assert losses_of(folder) == losses_of(whole[0])
    assert "CheckpointSkipped" not in kinds_of(folder)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000016", "step-00000020"]


def test_an_error_in_the_middle_of_saving_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, state(1), model, optimizer)

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "random_state", fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, state(step), model, optimizer)

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    check_checkpoint(tmp_path / "step-00000001")


def test_averages_that_the_manifest_does_not_know_are_not_loaded(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, state(1), model, optimizer)
    shutil.copy(path / "model.safetensors", path / "average.safetensors")
    with pytest.raises(CheckpointError, match=r"average\.safetensors differs from its sha256 sum$"):
        load_weights(model, path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "random.json"])
def test_a_file_that_the_manifest_does_not_miss_is_needed_all_the_same(tmp_path: Path, name: str) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, state(1), model, optimizer)
    (path / name).unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"{name} is missing$"):
        check_checkpoint(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "", "a\0b"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, state(1), model, optimizer)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is missing$"):
        check_checkpoint(path)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({"format": 1, "files": {}}, "its format is 1, this version reads 2"),
        ({"format": 2, "files": ["model.safetensors"]}, "manifest.json is missing or damaged"),
        ([], "manifest.json is missing or damaged"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: Any, reason: str) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, state(1), model, optimizer)
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint is None
    assert [skipped.reason for skipped in found.skipped] == [reason]


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, state(1), model, optimizer)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({"strange": 1, **values}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint.sha256_of(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state\.json is of another version \(1 errors\)$"):
        check_checkpoint(path)


# No pickle -------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_only_safetensors_and_json_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    train_tiny(tmp_path, ema=0.9, hear=interrupt_at(6))
    train_tiny(tmp_path, ema=0.9, resume=True)
    load_weights(TinyModel(), best_weights(tmp_path))

    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.name for path in files} == set(FILES)
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            length = int.from_bytes(path.read_bytes()[:8], "little")
            json.loads(path.read_bytes()[8 : 8 + length])


# Saving and restoring --------------------------------------------------------------------------------------------


def test_weights_optimizer_averages_and_random_states_come_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = WeightAverage(model, 0.5)
    average.update(100)
    path = save_checkpoint(tmp_path, state(1, best_metric=float("inf")), model, optimizer, average)
    drawn = torch.rand(3)
    kept = latest_checkpoint(tmp_path).checkpoint
    assert kept is not None
    assert kept.folder == path
    assert kept.state == state(1, best_metric=float("inf"))

    other = TinyModel(seed=4)
    fresh = AdamW(other.parameters(), lr=0.1)
    averages = WeightAverage(other, 0.5)
    restore_checkpoint(kept, other, fresh, averages)

    assert torch.equal(torch.rand(3), drawn)
    assert same_weights(model, other)
    assert same_weights(average.weights(), averages.weights())
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[parameter].keys() == fresh.state[twin].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, fresh.state[twin][key]) for key, value in optimizer.state[parameter].items())


def test_the_optimizers_memory_finds_its_parameter_by_name_and_not_by_place(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, state(1), model, optimizer)
    kept = latest_checkpoint(tmp_path).checkpoint
    assert kept is not None
    backwards = AdamW(list(model.parameters())[::-1], lr=0.1)

    restore_checkpoint(kept, model, backwards)

    for parameter in model.parameters():
        assert torch.equal(backwards.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_run_that_freezes_more_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, state(1), model, optimizer)
    kept = latest_checkpoint(tmp_path).checkpoint
    assert kept is not None
    with pytest.raises(
        CheckpointError,
        match=r"trained 'blocks\.0\.0\.bias' and this run does not\. Freeze the same parameters as that run\.$",
    ):
        restore_checkpoint(kept, model, AdamW([model.last.weight, model.last.bias]))


# Which ones stay -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saved(folder: Path, *steps: tuple[int, int | None]) -> Iterator[list[str]]:
    """Checkpoints of these steps, each naming its best; then the names of those that pruning left."""
    model, optimizer = trained()
    for step, best in steps:
        save_checkpoint(folder, state(step, best_step=best, best_metric=0.0), model, optimizer)
    left: list[str] = []
    yield left
    left += sorted(path.name for path in folder.iterdir())


def test_the_last_ones_and_their_best_ones_stay(tmp_path: Path) -> None:
    with saved(tmp_path, (1, 1), (2, 2), (3, 2), (4, 2), (5, 5)) as left:
        prune_checkpoints(tmp_path, keep=2)
    assert left == ["step-00000002", "step-00000004", "step-00000005"]


def test_without_a_best_one_the_last_ones_stay(tmp_path: Path) -> None:
    with saved(tmp_path, (9, None), (10, None), (100_000_000, None)) as left:
        prune_checkpoints(tmp_path, keep=2)
    assert left == ["step-00000010", "step-100000000"]


def test_a_damaged_one_does_not_hinder_pruning(tmp_path: Path) -> None:
    with saved(tmp_path, (1, None), (2, None), (3, None)) as left:
        (tmp_path / "step-00000002" / "state.json").write_text("{")
        prune_checkpoints(tmp_path, keep=2)
    assert left == ["step-00000002", "step-00000003"]


def test_the_best_weights_are_those_that_the_newest_checkpoint_names(tmp_path: Path) -> None:
    with saved(tmp_path / "checkpoints", (1, 1), (2, 2), (3, 2)):
        pass
    assert best_weights(tmp_path).name == "step-00000002"


def test_where_nothing_was_evaluated_the_last_weights_are_the_best(tmp_path: Path) -> None:
    with saved(tmp_path / "checkpoints", (1, None), (2, None)):
        pass
    assert best_weights(tmp_path).name == "step-00000002"


def test_a_run_without_a_checkpoint_has_no_best_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no whole checkpoint\. Train it first, or give another run\.$"):
        best_weights(tmp_path)


def test_best_weights_that_are_damaged_are_refused(tmp_path: Path) -> None:
    with saved(tmp_path / "checkpoints", (1, 1), (2, 1)):
        pass
    flip(tmp_path / "checkpoints" / "step-00000001" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs from its sha256 sum$"):
        best_weights(tmp_path)


def test_loading_takes_the_averages_where_there_are_any(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = WeightAverage(model, 0.9)
    for parameter in model.parameters():
        parameter.data += 1
    plain, averaged = weights(model), {name: weight.clone() for name, weight in average.weights().items()}
    without = save_checkpoint(tmp_path, state(1), model, optimizer)
    with_them = save_checkpoint(tmp_path, state(2), model, optimizer, average)

    other = TinyModel(seed=2)
    load_weights(other, without)
    assert same_weights(other, plain)
    load_weights(other, with_them)
    assert same_weights(other, averaged)
