"""A small sandwich of every kind of modality, with a batch; and a model that has learnt a made-up table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dougong
from dougong.bundle.model import Model
from dougong.core.signature import AudioInput, ImageInput, SignalInput, Signature, TableInput, Target, TextInput
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

SIGNATURE = Signature(
    inputs={
        "text": TextInput(vocabulary_size=20, max_tokens=6),
        "image": ImageInput(height=16, width=16),
        "sound": AudioInput(sample_rate=8000, max_samples=2000),
        "facts": TableInput(num_numbers=2, category_sizes=(3,)),
        "pulse": SignalInput(num_channels=2, max_samples=300),
    },
    target=Target(name="answer", task="single_label", labels=("a", "b", "c")),
)
ENCODERS: dict[str, Any] = {
    "text": {"kind": "text", "width": 16, "num_heads": 4, "num_layers": 3},
    "image": {"kind": "image", "width": 16, "num_heads": 2, "num_layers": 2, "stem": "convolution", "patch_size": 4},
    "sound": {
        "kind": "audio",
        "width": 16,
        "num_heads": 2,
        "num_layers": 1,
        "conv_dim": (8, 16),
        "conv_kernel": (256, 8),
        "conv_stride": (128, 4),
        "first_filters": "gabor",
    },
    "pulse": {"kind": "signal", "width": 16, "num_heads": 2, "num_layers": 2, "window": 30},
}


@pytest.fixture(scope="session")
def build() -> Callable[..., Sandwich]:
    def make(seed: int = 0, **settings: Any) -> Sandwich:
        torch.manual_seed(seed)
        values = {"width": 32, "encoders": ENCODERS, "bridge": {"num_blocks": 2}} | settings
        model = SandwichConfig.model_validate(values).build(SIGNATURE)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases that start alike would hide a wrong place
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Four records, each with media of its own, of which the last has no picture."""
    torch.manual_seed(1)
    length_U = torch.tensor([3, 6, 2, 5])
    values: dict[str, dict[str, torch.Tensor]] = {
        "text": {"ids_UT": torch.randint(1, 20, (4, 6)), "mask_UT": torch.arange(6) < length_U[:, None]},
        "image": {"pixels_UCHW": torch.randn(4, 3, 16, 16)},
        "sound": {"samples_UT": torch.randn(4, 2000), "mask_UT": torch.ones(4, 2000, dtype=torch.bool)},
        "facts": {
            "numbers_UN": torch.randn(4, 2),
            "known_UN": torch.ones(4, 2, dtype=torch.bool),
            "categories_UK": torch.randint(0, 3, (4, 1)),
        },
        "pulse": {"samples_UCT": torch.randn(4, 2, 300), "mask_UT": torch.arange(300) < 50 * length_U[:, None]},
    }
    media = {}
    for name, each in values.items():
        present_B = torch.tensor([True, True, True, name != "image"])
        media[name] = MediaBatch(each, torch.arange(4).masked_fill(~present_B, 0), present_B)
    return Batch(media, torch.tensor([0, 1, 2, 1]))


@pytest.fixture(scope="session")
def signature() -> Signature:
    return SIGNATURE


@pytest.fixture
def colours(colour_run: Path) -> Model:
    """A model that has learnt a made-up table; its own copy."""
    return dougong.load(colour_run / "bundle")
