"""A run's events in a store of MLflow's own, read back by its own client."""

import json
from pathlib import Path
from typing import Any

import pytest

from dougong.cli.main import main
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Evaluated, EventFile, RunStarted, StepDone
from dougong.watch.mlflow_export import export_run


def write(folder: Path, first: int, last: int) -> None:
    file = EventFile(folder / "events.jsonl", resume_at=first if first else None)
    if not first:
        file(RunStarted(step=0, total_steps=10, precision="fp32", num_parameters=9, resumed=False))
    for step in range(first + 1, last + 1):
        file(
            StepDone(
                step=step, loss=2.0 / step if step != 2 else float("nan"), grad_norm=1.0, learning_rate=0.1,
                num_records=8, epoch=0, seconds=0.01, wait_seconds=0.0,
            )
        )  # fmt: skip
    metrics = {"accuracy": 0.5}
    file(Evaluated(step=last, split="validation", condition="a (b)", metrics=metrics, num_records=9, seconds=0.1))
    file.close()


@pytest.mark.parametrize("store", ["runs.db", "sqlite:", "", "s3://bucket", "folder/x"])
def test_what_is_no_store_is_refused_in_one_line(tmp_path: Path, store: str) -> None:
    write(tmp_path, 0, 3)

    with pytest.raises(ConfigError, match="is no MLflow store. Use sqlite:///runs.db") as refused:
        export_run(tmp_path, store)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_run_is_refused_before_mlflow_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no events.jsonl"):
        export_run(tmp_path, "sqlite:///x.db")


def test_options_that_say_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, 3)

    assert main(["watch", str(tmp_path), "--mlflow", "sqlite:///x.db", "--out", "page.html"]) == 2
    assert "--mlflow" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--experiment", "mine"]) == 2
    assert "--experiment mine says nothing without --mlflow" in capsys.readouterr().err


@pytest.mark.slow  # MLflow takes seconds to load and to make its tables
def test_a_run_is_exported_once_and_then_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    run = tmp_path / "mine"
    run.mkdir()
    (run / "run.yaml").write_text("train: {steps: 10, optimizer: {name: adamw}}\nnote: x\n", encoding="utf-8")
    write(run, 0, 5)
    store = f"sqlite:///{tmp_path / 'kept.db'}"
    before = (run / "events.jsonl").read_bytes()

    first = export_run(run, store)
    again = export_run(run, store)
    write(run, 5, 8)
    assert main(["watch", str(run), "--mlflow", store, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert (first.num_events, again.num_events, told["num_events"]) == (7, 0, 4)
    assert first.run_id == again.run_id == told["run_id"]
    client = MlflowClient(tracking_uri=store)
    losses = client.get_metric_history(first.run_id, "train/loss")
    # The one that was not finite is left out, and no step is there twice.
    assert [(each.step, each.value) for each in losses] == [(step, 2.0 / step) for step in (1, 3, 4, 5, 6, 7, 8)]
    judged = client.get_metric_history(first.run_id, "validation/a _b_/accuracy")
    assert [(each.step, each.value) for each in judged] == [(5, 0.5), (8, 0.5)]
    assert client.get_run(first.run_id).data.params == {
        "train.steps": "10",
        "train.optimizer.name": "adamw",
        "note": "x",
    }
    assert (run / "events.jsonl").read_bytes().startswith(before)

    write(run, 3, 5)  # steps that were trained again
    other = export_run(run, store)
    assert other.run_id != first.run_id
    assert [each.step for each in client.get_metric_history(other.run_id, "train/grad_norm")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_said_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    write(tmp_path, 0, 3)

    with pytest.raises(ConfigError, match="--mlflow http://127.0.0.1:1") as refused:
        export_run(tmp_path, "http://127.0.0.1:1")
    assert "\n" not in str(refused.value)
