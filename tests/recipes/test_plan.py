import json
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from dougong.cli.main import main
from dougong.core.config import override, parse, to_yaml
from dougong.core.errors import ConfigError
from dougong.engine.parallel.plan import PlanConfig, check_plan
from dougong.recipes.build import check_layout, learn_preparation
from dougong.recipes.plan import Planned, PlanResult, chosen_plan, plan_recipe, read_cluster, read_varied
from dougong.recipes.recipe import Recipe
from dougong.recipes.tables import open_tables


def recipe_for(table: Path, batch_size: int = 48) -> Recipe:
    values = {
        "name": "small",
        "data": {"train": str(table), "target": "colour", "loader": {"batch_size": batch_size, "workers": 0}},
        "model": {"width": 32},
        "train": {"precision": "fp32", "accumulation": 4},
    }
    return parse(Recipe, values, where="test")


@pytest.fixture(scope="module")
def planned(colour_table: Path) -> PlanResult:
    return plan_recipe(recipe_for(colour_table), read_cluster("cpu", 4))


def test_every_layout_that_is_found_can_be_carried_out(planned: PlanResult) -> None:
    for found in planned.found.predictions:
        check_plan(found.choice.plan, 4, accumulation=4)
        assert planned.shape.num_heads % found.choice.plan.tensor == 0
        assert found.choice.micro_batches == 4
    seconds = [found.seconds for found in planned.found.predictions]
    assert seconds == sorted(seconds)
    # However it is laid out, a step has the recipe's records.
    assert {round(f.seconds * f.records_per_second) for f in planned.found.predictions} == {48 * 4}


def test_the_best_layout_is_rehearsed_and_its_weights_are_those_predicted(planned: PlanResult) -> None:
    assert len(planned.held) == planned.best.choice.plan.pipeline
    for held, state in zip(planned.held, planned.best.state_bytes, strict=True):
        assert held.weights + held.gradients + held.optimizer == pytest.approx(state, rel=0.05)
        assert held.peak > state


def chosen(table: Path, changes: dict[str, Any] | None = None, world: int = 4) -> PlanConfig:
    settings = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    recipe = parse(Recipe, override(recipe_for(table).model_dump(mode="json"), settings), where="test")
    tables = open_tables(recipe.data, seed=recipe.seed)
    return chosen_plan(Planned(recipe, tables, learn_preparation(recipe, tables)[0]), world)


def test_what_is_chosen_for_this_machine_can_be_trained_and_is_always_the_same(colour_table: Path) -> None:
    plan = chosen(colour_table)
    assert plan == chosen(colour_table)
    check_layout(recipe_for(colour_table), plan, 4)
    assert run_ranks(chosen, colour_table, world=2) == [plan, plan]  # also where it is asked on ranks
    assert chosen(colour_table, world=1) == PlanConfig()
    # All records of a batch in one place: no rank may share them out.
    spared = chosen(colour_table, {"data.corrupt": {"spare_one": True}})
    assert spared.tensor * spared.pipeline == 4
    with pytest.raises(ConfigError, match=r"no layout of 4 devices can be carried out: objective.balance=mmpareto"):
        chosen(colour_table, {"objective.balance": "mmpareto", "model.own_heads": "taught"})


