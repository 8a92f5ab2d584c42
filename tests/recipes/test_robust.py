"""Holds recipes/robust.py and recipes/judge.py to their promises: the same records, spoilt the same way every time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dougong
from dougong.bundle.model import Model
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.events import read_events
from dougong.data.corruption import Corruption
from dougong.data.preparation import Preparation
from dougong.engine.robustness import relative_robustness
from dougong.recipes.judge import judge
from dougong.recipes.recipe import Recipe
from dougong.recipes.robust import EVERY, sweep
from dougong.recipes.run import run_recipe

NAMES = ("photo", "clip", "remark", "table")


def test_each_modality_and_all_together_have_a_curve_that_falls(colour_run: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    curves = sweep(colour_run, None, levels=(0.0, 1.0), announce=lambda *step: heard.append(step))
    told = json.loads((colour_run / "evaluation.json").read_text())["conditions"]["all"]["metrics"]["accuracy"]

    assert [curve.what for curve in curves] == [*NAMES, EVERY]
    assert {curve.clean for curve in curves} == {told}
    assert all(curve.effective is None for curve in curves)
    assert curves[-1].scores[1] < curves[-1].clean
    for curve in curves:
        assert curve.relative == relative_robustness(curve.levels, curve.scores)
    assert [step[1:] for step in heard] == [(done, 5) for done in range(1, 6)]
    assert sweep(colour_run, None, levels=(0.0, 1.0)) == curves


def test_a_model_is_no_more_robust_than_itself(colour_run: Path) -> None:
    curves = sweep(colour_run, None, ("clip", "photo"), baseline=colour_run / "bundle", levels=(0.0, 0.5))
    assert [curve.what for curve in curves] == ["remark", "table", EVERY]
    assert [curve.effective for curve in curves] == [0.0, 0.0, 0.0]


def test_a_baseline_answers_the_same_question(colour_run: Path, tmp_path: Path) -> None:
    model = dougong.load(colour_run / "bundle")
    target = model.preparation.target.model_copy(update={"name": "paint"})
    preparation = Preparation(model.preparation.modalities, target)
    other = Model(model.network, preparation, model.manifest.model_copy(update={"signature": preparation.signature()}))
    with pytest.raises(ConfigError, match="--baseline .* predicts 'paint' with other labels or scale than the model"):
        sweep(colour_run, None, baseline=other.save(tmp_path / "bundle"))


def test_spoilt_records_are_judged_beside_clean_ones(colour_run: Path) -> None:
    spoilt = [Corruption(modality=name, level=1.0) for name in NAMES]
    figures = judge(colour_run, None, (), spoilt)
    how = "photo=1, clip=1, remark=1, table=1"

    assert list(figures) == ["all", how]
    assert figures[how]["metrics"]["accuracy"] < figures["all"]["metrics"]["accuracy"]
    assert figures[how]["num_records"] == figures["all"]["num_records"]
    without = judge(colour_run, None, ("clip",), [Corruption(modality="photo", kind="blur", level=0.5)])
    assert list(without) == ["all", "without clip", "photo:blur=0.5", "without clip, photo:blur=0.5"]


@pytest.mark.parametrize(
    ("missing", "spoilt", "message"),
    [
        (
            (),
            Corruption(modality="smell", level=1.0),
            "corruption names 'smell', which is no modality. Use some",
        ),
        ((), Corruption(modality="photo", kind="mask", level=1.0), "'mask' is no corruption of 'photo'. Use one of"),
        (("clip",), Corruption(modality="clip", level=1.0), "--corrupt and --missing both name 'clip'"),
    ],
)
def test_what_cannot_be_spoilt_is_told(
    missing: tuple[str, ...], spoilt: Corruption, message: str, colour_run: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        judge(colour_run, None, missing, [spoilt])


def small(table: Path, **data: object) -> Recipe:
    train = {"steps": 4, "precision": "fp32", "checkpoint_every": 2, "keep": 5}
    values = {"train": str(table), "target": "colour", "loader": {"batch_size": 32}, "modalities": ["photo", "remark"]}
    values |= data
    return parse(Recipe, {"name": "small", "data": values, "train": train}, where="test")


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]


def test_training_on_spoilt_records_is_another_training_and_resumes_to_its_own_losses(
    colour_table: Path, tmp_path: Path
) -> None:
    settings = {"preparation": {"quality": True}, "corrupt": {"chance": 0.7, "kinds": {"photo": ["blur"]}}}
    spoilt = small(colour_table, **settings)
    result = run_recipe(spoilt, tmp_path / "whole", quiet=True)
    run_recipe(small(colour_table), tmp_path / "clean", quiet=True)
    run_recipe(spoilt, tmp_path / "cut", quiet=True)
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:  # as if it had been killed after step 2
        shutil.rmtree(path)
    (tmp_path / "cut" / "events.jsonl").unlink()
    run_recipe(spoilt, tmp_path / "cut", resume=True, quiet=True)

    whole = losses(tmp_path / "whole")
    assert whole != losses(tmp_path / "clean")
    assert losses(tmp_path / "cut") == whole[2:]

    loaded = dougong.load(tmp_path / "whole" / "bundle")
    inputs = loaded.manifest.signature.inputs
    assert inputs["photo"].quality[:2] == ("sharpness", "exposure")
    assert loaded.predict([{"remark": "warm like fire"}]) == result.model.predict([{"remark": "warm like fire"}])
    arrays, _ = loaded.explain([{"remark": "warm like fire"}])
    assert arrays.media["remark"].quality_UQ is not None
    assert arrays.media["remark"].quality_UQ.shape == (1, len(inputs["remark"].quality))


def test_what_a_recipe_spoils_is_there_or_left_out_by_name(colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.corrupt names 'smell', which is no modality here. Use some of photo"):
        run_recipe(small(colour_table, corrupt={"chance": {"smell": 0.5}}), tmp_path / "none", quiet=True)
    fewer = small(colour_table, corrupt={"chance": {"clip": 0.5, "table": 0.5}}, modalities=["table"])
    assert run_recipe(fewer, tmp_path / "fewer", quiet=True).model.preparation.quality is False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"conditions": {"only": ["phto"]}},
            "data.conditions names 'phto', which is no modality here. Use some of photo",
        ),
        ({"conditions": {"only": ["clip"]}}, "data.conditions keep none of the modalities here: photo, remark."),
        ({"views": [{"keep": ["photo", "remrk"]}]}, "data.views names 'remrk', which is no modality here."),
    ],
)
def test_a_misspelt_modality_is_refused_before_a_step_is_taken(
    colour_table: Path, tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipe(small(colour_table, **data), tmp_path / "run", quiet=True)
    events = tmp_path / "run" / "events.jsonl"
    assert not events.exists() or not losses(tmp_path / "run")
