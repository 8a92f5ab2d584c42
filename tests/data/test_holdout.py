"""Holds data/holdout.py to its promise; tables that a recipe names are held to it in recipes/test_leaks.py."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from dougong.data.holdout import belonging, hold_out
from dougong.data.table import Table, table_of_rows


def table(photos: list[bytes], **columns: list[str]) -> Table:
    return table_of_rows(pa.table({"photo": photos, **columns}), Path())


def test_a_medium_that_most_records_share_is_the_unit_and_fewer_copies_stay_together() -> None:
    many = table([bytes([number // 3, 7]) for number in range(120)])
    few = table([bytes([0 if number in (5, 90) else number, 7]) for number in range(1, 121)])

    assert belonging(many, ["photo"], None).unit == "photo"
    assert belonging(few, ["photo"], None).unit is None
    for seed in range(12):
        for whole in (many, few):
            held = hold_out(whole, 0.4, belonging(whole, ["photo"], None), seed=seed)
            sides = [set(part.column("photo").to_pylist()) for part in (held.rest, held.aside)]
            assert not sides[0] & sides[1]
            assert held.rest.num_rows + held.aside.num_rows == 120
    assert held.by == "by record, those with the same photo on one side"


def test_a_unit_and_copies_across_units_are_both_kept() -> None:
    photos = [bytes([number, 1]) for number in range(100)]
    photos[7] = photos[0]  # of another speaker
    whole = table(photos, speaker=[f"s{number // 5}" for number in range(100)])

    for seed in range(12):
        held = hold_out(whole, 0.3, belonging(whole, ["photo"], "speaker"), seed=seed)
        for column in ("photo", "speaker"):
            sides = [set(part.column(column).to_pylist()) for part in (held.rest, held.aside)]
            assert not sides[0] & sides[1]
        assert held.by == "by speaker, those with the same photo on one side"


def test_copies_that_chain_all_units_together_may_be_on_both_sides_and_it_is_said() -> None:
    # Each speaker says again one thing that the one before said.
    photos = [bytes([max(0, number - 2 if number % 5 == 0 else number), 1]) for number in range(100)]
    whole = table(photos, speaker=[f"s{number // 5}" for number in range(100)])

    held = hold_out(whole, 0.3, belonging(whole, ["photo"], "speaker"), seed=0)

    speakers = [set(part.column("speaker").to_pylist()) for part in (held.rest, held.aside)]
    assert not speakers[0] & speakers[1]
    assert held.by == "by speaker"
    assert [note.partition(":")[0] for note in held.notes] == ["photo"]


def test_a_blank_binds_nobody_though_the_column_is_the_unit() -> None:
    # Six of ten have no picture to speak of; each of the others is in two records.
    photos = [b"blank" if number % 10 < 6 else bytes([number // 20, number % 10]) for number in range(1000)]
    whole = table(photos)
    belongs = belonging(whole, ["photo"], None)

    for seed in range(12):
        held = hold_out(whole, 0.1, belongs, seed=seed)
        assert 60 < held.aside.num_rows < 140
        sides = [set(part.column("photo").to_pylist()) for part in (held.rest, held.aside)]
        assert sides[0] & sides[1] == {b"blank"}
    assert (belongs.unit, held.by) == ("photo", "by photo")


def test_columns_that_nobody_names_hold_nothing_together() -> None:
    whole = table([b"ab" if number % 2 else b"cd" for number in range(100)])

    held = hold_out(whole, 0.3, belonging(whole, [], None), seed=0)

    assert (held.by, held.notes) == ("by record", ())
    assert np.isclose(held.aside.num_rows, 30, atol=15)
