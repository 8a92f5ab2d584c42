"""Encoders below, a bridge in the middle, a gate and a shared head on top.

Here        SandwichConfig, Sandwich (a BlockStack), its state and output; the baselines are the same parts put
            together otherwise (`fusion`).
Elsewhere   the parts: encoders/, completion.py, bridge.py, gate.py, heads.py; training it (engine/).
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
from dougong.model.completion import CompletionConfig, parts
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.encoder import Tokens
from dougong.model.encoders.image import ImageEncoderConfig, ImageTail
from dougong.model.encoders.signal import SignalEncoderConfig
from dougong.model.encoders.table import TableEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.encoders.vector import VectorEncoderConfig
from dougong.model.evidence import Opinion, Rule, conflict, evidence
from dougong.model.gate import GateConfig
from dougong.model.heads import ContrastiveHead, DecisionConfig
from dougong.model.narrow import LayerSize, apply_sizes
from dougong.model.votes import Ballot, Decide, WeighedVotes, vote
from dougong.nn.attention import check_heads
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.pooling import AttentionPooling
from dougong.nn.start import keep_variance

EncoderConfig = Annotated[
    TextEncoderConfig
    | ImageEncoderConfig
    | AudioEncoderConfig
    | TableEncoderConfig
    | SignalEncoderConfig
    | VectorEncoderConfig,
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

    completion: CompletionConfig | None = None
    """What a record lacks is completed from what it has, and stands in for it. None: it stays absent."""

    bridge: BridgeConfig = BridgeConfig()

    decide: Decide = "fused"
    """fused: one head on the fused vector. Otherwise each modality has a head of its own, and so has the bridge, which
    has a voice where a record has two modalities to bridge. mean: their scores are averaged. weighed: so they are, with
    weights that are learnt after training, from validation records. confidence: by how sure each is. evidence: as
    evidence. gated: the bridge's scores, and the modalities' own as far as the gate trusts each."""

    evidence_rule: Rule = "dempster"
    """How evidence is combined: dempster grows surer with each that agrees, average does not."""

    own_heads: Literal["none", "taught", "watching"] = "none"
    """Beside decide=fused: each modality decides by itself too, from what its encoder says before the bridge. taught:
    its loss reaches the encoder (objective.own_weight). watching: it only tells how much the modality knows."""

    gate_quality: bool = False
    """The gate also reads each modality's figures of quality (data.preparation.quality)."""

    gate_temperature: float = Field(default=1.0, gt=0)
    head_ratio: float = Field(default=2.0, gt=0)
    """Hidden channels of the head, as a multiple of `width`."""

    head_dropout: float = Field(default=0.0, ge=0, lt=1)

    sizes: dict[str, LayerSize] = {}
    """Layers with fewer heads or inner channels than `width` gives them, by their names in the model: what is left of a
    model that was pruned (compress/prune.py)."""

    @model_validator(mode="after")
    def _a_pair(self) -> Self:
        if len(set(self.align)) not in (0, 2) or len(self.align) > 2:
            raise ValueError(f"align={list(self.align)} must name two modalities, or none.")
        return self

    @model_validator(mode="after")
    def _one_way_to_decide(self) -> Self:
        if self.decide != "fused" and self.own_heads != "none":
            raise ValueError(
                f"own_heads={self.own_heads} cannot take effect beside decide={self.decide}, which gives each modality "
                "a taught head anyway. Leave own_heads out."
            )
        if self.evidence_rule != "dempster" and self.decide != "evidence":
            raise ValueError(
                f"evidence_rule={self.evidence_rule} combines evidence, and decide={self.decide} makes none. "
                "Use decide: evidence."
            )
        if self.gate_quality and self.fusion == "late":
            raise ValueError("gate_quality is read by the gate, and fusion=late has none. Use fusion: bridge.")
        if self.decide == "gated" and self.fusion == "late":
            raise ValueError("decide=gated counts votes by the gate, and fusion=late has none. Use decide: mean.")
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        for part, heads in (("bridge", self.bridge), ("completion", self.completion)):
            if heads is not None:
                check_heads(f"{part}.num_heads", heads.num_heads, self.width)
        return self

    @model_validator(mode="after")
    def _somewhere_to_stand_in(self) -> Self:
        if self.completion is not None and self.fusion == "late":
            raise ValueError(
                "completion cannot take effect with fusion=late, where no modality meets another before the head. "
                "Use fusion=bridge, or leave completion out."
            )
        return self

    def build(self, signature: Signature) -> Sandwich:
        """The model for these inputs and this target; draws its weights from torch's generator.

        Raises:
            ConfigError: an encoder is named for no modality, is of another kind, or does not exist.
        """
        return Sandwich(self, signature)


