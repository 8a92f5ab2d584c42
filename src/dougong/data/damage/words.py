"""Texts, spoilt.

Here        `words`: by name, what is done to token ids (T,).
Elsewhere   decoding them (data/modality/text.py); what sees it (data/quality.py).
Promise     what a tokenizer puts around a text stays, and at least one token stands between.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dougong.data.batch import Array
from dougong.data.damage.damage import Damage, about


class Vocabulary(NamedTuple):
    """What must be known of a tokenizer's ids."""

    unknown: int
    """Stands for what has no id; -1 where the tokenizer spells everything."""

    around: frozenset[int]
    """Put around texts, never part of one."""

    size: int


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    unknown = next(
        (
            number
            for name in ("[UNK]", "<unk>", "[MASK]", "<mask>")
            if (number := tokenizer.token_to_id(name)) is not None
        ),
        -1,
    )
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return Vocabulary(unknown, frozenset(special - {unknown}), tokenizer.get_vocab_size())


def words(tokenizer: Tokenizer, vocabulary: Vocabulary) -> dict[str, Damage]:
    """What may be done to texts of one tokenizer."""
    damages: dict[str, Damage] = {
        "mask": functools.partial(_mask, vocabulary=vocabulary),
        "swap": _swap,
        "delete": _delete,
        "typo": functools.partial(_typo, tokenizer=tokenizer),
    }
    return {
        name: damage if name == "typo" else functools.partial(_inside, damage, vocabulary.around)
        for name, damage in damages.items()
    }


def _inside(damage: Damage, around: frozenset[int], ids_T: Array, level: float, random: np.random.Generator) -> Array:
    """Only between what stands before and behind."""
    own = np.array([number not in around for number in ids_T.tolist()], np.bool_)
    if not own.any():
        return ids_T.copy()
    first, last = int(own.argmax()), len(own) - int(own[::-1].argmax())
    return np.concatenate([ids_T[:first], damage(ids_T[first:last], level, random), ids_T[last:]])


def _mask(ids_T: Array, level: float, random: np.random.Generator, *, vocabulary: Vocabulary) -> Array:
    """Make up to nine of ten tokens unknown; where everything can be spelt, any token comes in their place."""
    places = random.permutation(len(ids_T))[: about(0.9 * level * len(ids_T), random)]
    changed = ids_T.copy()
    changed[places] = (
        vocabulary.unknown if vocabulary.unknown >= 0 else random.integers(0, vocabulary.size, len(places))
    )
    return changed


def _swap(ids_T: Array, level: float, random: np.random.Generator) -> Array:
    """Exchange neighbours, at level 1 as many times as there are tokens."""
    changed = ids_T.copy()
    if len(ids_T) > 1:
        for place in random.integers(0, len(ids_T) - 1, about(level * len(ids_T), random)):
            changed[[place, place + 1]] = changed[[place + 1, place]]
    return changed


def _delete(ids_T: Array, level: float, random: np.random.Generator) -> Array:
    """Leave out up to eight of ten tokens."""
    lost = min(about(0.8 * level * len(ids_T), random), len(ids_T) - 1)
    return np.delete(ids_T, random.permutation(len(ids_T))[:lost])


def _typo(ids_T: Array, level: float, random: np.random.Generator, *, tokenizer: Tokenizer) -> Array:
    """Mistype up to four of ten letters: exchanged with the next, doubled, left out, or another one of the text."""
    letters = list(tokenizer.decode(ids_T.tolist()))
    places = [place for place, letter in enumerate(letters) if letter.isalnum()]
    wrong = [places[i] for i in random.permutation(len(places))[: about(0.4 * level * len(places), random)]]
    if not wrong:
        return ids_T.copy()
    for place, how in zip(wrong, random.integers(0, 4, len(wrong)).tolist(), strict=True):
        if how == 0 and place + 1 < len(letters):
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        elif how == 1:
            letters[place] *= 2
        elif how == 2:
            letters[place] = ""
        else:
            letters[place] = letters[places[int(random.integers(0, len(places)))]]
    ids = tokenizer.encode("".join(letters)).ids
    empty = tokenizer.encode("").ids
    return np.array(ids, np.int64) if len(ids) > len(empty) else ids_T.copy()
