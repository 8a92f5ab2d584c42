"""Holds data/worst.py to its promise: every record counts once, and of media that are alike one is named."""

from pathlib import Path

import numpy as np
from data_builders import fitted, inline, picture, rows

from dougong.data.batch import BatchArrays, MediaArrays
from dougong.data.check import check_table
from dougong.data.preparation import Preparation
from dougong.data.worst import LISTED, QualityTally, find_text_troubles


def preparation() -> Preparation:
    table = rows(image=[inline(picture(seed=seed)) for seed in range(4)], label=["no", "yes"] * 2)
    return fitted(table)


def tally(sharpness: list[float], exposure: list[float], *, shared: bool = False) -> QualityTally:
    """Records with these two figures and none of the others; where shared, each medium has two of them."""
    num = len(sharpness)
    figures = np.zeros((num, 7), np.float32)
    figures[:, 0], figures[:, 1] = sharpness, exposure
    index = np.arange(num).repeat(2 if shared else 1)
    there = np.ones(len(index), np.bool_)
    found = QualityTally()
    media = MediaArrays({}, index, there, there, figures)
    found.add(BatchArrays({"image": media}, None, np.arange(100, 100 + len(index)), ()))
    return found


def test_of_a_table_the_median_the_worst_share_and_the_worst_records() -> None:
    values = [place / 100 for place in range(101)]
    sharpness, exposure, *others = tally(values, values).summary(preparation())["image"]

    assert (sharpness.name, sharpness.side) == ("sharpness", "low")
    assert np.allclose([sharpness.median, sharpness.worst], [0.5, 0.05])
    assert [row for row, _ in sharpness.rows] == [100 + place for place in range(LISTED)]
    assert np.allclose([value for _, value in sharpness.rows], values[:LISTED])
    assert {exposure.rows[0][0], exposure.rows[1][0]} == {100, 200}  # either side
    assert all(figure.rows == () for figure in others)  # nothing is worse than the median


def test_the_worse_side_is_the_one_that_is_farther_from_the_median() -> None:
    dark = [0.1, 0.1] + [0.6] * 16 + [0.7] * 2
    (_, exposure, *_) = tally(dark, dark).summary(preparation())["image"]
    assert (exposure.side, [row for row, _ in exposure.rows][:1]) == ("low", [100])
    bright = [1 - value for value in dark]
    (_, exposure, *_) = tally(bright, bright).summary(preparation())["image"]
    assert exposure.side == "high"


def test_a_medium_that_records_share_counts_each_time_and_is_named_once() -> None:
    sharpness, *_ = tally([0.1, 0.2, 0.8, 0.9], [0.5] * 4, shared=True).summary(preparation())["image"]
    assert [row for row, _ in sharpness.rows] == [100, 102]
    assert np.isclose(sharpness.median, 0.5)


def test_batches_add_up_and_what_is_absent_is_not_counted() -> None:
    pictures = [inline(picture(seed=row)) for row in range(400)]
    table = rows(image=[None if row % 4 == 0 else pictures[row] for row in range(400)], label=["no", "yes"] * 200)
    report = check_table(table, fitted(table))
    named = {row for figure in report.quality["image"] for row, _ in figure.rows}
    assert named
    assert not any(row % 4 == 0 for row in named)
    assert report.num_batches == 2


def test_what_no_record_has_has_no_summary() -> None:
    table = rows(image=[inline(picture())] * 4, note=["a note", "b", "c", "d"], label=["no", "yes"] * 2)
    found = fitted(table, {"note": "text"})
    empty = rows(image=[None] * 4, note=["a note", None, "", "d"], label=["no", "yes"] * 2)
    report = check_table(empty, found)
    assert set(report.quality) == {"note"}


def test_troubles_of_texts_are_counted_with_their_rows(tmp_path: Path) -> None:
    notes = ["cafÃ© by the sea", "plain words", None, "lost \ufffd and cafÃ©", "plain again"]
    table = rows(tmp_path, note=notes, label=["no", "yes", "no", "yes", "no"])
    found = find_text_troubles(table, fitted(table, {"note": "text"}))
    assert [tuple(trouble) for trouble in found["note"]] == [("lost", 1, (3,)), ("misread", 2, (0, 3))]
