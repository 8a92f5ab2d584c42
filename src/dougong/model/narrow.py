"""Layers with fewer heads or inner channels than their width would give them.

Here        LayerSize; `apply_sizes`, which makes a model's layers so; `inner_of`, what lies inside of a layer.
Elsewhere   deciding how many are left, and which weights stay (compress/).
Promise     what goes in and out of a layer keeps its shape: only what lies between its linear maps becomes less.
            Names of parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator
from torch import nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.model.encoders.encoder import TransformerLayer
from dougong.nn.attention import Attention
from dougong.nn.feedforward import FeedForward
from dougong.nn.start import keep_variance

HEAD_CHANNELS = ("attention_head_size", "head_dim")
"""What transformers' layers call the channels of a head."""


class LayerSize(Config):
    """What is inside one layer. What is not given stays as the layer was built."""

    heads: int | None = Field(default=None, gt=0)
    """Attention heads."""

    head_channels: int | None = Field(default=None, gt=0)
    """Channels of each head."""

    channels: int | None = Field(default=None, gt=0)
    """Channels inside the feed-forward."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.heads is None and self.head_channels is None and self.channels is None:
            raise ValueError("it says neither heads, head_channels nor channels. Give one of them, or leave it out.")
        return self


class Inner(NamedTuple):
    """Units between the linear maps of a layer: heads, or channels of a feed-forward."""

    columns: tuple[str, ...]
    """Linear maps that make them, by their names in the layer."""

    rows: tuple[str, ...]
    """Linear maps that use them."""

    size: int
    """How many there are."""

    channels: int
    """Numbers of each in what is used."""


class Inside(NamedTuple):
    """What a layer has inside; None where it has no such part."""

    heads: Inner | None
    channels: Inner | None


def inner_of(layer: nn.Module) -> Inside | None:
    """What a layer has inside; None of a module that is no such layer."""
    if isinstance(layer, Attention):
        inner = layer.query.out_features
        return Inside(Inner(("query", "key_value"), ("out",), layer.num_heads, inner // layer.num_heads), None)
    if isinstance(layer, FeedForward):
        return Inside(None, Inner(("widen",), ("narrow",), layer.widen.out_features, 1))
    if not isinstance(layer, TransformerLayer):
        return None
    split = layer.split()
    columns, rows = (
        {kind: tuple(n for n in names if (".attention." in n) is kind) for kind in (True, False)}
        for names in (split.columns, split.rows)
    )
    heads = int(getattr(*_owner(layer, split.counts[0])))
    attention, feedforward = (layer.get_submodule(rows[kind][0]) for kind in (True, False))
    assert isinstance(attention, nn.Linear)
    assert isinstance(feedforward, nn.Linear)
    return Inside(
        Inner(columns[True], rows[True], heads, attention.in_features // heads),
        Inner(columns[False], rows[False], feedforward.in_features, 1),
    )


def apply_sizes(model: nn.Module, sizes: Mapping[str, LayerSize]) -> None:
    """Make layers of these names as large as it is said, in place; what changes starts from new random weights.

    Raises:
        ConfigError: a name is of no layer, or the layer has no such part.
    """
    modules = dict(model.named_modules())
    for name, size in sizes.items():
        inside = inner_of(modules[name]) if name in modules else None
        if inside is None:
            known = [each for each, module in modules.items() if inner_of(module) is not None]
            raise ConfigError(f"model.sizes names {name!r}, which is no layer here. Use some of {', '.join(known)}.")
        layer = modules[name]
        if size.heads is not None or size.head_channels is not None:
            if inside.heads is None:
                raise ConfigError(f"model.sizes.{name} gives heads, and that layer has none. Give channels.")
            _resize_heads(layer, inside.heads, size)
        if size.channels is not None:
            if inside.channels is None:
                raise ConfigError(f"model.sizes.{name} gives channels, and that layer has none. Give heads.")
            _resize(layer, inside.channels, size.channels)


def _resize_heads(layer: nn.Module, inner: Inner, size: LayerSize) -> None:
    heads, channels = size.heads or inner.size, size.head_channels or inner.channels
    _resize(layer, inner, heads * channels)
    if isinstance(layer, Attention):
        layer.num_heads = heads
        return
    assert isinstance(layer, TransformerLayer)
    attention, count = _owner(layer, layer.split().counts[0])
    setattr(attention, count, heads)
    (of_head,) = [name for name in HEAD_CHANNELS if hasattr(attention, name)]
    setattr(attention, of_head, channels)
    attention.scaling = channels**-0.5


def _resize(layer: nn.Module, inner: Inner, numbers: int) -> None:
    """So many numbers between the maps; a map that makes keys and values at once makes twice as many."""
    before = inner.size * inner.channels
    for name in inner.columns:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _replace(layer, name, linear, linear.in_features, linear.out_features // before * numbers)
    for name in inner.rows:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _replace(layer, name, linear, numbers, linear.out_features)


def _replace(layer: nn.Module, name: str, old: nn.Linear, in_features: int, out_features: int) -> None:
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = keep_variance(nn.Linear(in_features, out_features, bias=old.bias is not None, **like))
    owner, attribute = _owner(layer, name)
    setattr(owner, attribute, new)


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    """What holds a dotted name, and the name's last part."""
    *path, last = name.split(".")
    return module.get_submodule(".".join(path)), last
