"""What every encoder is: a stem, layers, and a tail.

Here        Tokens, Encoder, TransformerLayer (one of transformers' layers as one of ours), the settings they share.
Elsewhere   the encoders themselves (beside this file); reading a pretrained folder (pretrained.py).
Promise     an encoder works on the distinct media of a batch, never on records; its layers can be walked one at a
            time by whoever takes them; a medium without any valid token does no harm.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Input
from dougong.nn.attention import check_heads, key_mask
from dougong.nn.split import Split


class Tokens(NamedTuple):
    """Shapes: U media (records, once they are gathered), T tokens, D channels."""

    x_UTD: Tensor
    mask_UT: Tensor
    """True where there is a token; whatever else stands in `x_UTD` is finite and ignored."""


class TransformerConfig(Config):
    """Where a transformer encoder comes from: a pretrained folder, an exact architecture, or sizes given here."""

    pretrained: str | None = None
    """A local folder with config.json and *.safetensors; nothing is ever fetched. Else the weights start random."""

    architecture: dict[str, Any] | None = None
    """All settings of transformers' own config, as a bundle keeps them; instead of the sizes below."""

    width: int = Field(default=64, gt=0)
    """Channels of each token."""

    num_layers: int = Field(default=2, ge=0)
    """Transformer layers; each is one block of the model."""

    num_heads: int = Field(default=4, gt=0)
    """Attention heads; they share out the width."""

    feedforward_ratio: float = Field(default=4.0, gt=0)
    """Channels inside a feed-forward part, per channel of width."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of activations and attention weights that training leaves out; also over what a folder says."""

    initializer_range: float = Field(default=0.1, gt=0)
    """Spread of random weights. At small widths far faster to learn from than transformers' 0.02."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained is not None and self.architecture is not None:
            raise ValueError(
                "pretrained and architecture are both given: a folder brings its own architecture. Leave one out."
            )
        origin = "pretrained" if self.pretrained is not None else "architecture"
        if self.pretrained is not None or self.architecture is not None:
            for name in self._sizes():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} cannot take effect beside {origin}, which fixes it. "
                        f"Leave out {name}, or leave out {origin}."
                    )
        else:
            check_heads("num_heads", self.num_heads, self.width)
        return self

    def _sizes(self) -> tuple[str, ...]:
        """The settings that a pretrained folder or an architecture fixes."""
        return ("width", "num_layers", "num_heads", "feedforward_ratio", "initializer_range")

    def with_architecture(self, architecture: dict[str, Any]) -> Self:
        """These settings with the sizes replaced by an exact architecture, which needs no folder."""
        kept = {name: getattr(self, name) for name in type(self).model_fields if name not in self._sizes()}
        return type(self)(**kept | {"pretrained": None, "architecture": architecture})


class TransformerLayer(nn.Module):
    """One of transformers' layers, which take hidden states and a mask, as Tokens -> Tokens."""

    def __init__(self, layer: nn.Module, split: Split) -> None:
        super().__init__()
        self.layer = layer
        self._split = split

    def split(self) -> Split:
        return self._split

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(self.layer(tokens.x_UTD, attention_mask=key_mask(tokens.mask_UT)), tokens.mask_UT)


class Encoder(nn.Module):
    """Media to tokens in three parts, so that a model may own each part where it needs it."""

    def __init__(
        self, stem: nn.Module, layers: list[nn.Module], tail: nn.Module, *, width: int, config: Config
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.tail = tail
        self.width = width
        self._config = config
        # transformers hands out what it has read in evaluation mode.
        self.train()

    def embed(self, values: dict[str, Tensor]) -> Tokens:
        """The tokens before the first layer; names and shapes of `values` stand in core/signature.py."""
        tokens: Tokens = self.stem(values)
        return tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """The encoder's answer, from the tokens after the last layer."""
        finished: Tokens = self.tail(tokens)
        return finished

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        tokens = self.embed(values)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.finish(tokens)

    def resolved(self) -> Config:
        """The settings that build this encoder anew without the folder it was read from; weights come from a bundle."""
        return self._config


def wrong_input(encoder: str, given: Input) -> ConfigError:
    return ConfigError(
        f"an encoder of kind {encoder!r} cannot read {given.kind}: it expects other values. "
        f"Use kind {given.kind!r} for this modality, or give it {encoder}."
    )
