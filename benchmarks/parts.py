"""Figures that are measured once of the same sources.

Here        `once`.
Elsewhere   what is kept, and for how long (harness.py).
Promise     a benchmark that was stopped goes on with the first part that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness import Kept

from dougong.core.figures import Figure


def once(kept: Kept, key: str, make: Callable[[], Iterable[Figure]]) -> list[Figure]:
    """The figures of this part: from an earlier run, or made now."""
    values = kept.get(key)
    if values is None:
        values = [figure.model_dump(exclude={"holds"}) for figure in make()]
        kept.put(key, values)
    return [Figure.model_validate(value) for value in values]