class Own(NamedTuple):
    """One modality alone. Shapes: U distinct media, D channels, C outputs."""

    vector_UD: Tensor
    logit_UC: Tensor


class SandwichState(NamedTuple):
    """What walks through the blocks. A modality that the whole batch lacks is not in it."""

    tokens: dict[str, Tensor]
    """(U, T, D) of distinct media; after the join (B, T, D) of records."""

    masks: dict[str, Tensor]
    """Which tokens are real: (U, T), then (B, T)."""

    medium: dict[str, Tensor]
    """Each record's medium, (B,)."""

    present_BM: Tensor
    """Which modalities each record has; after the completion, or has been given."""

    aligned: dict[str, Tensor]
    """(U, D): vectors of length 1 of the media that are to be drawn together."""

    quality: dict[str, Tensor]
    """(B, Q): figures of quality of each record's medium, where they are measured; zero where it has none."""

    own: dict[str, Own]
    """What each medium's modality decides by itself."""

    truth: dict[str, Tensor]
    """(U, K, D): in training, what completed tokens of each medium should be; without a gradient."""

    completed_BM: Tensor
    """Which modalities were completed; present_BM then has them too."""

    completed: dict[str, Tensor]
    """(B, K, D): the completed tokens of each such modality; zero in other records."""

    key_B: Tensor | None = None
    """Records of equal numbers are not held against each other, where wrong partners are looked for."""

    @classmethod
    def begin(
        cls, tokens: dict[str, Tensor], masks: dict[str, Tensor], medium: dict[str, Tensor], present_BM: Tensor
    ) -> SandwichState:
        """Before the first block: nothing is made yet of what is given."""
        return cls(tokens, masks, medium, present_BM, {}, {}, {}, {}, torch.zeros_like(present_BM), {})


