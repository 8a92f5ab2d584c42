"""What comes in from the loader, and what is told of records that were set aside.

Here        Tally, Intake, Ahead.
Elsewhere   deciding that a record is bad (data/); saving the tally (engine/checkpoint.py).
Promise     a step gets only batches that hold records, on some rank at least; a record counts as bad once, however
            often it is met; where too many are bad, training refuses to go on. Every rank counts what all have met.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dougong.core.errors import DataError
from dougong.data.batch import BadRecord, BatchArrays
from dougong.data.position import Loader, Position
from dougong.engine.parallel.ranks import ALONE, Ranks

ENOUGH_SEEN = 200
"""Records to meet before a share of bad ones says something; at the end of an epoch any number does."""

NUM_FIRST = 10
"""Bad records that are told with their reasons."""


@dataclass
class Tally:
    """Where the loader stands and what it has met."""

    position: Position = field(default_factory=Position)
    seen: int = 0
    """Records of the first epoch, so each counts once."""

    bad_rows: set[int] = field(default_factory=set)
    first_bad: list[dict[str, Any]] = field(default_factory=list)


class Taken(NamedTuple):
    """The batches of a step."""

    arrays: list[BatchArrays]
    """This rank's share of each, which may be empty."""

    num_records: int
    """Of all ranks."""


class Ahead(NamedTuple):
    """Batches that this rank has read its share of, and no rank has told the others of."""

    read: list[tuple[Position, BatchArrays]]

    def counts(self) -> list[int]:
        """Three numbers of each: records, distinct rows with bad ones included, and bad columns."""
        # A record may stand in a batch under several views, and be bad in several columns.
        return [
            count
            for _, arrays in self.read
            for count in (
                len(arrays.row_B),
                len({*arrays.row_B.tolist(), *(record.row for record in arrays.bad)}),
                len(arrays.bad),
            )
        ]


class _Met(NamedTuple):
    """One batch: this rank's share of it, and what all ranks have of it."""

    position: Position
    arrays: BatchArrays
    num_records: int
    num_rows: int
    """Distinct ones, bad ones included."""

    bad: list[BadRecord]


class Intake:
    """Takes batches from a loader, from the tally's position on."""

    def __init__(
        self,
        loader: Loader,
        tally: Tally,
        *,
        max_bad_share: float,
        on_more_bad: Callable[[Tally], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.tally = tally
        self._loader = loader
        self._max_bad_share = max_bad_share
        self._on_more_bad = on_more_bad
        self._ranks = ranks
        self._batches: Iterator[tuple[Position, BatchArrays]] | None = None
        self._ahead: deque[_Met] = deque()

    def take(self, count: int) -> Taken:
        """The next `count` batches that hold records.

        Raises:
            DataError: too many records are bad, or an epoch has no good one.
        """
        taken: list[BatchArrays] = []
        num_records = num_empty = 0
        while len(taken) < count:
            if not self._ahead:
                self._meet_next()
            met = self._ahead.popleft()
            self._note(met)
            if met.num_records:
                taken.append(met.arrays)
                num_records += met.num_records
                num_empty = 0
            else:
                num_empty += 1
                if num_empty >= self._loader.batches_per_epoch:
                    raise DataError(f"a whole epoch has no record that can be used.{self._first()}")
        return Taken(taken, num_records)

    def peek(self) -> BatchArrays | None:
        """The batch that `take` will give first, still to be taken; None where an epoch has none."""
        while len(self._ahead) < self._loader.batches_per_epoch:
            self._meet_next()
            if self._ahead[-1].num_records:
                return self._ahead[-1].arrays
        return None

    def read_ahead(self, count: int) -> Ahead:
        """Wait for the batches of the next `take` as far as they have not been met. What they count must be added up
        over the ranks, together with what else is to be agreed on, and told by `meet`."""
        if self._batches is None:
            self._batches = self._loader.batches(self.tally.position)
        return Ahead([next(self._batches) for _ in range(count - len(self._ahead))])

    def meet(self, ahead: Ahead, sums: Sequence[int]) -> None:
        """`sums` are `ahead.counts()`, added up over the ranks."""
        for number, (position, arrays) in enumerate(ahead.read):
            num_records, num_rows, num_bad = sums[3 * number : 3 * number + 3]
            told = self._ranks.tell([list(record) for record in arrays.bad]) if num_bad else []
            bad = [BadRecord(*record) for part in told for record in part]
            self._ahead.append(_Met(position, arrays, num_records, num_rows, bad))

    def close(self) -> None:
        """Let the loader end its work."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None

    def _meet_next(self) -> None:
        ahead = self.read_ahead(len(self._ahead) + 1)
        self.meet(ahead, self._ranks.sums(*ahead.counts()))

    def _note(self, met: _Met) -> None:
        tally, before, position = self.tally, self.tally.position, met.position
        tally.position = position
        if before.epoch == 0:
            tally.seen += met.num_rows
        num_before = len(tally.bad_rows)
        for record in met.bad:
            if record.row not in tally.bad_rows and len(tally.first_bad) < NUM_FIRST:
                tally.first_bad.append(record._asdict())
            tally.bad_rows.add(record.row)
        if len(tally.bad_rows) > num_before:
            self._on_more_bad(tally)

        # At least as many were seen as were bad, also where a later epoch's sampling met new rows.
        seen = max(tally.seen, len(tally.bad_rows))
        judged = seen >= ENOUGH_SEEN or position.epoch > before.epoch
        if judged and len(tally.bad_rows) > self._max_bad_share * seen:
            raise DataError(
                f"{len(tally.bad_rows)} of the first {seen} records cannot be used, more than "
                f"max_bad_share={self._max_bad_share} allows.{self._first()} Mend the table, or raise max_bad_share."
            )

    def _first(self) -> str:
        if not self.tally.first_bad:
            return ""
        record = self.tally.first_bad[0]
        return f" The first is row {record['row']}, column {record['column']!r}: {record['reason']}."
