"""Encoders below, a bridge in the middle, a gate and a shared head on top.

Here        SandwichConfig, Sandwich (a BlockStack), its state and output; the baselines are the same parts put
            together otherwise (`fusion`).
Elsewhere   the parts: encoders/, bridge.py, gate.py, heads.py; training it (engine/).
Promise     a medium that records share is encoded once; whatever a record lacks changes nothing of its answer, and
            a record that lacks everything still has one, with finite gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import AudioInput, ImageInput, SignalInput, Signature, TextInput, VolumeInput
from dougong.model.bridge import BridgeConfig, Looked
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.encoder import Tokens
from dougong.model.encoders.image import ImageEncoderConfig, ImageTail
from dougong.model.encoders.table import TableEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.encoders.vector import VectorEncoderConfig
from dougong.model.gate import GateConfig
from dougong.model.heads import ContrastiveHead, DecisionConfig
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.pooling import AttentionPooling
from dougong.nn.start import keep_variance

EncoderConfig = Annotated[
    TextEncoderConfig | ImageEncoderConfig | AudioEncoderConfig | TableEncoderConfig | VectorEncoderConfig,
    Field(discriminator="kind"),
]


class SandwichConfig(Config):
    """How the parts are put together."""

    fusion: Literal["bridge", "late"] = "bridge"
    """bridge: the sandwich. late: each modality's vector side by side, straight to the head; a baseline."""

    width: int = Field(default=64, gt=0)
    """Channels of every modality after its encoder (D)."""

    encoders: dict[str, EncoderConfig] = {}
    """By modality. One that is not named here gets a small encoder from scratch, `width` wide."""

    align: tuple[str, ...] = ()
    """Two modalities that say the same, such as a sentence and a recording of it: each gets a vector before the bridge,
    for a contrastive loss to draw together."""

    bridge: BridgeConfig = BridgeConfig()

    gate_temperature: float = Field(default=1.0, gt=0)
    head_ratio: float = Field(default=2.0, gt=0)
    """Hidden channels of the head, as a multiple of `width`."""

    head_dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _a_pair(self) -> Self:
        if len(set(self.align)) not in (0, 2) or len(self.align) > 2:
            raise ValueError(f"align={list(self.align)} must name two modalities, or none.")
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.width % self.bridge.num_heads:
            fits = [heads for heads in range(1, self.width + 1) if self.width % heads == 0 and heads <= 16]
            raise ValueError(
                f"bridge.num_heads={self.bridge.num_heads} cannot share out width={self.width}: every head needs as "
                f"many channels. Use num_heads in {fits}."
            )
        return self

    def build(self, signature: Signature) -> Sandwich:
        """The model for these inputs and this target; draws its weights from torch's generator.

        Raises:
            ConfigError: an encoder is named for no modality, is of another kind, or does not exist.
        """
        return Sandwich(self, signature)


class SandwichState(NamedTuple):
    """What walks through the blocks. A modality that the whole batch lacks is not in it."""

    tokens: dict[str, Tensor]
    """(U, T, D) of distinct media; after the join (B, T, D) of records."""

    masks: dict[str, Tensor]
    """Which tokens are real: (U, T), then (B, T)."""

    medium: dict[str, Tensor]
    """Each record's medium, (B,)."""

    present_BM: Tensor
    """Which modalities each record has."""

    aligned: dict[str, Tensor]
    """(U, D): vectors of length 1 of the media that are to be drawn together."""


class SandwichOutput(NamedTuple):
    """Shapes: B records, C outputs, D channels, M modalities."""

    output_BC: Tensor
    fused_BD: Tensor
    weight_BM: Tensor | None
    """The gate's weights; None in late fusion, which has no gate."""

    vector_BMD: Tensor
    """Each modality's own vector; zero where it is absent."""

    aligned: dict[str, Tensor]
    """As SandwichState has them."""


class Explanation(NamedTuple):
    """A forward pass with what happened inside."""

    output: SandwichOutput
    state: SandwichState
    looked: tuple[dict[str, Looked], ...]
    """By block of the bridge, then by the asking modality."""

    pooled: dict[str, Tensor]
    """How much each token of a modality counted in its vector, (B, T)."""

    grids: dict[str, tuple[int, int]]
    """Rows and columns of the tokens of pictures."""


