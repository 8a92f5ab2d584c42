import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.core.errors import ConfigError, DataError
from dougong.data.split import largest_group, part_of, sample_table, split_table
from dougong.data.table import Table, open_table, table_of_rows


def numbers(table: Table) -> list[int]:
    return [int(n) for chunk in range(table.num_chunks) for n in table.numbers_of(chunk)]


def table(num_rows: int = 12_000) -> Table:
    speakers = [f"s{i % 40}" for i in range(num_rows)]
    return table_of_rows(pa.table({"speaker": speakers, "x": list(range(num_rows))}), Path())


def test_no_unit_is_on_both_sides_and_no_record_is_lost() -> None:
    whole = table()
    train, held_out = split_table(whole, 0.2, unit="speaker", seed=0)
    assert not set(train.column("speaker").to_pylist()) & set(held_out.column("speaker").to_pylist())
    assert sorted(numbers(train) + numbers(held_out)) == numbers(whole)


def test_records_whose_unit_nobody_knows_stand_alone() -> None:
    speakers = [f"s{i % 40}" if i % 2 else None for i in range(2000)]
    for seed in range(8):
        train, held_out = split_table(
            table_of_rows(pa.table({"speaker": speakers}), Path()), 0.2, unit="speaker", seed=seed
        )
        parts = [part.column("speaker").to_pylist() for part in (train, held_out)]
        assert not (set(parts[0]) & set(parts[1])) - {None}
        assert 0.15 < parts[1].count(None) / 1000 < 0.25


def test_records_keep_their_numbers() -> None:
    _, held_out = split_table(table(), 0.2, unit="speaker", seed=0)
    assert held_out.column("x").to_pylist() == numbers(held_out)


def test_the_same_seed_splits_alike_and_another_does_not() -> None:
    parts = [numbers(split_table(table(), 0.1, unit=None, seed=seed)[1]) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert 0.08 < len(parts[0]) / 12_000 < 0.12


def test_one_unit_cannot_be_split() -> None:
    rows = table_of_rows(pa.table({"speaker": ["a"] * 50}), Path("records"))
    with pytest.raises(DataError, match="cannot be split by 'speaker': all of its 50 records hang together"):
        split_table(rows, 0.2, unit="speaker", seed=0)


def test_of_two_units_each_has_a_side_whatever_the_seed() -> None:
    speakers = ["a"] * 30 + ["b"] * 10
    rows = table_of_rows(pa.table({"speaker": speakers}), Path())
    for seed in range(40):
        for share in (0.2, 0.9):
            train, held_out = split_table(rows, share, unit="speaker", seed=seed)
            sides = [set(part.column("speaker").to_pylist()) for part in (train, held_out)]
            assert sorted(map(len, sides)) == [1, 1]
            assert sides[0] != sides[1]
    asides = [split_table(rows, 0.001, unit="speaker", seed=seed)[1].num_rows for seed in range(10)]
    assert asides == [10] * 10  # what comes nearest to its share


def test_chains_as_long_as_the_table_are_followed_at_once() -> None:
    random, count = np.random.default_rng(0), 200_000
    place = random.permutation(count)
    pictures, sounds = place // 2, (place + 1) % count // 2  # each in two records: one ring

    started = time.perf_counter()
    assert largest_group([pictures, sounds]) == count
    assert largest_group([pictures]) == 2
    assert time.perf_counter() - started < 5  # link by link it would be minutes


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unit 'patient' is no column. Use one of speaker, x"):
        split_table(table(100), 0.2, unit="patient", seed=0)


def test_a_sample_is_from_all_over_the_table_and_keeps_its_numbers() -> None:
    whole = table()
    got = [sample_table(whole, 300, seed=seed) for seed in (0, 0, 1)]

    assert [part.num_rows for part in got] == [300] * 3
    assert numbers(got[0]) == numbers(got[1]) != numbers(got[2])
    assert got[0].column("x").to_pylist() == numbers(got[0])
    assert min(numbers(got[0])) < 600
    assert max(numbers(got[0])) > 11_400
    assert sample_table(whole, 12_000, seed=0) is whole


def test_a_part_made_elsewhere_keeps_its_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"x": list(range(10))}), path, row_group_size=4)

    part = part_of(open_table(path), np.array([9, 1, 2]))

    assert part.column("x").to_pylist() == [1, 2, 9]
    assert part.num_chunks == 2
    with pytest.raises(DataError, match="has no rows"):
        part_of(open_table(path), np.array([], np.int64))


def test_records_that_belong_together_are_on_one_side_also_by_way_of_others() -> None:
    # Row 0 has a copy in row 1; row 1's speaker speaks in row 2, whose picture is in row 3, too.
    speakers = ["a", "b", "b", "c", *(f"s{row}" for row in range(4, 400))]
    first, second = np.full(400, -1), np.full(400, -1)
    first[[0, 1]], second[[2, 3]] = 5, 0
    whole = table_of_rows(pa.table({"speaker": speakers}), Path())
    for seed in range(12):
        for unit in ("speaker", None):
            parts = split_table(whole, 0.3, unit=unit, seed=seed, together=[first, second])
            sides = [set(numbers(part)) for part in parts]
            assert len({0, 1} & sides[0]) in (0, 2)
            assert len({2, 3} & sides[0]) in (0, 2)
            assert len({0, 1, 2, 3} & sides[0]) in ((0, 4) if unit else (0, 2, 4))
            assert sorted(sides[0] | sides[1]) == list(range(400))


def test_a_split_without_copies_is_the_same_with_or_without_looking_for_them() -> None:
    alone = np.arange(12_000)
    for unit in ("speaker", None):
        plain = split_table(table(), 0.2, unit=unit, seed=3)
        looked = split_table(table(), 0.2, unit=unit, seed=3, together=[alone])
        assert [numbers(part) for part in plain] == [numbers(part) for part in looked]


def test_a_unit_that_is_no_number_or_blank_stands_alone() -> None:
    units = [float("nan") if row % 2 else float(row % 7) for row in range(2000)]
    _, held_out = split_table(table_of_rows(pa.table({"unit": units}), Path()), 0.2, unit="unit", seed=0)
    unknown = sum(value is None or value != value for value in held_out.column("unit").to_pylist())
    assert 0.15 < unknown / 1000 < 0.25
