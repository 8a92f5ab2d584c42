"""Holds data/modality/text.py to its promise, and a text to token ids between [CLS] and [SEP]."""

from typing import Any

import numpy as np
import pytest
from data_builders import HERE
from tokenizers import Tokenizer, models

from dougong.data.modality import text
from dougong.data.modality.medium import BadValue
from dougong.data.modality.text import TextConfig, TextModality, learn_tokenizer

TEXTS = ["what colour is the circle", "what colour is the square", "is the circle red"]


def modality(**settings: Any) -> TextModality:
    return TextModality(TextConfig(column="question", **settings), learn_tokenizer(TEXTS, 200))


def test_known_words_are_one_token_each_between_the_marks() -> None:
    words = modality()
    ids = words.decode(("What colour is the CIRCLE",), HERE)
    tokens = [words.tokenizer.id_to_token(int(token)) for token in ids]
    assert tokens == ["[CLS]", "what", "colour", "is", "the", "circle", "[SEP]"]


def test_the_same_texts_learn_the_same_vocabulary() -> None:
    texts = [f"{word} {other}" for word in TEXTS for other in ("naïve", "日本語", "🙂🙃")]
    assert len({learn_tokenizer(order, 200).to_str() for order in (texts, texts, texts[::-1]) for _ in range(3)}) == 1


def test_every_learnt_piece_is_a_beginning_or_an_inside_of_a_word() -> None:
    vocabulary = learn_tokenizer([*TEXTS, *TEXTS, "日本語"], 200).get_vocab()
    assert {"what", "colour", "circle", "日"} <= set(vocabulary)
    assert all(piece.removeprefix("##").isalpha() for piece in vocabulary if not piece.startswith("["))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_no_more_pieces_are_learnt_than_asked() -> None:
    texts = [f"{first}{second}ing" for first in "bcdfghklm" for second in "aeiou"] * 3
    assert learn_tokenizer(texts, 60).get_vocab_size() == 60


def test_one_word_texts_can_be_told_apart() -> None:
    answers = TextModality(TextConfig(column="answer"), learn_tokenizer(["yes", "no", "maybe"], 200))
    ids = [tuple(answers.decode((word,), HERE)) for word in ("yes", "no", "maybe")]
    assert len(set(ids)) == 3
    assert all(answers.tokenizer.token_to_id("[UNK]") not in found for found in ids)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (7, "holds int, not text"),
        (["a"], "holds list, not text"),
        (b"caf\xe9", "holds bytes, not text"),
        ("half \ud800", "holds half a character, which no UTF-8 can spell"),
        ("a" * 1_000_001, "has over 1,000,000 characters"),
    ],
)
def test_what_is_no_text_is_refused(cell: Any, reason: str) -> None:
    with pytest.raises(BadValue, match=reason):
        modality().decode((cell,), HERE)


def test_a_text_of_which_nothing_is_left_is_refused() -> None:
    bare = TextModality(TextConfig(column="question"), Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    bare.tokenizer.normalizer = text.normalizers.BertNormalizer()
    with pytest.raises(BadValue, match="has nothing that the tokenizer can read"):
        bare.decode(("\u0001\u0002",), HERE)


@pytest.mark.parametrize("cell", [None, "", "  \n"])
def test_an_empty_text_is_none(cell: str | None) -> None:
    assert modality().key((cell,)) is None


def test_the_key_tells_texts_apart_and_stays_short() -> None:
    words = modality()
    assert words.key(("a",)) == words.key(("a",)) != words.key(("b",))
    assert words.key(("a" * 9000 + "b",)) != words.key(("a" * 9000 + "c",))
    assert len(words.key(("a" * 9000,))) < 100  # type: ignore[arg-type]


def test_a_long_text_is_cut_at_the_end_and_still_closed() -> None:
    words = modality(max_tokens=4)
    ids = words.decode(("what colour is the circle",), HERE)
    assert [words.tokenizer.id_to_token(int(token)) for token in ids] == ["[CLS]", "what", "colour", "[SEP]"]


def test_shorter_texts_are_padded_and_masked() -> None:
    words = modality()
    media = [words.decode((cell,), HERE) for cell in ("circle", "is the circle red")]
    stacked = words.stack(media, None)
    assert stacked["ids_UT"].dtype == np.int64
    assert stacked["mask_UT"].sum(axis=1).tolist() == [3, len(media[1])]
    assert stacked["ids_UT"].shape == (2, len(media[1]))
    np.testing.assert_array_equal(stacked["ids_UT"][0, :3], media[0])
    assert words.stack([], None)["ids_UT"].shape == (0, 1)
