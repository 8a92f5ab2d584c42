"""Holds data/check.py to its promise: every record is read, the counts are exact, each bad one has row and reason."""

import math
from pathlib import Path
from typing import Any

import pytest
from data_builders import claiming_flac, claiming_picture, fitted, inline, npy, picture, rows, sound, sound_of

from dougong.data import check as check_module
from dougong.data.check import check_table
from dougong.data.table import Table

NAMED = {"age": "number", "question": "text"}


def table(folder: Path, num_rows: int = 40, bad: dict[int, tuple[str, Any]] | None = None) -> Table:
    """Good records, but for the cells given by row."""
    columns: dict[str, list[Any]] = {
        "image": [inline(picture(seed=row)) for row in range(num_rows)],
        "speech": [inline(sound(0.05, seed=row)) for row in range(num_rows)],
        "ecg": [npy([float(row), 1.0, 2.0]) for row in range(num_rows)],
        "question": [f"what is number {row}" for row in range(num_rows)],
        "age": [str(row) for row in range(num_rows)],
        "label": ["no", "yes"] * (num_rows // 2),
    }
    for row, (name, cell) in (bad or {}).items():
        columns[name][row] = cell
    return rows(folder, **columns)


def path_of(name: str) -> dict[str, Any]:
    return {"bytes": None, "path": name}


def test_each_bad_record_is_listed_with_its_row_column_and_reason(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (tmp_path / "x.png").write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "x.png")
    bad: dict[int, tuple[str, Any, str]] = {
        0: ("image", inline(picture()[:400]), "is a broken or truncated picture"),
        1: ("image", inline(picture(form="JPEG")[:400]), "is a broken or truncated picture"),
        2: ("image", inline(b"no picture"), "is not a picture"),
        3: ("image", inline(claiming_picture(60_000, 60_000)), "claims far more pixels than any camera takes"),
        4: ("image", path_of("../x.png"), "path '../x.png' leads out of the table's folder"),
        5: ("image", path_of(str(tmp_path / "x.png")), "leads out of the table's folder"),
        6: ("image", path_of("link.png"), "path 'link.png' leads out of the table's folder"),
        7: ("image", path_of("gone.png"), "there is no file 'gone.png'"),
        10: ("speech", inline(sound()[:-500]), "is not sound, or is cut short"),
        11: ("speech", inline(sound(form="WAV")[:-500]), "is truncated: 500 bytes of its samples are not there"),
        12: ("speech", inline(b"no sound"), "is not sound, or is cut short"),
        13: ("speech", inline(claiming_flac(36_000_000_000)), "claims 4500000 seconds"),
        14: ("speech", inline(sound_of([0.1, math.nan])), "has samples that are not numbers"),
        20: ("ecg", npy([1.0, math.nan]), "has values that are not numbers"),
        21: ("ecg", npy([{}], allow_pickle=True), "holds Python objects, which are never unpickled"),
        25: ("age", "forty", "age holds 'forty', not a number"),
        26: ("age", "inf", "age holds inf: leave a missing number empty"),
        27: ("age", "nan", "age holds nan: leave a missing number empty"),
        30: ("label", None, "the target is missing"),
        31: ("label", "maybe", "target 'maybe' was not among the 2 labels of the training data"),
    }
    preparation = fitted(table(folder), NAMED)
    report = check_table(table(folder, bad={row: (name, cell) for row, (name, cell, _) in bad.items()}), preparation)

    assert (report.num_rows, report.num_bad, report.num_batches) == (40, len(bad), 1)
    assert [record.row for record in report.bad] == sorted(bad)
    for record in report.bad:
        column, _, reason = bad[record.row]
        assert record.column == ("table" if column == "age" else column)
        assert reason in record.reason
    assert report.num_present == dict.fromkeys(["image", "speech", "ecg", "question", "table"], 40 - len(bad))


def test_what_is_missing_is_counted_and_is_not_bad(tmp_path: Path) -> None:
    missing = {3: ("image", None), 4: ("image", inline(None)), 5: ("question", " "), 6: ("age", None)}
    report = check_table(table(tmp_path, bad=missing), fitted(table(tmp_path), NAMED))
    assert report.num_bad == 0
    assert report.num_present == {"image": 38, "speech": 40, "ecg": 40, "question": 39, "table": 39}


def test_a_table_without_a_bad_record_has_none(tmp_path: Path) -> None:
    assert check_table(table(tmp_path), fitted(table(tmp_path), NAMED)).bad == ()


def test_the_count_is_exact_where_the_listing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "LISTED", 30)
    good = rows(x=["1.5", "2.5"], label=["no", "yes"])
    bad = rows(x=["1.5", "abc"] * 700, label=["no", "yes"] * 700)
    report = check_table(bad, fitted(good, {"x": "number"}))
    assert (report.num_bad, len(report.bad), report.num_batches) == (700, 30, 6)
    assert [record.row for record in report.bad] == list(range(1, 60, 2))


def test_progress_reaches_the_number_of_rows() -> None:
    heard: list[tuple[int, int]] = []
    records = rows(x=[str(row) for row in range(600)], label=["no", "yes"] * 299 + ["no", None])
    check_table(records, fitted(records, {"x": "number"}), lambda done, total: heard.append((done, total)))
    assert heard == [(256, 600), (512, 600), (600, 600)]