class Sandwich(BlockStack[SandwichState, SandwichOutput]):
    """Shapes: U distinct media, B records, M modalities, T tokens, D channels, C outputs."""

    def __init__(self, config: SandwichConfig, signature: Signature) -> None:
        super().__init__()
        strange = [name for name in config.align if name not in signature.inputs]
        if strange:
            known = ", ".join(signature.inputs)
            raise ConfigError(f"model.align names {strange[0]!r}, which is no modality here. Use some of {known}.")
        settled = settled_encoders(config.encoders, signature, config.width)
        self.names = tuple(settled)
        self.grids: dict[str, tuple[int, int]] = {}
        embedders: dict[str, nn.Module] = {}
        blocks: list[nn.Module] = []
        resolved: dict[str, Config] = {}
        for name, encoder_config in settled.items():
            encoder = encoder_config.build(signature.inputs[name])
            resolved[name] = encoder.resolved()
            embedders[name] = encoder.stem
            blocks += [EncoderBlock(name, layer) for layer in encoder.layers]
            blocks.append(FinishBlock(name, encoder.tail, encoder.width, config.width))
            if isinstance(encoder.tail, ImageTail):
                self.grids[name] = encoder.tail.grid
        self.embedders = ModulesByName(embedders)
        blocks += [AlignBlock(name, config.width) for name in config.align]
        self.late = config.fusion == "late"
        if not self.late:
            blocks.append(JoinBlock(self.names))
            blocks += [BridgeBlock(block) for block in config.bridge.build(self.names, config.width)]
        self.blocks = nn.ModuleList(blocks)
        self.width = config.width
        self.norms = ModulesByName({name: nn.LayerNorm(config.width) for name in self.names})
        self.pools = ModulesByName({name: AttentionPooling(width=config.width) for name in self.names})
        fused_width = config.width
        if self.late:
            fused_width *= len(self.names)
        else:
            self.gate = GateConfig(
                width=config.width, num_modalities=len(self.names), temperature=config.gate_temperature
            ).build()
        self.decision = DecisionConfig(
            width=fused_width,
            hidden=round(config.width * config.head_ratio),
            num_outputs=signature.target.num_outputs,
            dropout=config.head_dropout,
        ).build()
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
        return SandwichState(tokens, masks, medium, present_BM, {})

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Each encoder, with its way to the shared width, by its modality's name."""
        found = {name: list(self.embedders[name].parameters()) for name in self.names}
        for block in self.blocks:
            if isinstance(block, EncoderBlock | FinishBlock):
                found[block.name] += block.parameters()
        return found

    def head(self, state: SandwichState) -> SandwichOutput:
        return self._decide(state, pooled=None)

    @torch.no_grad()
    def explain(self, batch: Batch) -> Explanation:
        """The same answer, with attention maps; slower, without gradients, for looking at."""
        state = self.embed(batch)
        looked: list[dict[str, Looked]] = []
        for block in self.blocks:
            if isinstance(block, BridgeBlock):
                looked.append({})
                state = block(state, looked[-1])
            else:
                state = block(state)
        pooled: dict[str, Tensor] = {}
        return Explanation(self._decide(state, pooled), state, tuple(looked), pooled, self.grids)

    def _decide(self, state: SandwichState, pooled: dict[str, Tensor] | None) -> SandwichOutput:
        vectors = []
        for place, name in enumerate(self.names):
            if name not in state.tokens:
                like = self.decision.norm.weight
                vectors.append(like.new_zeros(state.present_BM.shape[0], self.width))
                continue
            found = self.pools[name](self.norms[name](state.tokens[name]), state.masks[name])
            x_BD = found.x_BD
            if self.late:  # pooled before gathering: records that share a medium share its vector
                x_BD = x_BD.index_select(0, state.medium[name])
            vectors.append(x_BD.masked_fill(~state.present_BM[:, place, None], 0.0))
            if pooled is not None:
                weight = found.weight_BT[state.medium[name]] if self.late else found.weight_BT
                pooled[name] = weight * state.present_BM[:, place, None]
        vector_BMD = torch.stack(vectors, dim=1)
        if self.late:
            fused_BD, weight_BM = vector_BMD.flatten(1), None
        else:
            fused_BD, weight_BM = self.gate(vector_BMD, state.present_BM)
        return SandwichOutput(self.decision(fused_BD), fused_BD, weight_BM, vector_BMD, state.aligned)


