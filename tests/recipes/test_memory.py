"""A recipe's memory settings: the same run, in less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from dougong.core.config import from_yaml, override, parse
from dougong.core.errors import ConfigError
from dougong.core.events import read_events
from dougong.engine.memory.config import MemoryConfig
from dougong.engine.memory.segments import SegmentChoice
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner.cluster import KNOWN
from dougong.engine.planner.search import describe
from dougong.recipes import room
from dougong.recipes.build import check_layout, learn_preparation, open_records
from dougong.recipes.plan import Planned, _settings
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.settle import lay_out, settle_recipe


def recipe_for(table: Path, **changes: Any) -> Recipe:
    values = {
        "name": "small",
        "data": {"train": str(table), "target": "colour", "loader": {"batch_size": 32, "workers": 0}},
        "model": {"width": 32},
        "train": {"precision": "fp32", "steps": 4},
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return parse(Recipe, override(parse(Recipe, values, where="test").model_dump(mode="json"), settings), where="test")


def losses(folder: Path) -> list[float]:
    found = [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]
    assert found
    return found


def planned(recipe: Recipe) -> Planned:
    tables = open_records(recipe)
    return Planned(recipe, tables, learn_preparation(recipe, tables)[0])


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({"recompute": "blocks"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "cheap", "every": 2}, marks=pytest.mark.slow),
        {"activations": "5MiB"},
        pytest.param({"offload": "disk"}, marks=pytest.mark.slow),
        pytest.param({"saved": "disk"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "blocks", "every": 2, "saved": "disk"}, marks=pytest.mark.slow),
        pytest.param({"offload": "disk", "saved": "disk"}, marks=pytest.mark.slow),
        {"offload": "disk", "recompute": "blocks", "saved": "disk"},
        pytest.param({"offload": "disk", "recompute": "cheap"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_in_less_memory_is_the_same_run(colour_table: Path, tmp_path: Path, memory: dict[str, Any]) -> None:
    run_recipe(recipe_for(colour_table), tmp_path / "whole", quiet=True)
    run_recipe(recipe_for(colour_table, memory=memory), tmp_path / "less", quiet=True)
    assert losses(tmp_path / "less") == losses(tmp_path / "whole")
    told = from_yaml((tmp_path / "less" / "run.yaml").read_text(), where="run.yaml")["memory"]
    assert (told["keep"] is not None) == ("activations" in memory)
    assert not list((tmp_path / "less").glob("offload/*"))


@pytest.mark.slow
def test_a_run_in_memory_goes_on_from_one_on_the_disk(colour_table: Path, tmp_path: Path) -> None:
    """And the other way round: what lies on the disk is no part of a checkpoint."""
    whole = recipe_for(colour_table, **{"train.checkpoint_every": 2, "memory.offload.folder": None})
    run_recipe(whole, tmp_path / "whole", quiet=True)
    away = tmp_path / "away"
    there = recipe_for(
        colour_table, **{"memory.offload": {"weights": "disk", "optimizer": "disk", "folder": str(away)}}
    )
    run_recipe(there, tmp_path / "there", quiet=True)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ends = [next((tmp_path / run / "checkpoints").glob("step-00000004")) / file for run in ("whole", "there")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    assert away.is_dir()
    assert not list(away.glob("*/*"))


def test_state_that_has_no_room_is_refused_before_it_takes_any(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(colour_table)
    weights = sum(p.nbytes for p in planned(recipe).model.parameters())
    for free, message in (
        (0.9 * weights, r"the model's weights alone take more than the .* KiB that may be planned with. Use memory"),
        (
            2.5 * weights,
            r"beside its weights a step holds .* KiB of gradients and .* KiB that the optimizer keeps, and",
        ),
    ):
        monkeypatch.setattr(room, "free_bytes", lambda free=free: free)
        with pytest.raises(ConfigError, match=message):
            run_recipe(recipe, tmp_path / f"refused at {free:.0f}", quiet=True)
        on_disk = recipe_for(colour_table, **{"memory.offload": "disk", "train.steps": 1})
        # What passes through memory at a time is megabytes, more than all of so small a model.
        with pytest.raises(ConfigError, match=r"has .* MiB on their way between disk and memory at one time"):
            run_recipe(on_disk, tmp_path / f"refused too at {free:.0f}", quiet=True)
        monkeypatch.setattr(room, "passing_bytes", lambda *_: 0)
        run_recipe(on_disk, tmp_path / f"on the disk at {free:.0f}", quiet=True)
        monkeypatch.undo()


def test_an_average_of_weights_on_the_disk_is_refused(colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.ema=0.9 keeps all weights in memory once more.* Use ema: null"):
        run_recipe(
            recipe_for(colour_table, **{"memory.offload": "disk", "train.ema": 0.9}), tmp_path / "run", quiet=True
        )
    assert not list((tmp_path / "run").glob("offload/*"))


def test_segments_are_measured_once_and_kept_for_a_resumed_run(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(colour_table, memory={"recompute": "blocks", "segments": "auto"})
    for size in (2, None):
        choice = SegmentChoice(size, 0, ())
        monkeypatch.setattr("dougong.recipes.plan.choose_segments", lambda *_, choice=choice, **__: choice)
        folder = tmp_path / str(size)
        folder.mkdir()
        assert settle_recipe(recipe, folder, resume=False).memory.segments == size
        monkeypatch.setattr("dougong.recipes.plan.choose_segments", None)
        assert settle_recipe(recipe, folder, resume=True).memory.segments == size


def test_segments_that_cannot_be_are_refused(colour_table: Path) -> None:
    memory = {"recompute": "blocks", "segments": "auto"}
    for changes, message in (
        ({"train.precision": "auto"}, r"memory.segments=auto is measured before training, and train.precision=auto"),
        ({"train.precision": "adaptive"}, r"train.precision=adaptive gives each a format of its own"),
        ({"objective.balance": "mmpareto", "model.own_heads": "taught"}, r"compiled segments give theirs once"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layout(recipe_for(colour_table, memory=memory, **changes), PlanConfig(), 1)
    with pytest.raises(ConfigError, match=r"memory.saved=host moves activations from a device"):
        check_layout(recipe_for(colour_table, **{"memory.saved": "host"}), PlanConfig(), 1)


@pytest.mark.slow
def test_a_budget_is_met_on_every_rank_of_a_layout(colour_table: Path) -> None:
    for plan, world in ((PlanConfig(), 1), (PlanConfig(tensor=2), 4), (PlanConfig(pipeline=2), 2)):
        recipe = recipe_for(colour_table, **{"train.accumulation": 2})
        whole = planned(recipe)
        choice = whole.choice(plan)
        most = max(each.activations for each in whole.rehearsed(choice, world))
        found = planned(recipe_for(colour_table, **{"train.accumulation": 2, "memory.activations": 0.85}))
        keep = found.kept(plan, world)
        assert keep is not None
        assert set(keep) > {"all"}
        held = max(each.activations for each in found.rehearsed(choice, world, keep))
        assert held <= 0.85 * most


@pytest.mark.slow
def test_a_launch_settles_what_is_kept(colour_table: Path, tmp_path: Path) -> None:
    recipe = recipe_for(colour_table, **{"memory.activations": 0.85})
    laid_out = lay_out(recipe, tmp_path / "run", 2)
    assert laid_out.memory.keep is not None
    assert run_ranks(refused_on_ranks, colour_table, tmp_path / "other", world=2)[0].startswith(
        "memory.activations is met before ranks are connected"
    )


def refused_on_ranks(table: Path, folder: Path) -> str:
    from dougong.recipes.settle import settle_recipe

    folder.mkdir(exist_ok=True)
    with pytest.raises(ConfigError) as found:
        settle_recipe(recipe_for(table, **{"memory.activations": 0.85}), folder, resume=False, world=2)
    return str(found.value)


def test_what_the_planner_recomputes_the_engine_can(colour_table: Path) -> None:
    ours = planned(recipe_for(colour_table))
    found = ours.search(KNOWN["cpu"].model_copy(update={"devices": 1}), vary=["recompute"], most=10)
    for each in found.predictions:
        assert each.can_be_carried_out
    by_bytes = sorted(found.predictions, key=lambda each: ours.rehearsed(each.choice, 1)[0].activations)
    assert [each.choice.activations.keep for each in by_bytes] == ["nothing", "products", "all"]


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"recompute": "cheap"}, "recompute all but products"),
        ({"recompute": "blocks"}, "recompute"),
        ({"recompute": "blocks", "segments": 2}, "recompute, 2 blocks a segment"),
        ({"saved": "disk", "saved_as": "bf16"}, "saved in bf16, activations on the disk"),
    ],
)
def test_the_planner_reckons_with_what_the_recipe_says(colour_table: Path, memory: dict[str, Any], words: str) -> None:
    ours, whole = planned(recipe_for(colour_table, memory=memory)), planned(recipe_for(colour_table))
    cluster = KNOWN["cpu"].model_copy(update={"devices": 1})
    found, usual = (each.search(cluster, most=1).predictions[0] for each in (ours, whole))
    assert describe(found.choice).endswith(f"fp32, {words}")
    assert found.peak_bytes < usual.peak_bytes
    assert _settings(found, ours.recipe) == []  # nothing besides what it says


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_predicted_of_blocks_is_near_what_a_step_holds(colour_table: Path, recompute: str, every: int) -> None:
    ours = planned(recipe_for(colour_table, memory={"recompute": recompute, "every": every}))
    found = ours.search(KNOWN["cpu"].model_copy(update={"devices": 1}), most=1).predictions[0]
    held = ours.rehearsed(found.choice, 1)[0].activations
    assert found.peak_bytes - found.state_bytes[0] == pytest.approx(held, rel=0.15)


def test_the_planner_reckons_with_weights_and_means_of_few_bits(colour_table: Path) -> None:
    few = {"train.weights": "bf16-stochastic", "train.precision": "bf16", "train.optimizer.states": "8bit"}
    ours, whole = planned(recipe_for(colour_table, **few)), planned(recipe_for(colour_table))
    cluster = KNOWN["cpu"].model_copy(update={"devices": 1})
    found, usual = (each.search(cluster, most=1).predictions[0] for each in (ours, whole))
    held = ours.rehearsed(found.choice, 1)[0]
    assert found.state_bytes[0] == pytest.approx(held.weights + held.gradients + held.optimizer, rel=0.01)
    assert found.state_bytes[0] < 0.7 * usual.state_bytes[0]  # small matrices keep their means whole


def test_what_cannot_be_is_said_in_one_line(colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"memory.activations comes to 10 KiB, less than the .* MiB that a step takes"
    ):
        run_recipe(recipe_for(colour_table, **{"memory.activations": "10KiB"}), tmp_path / "run", quiet=True)
    balanced = recipe_for(
        colour_table,
        **{"memory.recompute": "cheap", "objective.balance": "mmpareto", "model.own_heads": "taught"},
    )
    with pytest.raises(ConfigError, match=r"mmpareto asks for gradients several times.* Use memory.recompute: blocks"):
        check_layout(balanced, PlanConfig(), 1)
    short = recipe_for(colour_table, **{"memory.keep": ["all", "nothing"]})
    with pytest.raises(ConfigError, match=r"memory.keep says what 2 blocks keep, and the model has \d+"):
        run_recipe(short, tmp_path / "short", quiet=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activations": 1.5}, r"1.5 is no share of what keeping all takes. Use 0.4, or bytes like 6GiB"),
        ({"activations": "a lot"}, r"'a lot' is no number of bytes. .* Or a share of what keeping all takes, like 0.4"),
        ({"every": 2}, "every=2 has no effect with recompute: none. Use cheap or blocks"),
        ({"recompute": "blocks", "activations": 0.4}, "says what all blocks keep, and so does activations"),
        ({"recompute": "blocks", "keep": ("all",)}, "says what all blocks keep, and so does keep"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)
