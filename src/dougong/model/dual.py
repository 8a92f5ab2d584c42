"""Encoders side by side, each medium one vector; with a bridge on top, a score of whether two belong together.

Here        DualConfig, Dual (a BlockStack), its output.
Elsewhere   its parts: encoders/, bridge.py, heads.py, the blocks of sandwich.py; wrong pairs to learn from (mining.py);
            what it is trained for (objectives/contrastive.py, objectives/matching.py).
Promise     a medium's vector depends on that medium alone, so a gallery can be encoded once and searched by any query;
            a modality that a batch lacks costs nothing.
"""

from __future__ import annotations

import itertools
from typing import Final, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature
from dougong.model.bridge import BridgeConfig
from dougong.model.heads import ContrastiveHead, LearntTemperature, MatchingHead, PlainHead
from dougong.model.mining import Keyed, hard_negatives, spared
from dougong.model.sandwich import (
    BridgeBlock,
    EncoderBlock,
    EncoderConfig,
    FinishBlock,
    JoinBlock,
    SandwichState,
    settled_encoders,
)
from dougong.nn.attention import check_heads
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.pooling import AttentionPooling

MINED: Final = 3
"""In training each record stands in so many pairs: itself, its left with a wrong right, its right with a wrong left."""


class DualConfig(Config):
    """How the parts are put together."""

    width: int = Field(default=128, gt=0)
    """Channels of every modality after its encoder, and of its vector (D)."""

    encoders: dict[str, EncoderConfig] = {}
    """By modality. One that is not named here gets a small encoder from scratch, `width` wide."""

    head: Literal["pooled", "plain"] = "pooled"
    """From tokens to a vector. pooled: a norm, learnt pooling, and a linear map. plain: their mean as it is; above one
    vector of a frozen model, a linear map of it and no more, which overfits least."""

    pairs: tuple[tuple[str, str], ...] = ()
    """Modalities that are drawn together. Empty: all with all."""

    temperature: float = Field(default=0.07, ge=0.01, le=1.0)
    """What divides the similarities, at the start."""

    learn_temperature: bool = True
    """Else it stays as it is."""

    bridge: BridgeConfig | None = None
    """Looks at both media of a pair at once, for a score of whether they belong together. None: no such score."""

    @model_validator(mode="after")
    def _two_in_a_pair(self) -> Self:
        for pair in self.pairs:
            if len(set(pair)) < 2:
                raise ValueError(f"pairs: {list(pair)} is one modality twice. Name two.")
        if self.bridge is not None:
            check_heads("bridge.num_heads", self.bridge.num_heads, self.width)
        return self

    def build(self, signature: Signature) -> Dual:
        """The model for these inputs; draws its weights from torch's generator.

        Raises:
            ConfigError: there are fewer than two modalities, a setting names none, or a bridge meets more than two.
        """
        return Dual(self, signature)


class DualOutput(NamedTuple):
    """Shapes: U distinct media, D channels, P pairs."""

    vectors: dict[str, Tensor]
    """(U, D), of length 1, by modality; one that the batch lacks is not in it."""

    temperature: Tensor
    match_P: Tensor | None
    """Above 0: the two belong together. The batch's own records; in training then wrong pairs, twice as many. None:
    there is no bridge, or the batch lacks a modality."""

    is_pair_P: Tensor | None
    known_P: Tensor | None
    """Whether there is such a pair: both are there, and for a wrong one the batch had a wrong partner."""


