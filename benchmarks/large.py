"""A sandwich with the shapes of BERT-small and ViT-small, whose weights are random and whose times alone are told.

Here        `large_sandwich` (4 layers of 512 for 64 tokens, 12 of 384 for 224 pixels), `large_batch`.
Elsewhere   who times it (quantise.py, compress_path.py, compress_memory.py).
Promise     the same weights and the same batch of a size, every time.
"""

from __future__ import annotations

import string
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer

from dougong.bundle.model import Model
from dougong.core.bundle import Manifest
from dougong.core.signature import Target
from dougong.data.modality.image import ImageConfig, ImageModality
from dougong.data.modality.text import TextConfig, TextModality, learn_tokenizer
from dougong.data.preparation import Preparation
from dougong.model.bridge import BridgeConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

PIECES: Final = 30_522
"""As many as BERT-small knows."""


def large_sandwich() -> Model:
    letters = np.random.default_rng(0).choice(list(string.ascii_lowercase), size=(30_000, 7))
    words = ["".join(row) for row in letters]
    tokenizer: Tokenizer = learn_tokenizer(words * 2, PIECES)  # what comes but once is no piece
    preparation = Preparation(
        {
            "photo": ImageModality(ImageConfig(column="photo", height=224, width=224)),
            "words": TextModality(TextConfig(column="words", max_tokens=64), tokenizer),
        },
        Target(name="named", task="single_label", labels=tuple("abcdefghij")),
    )
    config = SandwichConfig(
        width=256,
        bridge=BridgeConfig(num_blocks=2),
        encoders={
            "photo": ImageEncoderConfig(
                width=384, num_layers=12, num_heads=6, patch_size=16, pool=2, initializer_range=0.02
            ),
            "words": TextEncoderConfig(width=512, num_layers=4, num_heads=8, initializer_range=0.02),
        },
    )
    torch.manual_seed(0)
    signature = preparation.signature()
    manifest = Manifest(name="large", signature=signature, model=config.model_dump(mode="json"))
    return Model(config.build(signature), preparation, manifest)


def large_batch(size: int, tokens: int = 32) -> Batch:
    random = torch.Generator().manual_seed(size)
    every_B, all_B = torch.arange(size), torch.ones(size).bool()
    ids = torch.randint(5, PIECES, (size, tokens), generator=random)
    pixels = torch.randn(size, 3, 224, 224, generator=random)
    return Batch(
        {
            "photo": MediaBatch({"pixels_UCHW": pixels}, every_B, all_B),
            "words": MediaBatch({"ids_UT": ids, "mask_UT": torch.ones_like(ids).bool()}, every_B, all_B),
        },
        None,
    )