class SandwichOutput(NamedTuple):
    """Shapes: B records, C outputs, D channels, M modalities."""

    output_BC: Tensor
    fused_BD: Tensor
    weight_BM: Tensor | None
    """The gate's weights; None in late fusion, which has no gate."""

    vector_BMD: Tensor
    """Each modality's own vector; zero where it is absent."""

    aligned: dict[str, Tensor]
    truth: dict[str, Tensor]
    completed_BM: Tensor
    completed: dict[str, Tensor]
    """These four as SandwichState has them."""

    own_BMC: Tensor | None = None
    """What each modality decides by itself; zero where it is absent. None for a model without such heads."""

    opinion: Opinion | None = None
    """decide=evidence: the combined opinion, with its vacuity."""

    conflict_B: Tensor | None = None
    """How far the modalities' own decisions are apart, 0 to 1; where they are classes, and decide by themselves."""

    ballot: Ballot | None = None
    """The votes that were counted: of each modality, then of the bridge, or of late fusion what is common (V = M + 1).
    None for decide=fused."""


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

    embed_names = ("embedders",)
    state_types = (SandwichState, SandwichOutput, Own, Opinion, Ballot)

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
        self.task = signature.target.task
        self.decide, self.evidence_rule = config.decide, config.evidence_rule
        if self.task != "single_label" and self.decide in ("confidence", "evidence"):
            raise ConfigError(f"model.decide={self.decide} weighs classes, and the target is {self.task}. Use mean.")
        self.has_own = config.decide != "fused" or config.own_heads != "none"
        if self.has_own:
            own_head = self._head_config(config, signature, config.width)
            watching = config.own_heads == "watching"
            blocks += [OwnBlock(name, own_head, watching=watching) for name in self.names]
        if config.completion is not None:
            if len(self.names) < 2:
                raise ConfigError(
                    f"model.completion has nothing to complete {self.names[0]!r} from, which is the only modality. "
                    "Leave completion out."
                )
            blocks.append(TruthBlock(config.completion.num_tokens))
        if not self.late:
            blocks.append(JoinBlock(self.names))
            if config.completion is not None:
                blocks.append(CompletionBlock(config.completion, self.names, config.width))
            blocks += [BridgeBlock(block) for block in config.bridge.build(self.names, config.width)]
        self.blocks = nn.ModuleList(blocks)
        self.width = config.width
        self.num_outputs = signature.target.num_outputs
        self.only_votes = self.late and self.decide != "fused"
        pooled = () if self.only_votes else self.names
        self.norms = ModulesByName({name: nn.LayerNorm(config.width) for name in pooled})
        self.pools = ModulesByName({name: AttentionPooling(width=config.width) for name in pooled})
        if not self.late:
            self.gate = GateConfig(
                width=config.width,
                num_modalities=len(self.names),
                num_quality=_num_quality(config, signature),
                temperature=config.gate_temperature,
            ).build()
        if self.only_votes:
            # Votes alone when nobody else does: a record that has nothing is answered by what is common.
            # It begins with next to no evidence.
            self.prior_C = nn.Parameter(torch.full((self.num_outputs,), -4.0 if self.decide == "evidence" else 0.0))
        else:
            fused_width = config.width * (len(self.names) if self.late else 1)
            self.decision = self._head_config(config, signature, fused_width).build()
        if self.decide == "weighed":
            self.votes = WeighedVotes(len(self.names) + 1)
        apply_sizes(self, config.sizes)
        self.config = config.model_copy(update={"encoders": resolved})
        """What rebuilds this model without any pretrained folder."""

    @staticmethod
    def _head_config(config: SandwichConfig, signature: Signature, width: int) -> DecisionConfig:
        return DecisionConfig(
            width=width,
            hidden=max(1, round(config.width * config.head_ratio)),
            num_outputs=signature.target.num_outputs,
            dropout=config.head_dropout,
        )

    def embed(self, batch: Batch) -> SandwichState:
        tokens, masks, medium, quality = {}, {}, {}, {}
        for name in self.names:
            media = batch.media[name]
            if next(iter(media.values.values())).shape[0]:
                tokens[name], masks[name] = self.embedders[name](media.values)
                medium[name] = media.index_B
                if media.quality_UQ is not None:
                    quality_BQ = media.quality_UQ.index_select(0, media.index_B)
                    quality[name] = quality_BQ.masked_fill(~media.present_B[:, None], 0.0)
        present_BM = torch.stack([batch.media[name].present_B for name in self.names], dim=1)
        return SandwichState.begin(tokens, masks, medium, present_BM)._replace(quality=quality)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Each encoder, with its way to the shared width, by its modality's name."""
        found = {name: list(self.embedders[name].parameters()) for name in self.names}
        for block in self.blocks:
            if isinstance(block, EncoderBlock | FinishBlock):  # own heads stand on an encoder and are no part of it
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
                like = next(self.parameters())
                vectors.append(like.new_zeros(state.present_BM.shape[0], self.width))
                continue
            x_BD = self._vector(state, name, place, pooled)
            vectors.append(x_BD.masked_fill(~state.present_BM[:, place, None], 0.0))
        vector_BMD = torch.stack(vectors, dim=1)
        if self.late:
            fused_BD, weight_BM = vector_BMD.flatten(1), None
        else:
            quality = tuple(state.quality.get(name) for name in self.names)
            fused_BD, weight_BM = self.gate(
                vector_BMD, state.present_BM, quality, state.present_BM & ~state.completed_BM
            )
        output_BC = self.prior_C.expand(fused_BD.shape[0], -1) if self.only_votes else self.decision(fused_BD)
        made = state.aligned, state.truth, state.completed_BM, state.completed
        output = SandwichOutput(output_BC, fused_BD, weight_BM, vector_BMD, *made)
        return self._vote(state, output) if self.has_own else output

    def _vector(self, state: SandwichState, name: str, place: int, pooled: dict[str, Tensor] | None) -> Tensor:
        """One modality's vector of each record."""
        if self.only_votes:
            return state.own[name].vector_UD.index_select(0, state.medium[name])
        found = self.pools[name](self.norms[name](state.tokens[name]), state.masks[name])
        # In late fusion it is pooled before gathering: records that share a medium share its vector.
        x_BD: Tensor = found.x_BD
        weight_BT: Tensor = found.weight_BT
        if self.late:
            x_BD, weight_BT = (each.index_select(0, state.medium[name]) for each in (x_BD, weight_BT))
        if pooled is not None:
            pooled[name] = weight_BT * state.present_BM[:, place, None]
        return x_BD

    def _vote(self, state: SandwichState, output: SandwichOutput) -> SandwichOutput:
        """What the modalities decide by themselves, beside the decision or in its place."""
        given_BM = state.present_BM & ~state.completed_BM  # what was completed from the others has no voice of its own
        nothing_BC = torch.zeros_like(output.output_BC)
        said = [
            state.own[name].logit_UC.index_select(0, state.medium[name]) if name in state.own else nothing_BC
            for name in self.names
        ]
        own_BMC = torch.stack(said, dim=1).masked_fill(~given_BM[..., None], 0.0)
        output = output._replace(own_BMC=own_BMC)
        if self.task == "single_label":
            output = output._replace(conflict_B=conflict(self._own_probabilities(own_BMC.detach()), given_BM))
        if self.decide == "fused":
            return output
        # One more vote: of the bridge where it has two to bridge, or of what is common where nobody else votes.
        nobody_B1 = ~given_BM.any(dim=1, keepdim=True)
        bridged_B1 = state.present_BM.sum(dim=1, keepdim=True) > 1
        votes_BVC = torch.cat([own_BMC, output.output_BC[:, None]], dim=1)
        present_BV = torch.cat([given_BM, nobody_B1 if self.only_votes else nobody_B1 | bridged_B1], dim=1)
        ballot = Ballot(votes_BVC, present_BV)
        if self.decide == "weighed":
            return output._replace(output_BC=self.votes(ballot), ballot=ballot)
        weight_BV = None
        if output.weight_BM is not None:
            weight_BV = torch.cat([output.weight_BM, torch.ones_like(output.weight_BM[:, :1])], dim=1)
        voted = vote(*ballot, self.decide, self.evidence_rule, weight_BV)
        return output._replace(output_BC=voted.output_BC, opinion=voted.opinion, ballot=ballot)

    def _own_probabilities(self, own_BMC: Tensor) -> Tensor:
        """Evidence of next to nothing for one class is no opinion, however far its scores are apart."""
        if self.decide != "evidence":
            return own_BMC.float().softmax(dim=-1)
        alpha_BMC = evidence(own_BMC) + 1.0
        return alpha_BMC / alpha_BMC.sum(dim=-1, keepdim=True)


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


