"""Words.

Here        TextConfig, TextModality, learning a vocabulary.
Elsewhere   making vectors of token ids (model/encoders/text.py).
Promise     the tokenizer is the one file that `tokenizers` writes, so any other program can read it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dougong.core.config import Config
from dougong.core.signature import TextInput
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.damage.words import Vocabulary, vocabulary_of, words
from dougong.data.modality.medium import BadValue, Modality, media_key, pad
from dougong.data.quality import TEXT, Quality, text_quality, troubled_share

LARGEST_CHARACTERS: Final = 1_000_000
PRIVATE: Final = 0xF0000
"""The first letter of Unicode's largest private area."""

SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TextConfig(Config):
    """How a text becomes token ids. The tokenizer itself is a file beside this."""

    kind: Literal["text"] = "text"
    column: str
    max_tokens: int = 128
    """What is longer is cut at the end."""

    vocabulary_size: int = 8000
    """At most so many tokens are learnt; ignored where a tokenizer is given."""


class TextModality(Modality):
    """Token ids between [CLS] and [SEP]."""

    quality_names = TEXT

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(config.max_tokens)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.config.column,)

    def signature(self) -> TextInput:
        return TextInput(vocabulary_size=self.tokenizer.get_vocab_size(), max_tokens=self.config.max_tokens)

    def key(self, cells: tuple[Any, ...]) -> Hashable:
        text = cells[0]
        # An empty text says as little as none.
        return media_key(text.strip() and text) if isinstance(text, str) else text

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        text = cells[0]
        if not isinstance(text, str):
            raise BadValue(f"holds {type(text).__name__}, not text")
        if len(text) > LARGEST_CHARACTERS:
            raise BadValue(f"has over {LARGEST_CHARACTERS:,} characters")
        try:
            ids = self.tokenizer.encode(text).ids
        except TypeError:  # what the Rust side makes of a lone surrogate
            raise BadValue("holds half a character, which no UTF-8 can spell") from None
        if not ids:
            raise BadValue("has nothing that the tokenizer can read")
        return np.array(ids, np.int64)

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        longest = max((len(ids) for ids in media), default=1)
        ids_UT, mask_UT = pad(media, longest, np.int64)
        return {"ids_UT": ids_UT, "mask_UT": mask_UT}

    @functools.cached_property
    def damages(self) -> Mapping[str, Damage]:
        return words(self.tokenizer, self._vocabulary)

    def quality(self, values: Mapping[str, Array]) -> Quality:
        around_V, piece_V = self._marked
        return text_quality(
            values["ids_UT"],
            values["mask_UT"],
            max_tokens=self.config.max_tokens,
            unknown=self._vocabulary.unknown,
            around_V=around_V,
            piece_V=piece_V,
        )

    def cell_quality(self, cells: tuple[Any, ...]) -> tuple[float, ...]:
        return (troubled_share(cells[0]),)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return vocabulary_of(self.tokenizer)

    @functools.cached_property
    def _marked(self) -> tuple[Array, Array]:
        """Of each id: whether it stands around texts, and whether it is a mere piece of a word."""
        around_V, piece_V = np.zeros((2, self._vocabulary.size), np.bool_)
        for piece, number in self.tokenizer.get_vocab().items():
            around_V[number] = number in self._vocabulary.around
            piece_V[number] = piece.startswith("##") or (len(piece) == 1 and piece.isalpha())
        return around_V, piece_V


def learn_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Word pieces, lower case (Schuster and Nakajima 2012, as BERT uses them)."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = (
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(_spellable(text)))
    )
    vocabulary = _word_pieces(Counter(words), vocabulary_size)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106, a token of text
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def _word_pieces(counts: Counter[str], vocabulary_size: int) -> dict[str, int]:
    """The pieces by number, the same at every call.

    The library's own trainer of word pieces numbers the "##" letters in the order of a hash table, which differs at
    every call, and ties follow. Its trainer of byte pairs sorts single letters: here it learns from words in which
    every letter but the first is replaced by one of Unicode's private ones.
    """
    letters = sorted({letter for word in counts for letter in word[1:]})
    private = {letter: chr(PRIVATE + place) for place, letter in enumerate(letters)}
    public = {other: letter for letter, other in private.items()}
    inner = str.maketrans(private)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        min_frequency=2,
        limit_alphabet=2**30,  # a limit would leave out the rarest in the order of a hash table
    )
    lines = (" ".join([word[0] + word[1:].translate(inner)] * count) for word, count in sorted(counts.items()))
    tokenizer.train_from_iterator(lines, trainer)
    pieces: dict[str, int] = tokenizer.get_vocab()
    return {_public(piece, public): number for piece, number in pieces.items()}


def _public(piece: str, public: dict[str, str]) -> str:
    letters = "".join(public.get(letter, letter) for letter in piece)
    return f"##{letters}" if piece[0] in public else letters


def _spellable(text: str) -> str:
    return text.encode("utf-8", "ignore").decode("utf-8")
