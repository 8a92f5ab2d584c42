"""Each way to fuse and to balance trains through a recipe; settings without effect are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dougong.bundle.contribution import measure_contribution
from dougong.core.config import parse
from dougong.core.errors import ConfigError, DougongError
from dougong.core.events import read_events
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.table import table_of_rows
from dougong.engine.batches import to_tensors
from dougong.objectives.balance import ModulatedBackward
from dougong.objectives.distillation import distillation_loss
from dougong.recipes.losses import ObjectiveConfig, backward_of, check_objective, losses_of
from dougong.recipes.pilot import blending_pilot
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import RunResult, run_recipe
from dougong.recipes.tables import open_tables

WAYS: dict[str, dict[str, Any]] = {
    "evidence": {"model": {"fusion": "late", "decide": "evidence"}},
    "confidence": {"model": {"fusion": "late", "decide": "confidence"}},
    "mean": {"model": {"fusion": "late", "decide": "mean"}},
    "modulated": {
        "model": {"fusion": "late", "own_heads": "watching"},
        "objective": {"balance": "ogm-ge", "ogm_alpha": 0.8},
    },
    "pareto": {"model": {"fusion": "late", "own_heads": "taught"}, "objective": {"balance": "mmpareto"}},
    "blended": {
        "model": {"fusion": "late", "own_heads": "taught"},
        "objective": {"blend": {"whole": 0.5, "photo": 0.2, "remark": 0.3}},
    },
    "gated": {"model": {"decide": "gated"}, "objective": {"teach_weight": 0.5}},
    "weighed": {"model": {"decide": "weighed"}, "objective": {"teach_weight": 1.0}},
    "late, weighed": {"model": {"fusion": "late", "decide": "weighed"}},
    "bottleneck": {
        "model": {"bridge": {"kind": "bottleneck"}, "own_heads": "taught"},
        "objective": {"teach_weight": 1.0},
    },
}


def run(table: Path, folder: Path, way: dict[str, Any], steps: int = 6) -> RunResult:
    values: dict[str, Any] = {
        "name": "way",
        "data": {
            "train": str(table),
            "target": "colour",
            "modalities": ["photo", "remark", "table"],
            "withhold": 0.3,
            "loader": {"batch_size": 16},
        },
        "model": {"width": 16, "bridge": {"num_heads": 2}},
        "train": {"steps": steps, "precision": "fp32", "checkpoint_every": 3},
    }
    values["model"] |= way.get("model", {})
    if "bridge" in way.get("model", {}):
        values["model"]["bridge"] = {"num_heads": 2} | way["model"]["bridge"]
    values["objective"] = way.get("objective", {})
    return run_recipe(parse(Recipe, values, where="test"), folder, quiet=True)


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_trains_and_answers(way: str, colour_table: Path, tmp_path: Path) -> None:
    result = run(colour_table, tmp_path / "run", WAYS[way])
    losses = [event["loss"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "StepDone"]
    assert len(losses) == 6
    assert all(loss == loss for loss in losses)
    assert result.evaluations["all"].num_records > 0
    (answer,) = result.model.predict([{"remark": "it is cold like the sea", "weight": 0.0}])
    assert (answer.vacuity is not None) == (way == "evidence")
    votes = WAYS[way]["model"].get("decide", "fused") != "fused" or "own_heads" in WAYS[way]["model"]
    assert (answer.conflict is not None) == votes
    assert set(result.evaluations) >= {"all", "without photo", "photo alone"}


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ({}, {"balance": "ogm-ge"}, "Set model.own_heads: watching"),
        ({"own_heads": "watching"}, {"balance": "mmpareto"}, "Set model.own_heads: taught"),
        ({}, {"blend": {"whole": 1.0}}, "objective.blend weighs each modality's own loss"),
        ({}, {"own_weight": 2.0}, "objective.own_weight=2.0 cannot take effect on this model"),
        ({}, {"ogm_noise": False}, "objective.ogm_noise=False cannot take effect on this model"),
        ({"own_heads": "watching"}, {"teach_weight": 1.0}, "objective.teach_weight=1.0 cannot take effect"),
        ({"decide": "evidence"}, {"teach_weight": 1.0}, "objective.teach_weight=1.0 cannot take effect"),
        ({}, {"doubt_weight": 0.5}, "objective.doubt_weight=0.5 cannot take effect on this model"),
        ({"decide": "evidence"}, {"label_smoothing": 0.1}, "objective.label_smoothing=0.1 cannot take effect"),
    ],
)
def test_a_part_without_anything_to_work_on_is_refused(
    model: dict[str, Any], objective: dict[str, Any], message: str
) -> None:
    recipe = parse(Recipe, {"name": "x", "model": model, "objective": objective}, where="test")
    with pytest.raises(ConfigError, match=message):
        check_objective(recipe.objective, recipe.model)


def test_weights_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="one for 'whole', the decision together"):
        ObjectiveConfig(blend={"image": 1.0})
    with pytest.raises(ValueError, match="must not be below 0"):
        ObjectiveConfig(gate_weight=-1.0)
    with pytest.raises(ValueError, match="must be above 0"):
        ObjectiveConfig(ogm_alpha=0.0)


def test_a_blend_of_strangers_is_refused(colour_table: Path, tmp_path: Path) -> None:
    way = {"model": {"own_heads": "taught"}, "objective": {"blend": {"whole": 1.0, "foto": 1.0}}}
    with pytest.raises(DougongError, match="objective.blend names 'foto', which is no modality here"):
        run(colour_table, tmp_path / "run", way)


def test_a_pilot_weighs_the_heads_and_its_weights_run(colour_table: Path, tmp_path: Path) -> None:
    values = {
        "name": "pilot",
        "data": {"train": str(colour_table), "target": "colour", "modalities": ["photo", "remark"]},
        "model": {"width": 16, "fusion": "late", "own_heads": "taught", "bridge": {"num_heads": 2}},
        "train": {"steps": 20, "precision": "fp32"},
    }
    recipe = parse(Recipe, values, where="test")
    tables = open_tables(recipe.data, seed=0)

    weights = blending_pilot(recipe, tmp_path / "pilot", tables, share=0.5)

    assert set(weights) == {"whole", "photo", "remark"}
    assert sum(weights.values()) == pytest.approx(1.0)
    steps = [event for event in read_events(tmp_path / "pilot" / "events.jsonl") if event["kind"] == "StepDone"]
    assert len(steps) == 10
    assert parse(ObjectiveConfig, {"blend": weights}, where="test").blend == weights
    with pytest.raises(ConfigError, match="a pilot runs for a share of train.steps"):
        blending_pilot(parse(Recipe, values | {"train": {}}, where="test"), tmp_path / "other", tables)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"gate_weight": 0.5}}, "learns from what is spoilt, and nothing is. Set data.corrupt"),
        ({"train": {"sampling": {"quality": 0.5}}}, "has nothing to read. Set data.preparation.quality: true"),
        ({"model": {"completion": {}}, "data": {"views": [{"keep": ["a"]}]}}, "none does. Set beside in data.views"),
    ],
)
def test_what_nothing_feeds_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, {"name": "x", **values}, where="test")


def test_a_gate_that_late_fusion_lacks_cannot_be_taught() -> None:
    values = {"name": "x", "model": {"fusion": "late"}, "objective": {"gate_weight": 0.5}, "data": {"corrupt": {}}}
    recipe = parse(Recipe, values, where="test")
    with pytest.raises(ConfigError, match="fusion=late has none. Use model.fusion: bridge"):
        check_objective(recipe.objective, recipe.model)


def test_what_each_modality_counts_is_measured_of_models_that_vote(colour_table: Path, tmp_path: Path) -> None:
    for way in ("mean", "gated"):
        result = run(colour_table, tmp_path / way, WAYS[way], steps=2)
        table = table_of_rows(result.tables.test.head(12), result.tables.test.folder)
        found = measure_contribution(result.model, table)
        assert sum(each.token_share for each in found.modalities.values()) == pytest.approx(1.0)


def test_what_all_together_decide_teaches_each_by_as_much_as_is_set(colour_table: Path, tmp_path: Path) -> None:
    result = run(colour_table, tmp_path / "run", WAYS["weighed"], steps=2)
    preparation, model = result.model.preparation, result.model.network
    (arrays, *_) = Loader(result.tables.test, preparation, LoaderConfig(batch_size=64)).one_pass()
    batch = to_tensors(arrays)
    output, settings = model(batch), result.recipe.model
    plain, taught = (
        losses_of(ObjectiveConfig(teach_weight=weight), settings, "single_label")(output, batch)
        for weight in (0.0, 2.0)
    )
    assert output.own_BMC is not None
    for place, (name, media) in enumerate(batch.media.items()):
        own_BC, whole_BC = output.own_BMC[media.present_B, place], output.output_BC[media.present_B]
        told = distillation_loss(own_BC, whole_BC, "single_label")
        assert told > 0
        torch.testing.assert_close(taught.own[name] - plain.own[name], 2.0 * told, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(taught.whole, plain.whole)


def test_noise_is_left_out_where_it_is_set_so(colour_table: Path, tmp_path: Path) -> None:
    model = run(colour_table, tmp_path / "run", WAYS["modulated"], steps=1).model.network
    for noise in (True, False):
        settings = ObjectiveConfig(balance="ogm-ge", ogm_noise=noise)
        backward = backward_of(settings, model, losses_of(settings, model.config, "single_label"))
        assert isinstance(backward, ModulatedBackward)
        assert backward.noise is noise