class OwnBlock(nn.Module):
    """What one modality decides by itself, of each medium, before it meets the others."""

    def __init__(self, name: str, head: DecisionConfig, *, watching: bool) -> None:
        super().__init__()
        self.name = name
        self.watching = watching
        self.norm = nn.LayerNorm(head.width)
        self.pool = AttentionPooling(width=head.width)
        self.decision = head.build()

    def forward(self, state: SandwichState) -> SandwichState:
        if self.name not in state.tokens:
            return state
        x_UTD = state.tokens[self.name]
        if self.watching:
            x_UTD = x_UTD.detach()
        vector_UD = self.pool(self.norm(x_UTD), state.masks[self.name]).x_BD
        return state._replace(own={**state.own, self.name: Own(vector_UD, self.decision(vector_UD))})


class TruthBlock(nn.Module):
    """What each medium's completed tokens should be, for the loss, while media that were withheld are still here."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts

    def forward(self, state: SandwichState) -> SandwichState:
        if not self.training:
            return state
        # Detached: were the truth to follow, all of it would soon be alike and easy to complete.
        found = {name: parts(x_UTD, state.masks[name], self.num_parts).detach() for name, x_UTD in state.tokens.items()}
        return state._replace(truth=found)


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


class CompletionBlock(nn.Module):
    """What a record lacks is made from what it has, and from here on counts as there."""

    def __init__(self, config: CompletionConfig, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.names = names
        self.completions = ModulesByName(
            {name: config.build(tuple(other for other in names if other != name), width) for name in names}
        )

    def forward(self, state: SandwichState) -> SandwichState:
        lacking_BM = ~state.present_BM & state.present_BM.any(dim=1, keepdim=True)
        tokens, masks, completed = dict(state.tokens), dict(state.masks), {}
        for place, name in enumerate(self.names):
            row_R = lacking_BM[:, place].nonzero()[:, 0]
            if not len(row_R):
                continue
            # Of what was there, never of what has been completed just now: the order counts for nothing.
            others = [other for other in state.tokens if other != name]
            completion = self.completions[name]
            made_RKD = completion(
                {other: state.tokens[other].index_select(0, row_R) for other in others},
                {other: state.masks[other].index_select(0, row_R) for other in others},
            )
            completed[name] = _put(None, row_R, made_RKD, len(lacking_BM))
            tokens[name] = _put(tokens.get(name), row_R, made_RKD + completion.mark_D, len(lacking_BM))
            there_RK = made_RKD.new_ones(made_RKD.shape[:2], dtype=torch.bool)
            masks[name] = _put(masks.get(name), row_R, there_RK, len(lacking_BM))
        # In the order that the bridge would have found them in.
        return state._replace(
            tokens={name: tokens[name] for name in self.names if name in tokens},
            masks={name: masks[name] for name in self.names if name in masks},
            present_BM=state.present_BM | lacking_BM,
            completed_BM=lacking_BM,
            completed=completed,
        )


def _put(x_BT: Tensor | None, row_R: Tensor, made_RK: Tensor, num_records: int) -> Tensor:
    """Rows of K tokens among those of T, all made as long as the longer; zeros where nothing is. None: no others."""
    if x_BT is None:
        x_BT = made_RK.new_zeros(num_records, *made_RK.shape[1:])
    longer = max(x_BT.shape[1], made_RK.shape[1])
    x_BT, made_RK = (_lengthened(x, longer) for x in (x_BT, made_RK))
    return x_BT.index_copy(0, row_R, made_RK.to(x_BT.dtype))


def _lengthened(x_BT: Tensor, length: int) -> Tensor:
    more = x_BT.new_zeros(x_BT.shape[0], length - x_BT.shape[1], *x_BT.shape[2:])
    return torch.cat([x_BT, more], dim=1) if more.shape[1] else x_BT


class BridgeBlock(nn.Module):
    """One block of the bridge, on the state."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: SandwichState, looked: dict[str, Looked] | None = None) -> SandwichState:
        return state._replace(tokens=self.block(state.tokens, state.masks, looked))


