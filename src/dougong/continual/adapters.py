"""What one task adds to a frozen model: changes of few numbers to its layers, and an output layer of its own.

Here        LowRank, `layers_of`, `rank_within`, TaskParts.
Elsewhere   putting them at work (continual/elastic.py); prompts (continual/prompt.py); files (continual/tasks.py).
Promise     a change begins as none at all, so a new task begins with what the base says; no layer of the base is
            wrapped, renamed or written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dougong.continual.extra import ExtraModality
from dougong.continual.prompt import PromptNetwork
from dougong.continual.rows import by_row
from dougong.core.errors import ConfigError
from dougong.model.sandwich import BridgeBlock, EncoderBlock, FinishBlock, Sandwich
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.start import keep_variance


class LowRank(nn.Module):
    """A linear layer's change, `up @ down`. Shapes: R rank, I inputs, O outputs.

    LoRA (Hu et al. 2021, arXiv:2106.09685) with alpha = R, so that no factor stands before the product. Why it is not
    peft's own layer is said in docs/adr/0016-adapters-beside-layers.md; tests hold the two to the same numbers.
    """

    def __init__(self, num_inputs: int, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.down_RI = nn.Parameter(torch.empty(rank, num_inputs))
        self.up_OR = nn.Parameter(torch.zeros(num_outputs, rank))
        nn.init.kaiming_uniform_(self.down_RI, a=math.sqrt(5))


class Layer(NamedTuple):
    """A layer that may be changed."""

    linear: nn.Linear
    modality: str | None
    """Whose encoder it is part of, and so works on distinct media. None: it works on records."""


def layers_of(base: Sandwich, modalities: Sequence[str]) -> dict[str, Layer]:
    """The linear layers of encoders, bridge and head input that have a part in a task of these modalities, by name."""
    found: dict[str, Layer] = {}
    for place, block in enumerate(base.blocks):
        if isinstance(block, EncoderBlock | FinishBlock):
            if block.name in modalities:
                found.update(_linears(block, f"blocks.{place}", block.name))
        elif isinstance(block, BridgeBlock):
            foreign = _of_others(block, [name for name in base.names if name not in modalities])
            found.update(
                (name, layer)
                for name, layer in _linears(block, f"blocks.{place}", None)
                if id(layer.linear) not in foreign
            )
    if not base.only_votes:
        found["decision.hidden"] = Layer(base.decision.hidden, None)
    return found


def _linears(module: nn.Module, prefix: str, modality: str | None) -> Iterator[tuple[str, Layer]]:
    for name, inner in module.named_modules(prefix=prefix):
        if isinstance(inner, nn.Linear):
            yield name, Layer(inner, modality)


def _of_others(block: nn.Module, names: Sequence[str]) -> set[int]:
    """Layers of a bridge that only tokens of these modalities pass."""
    owned: list[nn.Module] = []
    for module in block.modules():
        if isinstance(module, ModulesByName):
            for name in names:
                with contextlib.suppress(KeyError):  # of what only some modalities have
                    owned.append(module[name])
    return {id(inner) for module in owned for inner in module.modules()}


def rank_within(layers: Mapping[str, Layer], *, numbers: int, besides: int) -> int:
    """The highest rank at which all layers' changes, and what a task needs `besides`, are within so many numbers.

    Raises:
        ConfigError: not even 1 is.
    """
    per_rank = sum(layer.linear.in_features + layer.linear.out_features for layer in layers.values())
    rank = (numbers - besides) // max(1, per_rank)
    if rank < 1:
        raise ConfigError(
            f"budget allows a task {numbers} numbers, and its smallest adapter has {besides + per_rank}. "
            "Raise budget, or lower prompts or prompt_width."
        )
    return rank


class TaskParts(nn.Module):
    """All that one part of a task has of its own. Shapes: H hidden channels of the head, C outputs."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        rank: int,
        hidden: int,
        num_outputs: int,
        prompt: PromptNetwork | None,
        extras: Mapping[str, ExtraModality],
    ) -> None:
        super().__init__()
        self.layer_names = tuple(layers)
        self.changes = ModulesByName(
            {name: LowRank(layer.linear.in_features, layer.linear.out_features, rank) for name, layer in layers.items()}
        )
        self.out = keep_variance(nn.Linear(hidden, num_outputs))
        self.prompt = prompt
        self.extras = ModulesByName(extras)
        self.extra_names = tuple(extras)

    def change(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`down` and `up` of a layer, or None where the task leaves it as it is."""
        if name not in self.layer_names:
            return None
        found = self.changes[name]
        assert isinstance(found, LowRank)
        return found.down_RI, found.up_OR

    def outputs(self, hidden_BH: Tensor) -> Tensor:
        """(B, C), from what the head's hidden layer says."""
        return by_row(self.out, hidden_BH)

    def own_encoder(self, name: str) -> ExtraModality:
        found = self.extras[name]
        assert isinstance(found, ExtraModality)
        return found
