import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dougong
from dougong.core.config import from_yaml, parse, to_yaml
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import read_events
from dougong.core.signature import Task
from dougong.recipes.fit import fit
from dougong.recipes.judge import judge
from dougong.recipes.known import KNOWN, read_recipe
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.run import run_recipe


def recipe_for(table: Path, **settings: object) -> Recipe:
    values = {"steps": 6, "precision": "fp32", "checkpoint_every": 2, "keep": 5, **settings}
    data = {"train": str(table), "target": "colour", "loader": {"batch_size": 32}}
    return parse(Recipe, {"name": "small", "data": data, "train": values}, where="test")


def losses(folder: Path) -> dict[int, float]:
    return {
        event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"
    }


def test_a_run_leaves_all_that_was_promised(colour_run: Path) -> None:
    there = {path.name for path in colour_run.iterdir()}

    assert there >= {
        "run.yaml",
        "events.jsonl",
        "tensorboard",
        "checkpoints",
        "bundle",
        "evaluation.json",
        "report.html",
    }
    evaluation = json.loads((colour_run / "evaluation.json").read_text())
    assert set(evaluation["conditions"]) == {
        "all",
        *(f"without {name}" for name in ("photo", "clip", "remark", "table")),
        *(f"{name} alone" for name in ("photo", "clip", "remark", "table")),
    }
    assert evaluation["conditions"]["all"]["metrics"]["accuracy"] > 0.9


def test_what_show_prints_runs_as_it_is(colour_table: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(recipe_for(colour_table)))

    first = run_recipe(read_recipe(str(tmp_path / "small.yaml")), tmp_path / "first", quiet=True)
    run_recipe(recipe_for(colour_table), tmp_path / "second", quiet=True)

    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert first.evaluations["all"].num_records > 0


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_recipe_survives_its_own_yaml(name: str) -> None:
    recipe = KNOWN[name]()

    assert parse(type(recipe), from_yaml(to_yaml(recipe), where=name), where=name) == recipe


def test_a_resumed_run_has_the_losses_it_would_have_had(colour_table: Path, tmp_path: Path) -> None:
    recipe = recipe_for(colour_table)
    run_recipe(recipe, tmp_path / "whole", quiet=True)
    run_recipe(recipe, tmp_path / "cut", quiet=True)
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:  # as if it had been killed after step 2
        for file in path.iterdir():
            file.unlink()
        path.rmdir()

    run_recipe(recipe, tmp_path / "cut", resume=True, quiet=True)

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert sum(event["kind"] == "RunStarted" for event in read_events(tmp_path / "cut" / "events.jsonl")) == 2


def test_a_run_is_never_overwritten(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds a run already. Go on with it by --resume"):
        run_recipe(recipe_for(colour_table), colour_run, quiet=True)
    with pytest.raises(RunError, match="there is no run to resume"):
        run_recipe(recipe_for(colour_table), tmp_path / "none", resume=True, quiet=True)


def test_a_run_is_judged_again_to_the_same_figures(colour_run: Path) -> None:
    figures = judge(colour_run, None, ["clip"])
    told = json.loads((colour_run / "evaluation.json").read_text())["conditions"]

    assert figures["all"]["metrics"] == told["all"]["metrics"]
    assert figures["without clip"]["metrics"] == told["without clip"]["metrics"]


def test_judging_needs_a_table_and_names_that_are_there(colour_run: Path, tmp_path: Path) -> None:
    bundle = dougong.load(colour_run / "bundle").save(tmp_path / "alone")

    with pytest.raises(ConfigError, match="is a bundle without its run: name a table to judge on, with --data"):
        judge(bundle, None)
    with pytest.raises(ConfigError, match="--missing 'smell' is no modality of this model. Use some of photo"):
        judge(colour_run, None, ["smell"])


@pytest.mark.parametrize(
    ("task", "targets", "metric"),
    [
        ("regression", [0.5 * row for row in range(60)], "rmse"),
        ("multi_label", [["a"] if row % 2 else ["a", "b"] for row in range(60)], "micro_f1"),
    ],
)
def test_fit_finds_the_task(task: Task, targets: list[object], metric: str, tmp_path: Path) -> None:
    texts = [f"{'odd' if row % 2 else 'even'} number {row}" for row in range(60)]
    pq.write_table(pa.table({"text": texts, "size": list(range(60)), "target": targets}), tmp_path / "t.parquet")

    model = fit(tmp_path / "t.parquet", steps=5, out=tmp_path / "run", quiet=True)
    (answer,) = model.predict([{"text": "odd number 7"}])

    assert model.preparation.target.task == task
    assert metric in model.manifest.metrics["all"]
    assert isinstance(answer.answer, float if task == "regression" else list)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_class_folder_is_learnt_as_it_lies(tmp_path: Path, colour_table: Path) -> None:
    for number, row in enumerate(pq.read_table(colour_table).to_pylist()):
        if row["photo"] is not None and number < 100:
            (tmp_path / "photos" / row["colour"]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / row["colour"] / f"{number}.png").write_bytes(row["photo"]["bytes"])

    model = fit(tmp_path / "photos", steps=30, out=tmp_path / "run", quiet=True)

    assert list(model.preparation.modalities) == ["image"]
    assert model.manifest.metrics["all"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.modalities=[smell]"], "data.modalities names 'smell', which is no modality here. Use some of photo"),
        (["data.train=none.parquet"], "none.parquet does not exist"),
        (["data.target=smell"], "smell"),
    ],
)
def test_a_recipe_that_does_not_fit_its_table_is_told(
    settings: list[str], message: str, colour_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(recipe_for(colour_table)))

    with pytest.raises(Exception, match=message):
        run_recipe(read_recipe(str(tmp_path / "small.yaml"), settings), tmp_path / "run", quiet=True)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="source 'digits' and train 'a.csv' are both given"):
        parse(DataConfig, {"source": "digits", "train": "a.csv"}, where="data")
    with pytest.raises(ConfigError, match="'vqqa' is no recipe. Use one of vqa-demo, vqa, digits"):
        read_recipe("vqqa")
    with pytest.raises(ConfigError, match="has no setting 'train.step'. Did you mean 'steps'"):
        read_recipe("vqa", ["train.step=3"])