class Dual(BlockStack[SandwichState, DualOutput]):
    """Shapes: U distinct media, B records, T tokens, D channels."""

    state_types = (SandwichState,)

    def __init__(self, config: DualConfig, signature: Signature) -> None:
        super().__init__()
        settled = settled_encoders(config.encoders, signature, config.width)
        self.names = tuple(settled)
        _check_names(config, self.names)
        self.pairs = config.pairs or tuple(itertools.combinations(self.names, 2))
        embedders: dict[str, nn.Module] = {}
        blocks: list[nn.Module] = []
        resolved: dict[str, Config] = {}
        for name, encoder_config in settled.items():
            encoder = encoder_config.build(signature.inputs[name])
            resolved[name] = encoder.resolved()
            embedders[name] = encoder.stem
            blocks += [EncoderBlock(name, layer) for layer in encoder.layers]
            blocks.append(FinishBlock(name, encoder.tail, encoder.width, config.width))
            blocks.append(VectorBlock(name, PlainHead() if config.head == "plain" else ContrastiveHead(config.width)))
        self.embedders = ModulesByName(embedders)
        self.temperature = LearntTemperature(config.temperature)
        self.temperature.log.requires_grad_(config.learn_temperature)
        self.matching = config.bridge is not None
        if config.bridge is not None:
            blocks += [MineBlock(self.names, self.temperature), JoinBlock(self.names)]
            blocks += [BridgeBlock(block) for block in config.bridge.build(self.names, config.width)]
            self.norms = ModulesByName({name: nn.LayerNorm(config.width) for name in self.names})
            self.pools = ModulesByName({name: AttentionPooling(width=config.width) for name in self.names})
            self.match = MatchingHead(config.width)
        self.blocks = nn.ModuleList(blocks)
        self.config = config.model_copy(update={"encoders": resolved})
        """What rebuilds this model without any pretrained folder."""

    def embed(self, batch: Batch) -> SandwichState:
        tokens, masks, medium = {}, {}, {}
        for name in self.names:
            media = batch.media[name]
            if next(iter(media.values.values())).shape[0]:
                tokens[name], masks[name] = self.embedders[name](media.values)
                medium[name] = media.index_B
        present_BM = torch.stack([batch.media[name].present_B for name in self.names], dim=1)
        # A batch's target is what records share that are not held against each other.
        return SandwichState.begin(tokens, masks, medium, present_BM)._replace(key_B=batch.target)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Each encoder, with its way to the shared width, by its modality's name."""
        found = {name: list(self.embedders[name].parameters()) for name in self.names}
        for block in self.blocks:
            if isinstance(block, EncoderBlock | FinishBlock):
                found[block.name] += block.parameters()
        return found

    def head(self, state: SandwichState) -> DualOutput:
        temperature = self.temperature()
        if not self.matching or any(name not in state.tokens for name in self.names):
            return DualOutput(state.aligned, temperature, None, None, None)
        vector_PMD = torch.stack(
            [self.pools[name](self.norms[name](state.tokens[name]), state.masks[name]).x_BD for name in self.names],
            dim=1,
        )
        known_P = state.present_BM.all(dim=1)
        num_pairs = known_P.shape[0]
        num_records = num_pairs // MINED if self.training else num_pairs
        is_pair_P = torch.arange(num_pairs, device=known_P.device) < num_records
        return DualOutput(state.aligned, temperature, self.match(vector_PMD), is_pair_P, known_P)


class VectorBlock(nn.Module):
    """One modality's vectors of length 1, beside its tokens, which go on as they are."""

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.contrastive = head

    def forward(self, state: SandwichState) -> SandwichState:
        if self.name not in state.tokens:
            return state
        vector_UD = self.contrastive(state.tokens[self.name], state.masks[self.name])
        return state._replace(aligned={**state.aligned, self.name: vector_UD})


class MineBlock(nn.Module):
    """In training, wrong pairs behind the right ones: each record's left with a hard wrong right, and the reverse."""

    def __init__(self, names: tuple[str, ...], temperature: LearntTemperature) -> None:
        super().__init__()
        self.left, self.right = names
        # In a tuple, so that it is no part of this block: its parameter belongs to the model, once.
        self._temperature = (temperature,)

    def forward(self, state: SandwichState) -> SandwichState:
        if not self.training or self.left not in state.tokens or self.right not in state.tokens:
            return state
        left_B, right_B = state.medium[self.left], state.medium[self.right]
        both_B = state.present_BM.all(dim=1)
        with torch.no_grad():
            score_UV = state.aligned[self.left] @ state.aligned[self.right].T / self._temperature[0]()
            pair_UV = torch.zeros_like(score_UV, dtype=torch.bool)
            pair_UV[left_B[both_B], right_B[both_B]] = True
            if state.key_B is not None:
                has = zip((left_B, right_B), state.present_BM.unbind(dim=1), pair_UV.shape, strict=True)
                pair_UV |= spared(*(Keyed(medium_B[own_B], state.key_B[own_B], size) for medium_B, own_B, size in has))
            wrong_right = hard_negatives(score_UV, pair_UV)
            wrong_left = hard_negatives(score_UV.T, pair_UV.T)
        known_B = [both_B, both_B & wrong_right.known_U[left_B], both_B & wrong_left.known_U[right_B]]
        medium = {
            self.left: torch.cat([left_B, left_B, wrong_left.chosen_U[right_B]]),
            self.right: torch.cat([right_B, wrong_right.chosen_U[left_B], right_B]),
        }
        present_PM = torch.cat(known_B)[:, None].expand(-1, 2)
        return state._replace(medium=medium, present_BM=present_PM)


def _check_names(config: DualConfig, names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise ConfigError(f"there is {len(names)} modality, and a pair needs two. Name another side.")
    strange = [name for pair in config.pairs for name in pair if name not in names]
    if strange:
        raise ConfigError(
            f"model.pairs names {strange[0]!r}, which is no modality here. Use two of {', '.join(names)}."
        )
    if config.bridge is not None and len(names) != 2:
        raise ConfigError(
            f"model.bridge scores pairs of two modalities, and there are {len(names)}: {', '.join(names)}. "
            "Leave it out, or name two sides."
        )