def test_the_command_prints_the_layouts_and_what_to_set(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(recipe_for(colour_table)))
    monkeypatch.setattr("sys.argv", ["dougong", "plan", str(path), "--devices", "2", "--json"])
    assert main() == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert parse(PlanConfig, told["layouts"][0]["plan"], where="test")
    assert told["reason"]

    monkeypatch.setattr("sys.argv", ["dougong", "plan", str(path), "--devices", "2", "--explain"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "2 (t - 1) / t x bytes / bandwidth" in printed
    assert "parameters x (weight + gradient + optimizer bytes)" in printed
    assert "to carry it out:" in printed


def test_what_the_engine_cannot_do_is_predicted_and_never_chosen(colour_table: Path) -> None:
    table = plan_recipe(recipe_for(colour_table), read_cluster("cpu", 2), vary=["offload"], most=100)
    kinds = {(found.choice.offload, found.can_be_carried_out) for found in table.found.predictions}
    assert kinds == {("none", True), ("host", False), ("disk", True)}
    assert all(found.choice.plan.shard == 1 for found in table.found.predictions if found.choice.offload == "disk")
    assert (table.best.can_be_carried_out and table.best.choice.offload == "none") == bool(table.held)
    told = {each["offload"]: each["settings"] for each in table.as_json()["layouts"]}
    assert "memory.offload=disk" in told["disk"]


def test_seventy_billion_parameters_on_one_card_are_told_what_they_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["dougong", "plan", "llama-70b", "--cluster", "a100-80g", "--devices", "1", "--vary", "all"]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    assert main() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == pytest.approx(69e9, rel=0.01)
    (best, *_) = told["layouts"]
    assert best["offload"] == "disk"
    assert best["disk_bytes"] == pytest.approx(18 * told["parameters"])
    assert max(best["memory_bytes"]) < 0.9 * 80e9
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    said = capsys.readouterr().out
    assert re.search(r"needs [\d.]+ GiB of each host's memory", said)
    assert "needs 1.13 TiB of each disk" in said
    monkeypatch.setattr("sys.argv", [*command, "--set", "seed=1"])
    assert main() == 2
    assert "known by its sizes alone and has no settings" in capsys.readouterr().err


@pytest.mark.slow
def test_micro_batches_and_precision_vary_with_the_same_records_a_step(colour_table: Path) -> None:
    recipe, cluster = recipe_for(colour_table, batch_size=12), read_cluster("a100-80g", 4)
    table = plan_recipe(recipe, cluster, vary=read_varied(["micro-batches", "precision"]), most=300)
    choices = [found.choice for found in table.found.predictions]
    assert {each.precision for each in choices} == {"fp32", "bf16"}
    assert {1, 2, 4, 8} <= {each.micro_batches for each in choices}
    assert any(each.plan.pipeline > 1 and each.plan.shard > 1 for each in choices)
    assert {round(f.seconds * f.records_per_second) for f in table.found.predictions} == {12 * 4}
    # What is to be set makes the recipe such: as many records a step, and as predicted.
    for found, told in zip(table.found.predictions, table.as_json()["layouts"], strict=True):
        changed = parse(Recipe, override(recipe.model_dump(mode="json"), told["settings"]), where="test")
        assert changed.plan == found.choice.plan
        assert changed.train.accumulation * changed.data.loader.batch_size == 12 * 4
        assert changed.train.accumulation == found.choice.micro_batches
        assert changed.train.precision == found.choice.precision
        check_layout(changed, found.choice.plan, 4)


@pytest.mark.slow
def test_what_is_held_in_bf16_and_other_micro_batches_is_as_rehearsed(colour_table: Path) -> None:
    recipe = recipe_for(colour_table)
    tables = open_tables(recipe.data, seed=recipe.seed)
    planned = Planned(recipe, tables, learn_preparation(recipe, tables)[0])
    found = planned.search(read_cluster("cpu", 1), vary=["micro-batches", "precision"], most=100)
    peaks = {}
    for each in found.predictions:
        if each.choice.micro_batches in (1, 4, 16):
            (held,) = planned.rehearsed(each.choice, 1)
            peaks[each.choice.micro_batches, each.choice.precision] = held.peak
            assert held.peak == pytest.approx(each.peak_bytes, rel=0.4)
    for precision in ("fp32", "bf16"):
        assert peaks[1, precision] > peaks[4, precision] > peaks[16, precision]
    assert peaks[1, "bf16"] < peaks[1, "fp32"]


def test_records_that_are_compared_stay_together(colour_table: Path) -> None:
    changes = ['data.corrupt={"spare_one": true}']
    recipe = parse(Recipe, override(recipe_for(colour_table).model_dump(mode="json"), changes), where="test")
    result = plan_recipe(recipe, read_cluster("cpu", 1), vary=["micro-batches"])
    assert result.notes == (
        "micro-batches stay as the recipe has them: data.corrupt.spare_one looks at all records of one",
    )
    assert {found.choice.micro_batches for found in result.found.predictions} == {4}


def test_what_cannot_be_is_said_in_one_line(planned: PlanResult, colour_table: Path) -> None:
    with pytest.raises(ConfigError, match="'abacus' is no kind of device. Use one of a100-80g, cpu, h100"):
        read_cluster("abacus", 4)
    with pytest.raises(ConfigError, match=r"no layout of 2 devices fits .* GiB each: the smallest takes"):
        plan_recipe(recipe_for(colour_table), read_cluster("cpu", 2, memory_bytes=1e5))
    with pytest.raises(ConfigError, match="devices=12 are no whole nodes of per_node=8"):
        read_cluster("cpu", 12)
    with pytest.raises(ConfigError, match="'tensor' cannot vary. Use some of micro-batches, precision, recompute, off"):
        read_varied(["precision", "tensor"])
    assert read_varied(["all"]) == ("micro-batches", "precision", "recompute", "offload")


@pytest.mark.parametrize(
    ("plan", "world", "message"),
    [
        (
            {"tensor": 3},
            4,
            r"tensor=3 x pipeline=1 takes 3 ranks at a time, and there are 4. Use a product in \[1, 2, 4\]",
        ),
        (
            {"shard": 3},
            4,
            r"shard=3 cannot be a part of the 4 ranks that share out the records. Use shard in \[1, 2, 4\]",
        ),
        ({"shard": 4, "reduction": "hierarchical"}, 4, "shard=4 leaves none on 4 ranks. Use a smaller shard"),
        ({"context": 3, "tensor": 2}, 4, r"tensor=2 x context=3 x pipeline=1 takes 6 ranks at a time, and there are 4"),
        ({"context": 2, "shard": 3}, 4, r"shard=3 cannot be a part of the 4 ranks that share out records and tokens"),
        ({"pipeline": 4, "chunks": 2, "schedule": "dualpipev"}, 4, "needs 8 micro-batches or more, and there are 1"),
    ],
)
def test_a_plan_that_the_ranks_cannot_have_is_refused(plan: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plan(PlanConfig(**plan), world, accumulation=1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"pipeline": 2, "schedule": "zbv"}, "schedule=zbv has 2 stages on each rank, not 1"),
        ({"pipeline": 2, "chunks": 2}, "schedule=1f1b has 1 stage on each rank"),
        ({"shard": 2, "pipeline": 2}, "sharding=zero3 with pipeline=2 would gather a stage's weights"),
        ({"context_form": "swap"}, "context_form=swap cannot take effect. Leave it out, or set context: 2 or more"),
        ({"sequence": False}, "sequence=False cannot take effect. Leave it out, or set tensor: 2 or more"),
        ({"schedule": "gpipe"}, "schedule=gpipe cannot take effect. Leave it out, or set pipeline: 2 or more"),
        ({"sharding": "zero2"}, "sharding=zero2 cannot take effect. Leave it out, or set shard: 2 or more"),
        ({"wire": "bf16"}, "wire=bf16 cannot take effect. Leave it out, or set reduction: hierarchical"),
        ({"per_node": 4}, "per_node=4 cannot take effect. Leave it out, or set reduction: hierarchical"),
        (
            {"chunks": 2, "schedule": "interleaved"},
            "chunks=2 cannot take effect. Leave it out, or set pipeline: 2 or more",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**plan)