class EncoderBlock(nn.Module):
    """One layer of one modality's encoder, over distinct media."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.layer = layer

    def forward(self, state: SandwichState) -> SandwichState:
        if self.name not in state.tokens:
            return state
        return _with(state, self.name, self.layer(Tokens(state.tokens[self.name], state.masks[self.name])))


class FinishBlock(nn.Module):
    """The end of an encoder, and the way to the width that all modalities share."""

    def __init__(self, name: str, finisher: nn.Module, width: int, shared_width: int) -> None:
        super().__init__()
        self.name = name
        self.finisher = finisher
        self.project = keep_variance(nn.Linear(width, shared_width))

    def forward(self, state: SandwichState) -> SandwichState:
        if self.name not in state.tokens:
            return state
        finished = self.finisher(Tokens(state.tokens[self.name], state.masks[self.name]))
        return _with(state, self.name, Tokens(self.project(finished.x_UTD), finished.mask_UT))


class AlignBlock(nn.Module):
    """One modality's vectors for a contrastive loss, beside its tokens, which go on as they are."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.contrastive = ContrastiveHead(width)

    def forward(self, state: SandwichState) -> SandwichState:
        # Only for the loss: a model in use is not asked for it.
        if not self.training or self.name not in state.tokens:
            return state
        vector_UD = self.contrastive(state.tokens[self.name], state.masks[self.name])
        return state._replace(aligned={**state.aligned, self.name: vector_UD})


class JoinBlock(nn.Module):
    """From distinct media to records: from here on every record has tokens of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        # Columns of present_BM, where a modality that the batch lacks still has its own.
        self.place = {name: place for place, name in enumerate(names)}

    def forward(self, state: SandwichState) -> SandwichState:
        tokens, masks = {}, {}
        for name in state.tokens:
            present_B = state.present_BM[:, self.place[name]]
            if not present_B.any():
                continue  # what was encoded for a contrastive loss alone ends here
            # index_select, not x[index]: its backward adds rows up several times faster.
            x_BTD = state.tokens[name].index_select(0, state.medium[name])
            tokens[name] = x_BTD.masked_fill(~present_B[:, None, None], 0.0)
            masks[name] = state.masks[name].index_select(0, state.medium[name]) & present_B[:, None]
        return state._replace(tokens=tokens, masks=masks)


class BridgeBlock(nn.Module):
    """One block of the bridge, on the state."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: SandwichState, looked: dict[str, Looked] | None = None) -> SandwichState:
        return state._replace(tokens=self.block(state.tokens, state.masks, looked))


def _with(state: SandwichState, name: str, tokens: Tokens) -> SandwichState:
    return state._replace(tokens={**state.tokens, name: tokens.x_UTD}, masks={**state.masks, name: tokens.mask_UT})


def settled_encoders(named: Mapping[str, EncoderConfig], signature: Signature, width: int) -> dict[str, EncoderConfig]:
    """An encoder for each input, in the signature's order: the named one, else a small one from scratch.

    Raises:
        ConfigError: an encoder is named for no modality, is of another kind, or does not exist.
    """
    strange = [name for name in named if name not in signature.inputs]
    if strange:
        known = ", ".join(signature.inputs)
        raise ConfigError(f"model.encoders names {strange[0]!r}, which is no modality here. Use some of {known}.")
    settled: dict[str, EncoderConfig] = {}
    for name, shape in signature.inputs.items():
        chosen = named.get(name) or _default_encoder(name, shape, width)
        if getattr(chosen, "reads", chosen.kind) != shape.kind:
            raise ConfigError(f"model.encoders.{name} is for {chosen.kind}, and the column holds {shape.kind}.")
        settled[name] = chosen
    return settled


def _default_encoder(name: str, shape: object, width: int) -> EncoderConfig:
    """Small, from scratch."""
    if isinstance(shape, SignalInput | VolumeInput):
        raise ConfigError(
            f"{name!r} is a {shape.kind}, which has no encoder yet. Leave it out: columns: {{{name}: ignore}}."
        )
    heads = max(h for h in (1, 2, 3, 4, 6, 8) if width % h == 0 and width // h >= min(16, width))
    if isinstance(shape, AudioInput):
        # Windows of 32 milliseconds, a frame each 64, whatever the rate.
        hop = max(1, round(shape.sample_rate * 0.016))
        return AudioEncoderConfig(
            width=width,
            num_heads=heads,
            num_layers=1,
            conv_dim=(-(-width // 4) * 4, width),
            conv_kernel=(2 * hop, 8),
            conv_stride=(hop, 4),
            first_filters="gabor",
        )
    if isinstance(shape, ImageInput):
        return ImageEncoderConfig(width=width, num_heads=heads, patch_size=_patch_size(shape))
    if isinstance(shape, TextInput):
        return TextEncoderConfig(width=width, num_heads=heads, num_layers=1)
    return TableEncoderConfig(width=width)


def _patch_size(shape: ImageInput) -> int:
    """About 8 pixels, and a divisor of both sides; the whole picture where it has none."""
    smallest = min(shape.height, shape.width)
    liked = (size for size in (8, 7, 6, 9, 10, 5, 12, 4, 16, 3, 2) if size <= max(2, smallest // 4))
    whole = (size for size in liked if shape.height % size == 0 and shape.width % size == 0)
    return next(whole, math.gcd(shape.height, shape.width))