def _with(state: SandwichState, name: str, tokens: Tokens) -> SandwichState:
    return state._replace(tokens={**state.tokens, name: tokens.x_UTD}, masks={**state.masks, name: tokens.mask_UT})


def _num_quality(config: SandwichConfig, signature: Signature) -> tuple[int, ...]:
    """How many figures of quality the gate reads of each modality."""
    if not config.gate_quality:
        return ()
    counts = tuple(len(shape.quality) for shape in signature.inputs.values())
    if not any(counts):
        raise ConfigError(
            "model.gate_quality has nothing to read: no input measures its quality. Set data.preparation.quality: true."
        )
    return counts


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
    if isinstance(shape, VolumeInput):
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
    if isinstance(shape, SignalInput):
        return SignalEncoderConfig(width=width, num_heads=heads)
    return TableEncoderConfig(width=width)


def _patch_size(shape: ImageInput) -> int:
    """About 8 pixels, and a divisor of both sides; the whole picture where it has none."""
    smallest = min(shape.height, shape.width)
    liked = (size for size in (8, 7, 6, 9, 10, 5, 12, 4, 16, 3, 2) if size <= max(2, smallest // 4))
    whole = (size for size in liked if shape.height % size == 0 and shape.width % size == 0)
    return next(whole, math.gcd(shape.height, shape.width))
