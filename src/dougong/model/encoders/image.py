"""Pixels to tokens, by a vision transformer.

Here        ImageEncoderConfig and what it builds.
Elsewhere   decoding and resizing (data/modality/).
Promise     the same numbers as transformers' ViTModel with the same weights, within 1e-5. The tokens that leave are
            the patches, row by row as `grid` says; the class token, which belongs to no place, stays inside.
"""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ViTModel

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Input
from dougong.model.encoders.encoder import Encoder, Tokens, TransformerConfig, TransformerLayer, wrong_input
from dougong.model.encoders.pretrained import architecture_of, make_model
from dougong.nn.split import Split

VIT_SPLIT: Final = Split(
    columns=(
        "layer.attention.q_proj",
        "layer.attention.k_proj",
        "layer.attention.v_proj",
        "layer.mlp.fc1",
    ),
    rows=("layer.attention.o_proj", "layer.mlp.fc2"),
    counts=("layer.attention.num_attention_heads",),
)
"""Of one of its layers, as transformers names its parts."""


class ImageEncoderConfig(TransformerConfig):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) without its pooler."""

    kind: Literal["image"] = "image"

    patch_size: int = Field(default=8, gt=0)
    """Pixels along each side of a patch; one patch is one token."""

    stem: Literal["patch", "convolution"] = "patch"
    """convolution: several small convolutions in place of one as large as a patch, after Xiao et al. 2021
    (arXiv:2106.14881): learns shapes from scratch in far fewer steps. `patch_size` is then a power of 2."""

    pool: int = Field(default=1, gt=0)
    """Average pool x pool neighbouring patches after the last layer, for a shorter bridge."""

    def _sizes(self) -> tuple[str, ...]:
        return (*super()._sizes(), "patch_size", "stem")

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.stem == "convolution" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(
                f"patch_size={self.patch_size} cannot be reached by halving, as stem=convolution does. "
                "Use 4, 8 or 16, or stem patch."
            )
        return self

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the pretrained folder, or the architecture, does not fit the input."""
        if not isinstance(given, ImageInput):
            raise wrong_input(self.kind, given)
        if self.pretrained is None and self.architecture is None:
            self._check_patches(given)
        model = make_model(
            ViTModel,
            pretrained=self.pretrained,
            architecture=self.architecture or self._architecture(given),
            changes={"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout},
            add_pooling_layer=False,
        )
        origin = f"pretrained {self.pretrained!r}" if self.pretrained is not None else "architecture"
        size, patch = _pair(model.config.image_size), _pair(model.config.patch_size)
        if size != (given.height, given.width):
            raise ConfigError(
                f"{origin} sees images of {size[0]}x{size[1]} pixels and the images have {given.height}x{given.width}: "
                f"it has learnt one place per patch. Set the image size to {size[0]}x{size[1]}."
            )
        if model.config.num_channels != given.channels:
            raise ConfigError(
                f"{origin} sees {model.config.num_channels} colour channels and the images have {given.channels}. "
                f"Set channels to {model.config.num_channels}."
            )
        grid = (size[0] // patch[0], size[1] // patch[1])
        if grid[0] % self.pool or grid[1] % self.pool:
            fits = [pool for pool in range(1, max(grid) + 1) if grid[0] % pool == 0 and grid[1] % pool == 0]
            raise ConfigError(
                f"pool={self.pool} cannot share out {grid[0]}x{grid[1]} patches: every neighbourhood needs as many. "
                f"Use pool in {fits}."
            )
        if self.stem == "convolution":
            convolutions = _convolutions(given.channels, self.width, self.patch_size)
            model.embeddings.patch_embeddings.projection = convolutions  # type: ignore[assignment]  # it takes any map
        config = self if self.pretrained is None else self.with_architecture(architecture_of(model))
        layers: list[nn.Module] = [TransformerLayer(layer, VIT_SPLIT) for layer in model.layers]
        tail = ImageTail(model, grid, self.pool)
        return Encoder(ImageStem(model), layers, tail, width=model.config.hidden_size, config=config)

    def _check_patches(self, given: ImageInput) -> None:
        if given.height % self.patch_size or given.width % self.patch_size:
            fits = [
                size
                for size in range(2, min(given.height, given.width) + 1)
                if given.height % size == 0 and given.width % size == 0
            ]
            raise ConfigError(
                f"patch_size={self.patch_size} cannot share out images of {given.height}x{given.width} pixels: "
                f"a rest would never be seen. Use patch_size in {fits}, or another image size."
            )

    def _architecture(self, given: ImageInput) -> dict[str, object]:
        return {
            "image_size": [given.height, given.width],
            "patch_size": self.patch_size,
            "num_channels": given.channels,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": max(1, round(self.width * self.feedforward_ratio)),
            "initializer_range": self.initializer_range,
        }


def _convolutions(channels: int, width: int, patch_size: int) -> nn.Sequential:
    """Pixels to patches: each layer halves the sides; the channels double up to the width."""
    layers: list[nn.Module] = []
    halvings = patch_size.bit_length() - 1
    for left in reversed(range(halvings)):
        wider = max(8, width >> left)
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GroupNorm(1, wider), nn.ReLU()]
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


class ImageStem(nn.Module):
    """Embeds patches and places, after a class token."""

    def __init__(self, model: ViTModel) -> None:
        super().__init__()
        self.embeddings = model.embeddings

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        x_UTD: Tensor = self.embeddings(values["pixels_UCHW"])
        return Tokens(x_UTD, x_UTD.new_ones(x_UTD.shape[:2]).bool())


class ImageTail(nn.Module):
    """The last norm; then the class token goes, and neighbours are averaged."""

    def __init__(self, model: ViTModel, grid: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.norm = model.layernorm
        self.pool = pool
        self.patches = grid
        self.grid = (grid[0] // pool, grid[1] // pool)
        """Rows and columns of the tokens that leave."""

    def forward(self, tokens: Tokens) -> Tokens:
        x_UTD: Tensor = self.norm(tokens.x_UTD[:, 1:])
        if self.pool == 1:
            return Tokens(x_UTD, tokens.mask_UT[:, 1:])
        (rows, columns), pool = self.grid, self.pool
        x_URPCPD = x_UTD.view(x_UTD.shape[0], rows, pool, columns, pool, x_UTD.shape[-1])
        x_UTD = x_URPCPD.mean(dim=(2, 4)).flatten(1, 2)
        return Tokens(x_UTD, tokens.mask_UT[:, 1 : 1 + rows * columns])


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
