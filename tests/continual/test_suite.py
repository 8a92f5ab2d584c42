import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dougong.continual.suite.ask import ask, rows_for
from dougong.continual.suite.begin import begin_suite
from dougong.continual.suite.gate import gate
from dougong.continual.suite.performance import Performance, measure, remember, remembered, trend_picture
from dougong.continual.suite.suite import (
    Change,
    Dataset,
    DirectionCheck,
    InvarianceCheck,
    LatencyCheck,
    MetricCheck,
    MinimumCheck,
    Slice,
    Suite,
    read_suite,
    write_suite,
)
from dougong.continual.taught import Taught, open_taught
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError, RunError
from dougong.core.files import sha256_of, write_json
from dougong.data.table import open_table

Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def version(taught: Path) -> Taught:
    return open_taught(taught)


@pytest.fixture(scope="module")
def folder(records: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 test records."""
    place = tmp_path_factory.mktemp("suite")
    pq.write_table(pa.Table.from_pylist(records(120, seed=31, missing=0.1)), place / "test.parquet")
    return place


@pytest.fixture(scope="module")
def begun(version: Taught, folder: Path) -> Suite:
    return begin_suite(version, open_table(folder / "test.parquet"), folder / "suite.yaml", name="colours")


def damaged(bundle: Path, out: Path, part: str) -> Path:
    """The same bundle with the weights whose name has `part` made noise."""
    shutil.copytree(bundle, out)
    weights = load_file(out / "model.safetensors")
    torch.manual_seed(0)
    hit = [name for name in weights if part in name]
    assert hit
    for name in hit:
        weights[name] = torch.randn_like(weights[name])
    save_file(weights, out / "model.safetensors")
    manifest = json.loads((out / "bundle.json").read_text())
    file = out / "model.safetensors"
    manifest["files"]["model.safetensors"] = {"sha256": sha256_of(file), "num_bytes": file.stat().st_size}
    manifest["files"] = {name: v for name, v in manifest["files"].items() if not name.startswith("tasks/")}
    write_json(out / "bundle.json", Manifest.model_validate(manifest).model_dump(mode="json"))
    shutil.rmtree(out / "tasks", ignore_errors=True)
    return out


def test_a_suite_is_written_and_its_model_passes_it(version: Taught, begun: Suite, folder: Path) -> None:
    read = read_suite(folder / "suite.yaml")
    assert read == begun
    kinds = [check.kind for check in read.checks]
    assert {"metric", "invariance", "minimum", "latency", "memory"} <= set(kinds)
    assert {part.column for part in read.checks[0].slices} == {"colour"}  # type: ignore[union-attr]
    quick = read.model_copy(update={"checks": tuple(c for c in read.checks if c.kind != "latency")})

    verdict = gate(version, version, quick, folder, against="itself")

    assert verdict.passed, verdict.in_words()
    with pytest.raises(ConfigError, match="is there already"):
        begin_suite(version, open_table(folder / "test.parquet"), folder / "suite.yaml", name="colours")


def test_a_version_that_forgot_its_classes_is_refused(
    version: Taught, begun: Suite, folder: Path, taught: Path, tmp_path: Path
) -> None:
    worse = open_taught(damaged(taught, tmp_path / "worse", "decision.out"))
    metrics = begun.model_copy(update={"checks": tuple(c for c in begun.checks if c.kind == "metric")})
    verdict = gate(worse, version, metrics, folder)
    assert not verdict.passed
    refused = verdict.refusals[0]
    assert refused.num_changed > 0
    assert refused.changed[0][1] != refused.changed[0][2]
    assert refused.loss > 0.02


def test_behaviour_is_asked_three_ways(version: Taught, folder: Path) -> None:
    change = Change(
        column="remark", replace={"warm like fire": "cold like the sea", "fresh like grass": "cold like the sea"}
    )
    suite = Suite(
        name="behaviour",
        data={"d": Dataset(table="test.parquet", unit="maker")},
        checks=(
            InvarianceCheck(
                name="numbers say nothing", data="d", change=Change(column="remark", replace={"number": "no"})
            ),
            DirectionCheck(name="blue words", data="d", change=change, label="blue", moves="not down", by=0.01),
            DirectionCheck(name="blue words up", data="d", change=change, label="blue", moves="down"),
            MinimumCheck(name="all", data="d", least=0.5),
        ),
    )
    found = {one.check: one for one in ask(version, suite, folder).scored}
    assert found["numbers say nothing"].score_N.mean() > 0.9
    assert found["blue words"].score_N.mean() > 0.9
    assert found["blue words up"].score_N.mean() < 0.2
    assert found["all"].score_N.mean() > 0.9
    verdict = gate(version, None, suite, folder)
    assert [one.name for one in verdict.refusals] == ["blue words up"]


def test_a_task_has_its_own_checks(version: Taught, tmp_path: Path) -> None:
    from task_builders import tones

    pq.write_table(pa.Table.from_pylist(tones(40, seed=40)), tmp_path / "tones.parquet")
    suite = Suite(
        name="tones",
        data={"t": Dataset(table="tones.parquet")},
        checks=(
            MetricCheck(name="told", data="t", task="tones", least=0.8, slices=(Slice(column="pitch", value="low"),)),
            MetricCheck(name="spoilt", data="t", task="tones", corrupt=("clip=0.3",)),
        ),
    )
    verdict = gate(version, version, suite, tmp_path)
    assert verdict.passed
    assert verdict.comparisons[1].num_records < 40


def test_a_suite_that_cannot_be_asked_is_refused_before(version: Taught, folder: Path, tmp_path: Path) -> None:
    def asked(**check: Any) -> None:
        ask(
            version,
            Suite(
                name="s", data={"d": Dataset(table="test.parquet")}, checks=(MetricCheck(name="c", data="d", **check),)
            ),
            folder,
        )

    with pytest.raises(ConfigError, match="'smell' is no modality"):
        asked(without=("smell",))
    with pytest.raises(ConfigError, match="'town' is no column"):
        asked(slices=(Slice(column="town", value="x"),))
    with pytest.raises(ConfigError, match="is no task of this bundle"):
        asked(task="smells")
    write_suite(tmp_path / "s.yaml", Suite(name="s", data={"d": Dataset(table="../x.parquet")}, checks=()))
    with pytest.raises(ConfigError, match="is not in the suite's folder"):
        read_suite(tmp_path / "s.yaml")
    (tmp_path / "t.yaml").write_text("name: t\ndata: {}\nchecks: [{kind: metric, name: c, data: gone}]\n")
    with pytest.raises(ConfigError, match="reads 'gone'"):
        read_suite(tmp_path / "t.yaml")
    with pytest.raises(ConfigError, match="--init"):
        read_suite(tmp_path / "none.yaml")


def test_slices_are_values_ranges_and_nothing() -> None:
    assert Slice(column="c", value="1").holds(1)
    assert Slice(column="c", low=1, high=2).holds(1.5)
    assert not Slice(column="c", low=1, high=2).holds(2)
    assert not Slice(column="c", low=1).holds(None)
    assert Slice(column="c").holds(None)
    assert not Slice(column="c", value="None").holds(None)
    with pytest.raises(ValueError, match="a value and a range"):
        Slice(column="c", value=1, low=0)


def test_time_and_memory_are_remembered_and_drawn(version: Taught, taught: Path, folder: Path, tmp_path: Path) -> None:
    rows = rows_for(open_table(folder / "test.parquet"), 4)
    found = measure(version, rows, "colours 1", taught, repeats=5)
    assert found.latency_seconds > 0
    assert found.peak_bytes > 0
    file = tmp_path / "baselines.jsonl"
    remember(file, found)
    remember(file, found.model_copy(update={"version": "colours 2"}))
    with file.open("a") as opened:
        opened.write('{"version": "half')  # a killed process
    assert [one.version for one in remembered(file)] == ["colours 1", "colours 2"]
    assert trend_picture(remembered(file), tmp_path / "trend.svg").read_text().startswith("<?xml")
    file.write_text("nonsense\n" + found.model_dump_json() + "\n")
    with pytest.raises(RunError, match="line 1 is no baseline"):
        remembered(file)
    with pytest.raises(ConfigError, match="no baseline to draw"):
        trend_picture([], tmp_path / "trend.svg")
    assert isinstance(found, Performance)
    assert LatencyCheck(name="l", data="d").most_ratio > 1
