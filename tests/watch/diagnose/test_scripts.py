"""Three broken trainings as people write them, each watched by three lines: the planted fault is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional

from dougong.cli.main import main
from dougong.watch.diagnose.hook import callback, watch


def test_a_plain_script_that_forgot_zero_grad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched = watch(model, optimizer, tmp_path)  # 1
    for _ in range(20):
        images, labels = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        watched.step(loss)  # 2
    watched.close()

    assert "Gradients of earlier steps are still there" in str(watched)  # 3
    assert main(["diagnose", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["findings"][0]["cause"], told["findings"][0]["place"]) == ("gradients not cleared", "optimizer")
    assert told["measured"] == 5


def test_a_training_that_goes_on_from_a_checkpoint_is_watched_from_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched = watch(model, optimizer, tmp_path, total_steps=1000, steps=598)
    assert not watched.examining
    for _ in range(4):
        loss = functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(3, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watched.step(loss)
    watched.close()

    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "StepDone"] == [599, 600, 601, 602]
    assert [e["step"] for e in events if e["kind"] == "FlowMeasured"] == [600]
    assert (events[0]["kind"], events[0]["step"], events[0]["resumed"]) == ("RunStarted", 598, True)
    assert watched.history.progress == pytest.approx(0.602)


def test_a_transformers_trainer_whose_encoder_was_frozen(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for parameter in model.bert.encoder.parameters():
        parameter.requires_grad = False
    random = np.random.default_rng(0)
    data: list[dict[str, Any]] = [
        {"input_ids": random.integers(4, 50, 12), "attention_mask": np.ones(12, np.int64), "labels": number % 3}
        for number in range(64)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    watching = callback()  # 1
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[watching])  # type: ignore[arg-type]  # 2
    trainer.train()

    found = watching.watched.findings()  # 3
    assert (found[0].cause, found[0].place) == ("frozen", "bert.encoder.layer")


def test_a_recipe_whose_weight_decay_lost_its_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"note": ["warm red thing", "cold blue thing"][k % 2], "size": k / 9.0, "answer": "ab"[k % 2]}
        for k in range(99)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "recipe.yaml").write_text(
        f"name: decayed\ndata: {{train: {tmp_path / 'rows.parquet'}, target: answer}}\nmodel: {{width: 16}}\n"
        "train: {steps: 6, precision: fp32, flow: {}, optimizer: {weight_decay: 50.0}}\n"
    )
    run = tmp_path / "run"

    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(run), "--json"]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert (told["findings"][0]["cause"], told["findings"][0]["place"]) == ("weight decay too high", "optimizer")
    assert main(["diagnose", str(run)]) == 0
    assert "Weight decay is stronger than learning: optimizer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_remedy_is_tried_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    rows = [
        {
            "note": ["warm red thing", "cold blue thing"][kind],
            "size": float(random.standard_normal()),
            "answer": "ab"[kind],
        }
        for kind in random.integers(0, 2, 200).tolist()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "recipe.yaml").write_text(
        f"name: slow\ndata: {{train: {tmp_path / 'rows.parquet'}, target: answer}}\nmodel: {{width: 16}}\n"
        "train: {steps: 40, precision: fp32, flow: {}, optimizer: {learning_rate: 0.0000001}}\n"
    )
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(run), "--json"]) == 0
    before = sorted(path.name for path in run.iterdir())
    capsys.readouterr()

    assert main(["diagnose", str(run), "--try-fix", "--steps", "12", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["findings"][0]["cause"] == "learning rate too low"
    trial = told["trials"][0]
    assert trial["setting"] == "train.optimizer.learning_rate=30x"
    assert len(trial["before"]) == len(trial["after"]) == 2
    assert sorted(path.name for path in run.iterdir()) == before


def test_what_cannot_be_diagnosed_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "holds no events.jsonl" in capsys.readouterr().err
    watched = watch(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), tmp_path)
    watched.close()
    assert main(["diagnose", str(tmp_path)]) == 0
    assert "Only the curves could be judged" in capsys.readouterr().out
