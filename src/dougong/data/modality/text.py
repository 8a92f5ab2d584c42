"""Words.

Here        TextConfig, TextModality, learning a vocabulary.
Elsewhere   making vectors of token ids (model/encoders/text.py).
Promise     the tokenizer is the one file that `tokenizers` writes, so any other program can read it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dougong.core.config import Config
from dougong.core.signature import TextInput
from dougong.data.batch import Array
from dougong.data.modality.medium import BadValue, Modality, pad

LARGEST_CHARACTERS: Final = 1_000_000
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
        return (text if text.strip() else None) if isinstance(text, str) else text

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        text = cells[0]
        if not isinstance(text, str):
            raise BadValue(f"holds {type(text).__name__}, not text")
        if len(text) > LARGEST_CHARACTERS:
            raise BadValue(f"has over {LARGEST_CHARACTERS:,} characters")
        return np.array(self.tokenizer.encode(text).ids, np.int64)

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        longest = max((len(ids) for ids in media), default=1)
        ids_UT, mask_UT = pad(media, longest, np.int64)
        return {"ids_UT": ids_UT, "mask_UT": mask_UT}


def learn_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Word pieces, lower case (Schuster and Nakajima 2012, as BERT uses them)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106, a token of text
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer
