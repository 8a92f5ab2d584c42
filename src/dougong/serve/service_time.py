"""How long a batch takes, learnt from the batches that were run.

Here        Shape, length_step, ServiceTime.
Elsewhere   what is decided by it (batcher.py); measuring (engine.py).
Promise     before anything was measured it gives the guess that it was made with; a batch never takes less than a
            hundredth of a millisecond, whatever was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np

LEAST_SECONDS: Final = 1e-5
FORGET: Final = 0.98
"""What an observation still counts after the next one: about fifty batches are remembered."""

HELD: Final = 0.0025
"""What a cost as it is known counts beside one batch that tells of nothing else: the variance of a batch's time, in
shares of it, over that of a cost."""

DOUBTED: Final = 0.02
"""What remembered batches still count once another model is being measured."""

SURPRISING: Final = 0.35
SURPRISES: Final = 3
"""After so many errors in a row of more than this, all on one side, another model is being measured than before: what
was learnt counts little from then on."""

MOST_SHAPES: Final = 48
"""Shapes with a cost of their own; those met later share the last one's."""

SETTLED: Final = 100
SOLVED_EVERY: Final = 4
"""After so many batches the equations are solved anew only at every so many-th of them: solving takes as long as
passing on two answers does, and of fifty batches that are remembered four change little."""

LINE_FIRST: Final = 20
"""Batches that fit the line before its bends are learnt."""


class Shape(NamedTuple):
    """What makes one record dearer than another: the modalities that it carries, and how long it is."""

    carries: tuple[str, ...] = ()
    length: int = 0
    """A step of `length_step`; 0 where nothing has a length."""


def length_step(length: float) -> int:
    """Where a length stands: steps of half an octave, so that padding within one is below a half."""
    return 0 if length < 1 else 1 + int(2 * math.log2(length))


