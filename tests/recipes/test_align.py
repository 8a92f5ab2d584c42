"""Holds recipes/align.py to its promises: a run leaves all that was promised, and goes on to the same losses."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.bundle.aligner import load_aligner
from dougong.bundle.model import load
from dougong.cli.main import main
from dougong.core.config import from_yaml, parse, to_yaml
from dougong.core.errors import BundleError, ConfigError, DataError, RunError
from dougong.core.events import read_events
from dougong.data.table import open_table
from dougong.engine import prepare
from dougong.engine.memory.recompute import Keep, apply_recompute
from dougong.nn.block_stack import BlockStack
from dougong.recipes.align import run_align
from dougong.recipes.alignment import AlignRecipe
from dougong.recipes.check import check_recipe_or_table
from dougong.recipes.known import read_any_recipe, read_recipe
from dougong.serve.backend import load_backend


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, records: Any) -> Path:
    """Pictures with two remarks each, made up; the second remark is missing now and then."""
    folder = tmp_path_factory.mktemp("align")
    for name, seed, count in (("train", 0, 80), ("validation", 1, 24), ("test", 2, 24)):
        rows = [
            {
                "photo": row["photo"],
                "photo_again": other["photo"],
                "remark": row["remark"],
                "second_remark": None if place % 3 == 0 else f"so {row['colour']} a thing",
                "colour": row["colour"],
            }
            for place, (row, other) in enumerate(
                zip(records(count, seed=seed, missing=0.0), records(count, seed=seed, missing=0.0), strict=True)
            )
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=30)
    return folder


def recipe(tables: Path, **train: Any) -> AlignRecipe:
    values: dict[str, Any] = {
        "kind": "align",
        "name": "colours",
        "data": {
            "train": str(tables / "train.parquet"),
            "validation": str(tables / "validation.parquet"),
            "test": str(tables / "test.parquet"),
            "sides": {"picture": ["photo", "photo_again"], "words": ["remark", "second_remark"]},
            "judged": {"picture": ["photo", "photo_again"], "words": ["remark"]},
            "spare": "colour",
            "group": "colour",
            "batch_size": 16,
            "preparation": {"image_size": 16},
        },
        "model": {
            "width": 16,
            "encoders": {
                "picture": {"kind": "image", "width": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8},
                "words": {"kind": "text", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
            },
            "bridge": {"num_heads": 2},
        },
        "train": {"steps": 6, "precision": "fp32", "checkpoint_every": 2, "keep": 5, **train},
    }
    return parse(AlignRecipe, values, where="test")


@pytest.fixture(scope="module")
def run(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_align(recipe(tables), tmp_path_factory.mktemp("runs") / "whole", quiet=True).folder


def losses(folder: Path) -> dict[int, float]:
    return {
        event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"
    }


def test_a_run_leaves_all_that_was_promised(run: Path) -> None:
    there = {path.name for path in run.iterdir()}
    assert there >= {"run.yaml", "events.jsonl", "checkpoints", "bundle", "evaluation.json", "report.html"}
    figures = json.loads((run / "evaluation.json").read_text())["conditions"]["picture and words"]
    assert figures["num_records"] == 24
    assert 0 <= figures["metrics"]["recall_at_10"] <= 1
    assert figures["metrics"]["chance_at_10"] == pytest.approx(10 / 24)


def test_the_report_shows_what_was_found_and_refers_to_nothing(run: Path) -> None:
    found = json.loads((run / "retrievals.json").read_text())
    page = (run / "report.html").read_text()

    assert found["asked"] == "words"
    assert {len(entry["found"]) for entry in found["entries"]} == {10}
    for entry in found["entries"]:
        right = [place for place, each in enumerate(entry["found"], start=1) if each["right"]]
        assert right == ([entry["rank"]] if entry["rank"] <= 10 else [])
    assert found["entries"][0]["query"]["text"] in page
    assert page.count('class="right"') == sum(entry["rank"] <= 10 for entry in found["entries"])
    assert "data:image/png" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(run: Path, tables: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    for step in (6, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    assert (folder / "checkpoints" / "step-00000002").exists()
    (folder / "evaluation.json").unlink()

    run_align(recipe(tables), folder, resume=True, quiet=True)

    assert losses(folder) == losses(run)
    again, before = (json.loads((each / "evaluation.json").read_text()) for each in (folder, run))
    assert again["conditions"] == before["conditions"]


@pytest.mark.parametrize(
    "memory", [{"recompute": "blocks", "every": 2}, pytest.param({"activations": 0.9}, marks=pytest.mark.slow)]
)
def test_a_run_in_less_memory_is_the_same_run(
    run: Path, tables: Path, tmp_path: Path, memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Sequence[Keep]] = []

    def noted(model: BlockStack[Any, Any], keep: Sequence[Keep]) -> None:
        kept.append(keep)
        apply_recompute(model, keep)

    monkeypatch.setattr(prepare, "apply_recompute", noted)
    values = recipe(tables).model_dump(mode="json") | {"memory": memory}
    run_align(parse(AlignRecipe, values, where="test"), tmp_path / "less", quiet=True)

    assert losses(tmp_path / "less") == losses(run)
    told = from_yaml((tmp_path / "less" / "run.yaml").read_text(), where="run.yaml")["memory"]
    assert set(kept[-1]) - {"all"}  # the run's own: what rehearsed it came before
    assert told["keep"] in (None, list(kept[-1]))


def test_a_bundle_gives_the_same_vectors(run: Path, tables: Path) -> None:
    aligner = load_aligner(run / "bundle")
    table = open_table(tables / "test.parquet")

    first = aligner.vectors(table, "words", ["remark", "second_remark"])
    second = load_aligner(run / "bundle").vectors(table, "words", ["remark", "second_remark"])

    assert first.num_bad == 0
    np.testing.assert_array_equal(first.x_ND, second.x_ND)
    np.testing.assert_allclose(np.linalg.norm(first.x_ND, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(ConfigError, match="'sound' is no side of this model. Use one of picture, words"):
        aligner.vectors(table, "sound", ["remark"])
    with pytest.raises(ConfigError, match="has no column 'remarks'"):
        aligner.vectors(table, "words", ["remarks"])


def test_a_page_says_why_media_are_alike_and_stands_alone(
    run: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "alike.html"
    data = tables / "test.parquet"
    command = ["watch", run, "--record", "3", "--record", "4", "--out", page, "--json"]

    assert main([str(part) for part in command]) == 0

    told = json.loads(capsys.readouterr().out)
    written = page.read_text(encoding="utf-8")
    assert [record["row"] for record in told["records"]] == [3, 4]
    vectors = {
        side: load_aligner(run / "bundle").vectors(open_table(data), side, [column]).x_ND
        for side, column in (("picture", "photo"), ("words", "remark"))
    }
    for record in told["records"]:
        (pair,) = record["pairs"]
        row = record["row"]
        assert pair["alike"] == pytest.approx(float(vectors["picture"][row] @ vectors["words"][row]), abs=1e-4)
        for given in pair["inputs"]:
            assert sum(given["maps"]["relevance"]) == pytest.approx(1.0, abs=1e-3)
    assert "<script" not in written
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", written)
    assert "picture and words" in written
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(data).select(["remark"]), other)
    assert main(["watch", str(run), "--data", str(other), "--record", "0", "--out", str(page)]) == 2
    assert "has no column to read as picture. Give it one that is named photo" in capsys.readouterr().err


def test_a_bundle_of_another_kind_is_refused(colour_run: Path) -> None:
    with pytest.raises(BundleError, match="is a bundle of another kind of model: load it with dougong.load"):
        load_aligner(colour_run / "bundle")


def test_who_wants_a_model_that_decides_is_told_what_this_one_is(run: Path) -> None:
    with pytest.raises(BundleError, match="holds a model that gives vectors, not a model that decides"):
        load(run / "bundle")
    with pytest.raises(ConfigError, match="gives vectors to media and answers nothing. Serve another one"):
        load_backend(run / "bundle", {})


def test_a_run_is_never_overwritten(run: Path, tables: Path) -> None:
    with pytest.raises(RunError, match="holds a run already"):
        run_align(recipe(tables), run, quiet=True)


def test_commands_know_the_kind(run: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "colours.yaml"
    settings.write_text((run / "run.yaml").read_text().replace("steps: 6", "steps: 2"))

    assert main(["show", "emoji-retrieval", "--set", "data.views=3"]) == 0
    assert "views: 3" in capsys.readouterr().out
    assert main(["check", str(settings), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["tables"]["train"]["rows"] == 80
    assert set(checked["tables"]["train"]["present"]) == {"photo", "photo_again", "remark", "second_remark"}
    assert checked["columns"]["second_remark"]["role"] == "text"
    assert main(["train", str(settings), "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"].keys() == {"picture and words"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.sides={picture: [picture]}"], "name two sides or more"),
        (["data.train=a.csv"], "source 'emoji' and train 'a.csv': give exactly one of them"),
        (["data.judged={sound: [name]}"], "judged names 'sound', which is no side. Use some of picture, words"),
        (["kind=alig"], "is of kind 'alig'. Use align, generate, decode, or leave it out"),
        (["data.vews=3"], "has no setting 'data.vews'. Did you mean 'views'"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_any_recipe("emoji-retrieval", settings)


def test_a_recipe_of_another_kind_does_not_decide() -> None:
    with pytest.raises(ConfigError, match="recipe emoji-retrieval learns to align, not to decide"):
        read_recipe("emoji-retrieval")


def test_sides_of_several_kinds_or_of_no_column_are_refused(tables: Path, tmp_path: Path) -> None:
    for sides, message in (
        ({"picture": ["photo", "remark"], "words": ["remark"]}, "data.sides.picture mixes kinds: photo image, remark"),
        ({"picture": ["photos"], "words": ["remark"]}, "data.sides.picture names 'photos', which train.parquet lacks"),
    ):
        values = recipe(tables).model_dump(mode="json")
        values["data"] |= {"sides": sides, "judged": {}}
        values["model"]["encoders"] = {}
        with pytest.raises(ConfigError, match=message):
            run_align(parse(AlignRecipe, values, where="test"), tmp_path / message[:20], quiet=True)


def test_tables_that_share_a_medium_are_refused_and_told_by_a_check(tables: Path, tmp_path: Path) -> None:
    train, test = (pq.read_table(tables / f"{name}.parquet").to_pylist() for name in ("train", "test"))
    test[3]["photo_again"] = train[5]["photo_again"]
    pq.write_table(pa.Table.from_pylist(test), tmp_path / "test.parquet")
    values = recipe(tables).model_dump(mode="json")
    values["data"]["test"] = str(tmp_path / "test.parquet")
    leaking = parse(AlignRecipe, values, where="test")

    with pytest.raises(DataError, match="the split leaks: 1 image media of 'photo_again' are in train and in test"):
        run_align(leaking, tmp_path / "run", quiet=True)
    (tmp_path / "recipe.yaml").write_text(to_yaml(leaking))
    found = check_recipe_or_table(str(tmp_path / "recipe.yaml"))
    assert any("photo_again" in warning and "a run would refuse this" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("part", "column", "message"),
    [
        ("validation", "photo_again", "by which picture is judged. Add it, or name others in data.judged"),
        ("test", "remark", "by which words is judged. Add it, or name others in data.judged"),
        ("test", "colour", "by which the report is grouped. Name another in data.group, or none"),
        ("train", "colour", "by which records are spared. Name another in data.spare, or none"),
    ],
)
def test_a_column_that_is_asked_for_after_training_is_missed_before_it(
    tables: Path, tmp_path: Path, part: str, column: str, message: str
) -> None:
    pq.write_table(pq.read_table(tables / f"{part}.parquet").drop_columns([column]), tmp_path / "cut.parquet")
    values = recipe(tables).model_dump(mode="json")
    values["data"][part] = str(tmp_path / "cut.parquet")
    with pytest.raises(ConfigError, match=f"cut.parquet lacks the column '{column}', {message}"):
        run_align(parse(AlignRecipe, values, where="test"), tmp_path / "run", quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.yaml"]  # free for the mended one


def test_a_side_that_nobody_has_where_it_is_judged_has_no_figures_and_ends_no_run(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(tables).model_dump(mode="json")
    values["model"]["bridge"] = None
    for part in ("validation", "test"):
        whole = pq.read_table(tables / f"{part}.parquet")
        place = whole.schema.get_field_index("remark")
        empty = whole.set_column(place, "remark", pa.nulls(whole.num_rows, pa.string()))
        pq.write_table(empty, tmp_path / f"{part}.parquet")
        values["data"][part] = str(tmp_path / f"{part}.parquet")
    (tmp_path / "empty.yaml").write_text(to_yaml(parse(AlignRecipe, values, where="test")))

    assert main(["train", str(tmp_path / "empty.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["picture and words"] == {"chance_at_10": pytest.approx(10 / 24)}
    assert "picture and words: none was looked for, since no record has both" in told["notes"]
    assert json.loads((tmp_path / "run" / "retrievals.json").read_text())["entries"] == []
    assert (tmp_path / "run" / "report.html").exists()
    aligner = load_aligner(tmp_path / "run" / "bundle")
    nobody = aligner.vectors(open_table(tmp_path / "test.parquet"), "words", ["remark"])
    assert nobody.x_ND.shape == (24, 16)
    assert not nobody.x_ND.any()


def test_what_is_alike_is_spared_by_degrees_where_a_recipe_says_so(tables: Path, tmp_path: Path) -> None:
    def run(name: str, column: str, spare_alike: list[float] | None) -> list[float]:
        values = recipe(tables, steps=2).model_dump(mode="json")
        values["data"]["spare"], values["objective"]["spare_alike"] = column, spare_alike
        values["model"]["bridge"] = None
        run_align(parse(AlignRecipe, values, where="test"), tmp_path / name, quiet=True)
        return [*losses(tmp_path / name).values()]

    plain = run("plain", "remark", None)
    less = run("less", "remark", [0.1, 0.9])
    # All remarks have four words in common, of ten at most: none is held against another.
    fewest = run("fewest", "remark", [0.0, 0.1])
    assert plain[0] > less[0] > fewest[0]
    assert fewest[0] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(ConfigError, match="column 'photo' holds neither texts nor lists of numbers"):
        run("pictures", "photo", [0.1, 0.9])


@pytest.mark.parametrize(
    ("objective", "spare", "message"),
    [
        ({"spare_alike": [0.9, 0.2]}, "colour", r"\[0.9, 0.2\] must rise from 0 or more to 1 or less"),
        ({"spare_alike": [0.2, 1.5]}, "colour", r"\[0.2, 1.5\] must rise from 0 or more to 1 or less"),
        ({"spare_alike": [0.2, 0.9]}, None, r"compares values of data.spare, and no column is named there. Set data"),
    ],
)
def test_degrees_that_say_nothing_are_refused(
    tables: Path, objective: dict[str, Any], spare: str | None, message: str
) -> None:
    values = recipe(tables).model_dump(mode="json")
    values["objective"] |= objective
    values["data"]["spare"] = spare
    with pytest.raises(ConfigError, match=message):
        parse(AlignRecipe, values, where="test")
