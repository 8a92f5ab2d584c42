"""Holds data/leak.py to its promise: a unit or a medium on two sides is found wherever it lies; what may repeat may."""

import math
from pathlib import Path

import numpy as np
import pytest
from data_builders import inline, npy, picture, rows

from dougong.core.errors import DataError
from dougong.data import leak as leak_module
from dougong.data.columns import infer_roles
from dougong.data.leak import check_leaks, copies, find_leaks
from dougong.data.table import Table


def test_a_unit_on_two_sides_is_found_however_it_is_stored() -> None:
    train = rows(patient=[1, 2, 3, 3, None], x=[1.0, 2.0, 3.0, 4.0, 5.0], label=["a", "b", "a", "b", "a"])
    test = rows(patient=[3.0, 4.0, None], x=[1.0, 2.0, 3.0], label=["a", "b", "a"])
    roles = infer_roles(train, target="label", named={})

    (leak,) = find_leaks({"train": train, "test": test}, roles, "patient")

    assert (leak.column, leak.kind, leak.left, leak.right) == ("patient", "unit", "train", "test")
    assert (leak.num_shared, leak.num_left, leak.num_right) == (1, 2, 1)
    with pytest.raises(DataError) as caught:
        check_leaks([leak])
    assert str(caught.value) == (
        "the split leaks: 1 values of the unit 'patient' are in train and in test (2 and 1 records; such as '3'), so "
        "figures would be of what was learnt by heart. Remove those records from one side, or set data.allow_leak: "
        "true to go on."
    )


def test_a_medium_is_found_under_another_name_in_another_folder(tmp_path: Path) -> None:
    for name, seed in (("a/one.png", 1), ("a/two.png", 2), ("b/three.png", 2), ("b/four.png", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(seed=seed))
    train = rows(tmp_path / "a", image=["one.png", "two.png", "gone.png"], label=["a", "b", "a"])
    test = rows(tmp_path / "b", image=["three.png", "four.png"], label=["a", "b"])
    inline_test = rows(image=[inline(picture(seed=1)), inline(None)], label=["a", "b"])
    roles = infer_roles(train, target="label", named={"image": "image"})

    found = find_leaks({"train": train, "test": test, "validation": inline_test}, roles)

    assert [(leak.left, leak.right, leak.num_shared, leak.example) for leak in found] == [
        ("train", "test", 1, "such as row 1 of train and row 0 of test"),
        ("train", "validation", 1, "such as row 0 of train and row 0 of validation"),
    ]


def test_a_file_of_a_size_that_no_other_side_has_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"1234")
    (tmp_path / "b.png").write_bytes(b"12345")
    (tmp_path / "c.png").write_bytes(b"5432")
    read: list[str] = []

    def reading(name: str, folder: Path) -> bytes:
        read.append(name)
        return (folder / name).read_bytes()

    monkeypatch.setattr(leak_module, "media_bytes", reading)
    train, test = rows(tmp_path, image=["a.png", "b.png"], label=[0, 1]), rows(tmp_path, image=["c.png"], label=[0])

    roles = infer_roles(train, target="label", named={"image": "image"})

    assert find_leaks({"train": train, "test": test}, roles) == ()
    assert sorted(read) == ["a.png", "c.png"]


def test_texts_numbers_and_short_lists_may_repeat() -> None:
    random = np.random.default_rng(0)

    def part(count: int) -> Table:
        return rows(
            question=["what colour is it"] * count,
            size=[1.0] * count,
            gauge=[[0.0, 1.0]] * count,
            wave=[npy(random.normal(size=64)) for _ in range(count)],
            label=["a", "b"] * (count // 2),
        )

    train, test = part(4), part(2)
    roles = infer_roles(train, target="label", named={"question": "text"})
    assert roles["gauge"].role == "signal"

    assert find_leaks({"train": train, "test": test}, roles) == ()


def test_a_long_list_of_numbers_is_a_medium() -> None:
    wave = [float(number) for number in range(64)]
    train, test = rows(wave=[wave, wave[::-1]], label=[0, 1]), rows(wave=[wave], label=[0])

    (leak,) = find_leaks({"train": train, "test": test}, infer_roles(train, target="label", named={}))

    assert (leak.kind, leak.num_shared) == ("signal", 1)


def test_units_that_nobody_knows_are_on_no_side() -> None:
    train = rows(patient=["a", "", " ", None], label=["a", "b", "a", "b"])
    test = rows(patient=["", "b", None], label=["a", "b", "a"])
    numbers = rows(patient=[math.nan, 2.0], label=["a", "b"])
    others = rows(patient=[math.nan, 3.0], label=["a", "b"])

    assert find_leaks({"train": train, "test": test}, {}, "patient") == ()
    assert find_leaks({"train": numbers, "test": others}, {}, "patient") == ()


def test_the_same_numbers_are_found_whether_stored_as_whole_or_not() -> None:
    whole = rows(wave=[list(range(20)), [7] * 20], label=["a", "b"])
    double = rows(wave=[[float(n) for n in range(20)], [0.5] * 20], label=["a", "b"])
    roles = infer_roles(whole, target="label", named={"wave": "signal"})

    (leak,) = find_leaks({"train": whole, "test": double}, roles)

    assert (leak.kind, leak.num_shared) == ("signal", 1)


def test_copies_are_told_by_content_and_a_blank_that_many_have_is_none(tmp_path: Path) -> None:
    for place in range(20):
        (tmp_path / f"{place}.png").write_bytes(picture(seed=place))
    (tmp_path / "again.png").write_bytes(picture(seed=3))
    names = [*(f"{place}.png" for place in range(20)), "again.png", None, "gone.png"]
    table = rows(tmp_path, image=names)

    number_R = copies(table, "image")

    assert number_R[20] == number_R[3]
    assert number_R[21] == number_R[22] == -1
    assert len(set(number_R[:20].tolist())) == 20
    # The blank is on 30 records, each other picture on two: they are copies, and it is what records have in common.
    blanks = [inline(picture(seed=99 if place % 2 else place // 4)) for place in range(60)]
    often_R = copies(rows(image=blanks), "image")
    assert (often_R[1::2] == -1).all()
    assert often_R[0] == often_R[2] != often_R[4]
    few = rows(image=[inline(picture(seed=place % 2)) for place in range(40)])
    assert sorted(np.bincount(copies(few, "image"))) == [20, 20]
