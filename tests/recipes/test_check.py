"""Holds recipes/check.py to its promise: all of any table or recipe is read, whatever more a run would need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.cli.main import main
from dougong.core.config import parse, to_yaml
from dougong.recipes.alignment import AlignRecipe
from dougong.recipes.check import check_recipe_or_table

Records = Callable[..., list[dict[str, Any]]]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def pairs(records: Records, count: int, seed: int, *, shuffled: bool = False) -> list[dict[str, Any]]:
    """Pictures, and what is said of them; or of others."""
    some = records(count, seed=seed, missing=0.0)
    said = [f"this one is quite {record['colour']}" for record in some]
    return [
        {"photo": record["photo"], "remark": said[place - 1 if shuffled else place]}
        for place, record in enumerate(some)
    ]


def test_pairs_without_a_target_are_read_and_held_against_each_other(records: Records, tmp_path: Path) -> None:
    true = check_recipe_or_table(write(tmp_path / "pairs.parquet", pairs(records, 300, 0)))
    wrong = check_recipe_or_table(write(tmp_path / "wrong.parquet", pairs(records, 300, 0, shuffled=True)))

    assert true.roles["remark"].role == "text"
    assert true.target == {}
    assert true.num_parameters is None
    assert any("no column is named as the target" in note for note in true.notes)
    assert set(true.reports["train"].quality) == {"photo", "remark"}
    (related,), (unrelated,) = true.alignments, wrong.alignments
    assert related.related
    assert not unrelated.related or unrelated.shift


def test_what_draws_modalities_together_is_looked_at_as_any_table(records: Records, tmp_path: Path) -> None:
    train, validation = pairs(records, 120, 0), pairs(records, 40, 1)
    train[5]["photo"] = train[9]["photo"]
    train[7]["remark"] = "the caf\u00c3\u00a9 is \ufffd"
    values = {
        "kind": "align",
        "name": "pairs",
        "data": {
            "train": write(tmp_path / "a.parquet", train),
            "validation": write(tmp_path / "b.parquet", validation),
            "sides": {"picture": ["photo"], "words": ["remark"]},
        },
    }
    (tmp_path / "r.yaml").write_text(to_yaml(parse(AlignRecipe, values, where="r")))

    found = check_recipe_or_table(str(tmp_path / "r.yaml"), pictures=tmp_path / "worst.html")

    assert found.inputs.keys() == {"picture", "words"}
    assert found.reports["train"].num_present == {"photo": 120, "remark": 120}
    assert next(one for one in found.duplicates if one.column == "photo").num_repeats == 1
    assert {trouble.name for trouble in found.reports["train"].troubles["remark"]} == {"lost", "misread"}
    (pair,) = found.alignments
    assert pair.auc > 0.7  # of few classes, whose true pairs shuffled ones often are too
    assert "remark" in (tmp_path / "worst.html").read_text()
    assert found.num_parameters


def test_a_part_may_lack_what_is_learnt_from_alone(records: Records, tmp_path: Path) -> None:
    train = [{**row, "second": f"again, {row['remark']}"} for row in pairs(records, 60, 0)]
    values = {
        "kind": "align",
        "name": "pairs",
        "data": {
            "train": write(tmp_path / "a.parquet", train),
            "validation": write(tmp_path / "b.parquet", pairs(records, 30, 1)),
            "sides": {"picture": ["photo"], "words": ["remark", "second"]},
            "judged": {"words": ["remark"]},
        },
    }
    (tmp_path / "r.yaml").write_text(to_yaml(parse(AlignRecipe, values, where="r")))

    found = check_recipe_or_table(str(tmp_path / "r.yaml"), pictures=tmp_path / "worst.html")

    assert found.reports["train"].num_present["second"] == 60
    assert found.reports["validation"].num_present == {"photo": 30, "remark": 30}
    assert main(["check", str(tmp_path / "r.yaml")]) == 0


def test_a_target_that_is_joined_is_seen(records: Records, tmp_path: Path) -> None:
    rows = pairs(records, 60, 0)
    base = write(tmp_path / "base.parquet", [{"id": number, **row} for number, row in enumerate(rows)])
    labels = [{"id": number, "label": "xy"[number % 2]} for number in range(60)]
    join = f"data.join=[{{table: {write(tmp_path / 'labels.parquet', labels)}, key: id}}]"

    found = check_recipe_or_table(base, settings=[join])

    assert found.target["name"] == "label"
    assert not any("no column is named as the target" in note for note in found.notes)


def test_a_table_of_which_nothing_can_be_held_out_is_read_whole(records: Records, tmp_path: Path) -> None:
    one = records(1, seed=0, missing=0.0)
    test = write(tmp_path / "test.parquet", records(6, seed=1, missing=0.0))

    found = check_recipe_or_table(write(tmp_path / "one.parquet", one))
    beside = check_recipe_or_table(write(tmp_path / "one.parquet", one), settings=[f"data.test={test}"])

    assert {part: report.num_rows for part, report in found.reports.items()} == {"train": 1}
    assert any("cannot be split" in warning for warning in found.warnings)
    assert found.leaks == ()
    assert {part: report.num_rows for part, report in beside.reports.items()} == {"train": 1, "test": 6}


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{number % 7},{number % 5},{'ab'[number % 2]}" for number in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["pulse [/min],temp [mm],label", *lines]) + "\n")

    assert main(["check", str(tmp_path / "t.csv")]) == 0

    shown = capsys.readouterr().out
    assert "pulse [/min]" in shown
    assert "temp [mm]" in shown
