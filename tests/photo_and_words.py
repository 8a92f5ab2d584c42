"""Two small encoders and four records for them, of which maps are made."""

from typing import Final

import torch

from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import EncoderConfig
from dougong.nn.batch import Batch, MediaBatch

SIGNATURE: Final = Signature(
    inputs={"photo": ImageInput(height=16, width=16), "words": TextInput(vocabulary_size=40, max_tokens=9)},
    target=Target(name="named", task="single_label", labels=("a", "b", "c")),
)
ENCODERS: Final[dict[str, EncoderConfig]] = {
    "photo": ImageEncoderConfig(width=16, num_layers=1, num_heads=2, patch_size=4, pool=2),
    "words": TextEncoderConfig(width=16, num_layers=1, num_heads=2),
}


def records() -> Batch:
    """Four: whole, padded, without words, without a photo; the first two share a photo."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.randint(4, 40, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    photo = MediaBatch({"pixels_UCHW": pixels}, torch.tensor([0, 0, 1, 0]), torch.tensor([True, True, True, False]))
    words = MediaBatch(
        {"ids_UT": ids, "mask_UT": mask}, torch.tensor([0, 1, 0, 2]), torch.tensor([True, True, False, True])
    )
    return Batch({"photo": photo, "words": words}, torch.tensor([0, 1, 2, 0]))
