"""Figures that are measured once of the same sources.

Here        `once`, `each_seed`.
Elsewhere   what is kept, and for how long (harness.py).
Promise     a benchmark that was stopped goes on with the first part that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from harness import Kept

from dougong.core.figures import Figure


def once(kept: Kept, key: str, make: Callable[[], Iterable[Figure]]) -> list[Figure]:
    """The figures of this part: from an earlier run, or made now."""
    values = kept.get(key)
    if values is None:
        values = [figure.model_dump(exclude={"holds"}) for figure in make()]
        kept.put(key, values)
    return [Figure.model_validate(value) for value in values]


def each_seed(kept: Kept, key: str, seeds: int, make: Callable[[int], Any]) -> list[Any]:
    """What was found with each seed: from an earlier run, or made now."""
    found = []
    for seed in range(seeds):
        value = kept.get(f"{key}, seed {seed}")
        if value is None:
            value = make(seed)
            kept.put(f"{key}, seed {seed}", value)
        found.append(value)
    return found
