import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dougong.bundle.files import predict_file
from dougong.core.errors import BundleError, ConfigError


def test_each_kind_of_file_holds_the_same_answers(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    for ending in ("jsonl", "csv", "parquet"):
        assert predict_file(colour_run, colour_table, tmp_path / f"a.{ending}")["answered"] == 240

    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()

    assert [line["row"] for line in lines] == list(range(240))
    assert [line["answer"] for line in lines] == [row["answer"] for row in rows] == [row["answer"] for row in table]
    assert json.loads(rows[7]["gate"]) == json.loads(table[7]["gate"]) == lines[7]["gate"]


def test_records_that_cannot_be_read_are_counted(colour_run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"remark": "it is cold"}\n{"photo": "none.png"}\n')

    summary = predict_file(colour_run / "bundle", tmp_path / "rows.jsonl", tmp_path / "answers.jsonl")

    assert (summary["answered"], summary["refused"]) == (1, 1)


def test_a_failure_leaves_no_half_file(colour_run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"smell": "roses"}\n')

    with pytest.raises(Exception, match="the model reads"):
        predict_file(colour_run, tmp_path / "rows.jsonl", tmp_path / "answers.jsonl")

    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_mistakes_are_told_before_anything_is_read(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"answers.txt ends in '.txt': answers are written as .jsonl, .csv, .parquet"):
        predict_file(colour_run, colour_table, tmp_path / "answers.txt")
    with pytest.raises(ConfigError, match="is the table of records itself"):
        predict_file(colour_run, colour_table, colour_table)
    with pytest.raises(BundleError, match="neither a bundle nor a finished run"):
        predict_file(tmp_path, colour_table, tmp_path / "answers.jsonl")