class ServiceTime:
    """Seconds of a batch: `a` and, for each record, what its shape costs when padded to the batch's longest.

    Fitted by least squares on relative errors, with forgetting, and then corrected by how batches of about that size
    really were, since the cost of a batch is seldom quite linear in its size. What the remembered batches do not tell
    stays as it was: under a light load all of them are of one record, of which no one can say what is its own cost and
    what the batch's. (The recursive form of the same, Haykin 2002, chapter 9, loses its footing there: what is
    forgotten without being met again grows until rounding decides.)
    """

    def __init__(self, *, fixed_seconds: float = 0.004, item_seconds: float = 0.0005) -> None:
        self._item_seconds = item_seconds
        self._place: dict[Shape, int] = {}
        self._weight_F = np.array([fixed_seconds])
        self._costs = [fixed_seconds]
        """The same as plain numbers, which are read far more often than fitted."""
        self._met_FF = np.zeros((1, 1))
        self._told_F = np.zeros(1)
        """The normal equations of the batches that are remembered."""

        self._bends = [1.0] * 24
        """By what the line is off for batches of 1, 2 to 3, 4 to 7 ... records."""
        self._deviation = 0.1
        self._surprises = 0
        self.num_observed = 0

    @property
    def fixed_seconds(self) -> float:
        """`a`: what a batch takes beyond its records."""
        return max(LEAST_SECONDS, self._costs[0])

    @property
    def deviation(self) -> float:
        """By what share of itself a batch's time usually differs from what was foretold."""
        return self._deviation

    def item_seconds(self, shape: Shape) -> float:
        """What one record of this shape adds."""
        place = self._place.get(shape)
        return max(0.0, self._costs[place]) if place is not None else self._guess(shape)

    def seconds(self, counts: Mapping[Shape, int]) -> float:
        """Of a batch with so many records of each shape; 0 of none."""
        if len(counts) == 1:  # asked for at every request: by hand
            ((shape, number),) = counts.items()
            place = self._place.get(shape)
            if place is not None and number:
                return max(
                    LEAST_SECONDS, (self._costs[0] + number * self._costs[place]) * self._bends[number.bit_length()]
                )
        number = sum(counts.values())
        return max(LEAST_SECONDS, self._line(counts) * self._bends[number.bit_length()]) if number else 0.0

    def observe(self, counts: Mapping[Shape, int], seconds: float) -> None:
        """A batch of at least one record has taken so long."""
        foretold = self.seconds(counts)
        seconds = max(LEAST_SECONDS, seconds)
        if self.num_observed >= 4:  # before, the error is the first guess's
            seconds = min(seconds, 8 * foretold)  # a pause of the machine says nothing of the model
            self._look_for_change((seconds - foretold) / foretold)
            self._deviation += 0.05 * (min(1.0, abs(seconds - foretold) / foretold) - self._deviation)
        self._fit(counts, seconds)
        self.num_observed += 1
        if self.num_observed > LINE_FIRST:
            slot = sum(counts.values()).bit_length()
            off = min(2.0, max(0.5, seconds / self._line(counts)))
            self._bends[slot] += 0.2 * (off - self._bends[slot])

    def _look_for_change(self, error: float) -> None:
        side = 0 if abs(error) < SURPRISING else 1 if error > 0 else -1
        self._surprises = self._surprises + side if side and side * self._surprises >= 0 else side
        if abs(self._surprises) >= SURPRISES:
            self._surprises = 0
            self._met_FF, self._told_F = self._met_FF * DOUBTED, self._told_F * DOUBTED
            self._bends = [1.0] * len(self._bends)

    def _line(self, counts: Mapping[Shape, int]) -> float:
        items = sum(count * self.item_seconds(shape) for shape, count in _padded(counts))
        return max(LEAST_SECONDS, self.fixed_seconds + items)

    def _fit(self, counts: Mapping[Shape, int], seconds: float) -> None:
        places = [(self._place_of(shape), count) for shape, count in _padded(counts)]
        x_F = np.zeros(len(self._weight_F))
        x_F[0] = 1.0
        for place, count in places:
            x_F[place] += count
        # Relative errors: else the largest batches alone would say how long a small one takes.
        x_F /= seconds
        self._met_FF = FORGET * self._met_FF + np.outer(x_F, x_F)
        self._told_F = FORGET * self._told_F + x_F
        if self.num_observed < SETTLED or self.num_observed % SOLVED_EVERY == 0 or self._surprises:
            self._solve()

    def _solve(self) -> None:
        scale_F = np.maximum(self._weight_F, [LEAST_SECONDS] + [self._item_seconds] * (len(self._told_F) - 1))
        held_FF = self._met_FF * np.outer(scale_F, scale_F) + HELD * np.eye(len(scale_F))
        share_F = np.linalg.solve(held_FF, self._told_F * scale_F + HELD * self._weight_F / scale_F)
        self._weight_F = np.maximum(share_F * scale_F, 0.0)
        self._costs = self._weight_F.tolist()

    def _place_of(self, shape: Shape) -> int:
        place = self._place.get(shape)
        if place is not None:
            return place
        if len(self._place) >= MOST_SHAPES:
            return len(self._weight_F) - 1
        guess, size = self._guess(shape), len(self._weight_F)
        self._place[shape] = size
        self._weight_F = np.append(self._weight_F, guess)
        self._met_FF = np.pad(self._met_FF, (0, 1))
        self._told_F = np.append(self._told_F, 0.0)
        self._costs = self._weight_F.tolist()
        return size

    def _guess(self, shape: Shape) -> float:
        """From the shapes most like it: of the same modalities, then of any."""
        alike = [each for each in self._place if each.carries == shape.carries]
        if alike:
            nearest = min(alike, key=lambda each: abs(each.length - shape.length))
            stretch: float = 2.0 ** ((shape.length - nearest.length) / 2)
            return max(1e-7, self._costs[self._place[nearest]]) * min(8.0, max(0.125, stretch))
        if self._place:
            return max(1e-7, sum(self._costs[1:]) / len(self._place))
        return self._item_seconds


def _padded(counts: Mapping[Shape, int]) -> Iterator[tuple[Shape, int]]:
    """Shapes as they are in one batch: whatever has a length is padded to the longest."""
    if len(counts) == 1:
        yield from counts.items()
        return
    longest = max(shape.length for shape in counts)
    for shape, count in counts.items():
        yield (Shape(shape.carries, longest) if shape.length else shape), count
