"""Pictures to few discrete codes, and back.

Here        TokenizerConfig, PictureTokenizer (a BlockStack), Codebook.
Elsewhere   how wrong a picture is (objectives/reconstruction.py); writing codes (model/writer.py).
Promise     a code depends on the pixels of its own cell alone, so equal cells have equal codes; in evaluation
            nothing in it changes; a code that no picture uses is given up for some cell that the others serve badly.

After van den Oord et al. 2017 (arXiv:1711.00937), with the codebook as moving averages, narrow codes as in Yu et al.
2021 (arXiv:2110.04627), pixels shuffled out of channels (Shi et al. 2016, arXiv:1609.05158), and no adversary.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class TokenizerConfig(Config):
    """How a picture becomes codes."""

    cell: int = 8
    """Pixels along each side of what one code stands for: a power of 2, at least 4."""

    width: int = Field(default=64, gt=0)
    """Channels inside (D)."""

    num_codes: int = Field(default=256, gt=1)
    """Size of the codebook (K)."""

    code_width: int = Field(default=16, gt=0)
    """Channels of a code (E)."""

    num_layers: int = Field(default=1, ge=0)
    """Residual layers on each side of the codes, and at each of the two scales."""

    commitment: float = Field(default=0.25, ge=0)
    """Weight of drawing the encoder towards the codes it chose."""

    decay: float = Field(default=0.98, gt=0, lt=1)
    """Of the codebook's moving averages."""

    revive_below: float = Field(default=0.1, ge=0)
    """A code that is chosen less than so often a batch, on average, is given up and begins anew."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.cell < 4 or self.cell & (self.cell - 1):
            raise ValueError(f"cell={self.cell} is no power of 2 from 4 on, which halving reaches. Use 4, 8 or 16.")
        return self

    def build(self, given: ImageInput) -> PictureTokenizer:
        """The tokenizer of these pictures; draws its weights from torch's generator.

        Raises:
            ConfigError: the cells do not share out the picture.
        """
        if given.height % self.cell or given.width % self.cell:
            raise ConfigError(
                f"tokenizer.cell={self.cell} cannot share out pictures of {given.height}x{given.width} pixels. "
                "Use a cell that divides both sides, or another data.preparation.image_size."
            )
        return PictureTokenizer(self, given)


class Coded(NamedTuple):
    """What walks through the blocks, and what comes out. Shapes: U pictures, D channels, H x W cells, E of a code."""

    x_UDHW: Tensor
    """At last the picture itself, (U, C, height, width), normalised as it came in."""

    code_UHW: Tensor
    """Which code stands in each cell; -1 before they are chosen."""

    strayed_U: Tensor
    """Mean squared distance of the encoder's answers from the codes chosen."""


class PictureTokenizer(BlockStack[Coded, Coded]):
    """Shapes: U pictures, C colour channels, D channels, H x W cells."""

    def __init__(self, config: TokenizerConfig, given: ImageInput) -> None:
        super().__init__()
        half, width = config.cell // 2, config.width
        self.config, self.given = config, given
        self.grid = (given.height // config.cell, given.width // config.cell)
        """Rows and columns of codes."""
        # Whole patches at once, in and out: layers at full size would cost ten times as much. A code is of its own
        # cell alone, so that a plain ground is the same code everywhere: what writes codes need not learn noise.
        self.stem = nn.Conv2d(given.channels, width, half, stride=half)
        self.codebook = Codebook(config)
        alone = [[Residual(width, reach=0) for _ in range(config.num_layers)] for _ in range(2)]
        seeing = [[Residual(width, reach=1) for _ in range(config.num_layers)] for _ in range(2)]
        self.blocks = nn.ModuleList(
            [
                *alone[0],
                OnPicture(nn.Conv2d(width, width, 2, stride=2)),
                *alone[1],
                self.codebook,
                *seeing[0],
                OnPicture(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)),
                *seeing[1],
            ]
        )
        self.paint = nn.Sequential(
            PlaceNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, given.channels * half**2, 3, padding=1, padding_mode="replicate"),
            nn.PixelShuffle(half),
        )

    def embed(self, batch: Batch) -> Coded:
        return self._start(_pixels(batch))

    def head(self, state: Coded) -> Coded:
        return state._replace(x_UDHW=self.paint(state.x_UDHW))

    @torch.no_grad()
    def encode(self, pixels_UCHW: Tensor) -> Tensor:
        """The codes, row by row, (U, P) for P cells; the same under any precision."""
        with torch.autocast(pixels_UCHW.device.type, enabled=False):
            state = self._start(pixels_UCHW.float())
            for block in self.blocks:
                state = block(state)
                if block is self.codebook:
                    break
        return state.code_UHW.flatten(1)

    @torch.no_grad()
    def decode(self, code_UP: Tensor) -> Tensor:
        """The picture of codes, normalised as the encoder's pictures are: (U, C, height, width)."""
        code_UHW = code_UP.view(-1, *self.grid)
        state = Coded(self.codebook.look_up(code_UHW), code_UHW, self.codebook.used_K.new_zeros(len(code_UP)))
        after = False
        for block in self.blocks:
            if after:
                state = block(state)
            after = after or block is self.codebook
        return self.head(state).x_UDHW

    def _start(self, pixels_UCHW: Tensor) -> Coded:
        x_UDHW = self.stem(pixels_UCHW)
        none_UHW = torch.full((len(x_UDHW), *self.grid), -1, device=x_UDHW.device)
        return Coded(x_UDHW, none_UHW, x_UDHW.new_zeros(len(x_UDHW)))


