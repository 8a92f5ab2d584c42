"""Small models of every kind, with batches and a loss, for tests of what the engine does to any model.

Here        `build`, `batches`, `loss_of`.
Elsewhere   the models themselves (src/dougong/model/); ranks (ranks.py).
Promise     the same kind is the same weights and numbers each time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.data.position import Share
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig, ExpertsConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.generation import words_loss

WORDS: Final = 203
MICRO_BATCHES: Final = 4
RECORDS: Final = 106
"""Of all micro-batches."""


def build(kind: str) -> BlockStack[Any, Any]:
    """decoder, sandwich, or convnet, whose buffers move in each forward and which draws random numbers."""
    torch.manual_seed(0)
    if kind == "convnet":
        return ConvNet()
    inputs: dict[str, Any] = {"words": TextInput(vocabulary_size=WORDS, max_tokens=24)}
    if kind == "sandwich":
        inputs["photo"] = ImageInput(height=16, width=16)
    signature = Signature(inputs=inputs, target=Target(name="named", task="single_label", labels=("a", "b", "c")))
    if kind == "decoder":
        experts = ExpertsConfig(num=4, num_chosen=2, hidden=32)
        return DecoderConfig(num_layers=4, num_heads=4, experts=experts).build(signature)
    return SandwichConfig(
        width=32,
        bridge=BridgeConfig(num_blocks=2, num_heads=4),
        encoders={
            "photo": ImageEncoderConfig(width=32, num_layers=2, num_heads=4),
            "words": TextEncoderConfig(width=32, num_layers=2, num_heads=4),
        },
    ).build(signature)


def batches(kind: str, share: Share) -> list[Batch]:
    """Micro-batches of unequal size, of which ranks have unequal parts."""
    made = []
    for number in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(number)
        num_records, num_words = 25 + number, 16 + number
        words = torch.randint(4, WORDS, (num_records, num_words), generator=generator)[share.of(num_records)]
        index_B = torch.arange(len(words))
        present_B = torch.ones_like(index_B).bool()
        mask = torch.ones_like(words, dtype=torch.bool)
        media = {"words": MediaBatch({"ids_UT": words, "mask_UT": mask}, index_B, present_B)}
        if kind != "decoder":
            pixels = torch.randn(num_records, 3, 16, 16, generator=generator)[share.of(num_records)]
            media["photo"] = MediaBatch({"pixels_UCHW": pixels}, index_B, present_B)
        made.append(Batch(media, (torch.arange(num_records) % 3)[share.of(num_records)]))
    return made


def loss_of(output: Any, batch: Batch) -> Tensor:
    if hasattr(output, "loss_BN"):
        return words_loss(output)
    return torch.nn.functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


class _Answer(NamedTuple):
    output_BC: Tensor


class ConvNet(BlockStack[Tensor, _Answer]):
    """Convolutions with batch normalisation and dropout."""

    embed_names = ("stem",)

    def __init__(self, width: int = 8, num_blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(num_blocks)
        )
        self.decide = nn.Linear(width, 3)

    def embed(self, batch: Batch) -> Tensor:
        stem: Tensor = self.stem(batch.media["photo"].values["pixels_UCHW"])
        return stem

    def head(self, state: Tensor) -> _Answer:
        return _Answer(self.decide(state.mean(dim=(2, 3))))
