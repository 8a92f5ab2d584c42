"""Signals and lists of features to tokens, one per window of samples.

Here        SignalEncoderConfig and what it builds.
Elsewhere   reading and standardising them (data/modality/array.py).
Promise     padding leaves no trace, not even NaN: a signal gives the same tokens alone and beside a longer one. A
            signal of up to WHOLE samples is one token by default, as a list of features wants to be.
"""

from __future__ import annotations

from typing import Final, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Input, SignalInput
from dougong.model.encoders.encoder import Encoder, Tokens, wrong_input
from dougong.nn.attention import Attention, check_heads
from dougong.nn.feedforward import FeedForward
from dougong.nn.start import keep_variance

WHOLE: Final = 256
"""Samples up to which a signal is one window by default."""

WINDOWS: Final = 32
"""About as many windows has a longer one by default."""

FAINTEST: Final = 1e-3
"""Added to a power before its logarithm, where a signal of spread 1 has about 1: 30 decibels below are silence."""


class SignalEncoderConfig(Config):
    """Windows of samples, embedded as a whole, that then see each other."""

    kind: Literal["signal"] = "signal"

    width: int = Field(default=64, gt=0)
    """Channels of each token."""

    form: Literal["samples", "spectrum"] = "samples"
    """What is embedded of a window: its samples, or the logarithm of their power at each frequency, which does not
    depend on when the window began."""

    window: int | None = Field(default=None, gt=1)
    """Samples of one token. None: all of a short signal, a share of a long one."""

    stride: int | None = Field(default=None, gt=0)
    """Samples from one window to the next. None: the window's own, so that none is seen twice."""

    num_layers: int = Field(default=2, ge=0)
    """Each is attention among the windows, where there are several, and a feed-forward; one block of the model."""

    num_heads: int = Field(default=4, gt=0)
    """Attention heads; they share out the width."""

    feedforward_ratio: float = Field(default=2.0, gt=0)
    """Channels inside a feed-forward, per channel of width."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of inner channels and attention weights that training leaves out."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError(
                f"stride={self.stride} is given with window={self.window}: samples between the windows would be "
                "overlooked. Give a window that is at least as long."
            )
        check_heads("num_heads", self.num_heads, self.width)
        return self

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the input is no signal, or shorter than a window."""
        if not isinstance(given, SignalInput):
            raise wrong_input(self.kind, given)
        if self.window is not None and self.window > given.max_samples:
            raise ConfigError(
                f"window={self.window} is longer than any signal here, which has at most {given.max_samples} samples. "
                f"Use a window of up to {given.max_samples}."
            )
        stem = SignalStem(self, given)
        layers: list[nn.Module] = [SignalLayer(self, alone=stem.num_windows == 1) for _ in range(self.num_layers)]
        return Encoder(stem, layers, SignalTail(self.width), width=self.width, config=self)

    def window_of(self, max_samples: int) -> int:
        """Samples of one token, for signals of at most so many."""
        if self.window is not None:
            return self.window
        return max_samples if max_samples <= WHOLE else -(-max_samples // WINDOWS)


class SignalStem(nn.Module):
    """Shapes: U signals, C channels, T samples; tokens are N windows of W samples, D channels."""

    def __init__(self, config: SignalEncoderConfig, given: SignalInput) -> None:
        super().__init__()
        self.window = config.window_of(given.max_samples)
        self.stride = config.stride or self.window
        self.num_windows = int(self._num_windows(torch.tensor(given.max_samples)))
        self.spectrum = config.form == "spectrum"
        seen = self.window // 2 + 1 if self.spectrum else self.window
        self.embed = keep_variance(nn.Linear(given.num_channels * seen, config.width))
        # Small beside what is embedded: where a window lies should not drown what is in it.
        self.place_ND = nn.Parameter(torch.empty(self.num_windows, config.width).normal_(std=0.1))
        self.bell_W: Tensor
        self.register_buffer("bell_W", torch.hann_window(self.window), persistent=False)

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        samples_UCT, mask_UT = values["samples_UCT"], values["mask_UT"]
        samples_UCT = samples_UCT.masked_fill(~mask_UT[:, None], 0.0)  # 0 * NaN would still be NaN
        num_windows_U = self._num_windows(mask_UT.sum(dim=1))
        num_windows = int(self._num_windows(torch.tensor(mask_UT.shape[1])))
        lacking = (num_windows - 1) * self.stride + self.window - mask_UT.shape[1]
        window_UCNW = functional.pad(samples_UCT, (0, lacking)).unfold(2, self.window, self.stride)
        if self.spectrum:
            power_UCNF = torch.fft.rfft(window_UCNW * self.bell_W).abs().square() / self.bell_W.square().sum()
            window_UCNW = (power_UCNF + FAINTEST).log()
        x_UTD = self.embed(window_UCNW.transpose(1, 2).flatten(2)) + self.place_ND[:num_windows]
        return Tokens(x_UTD, torch.arange(num_windows, device=mask_UT.device) < num_windows_U[:, None])

    def _num_windows(self, num_samples: Tensor) -> Tensor:
        """As many as see every sample, the last one's end being padded; one of nothing at all."""
        more = num_samples - self.window + self.stride - 1
        return torch.div(more, self.stride, rounding_mode="floor").clamp(min=0) + 1


class SignalLayer(nn.Module):
    """Windows see each other, then each thinks by itself; norms come first."""

    def __init__(self, config: SignalEncoderConfig, *, alone: bool) -> None:
        super().__init__()
        self.alone = alone  # one window has nobody to ask
        if not alone:
            self.norm = nn.LayerNorm(config.width)
            self.attention = Attention(width=config.width, num_heads=config.num_heads, dropout=config.dropout)
        self.inner_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(width=config.width, ratio=config.feedforward_ratio, dropout=config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        x_UTD = tokens.x_UTD
        if not self.alone:
            normed_UTD = self.norm(x_UTD)
            x_UTD = x_UTD + self.attention(normed_UTD, normed_UTD, tokens.mask_UT).x_BTD
        return Tokens(x_UTD + self.feedforward(self.inner_norm(x_UTD)), tokens.mask_UT)


class SignalTail(nn.Module):
    """The last norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(self.norm(tokens.x_UTD), tokens.mask_UT)
