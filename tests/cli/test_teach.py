"""Teaching a bundle, keeping versions and asking a gate, by commands."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.cli.main import main

Records = Callable[..., list[dict[str, Any]]]


def output(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    assert main([str(argument) for argument in arguments]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dougong: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def makers(records: Records, tmp_path: Path) -> Path:
    """A new question about the same kind of records: is it heavy?"""
    rows = [
        {"remark": row["remark"], "photo": row["photo"], "heavy": "yes" if row["colour"] == "blue" else "no"}
        for row in records(80, seed=70, missing=0.0)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "heavy.parquet")
    return tmp_path / "heavy.parquet"


def test_a_bundle_is_taught_asked_and_unlearns(
    colour_run: Path, makers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(colour_run, tmp_path / "run"))
    some = ("--set", "train.steps=20", "--set", "budget=0.1")
    learnt = output(
        capsys, "learn", run, makers, "--task", "heavy", "--target", "heavy", "--about", "is it heavy", *some, "--json"
    )
    assert learnt["metrics"]["accuracy"] > 0.6
    assert learnt["original_known"] is True
    assert learnt["of_base"] <= 0.1

    told = output(capsys, "predict", run, makers, tmp_path / "a.jsonl", "--task", "heavy", "--json")
    assert told == {"answered": 80, "refused": 0, "path": str(tmp_path / "a.jsonl")}
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {answer["answer"] for answer in answers} <= {"yes", "no"}
    assert {answer["task"] for answer in answers} == {"heavy"}
    for ending in ("csv", "parquet"):
        output(capsys, "predict", run, makers, tmp_path / f"a.{ending}", "--task", "auto", "--json")
    assert {"task", "task_confidence"} <= set(pq.read_schema(tmp_path / "a.parquet").names)

    (listed,) = output(capsys, "tasks", "list", run, "--json")
    assert listed["name"] == "heavy"
    assert main(["tasks", "list", str(run)]) == 0
    assert "heavy/1" in capsys.readouterr().out
    exported = output(capsys, "tasks", "export", run, "heavy", tmp_path / "heavy", "--json")
    assert exported["bytes"] < 2**20
    output(capsys, "tasks", "remove", run, "heavy", "--json")
    assert output(capsys, "tasks", "list", run, "--json") == []
    assert output(capsys, "tasks", "add", run, tmp_path / "heavy", "--json") == {"added": ["heavy/1"]}


def test_mistakes_are_told_in_one_line(
    colour_run: Path, makers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = colour_run
    assert "has no MODALITY=COLUMN" in refused(capsys, "learn", run, makers, "--task", "h", "--column", "x")
    assert "without --watch" in refused(capsys, "learn", run, makers, "--task", "h", "--minutes", "3")
    assert "without --rehearsal" in refused(capsys, "learn", run, makers, "--task", "h", "--key", "k")
    assert "cannot be used" in refused(capsys, "learn", run, makers, "--task", "original")
    assert "no setting 'buget'" in refused(capsys, "learn", run, makers, "--task", "h", "--set", "buget=1")
    assert "is no task of this bundle" in refused(capsys, "predict", run, makers, tmp_path / "a.csv", "--task", "h")
    assert "cannot take effect beside --task" in refused(
        capsys, "predict", run, makers, tmp_path / "a.csv", "--task", "auto", "--withhold", "photo"
    )
    assert "has no task 'h'" in refused(capsys, "tasks", "remove", run, "h")
    nowhere = tmp_path / "none"
    assert "is no registry yet" in refused(capsys, "registry", "list", "--registry", nowhere)
    assert "cannot be read as a suite" in refused(capsys, "regress", run, "--suite", nowhere)
    assert "without --init" in refused(capsys, "regress", run, "--unit", "maker")
    assert "draws what --baselines" in refused(capsys, "regress", run, "--trend", "x.png")
    assert "is no reason" in refused(capsys, "registry", "promote", "x", "--override", "because", "--registry", nowhere)


@pytest.mark.slow
def test_a_version_goes_through_the_gate_into_production(
    colour_run: Path, records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    pq.write_table(pa.Table.from_pylist(records(60, seed=71, missing=0.1)), tmp_path / "test.parquet")
    suite, where = tmp_path / "suite.yaml", ("--registry", tmp_path / "registry")
    begun = output(
        capsys, "regress", colour_run, "--init", "--suite", suite, "--data", tmp_path / "test.parquet", "--json"
    )
    assert "all records" in begun["checks"]
    # Time is asked by a test of its own: here another process may slow it.
    suite.write_text(suite.read_text().replace("most_ratio: 1.25", "most_ratio: 20.0"))
    added = output(capsys, "registry", "add", colour_run, "--name", "colours", *where, "--json")
    assert added["version"] == 1
    output(capsys, "registry", "promote", "colours", "1", *where, "--json")

    reports = ("--junit", tmp_path / "j.xml", "--markdown", tmp_path / "r.md")
    drawn = ("--baselines", tmp_path / "b.jsonl", "--trend", tmp_path / "t.png")
    against = ("--suite", suite, "--against", "production", "--name", "colours", *where)
    asked = output(capsys, "regress", colour_run, *against, *reports, *drawn, "--json")
    assert asked["passed"]
    assert ElementTree.parse(tmp_path / "j.xml").getroot().attrib["failures"] == "0"
    assert "passed" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "t.png").stat().st_size > 1000

    worse = Path(shutil.copytree(colour_run / "bundle", tmp_path / "worse"))
    from safetensors.torch import load_file, save_file

    from dougong.core.files import sha256_of

    weights = load_file(worse / "model.safetensors")
    save_file(
        {name: -x if name.startswith("decision.out") else x for name, x in weights.items()}, worse / "model.safetensors"
    )
    manifest = json.loads((worse / "bundle.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = sha256_of(worse / "model.safetensors")
    manifest["files"]["model.safetensors"]["num_bytes"] = (worse / "model.safetensors").stat().st_size
    (worse / "bundle.json").write_text(json.dumps(manifest))
    output(capsys, "registry", "add", worse, "--name", "colours", *where, "--json")
    assert "nothing says that 2 is no worse" in refused(capsys, "registry", "promote", "colours", "2", *where)
    said = output(capsys, "registry", "promote", "colours", "2", "--suite", suite, *where, "--json", status=1)
    assert not said["passed"]
    assert said["in_words"].startswith("refused: all records")
    assert main(["regress", str(worse), "--suite", str(suite), "--against", str(colour_run)]) == 1
    assert "records changed, first" in capsys.readouterr().out

    forced = output(
        capsys,
        "registry",
        "promote",
        "colours",
        "2",
        "--suite",
        suite,
        "--override",
        "we must see it live",
        *where,
        "--json",
    )
    assert forced["reason"] == "we must see it live"
    assert forced["verdict"].startswith("overridden; refused")
    assert output(capsys, "registry", "rollback", "colours", *where, "--json")["after"] == 1
    shown = output(capsys, "registry", "show", "colours", "2", "--out", tmp_path / "back", *where, "--json")
    assert shown["promotions"][0]["reason"] == "we must see it live"
    assert (tmp_path / "back" / "bundle.json").read_bytes() == (worse / "bundle.json").read_bytes()
    for command in (("list",), ("lineage", "colours"), ("diff", "colours", "1", "2"), ("show", "colours")):
        assert main([str(each) for each in ("registry", *command, *where)]) == 0
        assert capsys.readouterr().out
