"""What a step holds, from its first moment to its last, and whose it is.

Here        `timeline_of`; Timeline, Series; `moments_in_time` and `fewer_moments`, to show it.
Elsewhere   counting (account.py); where the step is meanwhile (visits.py); drawing it (watch/profile.py).
Promise     at every moment the series add up to what is there, each piece of memory counted once; their peak is the
            account's of the same step, to the byte.

A moment is when a piece of memory was made, went, or became another's. What a part made in its forward and left there
is that part's activation until it goes. What was made in a backward and goes on beyond its part is passed back: nearly
all of it gradients of what lies between two parts. All else is temporary: made and gone within one part's forward or
backward, what is made anew there too, copies of buffers, and what the optimizer needs besides its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.memory.visits import StepPart, Visit, parts_of, visits_told
from dougong.engine.step import TrainParts

Kind = Literal["parameters", "optimizer", "gradients", "activations", "passed back", "temporary"]

WITHOUT_PART: Final[tuple[Kind, ...]] = ("parameters", "optimizer", "gradients", "passed back", "temporary")


class Series(NamedTuple):
    """One of the things that are held."""

    kind: Kind
    part: int | None = None
    """Whose activations they are."""


class Timeline(NamedTuple):
    """One step."""

    parts: tuple[StepPart, ...]
    series: tuple[Series, ...]
    """In the order in which they are best stacked."""

    bytes: npt.NDArray[np.int64]
    """Of each series (rows) at each moment (columns)."""

    visits: tuple[tuple[Visit, int], ...]
    """Where the step was, each from this moment on."""

    held: StepBytes

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """At each moment."""
        found: npt.NDArray[np.int64] = self.bytes.sum(axis=0)
        return found

    @property
    def peak_moment(self) -> int:
        """The first one at which there is most."""
        return int(self.total.argmax())

    def visit_at(self, moment: int) -> Visit:
        """Where the step was then."""
        return [visit for visit, begun in self.visits if begun <= moment][-1]

    def at_peak(self) -> dict[Kind, int]:
        """What the peak is made of, all parts' activations together."""
        found: dict[Kind, int] = {}
        for series, size in zip(self.series, self.bytes[:, self.peak_moment].tolist(), strict=True):
            found[series.kind] = found.get(series.kind, 0) + size
        return found


def timeline_of(step: Callable[[TrainParts], Any], parts: TrainParts) -> Timeline:
    """Carry a step out, with the parts that it is given, and say what it holds: not the first one, in which the
    optimizer makes what it keeps."""
    recorder = _Recorder(parts)
    with visits_told(parts, recorder.visit) as told, recorder:
        step(told)
    return recorder.timeline()


def moments_in_time(timeline: Timeline, seconds: Sequence[float]) -> list[float]:
    """When each moment comes, where each visit takes so long: those of a visit are spread evenly over it."""
    found = np.zeros(timeline.bytes.shape[1])
    ends = [begun for _, begun in timeline.visits[1:]] + [len(found) - 1]
    at = 0.0
    for (_, begun), end, taken in zip(timeline.visits, ends, seconds, strict=True):
        number = end - begun
        found[begun + 1 : end + 1] = at + taken * np.arange(1, number + 1) / max(1, number)
        at += taken
    return [float(moment) for moment in found]


def fewer_moments(total: Sequence[int] | npt.NDArray[np.int64], times: Sequence[float], most: int) -> list[int]:
    """The first and the last moment, and of each of so many stretches of time the one at which there is most."""
    stretch = np.minimum((np.asarray(times) / max(times[-1], 1e-12) * most).astype(np.int64), most - 1)
    kept = {0, len(times) - 1}
    for number in np.unique(stretch):
        places = np.flatnonzero(stretch == number)
        kept.add(int(places[np.asarray(total)[places].argmax()]))
    return sorted(kept)


class _Piece:
    """Of memory."""

    def __init__(self, visit: int) -> None:
        self.visit = visit
        """In which it was made."""

        self.changes: list[tuple[int, int]] = []
        """Bytes more, and when."""

        self.gradient: int | None = None
        """When it became a parameter's gradient."""

        self.gone: int | None = None


class _Recorder(Account):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Writes down when what is counted was made, and when it went."""

    def __init__(self, parts: TrainParts) -> None:
        super().__init__(parts.model, parts.optimizer)
        self._parts = parts_of(parts.model)
        self._moment = 0
        self._visits: list[tuple[Visit, int]] = []
        self._pieces: list[_Piece] = []
        self._piece: dict[int, _Piece] = {}
        self._over = False
        self._handles: list[Any] = []

    def __enter__(self) -> _Recorder:
        for parameter in self._parameters:
            if parameter.requires_grad:
                hooked: Any = parameter.register_post_accumulate_grad_hook  # torch ships it without types
                self._handles.append(hooked(self._gradient_came))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._note_gradients()
        self._over = True
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()

    def visit(self, visit: Visit) -> None:
        """The step is there from now on."""
        self._note_gradients()
        self._visits.append((visit, self._moment))

    def _changed(self, storage: torch.UntypedStorage, by: int) -> None:
        super()._changed(storage, by)
        if self._over or not by:
            return
        self._moment += 1
        key = id(storage)
        if key not in self._piece:
            self._piece[key] = _Piece(len(self._visits) - 1)
            self._pieces.append(self._piece[key])
        self._piece[key].changes.append((self._moment, by))

    def _gone(self, key: int) -> None:
        super()._gone(key)
        piece = self._piece.pop(key, None)
        if piece is not None and not self._over:
            self._moment += 1
            piece.gone = self._moment

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            piece = self._piece.get(id(parameter.grad.untyped_storage()))
            if piece is not None and piece.gradient is None:
                self._moment += 1
                piece.gradient = self._moment

    def _note_gradients(self) -> None:
        """Also of those that were put there by hand, as some objectives do."""
        for parameter in self._parameters:
            self._gradient_came(parameter)

    def timeline(self) -> Timeline:
        """Of the step that was carried out."""
        activations = [Series("activations", place) for place in range(len(self._parts))]
        *before, passed, temporary = (Series(kind) for kind in WITHOUT_PART)
        series = (*before, *activations, passed, temporary)
        row = {each: place for place, each in enumerate(series)}
        steps = np.zeros((len(series), self._moment + 1), dtype=np.int64)
        held = self.bytes
        steps[row[Series("parameters")], 0] = held.weights
        steps[row[Series("optimizer")], 0] = held.optimizer
        for piece in self._pieces:
            own, gradient = row[self._series_of(piece)], row[Series("gradients")]
            for moment, by in piece.changes:
                steps[own if piece.gradient is None or moment < piece.gradient else gradient, moment] += by
            size = sum(by for _, by in piece.changes)
            if piece.gradient is not None:
                already = sum(by for moment, by in piece.changes if moment < piece.gradient)
                steps[own, piece.gradient] -= already
                steps[gradient, piece.gradient] += already
            if piece.gone is not None:
                steps[own if piece.gradient is None else gradient, piece.gone] -= size
        return Timeline(tuple(self._parts), series, steps.cumsum(axis=1), tuple(self._visits), held)

    def _series_of(self, piece: _Piece) -> Series:
        visit, _ = self._visits[piece.visit]
        after = self._visits[piece.visit + 1][1] if piece.visit + 1 < len(self._visits) else self._moment
        if visit.part is None or piece.gradient is not None or (piece.gone is not None and piece.gone <= after):
            return Series("temporary")
        return Series("activations", visit.part) if visit.phase == "forward" else Series("passed back")
