from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dougong.core.errors import ConfigError
from dougong.core.signature import Target
from dougong.data.batch import BatchArrays
from dougong.data.columns import ColumnRole
from dougong.data.pairs import PairLoader
from dougong.data.position import Position, Share
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.table import Table, table_of_rows

NOTHING = Target(name="", task="regression")
SIDES = {"left": ("a", "b", "c"), "right": ("d",)}


@pytest.fixture
def table() -> Table:
    rows = {
        **{name: [f"{name} number {row}" for row in range(10)] for name in ("a", "b", "c", "d")},
        "key": [row // 2 for row in range(10)],
    }
    rows["b"][3] = None  # type: ignore[call-overload]
    rows["d"][4] = None  # type: ignore[call-overload]
    return table_of_rows(pa.table(rows), Path())


@pytest.fixture
def preparation(table: Table) -> Preparation:
    modalities = {}
    for side, columns in SIDES.items():
        cells = pa.chunked_array([chunk for column in columns for chunk in table.column(column).chunks])
        stacked = table_of_rows(pa.table({side: cells}), Path())
        fitted = fit_preparation(stacked, {side: ColumnRole("text", "")}, NOTHING, PreparationConfig())
        modalities |= fitted.modalities
    return Preparation(modalities, NOTHING)


def pairs_of(batch: BatchArrays, preparation: Preparation) -> set[tuple[int, str, str]]:
    """Row, and both texts, of each pair that is whole."""
    texts = {}
    for side in SIDES:
        tokenizer = preparation.modalities[side].tokenizer  # type: ignore[attr-defined]
        texts[side] = [tokenizer.decode(ids) for ids in batch.media[side].values["ids_UT"].tolist()]
    return {
        (
            int(row),
            texts["left"][batch.media["left"].index_B[place]],
            texts["right"][batch.media["right"].index_B[place]],
        )
        for place, row in enumerate(batch.row_B)
        if batch.media["left"].present_B[place] and batch.media["right"].present_B[place]
    }


def test_all_that_is_seen_of_a_record_is_paired(table: Table, preparation: Preparation) -> None:
    loader = PairLoader(table, preparation, SIDES, batch_size=10, views=2, train=True)

    _, batch = next(loader.batches(Position()))

    by_row: dict[int, list[tuple[str, str]]] = {}
    for row, left, right in pairs_of(batch, preparation):
        assert left.endswith(f"number {row}")
        assert right == f"d number {row}"
        by_row.setdefault(row, []).append((left, right))
    assert set(by_row) == set(range(10)) - {4}  # which has no right side
    assert {len(found) for found in by_row.values()} == {2}
    assert sorted(left for left, _ in by_row[3]) == ["a number 3", "c number 3"]  # all that it has


def test_a_batch_follows_from_its_place_alone(table: Table, preparation: Preparation) -> None:
    def loader(seed: int) -> PairLoader:
        return PairLoader(table, preparation, SIDES, batch_size=4, views=1, seed=seed, train=True)

    run = loader(0).batches(Position())
    several = [next(run) for _ in range(7)]
    middle = loader(0).batches(several[3][0])

    for position, batch in several[4:]:
        again_position, again = next(middle)
        assert again_position == position
        assert pairs_of(again, preparation) == pairs_of(batch, preparation)
    first = [pairs_of(batch, preparation) for _, batch in several[:3]]
    assert {row for found in first for row, *_ in found} == set(range(10)) - {4}
    assert first != [pairs_of(batch, preparation) for _, batch in several[3:6]]  # another epoch, other views
    assert pairs_of(next(loader(1).batches(Position()))[1], preparation) != first[0]


def test_equal_keys_are_equal_numbers(table: Table, preparation: Preparation) -> None:
    loader = PairLoader(table, preparation, SIDES, batch_size=10, views=2, key="key", train=True)
    _, batch = next(loader.batches(Position()))
    assert batch.target is not None
    found = dict(zip(batch.row_B.tolist(), batch.target.tolist(), strict=True))
    assert [found[row] for row in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_judging_pass_is_in_order_and_complete(table: Table, preparation: Preparation) -> None:
    loader = PairLoader(table, preparation, SIDES, batch_size=4)
    rows = np.concatenate([batch.row_B for batch in loader.one_pass()])
    assert rows.tolist() == list(range(10))
    assert loader.batches_per_epoch == 3
    assert [len(batch.row_B) for batch in loader.one_pass()] == [4, 3, 3]


def test_columns_and_sides_that_are_not_there_are_refused(table: Table, preparation: Preparation) -> None:
    with pytest.raises(ConfigError, match="has no column 'e'"):
        PairLoader(table, preparation, {"left": ("e",), "right": ("d",)}, batch_size=4)
    with pytest.raises(ConfigError, match="side 'top' has no modality"):
        PairLoader(table, preparation, {"top": ("a",)}, batch_size=4)


def test_records_whose_key_nobody_knows_share_it_with_nobody(table: Table, preparation: Preparation) -> None:
    keys = [None, None, float("nan"), float("nan"), 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    known = table_of_rows(table.read(0, [*"abcd"]).append_column("key", pa.array(keys)), Path())
    loader = PairLoader(known, preparation, SIDES, batch_size=10, key="key")
    _, batch = next(iter(loader.batches(Position())))
    number = dict(zip(batch.row_B.tolist(), batch.target.tolist(), strict=True))  # type: ignore[union-attr]
    assert number[4] == number[5]
    assert len(set(number.values())) == len(number) - 1


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_shares_put_together_are_the_whole_batches(table: Table, preparation: Preparation, world: int) -> None:
    def batches(share: Share) -> list[tuple[Position, BatchArrays]]:
        loader = PairLoader(
            table, preparation, SIDES, batch_size=4, views=2, key="key", seed=1, train=True, share=share
        )
        return [each for _, each in zip(range(7), loader.batches(Position()), strict=False)]

    whole = batches(Share())
    shares = [batches(Share(rank, world)) for rank in range(world)]

    for (position, want), parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert {after for after, _ in parts} == {position}
        assert np.concatenate([part.row_B for _, part in parts]).tolist() == want.row_B.tolist()
        targets = [part.target for _, part in parts]
        assert np.concatenate(targets).tolist() == want.target.tolist()  # type: ignore[arg-type,union-attr]
        found = [pairs_of(part, preparation) for _, part in parts]
        assert set().union(*found) == pairs_of(want, preparation)
        assert all(media.id_U is None for media in want.media.values())
    rows = [{*part.row_B.tolist()} for _, part in (share[0] for share in shares)]
    assert sum(map(len, rows)) == len(set().union(*rows))  # a record is never on two of them
    assert world < 7 or not all(len(part.row_B) for share in shares for _, part in share)


def test_a_medium_has_one_number_on_every_rank(table: Table, preparation: Preparation) -> None:
    rows = {name: [f"{name} number {row % 3}" for row in range(10)] for name in "abcd"}
    shared = table_of_rows(pa.table(rows), Path())
    numbers: dict[str, set[int]] = {}
    for rank in range(2):
        loader = PairLoader(shared, preparation, SIDES, batch_size=10, share=Share(rank, 2))
        (batch,) = loader.one_pass()
        left = batch.media["left"]
        tokenizer = preparation.modalities["left"].tokenizer  # type: ignore[attr-defined]
        assert left.id_U is not None
        for number, ids in zip(left.id_U.tolist(), left.values["ids_UT"].tolist(), strict=True):
            numbers.setdefault(tokenizer.decode(ids), set()).add(number)
    assert len(numbers) == 3
    assert {len(found) for found in numbers.values()} == {1}
    assert len(set().union(*numbers.values())) == 3
