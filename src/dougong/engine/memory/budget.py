"""Which block keeps what, so that activations fit a budget and a step takes least time.

Here        `choose_keep`, `fit_budget`, Chosen.
Elsewhere   what blocks take (blocks.py); having them keep so much (recompute.py).
Promise     of all ways to give every block one of its choices, the fastest by what was measured whose most, over
            forward and backward, is within the budget, but for rounding up by a thousandth; what is chosen is then
            measured whole, and chosen anew where it came out differently.

The most is not the sum of what is kept: while a block makes its activations anew, all of them are there, beside what
those before it keep; those after it have let theirs go. So early blocks should keep less than late ones, and the last
can keep all for nothing. Found by going through the blocks with, for each number of bytes that those so far keep, the
least time in which that can be (a knapsack with several choices, after Kellerer et al. 2004; that recomputing is a
knapsack, after Jain et al. 2020, Checkmate, arXiv:1910.02653, who solve more general graphs by integer programs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text
from dougong.engine.memory.blocks import PartCost, Profile
from dougong.engine.memory.recompute import Keep, all_alike

STEPS: Final = 8192
"""Into so many a budget is divided: what a block keeps is rounded up to one of them."""

CLOSE: Final = 0.97
"""Share of the budget from which on it is used well enough."""


class Chosen(NamedTuple):
    """What each block keeps."""

    keep: tuple[Keep, ...]
    bytes: int
    """Of activations, at their most, as predicted; or as measured."""

    seconds: float
    """Of all blocks, embedding and head, forward and backward, with one micro-batch."""


def most_bytes(profile: Profile, keep: Sequence[Keep]) -> int:
    """Activations at their most, where blocks keep so much."""
    before, most = 0, 0
    for cost in _parts(profile, keep):
        most = max(most, before + cost.forward_bytes, before + cost.backward_bytes)
        before += cost.kept
    return most


def choose_keep(profile: Profile, budget_bytes: float) -> Chosen | None:
    """The fastest that fits; None where nothing does."""
    step = budget_bytes / STEPS
    # By steps that all so far keep: the least seconds, and by which choice of each block.
    seconds = np.full(STEPS + 1, np.inf)
    if not _fits(profile.embed, 0.0, budget_bytes):
        return None
    seconds[_steps(profile.embed.kept, step)] = profile.embed.seconds
    held = np.arange(STEPS + 1) * step
    decisions = []
    for block in profile.blocks:
        following, decided = np.full(STEPS + 1, np.inf), np.full(STEPS + 1, -1, dtype=np.int64)
        for number, cost in enumerate(block.values()):
            moved = _steps(cost.kept, step)
            if moved > STEPS:
                continue
            room = held[: STEPS + 1 - moved]
            after = np.where(_fits(cost, room, budget_bytes), seconds[: STEPS + 1 - moved] + cost.seconds, np.inf)
            better = after < following[moved:]
            following[moved:][better] = after[better]
            decided[moved:][better] = number
        decisions.append(decided)
        seconds = following
    seconds = np.where(_fits(profile.head, held, budget_bytes), seconds + profile.head.seconds, np.inf)
    place = int(seconds.argmin())
    if not np.isfinite(seconds[place]):
        return None
    keep: list[Keep] = []
    least = float(seconds[place])
    for block, decided in zip(profile.blocks[::-1], decisions[::-1], strict=True):
        each = list(block)[decided[place]]
        keep.append(each)
        place -= _steps(block[each].kept, step)
    found = tuple(keep[::-1])
    return Chosen(found, most_bytes(profile, found), least)


def fit_budget(
    profile: Profile,
    budget: Callable[[int], float],
    measured: Callable[[Sequence[Keep]], int],
    *,
    tries: int = 6,
) -> Chosen:
    """The fastest found whose measured bytes fit.

    `measured` carries a step out, of which the profile may have seen another share of the records; `budget` is told
    what keeping all takes.

    Raises:
        ConfigError: not even what keeps least does; the message says how much that takes.
    """
    every = all_alike("all", len(profile.blocks))
    whole = measured(every)
    room = budget(whole)
    predicted = most_bytes(profile, every)
    tried = {every: whole}
    best: Chosen | None = None
    if whole <= room:
        return Chosen(every, whole, sum(cost.seconds for cost in _parts(profile, every)))
    target = room * predicted / whole
    for _ in range(tries):
        found = choose_keep(profile, target) or _least(profile)
        if found.keep in tried:
            break
        real = tried[found.keep] = measured(found.keep)
        if real <= room and (best is None or found.seconds < best.seconds):
            best = found._replace(bytes=real)
        if CLOSE * room <= real <= room:
            break
        target *= room / real
    if best is None:
        raise ConfigError(
            f"memory.activations comes to {bytes_as_text(room)}, less than the {bytes_as_text(min(tried.values()))} "
            f"that a step takes where blocks make all that they can anew (keeping all: {bytes_as_text(whole)}). Use "
            "smaller batches with a larger train.accumulation, or more room."
        )
    return best


def _least(profile: Profile) -> Chosen:
    """What keeps least, the fastest of such."""
    low, high = 0.0, float(most_bytes(profile, [min(b, key=lambda k: b[k].kept) for b in profile.blocks]))
    best = choose_keep(profile, high * (1 + 2 / STEPS * len(profile.blocks)))
    assert best is not None
    while high - low > high / STEPS:
        middle = (low + high) / 2
        found = choose_keep(profile, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _parts(profile: Profile, keep: Sequence[Keep]) -> list[PartCost]:
    blocks = [block[each] for block, each in zip(profile.blocks, keep, strict=True)]
    return [profile.embed, *blocks, profile.head]


def _fits(cost: PartCost, before: np.ndarray | float, budget_bytes: float) -> np.ndarray | np.bool_:
    return np.asarray(before + max(cost.forward_bytes, cost.backward_bytes) <= budget_bytes)


def _steps(size: int, step: float) -> int:
    return int(np.ceil(size / step))
