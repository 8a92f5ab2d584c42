"""How alike the values of a column are, whatever a model says of their records.

Here        Likeness.
Elsewhere   which records have one value (data/keyed.py, `numbered`); what is made of it (objectives/contrastive.py).
Promise     from 0 to 1; 1 of a value with itself, and 0 of one that nobody knows with every other. What is found of two
            values depends on them alone, so every process finds the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dougong.core.errors import ConfigError
from dougong.data.keyed import numbered

Floats = npt.NDArray[np.float32]


class Likeness:
    """Of a column of texts the share of their words that two have in common (Jaccard); of one of lists of numbers, such
    as a frozen model's vectors, their cosine.

    Shapes: K distinct values, W words or numbers.
    """

    def __init__(self, cells: Sequence[Any], name: str) -> None:
        """Args:
            cells: the whole column; its values are known by the numbers that `numbered` gives them.
            name: what the column is called.

        Raises:
            ConfigError: it holds neither, or lists of several lengths.
        """
        cells = list(cells)
        _, first_K = np.unique(numbered(cells), return_index=True)
        values = [cells[place] for place in first_K.tolist()]
        known = [value for value in values if value is not None]
        self._words: list[npt.NDArray[np.int64]] | None = None
        self._vectors_KW: Floats | None = None
        if any(isinstance(value, str) for value in known) and all(isinstance(value, str | bytes) for value in known):
            self._words = _words(values)
        elif known and all(isinstance(value, list) for value in known):
            self._vectors_KW = _vectors(values, name)
        else:
            raise ConfigError(
                f"column {name!r} holds neither texts nor lists of numbers, so that two of its values are equal or are "
                "not. Leave objective.spare_alike out, or name another column in data.spare."
            )

    def __call__(self, number_K: npt.NDArray[np.int64]) -> Floats:
        """How alike each two of these values are, (K, K)."""
        if self._words is not None:
            has_KW = _multi_hot([self._words[number] for number in number_K.tolist()])
            common_KK = has_KW @ has_KW.T
            count_K = has_KW.sum(axis=1)
            alike_KK = common_KK / np.maximum(count_K[:, None] + count_K - common_KK, 1.0)
        else:
            assert self._vectors_KW is not None
            x_KW = self._vectors_KW[number_K]
            alike_KK = (x_KW @ x_KW.T).clip(0.0, 1.0)
        np.fill_diagonal(alike_KK, 1.0)
        found: Floats = alike_KK.astype(np.float32)
        return found


def _words(values: Sequence[Any]) -> list[npt.NDArray[np.int64]]:
    place: dict[str, int] = {}
    found = []
    for value in values:
        text = value if isinstance(value, str) else ""  # bytes are a text that could not be read
        words = sorted(set(re.findall(r"\w+", text.casefold())))
        found.append(np.array([place.setdefault(word, len(place)) for word in words], np.int64))
    return found


def _multi_hot(words: Sequence[npt.NDArray[np.int64]]) -> Floats:
    """Of so many values, which words of any of them each has."""
    known, column = np.unique(np.concatenate([*words, np.zeros(0, np.int64)]), return_inverse=True)
    row = np.repeat(np.arange(len(words)), np.array([len(own) for own in words], np.int64))
    has_KW = np.zeros((len(words), len(known)), np.float32)
    has_KW[row, column] = 1.0
    return has_KW


def _vectors(values: Sequence[Any], name: str) -> Floats:
    """Of length 1; zeros where nothing is known."""
    lengths = {len(value) for value in values if value is not None}
    x_KW: Floats | None = None
    if len(lengths) == 1:
        nothing = [0.0] * lengths.pop()
        try:
            x_KW = np.array([nothing if value is None else value for value in values], np.float32)
        except (TypeError, ValueError):
            x_KW = None
    if x_KW is None or x_KW.ndim != 2 or not np.isfinite(x_KW).all():
        raise ConfigError(
            f"column {name!r} holds lists that are not of one length, or not of numbers alone, and cannot be compared. "
            "Leave objective.spare_alike out, or name another column in data.spare."
        )
    unit_KW: Floats = x_KW / np.maximum(np.linalg.norm(x_KW, axis=1, keepdims=True), 1e-12)
    return unit_KW
