"""What every damage is.

Here        Damage, and `about`: a whole number for a share of things.
Elsewhere   the formulas, in their files; choosing what is spoilt, and how strongly (data/corruption.py).
Promise     a damage returns a new array of the kind it was given, and never writes into what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from dougong.data.batch import Array

Damage: TypeAlias = Callable[[Array, float, np.random.Generator], Array]
"""From a decoded medium, a level above 0 and up to 1, and where chance comes from."""


def about(wanted: float, random: np.random.Generator) -> int:
    """A whole number whose mean is `wanted`: so that a weak damage is rarer on few things, not absent."""
    return int(wanted + random.random())
