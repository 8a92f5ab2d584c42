"""ResNets of transformers' configuration as a stack of blocks, for the benchmarks of memory and precision.

Here        ResNet, and the batches that it reads.
Elsewhere   what is measured with it (activations.py, mixed_memory.py).
Promise     transformers' own layers, one a block; random weights, the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

RESNET_152 = (3, 8, 36, 3)


class Answer(NamedTuple):
    output_BC: Tensor


class ResNet(BlockStack[Tensor, Answer]):
    """By the layers of its stages, bottlenecks or (basic) pairs of convolutions.

    A block is a layer; or as many layers as `together` says for each stage, where the stem is a block too.
    """

    embed_names = ("stem",)

    def __init__(
        self,
        depths: Sequence[int] = RESNET_152,
        *,
        classes: int = 1000,
        widths: Sequence[int] = (256, 512, 1024, 2048),
        basic: bool = False,
        channels: int = 3,
        together: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = ResNetConfig(
            depths=list(depths),
            id2label={number: str(number) for number in range(classes)},
            num_channels=channels,
            layer_type="basic" if basic else "bottleneck",
            hidden_sizes=list(widths),
            embedding_size=min(64, widths[0]),
        )
        whole = ResNetForImageClassification(config)
        self.stem = whole.resnet.embedder if together is None else nn.Identity()
        blocks: list[nn.Module] = [] if together is None else [whole.resnet.embedder]
        for place, stage in enumerate(whole.resnet.encoder.stages):
            layers = list(stage.get_submodule("layers").children())
            count = 1 if together is None else together[place]
            blocks += [nn.Sequential(*layers[first : first + count]) for first in range(0, len(layers), count)]
        self.blocks = nn.ModuleList(blocks)
        self.classifier = whole.classifier

    def embed(self, batch: Batch) -> Tensor:
        found: Tensor = self.stem(batch.media["image"].values["pixels_UCHW"])
        return found

    def head(self, state: Tensor) -> Answer:
        return Answer(self.classifier(state.mean(dim=(2, 3), keepdim=True)))


def pictures(count: int, size: int, classes: int = 1000) -> Batch:
    """Noise with labels."""
    generator = torch.Generator().manual_seed(0)
    every_B = torch.arange(count)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    media = {"image": MediaBatch({"pixels_UCHW": pixels}, every_B, torch.ones_like(every_B).bool())}
    return Batch(media, torch.randint(classes, (count,), generator=generator))
