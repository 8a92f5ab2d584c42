from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_run import TinyLoader

from dougong.core.errors import DataError
from dougong.data.batch import BatchArrays
from dougong.data.position import Position
from dougong.engine.intake import ENOUGH_SEEN, Intake, Tally


def intake(loader: TinyLoader, tally: Tally | None = None, share: float = 1.0) -> tuple[Intake, list[int]]:
    """And how many bad records were told of, each time."""
    told: list[int] = []
    return Intake(
        loader, tally or Tally(), max_bad_share=share, on_more_bad=lambda tally: told.append(len(tally.bad_rows))
    ), told


def rows(batches: list[BatchArrays]) -> list[list[int]]:
    return [batch.row_B.tolist() for batch in batches]


class InOrder(TinyLoader):
    """Not shuffled, so that a test can say which batch has what."""

    def batches(self, start: Position) -> Iterator[tuple[Position, BatchArrays]]:
        epoch, first = start
        while True:
            for number in range(first, self.batches_per_epoch):
                last = number + 1 == self.batches_per_epoch
                after = Position(epoch + 1, 0) if last else Position(epoch, number + 1)
                yield after, self.collate(np.arange(len(self.x_ND)), number)
            epoch, first = epoch + 1, 0


def test_batches_come_in_the_loaders_order_from_the_tallys_position_on() -> None:
    loader = TinyLoader()
    want = [arrays for _, arrays in zip(range(9), (a for _, a in loader.batches(Position(1, 2))), strict=False)]

    took, _ = intake(loader, Tally(Position(1, 2)))
    taken = took.take(4).arrays + took.take(5).arrays

    assert rows(taken) == rows(want)
    assert took.tally.position == Position(3, 1)


def test_what_was_peeked_at_is_taken_next_and_not_counted_before() -> None:
    took, _ = intake(InOrder(16, 4, bad={0, 1, 2, 3}))

    peeked = took.peek()

    assert peeked is not None
    assert peeked.row_B.tolist() == [4, 5, 6, 7]
    assert took.tally == Tally()
    assert rows(took.take(2).arrays) == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert took.tally.position == Position(0, 3)


def test_what_was_read_ahead_is_taken_next_and_not_counted_before() -> None:
    took, _ = intake(InOrder(16, 4, bad={4, 5, 6, 7, 9}))

    ahead = took.read_ahead(2)
    took.meet(ahead, ahead.counts())

    assert ahead.counts() == [4, 4, 0, 0, 4, 4]
    assert took.tally == Tally()
    assert took.read_ahead(2).read == []  # they have been met
    assert rows(took.take(2).arrays) == [[0, 1, 2, 3], [8, 10, 11]]  # the second has nothing, and one more is read
    assert took.tally.bad_rows == {4, 5, 6, 7, 9}


def test_there_is_nothing_to_peek_at_where_all_is_bad() -> None:
    took, _ = intake(InOrder(8, 4, bad=set(range(8))))
    assert took.peek() is None


def test_a_step_gets_only_batches_that_hold_records() -> None:
    took, _ = intake(InOrder(16, 4, bad={4, 5, 6, 7, 9}))
    assert rows(took.take(3).arrays) == [[0, 1, 2, 3], [8, 10, 11], [12, 13, 14, 15]]


def test_a_bad_record_counts_once_however_often_it_is_met() -> None:
    took, told = intake(InOrder(16, 4, bad={1, 9}))
    took.take(12)
    assert told == [1, 2]
    assert took.tally.bad_rows == {1, 9}
    assert took.tally.seen == 16
    assert took.tally.first_bad == [{"row": row, "column": "x", "reason": "not a number"} for row in (1, 9)]


def test_of_many_bad_records_ten_are_told_with_their_reasons() -> None:
    took, _ = intake(InOrder(80, 4, bad=set(range(1, 80, 2))))
    took.take(20)
    assert [record["row"] for record in took.tally.first_bad] == list(range(1, 20, 2))
    assert len(took.tally.bad_rows) == 40


def test_a_few_bad_records_at_the_start_say_nothing_yet() -> None:
    took, _ = intake(InOrder(400, 4, bad={0, 1}), share=0.05)
    took.take(100)
    assert took.tally.position == Position(1, 0)


def test_too_many_bad_records_are_refused_as_soon_as_enough_were_seen() -> None:
    took, _ = intake(InOrder(400, 4, bad=set(range(0, 400, 10))), share=0.05)
    with pytest.raises(DataError) as refused:
        took.take(100)
    assert str(refused.value) == (
        "20 of the first 200 records cannot be used, more than max_bad_share=0.05 allows. The first is row 0, "
        "column 'x': not a number. Mend the table, or raise max_bad_share."
    )
    assert took.tally.seen == ENOUGH_SEEN


def test_a_small_table_is_judged_at_the_end_of_its_epoch() -> None:
    took, _ = intake(InOrder(16, 4, bad={0}), share=0.05)
    assert len(took.take(3).arrays) == 3
    with pytest.raises(DataError, match=r"^1 of the first 16 records cannot be used"):
        took.take(1)


def test_a_table_without_a_good_record_is_refused() -> None:
    took, _ = intake(InOrder(8, 4, bad=set(range(8))))
    with pytest.raises(DataError, match=r"^a whole epoch has no record that can be used\. The first is row 0, column"):
        took.take(1)


def test_the_loader_is_told_of_the_end() -> None:
    ended: list[bool] = []

    class Closing(TinyLoader):
        def batches(self, start: Position) -> Iterator[Any]:
            try:
                yield from super().batches(start)
            finally:
                ended.append(True)

    took, _ = intake(Closing())
    took.close()  # nothing was begun yet
    took.take(1)
    assert not ended
    took.close()
    assert ended == [True]