class Codebook(nn.Module):
    """The nearest code for each cell; gradients pass as if there were none (straight through).

    Shapes: N cells of all pictures, E channels of a code, K codes.
    """

    code_KE: Tensor
    used_K: Tensor
    sum_KE: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.decay, self.revive_below = config.decay, config.revive_below
        self.narrow = nn.Conv2d(config.width, config.code_width, 1)
        self.widen = nn.Conv2d(config.code_width, config.width, 1)
        code_KE = torch.randn(config.num_codes, config.code_width)
        self.register_buffer("code_KE", code_KE)
        # Nothing was used yet: in the first batch every code is revived, as some cell of real pictures.
        self.register_buffer("used_K", torch.zeros(config.num_codes))
        self.register_buffer("sum_KE", torch.zeros_like(code_KE))

    def forward(self, state: Coded) -> Coded:
        z_UHWE = self.narrow(state.x_UDHW).permute(0, 2, 3, 1)
        z_NE = z_UHWE.detach().flatten(0, 2).float()
        learns = self.training and len(z_NE) > 0  # a batch without pictures says nothing of any code
        if learns:
            self._revive(z_NE)
        nearest_N = _nearest(z_NE, self.code_KE)
        chosen_UHWE = functional.embedding(nearest_N, self.code_KE).view(z_UHWE.shape)
        if learns:
            self._follow(z_NE, nearest_N)
        strayed_U = (z_UHWE - chosen_UHWE).square().mean(dim=(1, 2, 3))
        passed_UHWE = z_UHWE + (chosen_UHWE - z_UHWE).detach()
        x_UDHW = self.widen(passed_UHWE.permute(0, 3, 1, 2))
        return Coded(x_UDHW, nearest_N.view(z_UHWE.shape[:3]), strayed_U)

    def look_up(self, code_UHW: Tensor) -> Tensor:
        """Codes as the decoder's first input, (U, D, H, W)."""
        x_UDHW: Tensor = self.widen(functional.embedding(code_UHW, self.code_KE).permute(0, 3, 1, 2))
        return x_UDHW

    @torch.no_grad()
    def _follow(self, z_NE: Tensor, nearest_N: Tensor) -> None:
        """Each code is the mean of what chose it, of late."""
        num_codes = len(self.used_K)
        count_K = torch.bincount(nearest_N, minlength=num_codes).to(z_NE.dtype)
        sum_KE = torch.zeros_like(self.sum_KE).index_add_(0, nearest_N, z_NE)
        self.used_K.lerp_(count_K, 1 - self.decay)
        self.sum_KE.lerp_(sum_KE, 1 - self.decay)
        alive_K = self.used_K > 1e-6
        self.code_KE[alive_K] = self.sum_KE[alive_K] / self.used_K[alive_K, None]

    @torch.no_grad()
    def _revive(self, z_NE: Tensor) -> None:
        dead_K = self.used_K < self.revive_below
        count = int(dead_K.sum())
        if count == 0:
            return
        # What the living codes serve worst, as k-means++ begins (Arthur and Vassilvitskii 2007): drawn evenly, nearly
        # all would come from plain ground, and what is rare, such as corners, would have no code.
        alive_LE = self.code_KE[~dead_K] if count < len(dead_K) else z_NE.mean(dim=0, keepdim=True)
        nearest_N = _nearest(z_NE, alive_LE)
        off_N = (z_NE - alive_LE[nearest_N]).square().sum(dim=1)
        drawn_K = torch.multinomial(off_N + 1e-9, count, replacement=True)
        self.code_KE[dead_K] = z_NE[drawn_K]
        # As if chosen once a batch: time to be found useful before it is judged again.
        self.used_K[dead_K] = 1.0
        self.sum_KE[dead_K] = z_NE[drawn_K]


def _nearest(z_NE: Tensor, code_KE: Tensor) -> Tensor:
    # |z|^2 is the same for every code. In float32 under any precision: of near codes a rounded product takes another.
    with torch.autocast(z_NE.device.type, enabled=False):
        distance_NK = code_KE.square().sum(dim=1) - 2 * z_NE @ code_KE.T
        return distance_NK.argmin(dim=1)


class PlaceNorm(nn.LayerNorm):
    """Norm over the channels of each place by itself: a place's answer depends on no far one."""

    def forward(self, x_UDHW: Tensor) -> Tensor:
        return super().forward(x_UDHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Norm, bend, convolve, twice, beside the way through; `reach` is in places each way."""

    def __init__(self, width: int, *, reach: int) -> None:
        super().__init__()

        def convolution() -> nn.Conv2d:
            return nn.Conv2d(width, width, 2 * reach + 1, padding=reach, padding_mode="replicate")

        self.inner = nn.Sequential(
            PlaceNorm(width), nn.SiLU(), convolution(), PlaceNorm(width), nn.SiLU(), convolution()
        )

    def forward(self, state: Coded) -> Coded:
        return state._replace(x_UDHW=state.x_UDHW + self.inner(state.x_UDHW))


class OnPicture(nn.Module):
    """Any layer on the state's picture."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: Coded) -> Coded:
        return state._replace(x_UDHW=self.layer(state.x_UDHW))


def _pixels(batch: Batch) -> Tensor:
    """Of the one modality that has pixels."""
    return next(one.values["pixels_UCHW"] for one in batch.media.values() if "pixels_UCHW" in one.values)
