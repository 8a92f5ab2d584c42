"""The large model: a causal decoder of the DeepSeek-V3 architecture that reads other modalities before its words.

Here        DecoderConfig, Decoder (a BlockStack), its state and output, writing token by token.
Elsewhere   attention (nn/latent_attention.py) and experts (nn/experts.py); weights under the names that others know
            them by (model/deepseek.py); encoders (encoders/); the loss (objectives/generation.py).
Promise     logits within 1e-5 of transformers' DeepseekV3ForCausalLM with the same weights, read at once and token by
            token; what a record lacks, or is padded with, leaves no trace in what is written.

DeepSeek-V3 (2024, arXiv:2412.19437). What is read of other modalities stands before the words, as tokens that every
layer sees. Predicting further tokens: their section 2.2, on the words alone, from the vectors before the last norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Signature, TextInput
from dougong.model.reading import ReadBlock, and_tokens, nothing_read, num_media
from dougong.model.sampling import SamplingConfig, choose
from dougong.model.sandwich import EncoderBlock, EncoderConfig, FinishBlock, SandwichState, settled_encoders
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack
from dougong.nn.context import Context, Seen
from dougong.nn.experts import Experts, GatedFeedForward, MixtureOfExperts, Router
from dougong.nn.latent_attention import LatentAttention, LatentCache
from dougong.nn.modules_by_name import ModulesByName
from dougong.nn.norm import RMSNorm
from dougong.nn.rotary import Stretch, frequencies, magnitude
from dougong.nn.split import Split
from dougong.nn.start import keep_variance
from dougong.nn.vocabulary import TokenLoss


class ExpertsConfig(Config):
    """The feed-forwards of which each token uses a few."""

    num: int = Field(default=8, gt=1)
    num_chosen: int = Field(default=2, gt=0)
    """Of the routed ones, by each token."""

    num_shared: int = Field(default=1, ge=0)
    """Used by every token besides."""

    hidden: int = Field(default=64, gt=0)
    """Channels inside one expert."""

    num_groups: int = Field(default=1, gt=0)
    groups_chosen: int = Field(default=1, gt=0)
    """A token's experts are of so many groups of so many: the fewer, the fewer devices it is sent to."""

    normalise: bool = True
    """The chosen ones' weights are made to add up to 1."""

    scale: float = Field(default=1.0, gt=0)
    """What the routed ones' answers are multiplied by."""

    balance_speed: float = Field(default=0.001, ge=0)
    """How far an expert's bias moves after a step, against its load; 0: not at all."""

    @model_validator(mode="after")
    def _can_be_chosen(self) -> ExpertsConfig:
        if self.num % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} cannot share out num={self.num}. Use a divisor of it.")
        if self.groups_chosen > self.num_groups:
            raise ValueError(
                f"groups_chosen={self.groups_chosen} is more than num_groups={self.num_groups}. Use fewer."
            )
        size = self.num // self.num_groups
        if self.num_groups > 1 and size < 2:
            raise ValueError(f"num_groups={self.num_groups} leaves {size} expert to a group. Use groups of 2 or more.")
        if self.num_chosen > self.groups_chosen * size:
            raise ValueError(
                f"num_chosen={self.num_chosen} is more than the {self.groups_chosen * size} experts of "
                f"groups_chosen={self.groups_chosen} groups. Use fewer, or more groups."
            )
        return self


class StretchConfig(Config):
    """Reading far more tokens than the weights were trained for (YaRN)."""

    factor: float = Field(gt=1)
    original: int = Field(gt=0)
    fast: float = 32.0
    slow: float = 1.0
    magnitude: float | None = None
    magnitude_all: float | None = None


class DecoderConfig(Config):
    """The decoder's sizes; the defaults are small, from scratch."""

    writes: str | None = None
    """The text modality that is written. None: the only one."""

    width: int = Field(default=64, gt=0)
    """Channels of every token (D)."""

    num_layers: int = Field(default=4, gt=0)
    num_dense: int = Field(default=1, ge=0)
    """Of the first layers, with one feed-forward in place of experts."""

    num_heads: int = Field(default=4, gt=0)
    query_rank: int | None = Field(default=None, gt=0)
    """Channels that queries are made from; None: from the token itself."""

    latent_rank: int = Field(default=32, gt=0)
    """Channels that keys and values are made from, and that are remembered."""

    plain_width: int = Field(default=16, gt=0)
    turned_width: int = Field(default=8, gt=0)
    """Channels of a head's query and key: without, and with a place in the text."""

    value_width: int = Field(default=16, gt=0)
    hidden: int = Field(default=256, gt=0)
    """Channels inside the feed-forward of a dense layer."""

    experts: ExpertsConfig | None = ExpertsConfig()
    """None: all layers are dense."""

    num_further: int = Field(default=0, ge=0)
    """Tokens after the next one that training predicts too, each by a layer of its own."""

    angle_base: float = Field(default=10000.0, gt=1)
    stretch: StretchConfig | None = None
    norm_epsilon: float = Field(default=1e-6, gt=0)
    bias: bool = False
    """Of the projections down to ranks and out of attention."""

    encoders: dict[str, EncoderConfig] = {}
    """Of the modalities that are read, by name; a small one from scratch where none is named."""

    @model_validator(mode="after")
    def _pairs_turn(self) -> DecoderConfig:
        if self.turned_width % 2:
            raise ValueError(f"turned_width={self.turned_width} is odd, and channels turn in pairs. Use an even one.")
        return self

    def build(self, signature: Signature) -> Decoder:
        """The model for these inputs; draws its weights from torch's generator.

        Raises:
            ConfigError: there is no one text to write, or an encoder fits no input.
        """
        return Decoder(self, signature)

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, from 0, has experts."""
        return self.experts is not None and layer >= self.num_dense


class DecoderState(NamedTuple):
    """What walks through the blocks. Shapes: B records, N words, T tokens, D channels."""

    read: SandwichState
    """Other modalities, on their way through the encoders; empty after the join."""

    x_BTD: Tensor
    """The words; after the join, what was read stands before them."""

    mask_BT: Tensor
    id_BN: Tensor
    due_BN: Tensor
    """Which words are to be predicted: all but the first of each record."""

    word_BND: Tensor | None
    """The words as they were embedded, for whoever predicts further ones."""

    further: tuple[Tensor, ...]
    """(B, N - k, D) of the k-th further word."""

    num_padded: int = 0
    """Masked tokens after the words, where ranks share out the tokens and their number must fit."""


class DecoderOutput(NamedTuple):
    """Shapes: B records, N words, V words of the vocabulary."""

    score_BNV: Tensor
    """Of what comes after each word, the last one included. Of ranks that share out tokens, or the vocabulary, each has
    a part in training."""

    loss_BN: Tensor
    """Of each word but the first, in nats: N - 1 of them."""

    due_BN: Tensor
    """Which of these count."""

    further: tuple[tuple[Tensor, Tensor], ...]
    """The same two for the words after; in training only."""


class Decoder(BlockStack[DecoderState, DecoderOutput]):
    """Shapes: B records, N words, T tokens, D channels, V words of the vocabulary."""

    embed_names = ("embedders", "words")
    state_types = (DecoderState, SandwichState, DecoderOutput)

    def __init__(self, config: DecoderConfig, signature: Signature) -> None:
        super().__init__()
        self.writes, text = written_text(config, signature)
        others = {name: shape for name, shape in signature.inputs.items() if name != self.writes}
        read = signature.model_copy(update={"inputs": others})
        settled = settled_encoders(config.encoders, read, config.width) if others or config.encoders else {}
        self.names = tuple(settled)
        embedders: dict[str, nn.Module] = {}
        resolved: dict[str, Config] = {}
        blocks: list[nn.Module] = []
        for name, encoder_config in settled.items():
            encoder = encoder_config.build(signature.inputs[name])
            resolved[name] = encoder.resolved()
            embedders[name] = encoder.stem
            blocks += [ReadBlock(EncoderBlock(name, layer)) for layer in encoder.layers]
            blocks.append(ReadBlock(FinishBlock(name, encoder.tail, encoder.width, config.width)))
        self.embedders = ModulesByName(embedders)
        if self.names:
            blocks.append(JoinPrefix(self.names, tuple(signature.inputs)))
        blocks += [LayerBlock(DecoderLayer(config, layer)) for layer in range(config.num_layers)]
        blocks += [FurtherBlock(config, place) for place in range(config.num_further)]
        self.blocks = nn.ModuleList(blocks)
        first = len(blocks) - config.num_layers - config.num_further
        self.token_blocks = range(first, first + config.num_layers)

        self.words = nn.Embedding(text.vocabulary_size, config.width)
        nn.init.normal_(self.words.weight, std=0.3)
        self.norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.out = keep_variance(nn.Linear(config.width, text.vocabulary_size, bias=False))
        self.token_loss = TokenLoss()
        self.context = Context()
        self.config = config.model_copy(update={"encoders": resolved})
        """What rebuilds this model without any pretrained folder."""

    def split(self) -> Split:
        return Split(vocabulary=("words", "out", "token_loss"))

    def tokens(self, state: DecoderState) -> tuple[Tensor, Tensor]:
        return state.x_BTD, state.mask_BT

    def with_tokens(self, state: DecoderState, x_BTD: Tensor, mask_BT: Tensor, num_padded: int) -> DecoderState:
        return state._replace(x_BTD=x_BTD, mask_BT=mask_BT, num_padded=num_padded)

    def num_padded(self, state: DecoderState) -> int:
        return state.num_padded

    @property
    def layers(self) -> list[DecoderLayer]:
        """Those that are here, without the ones that predict further words."""
        return [block.layer for block in self.blocks if isinstance(block, LayerBlock)]

    def after_step(self) -> None:
        for module in self.modules():
            if isinstance(module, Router):
                module.balance()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Each encoder, with its way to the shared width, by its modality's name."""
        found = {name: list(self.embedders[name].parameters()) for name in self.names}
        for block in self.blocks:
            if isinstance(block, ReadBlock) and isinstance(block.block, EncoderBlock | FinishBlock):
                found[block.block.name] += block.parameters()
        return found

    # All at once ---------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> DecoderState:
        id_BN, mask_BN = self._written(batch)
        x_BND = self.words(id_BN)
        ahead = x_BND if self.config.num_further and self.training else None
        return DecoderState(self._begin_read(batch), x_BND, mask_BN, id_BN, mask_BN[:, 1:], ahead, ())

    def head(self, state: DecoderState) -> DecoderOutput:
        num_words = state.id_BN.shape[1]
        score_BNV, loss_BN = self._judged(state.x_BTD[:, state.x_BTD.shape[1] - num_words :], state.id_BN, 1)
        further = []
        for place, x_BND in enumerate(state.further):
            # From word i the next one is i + 1; this one is place + 2 after it.
            ahead = place + 2
            _, further_BN = self._judged(x_BND, state.id_BN, ahead)
            further.append((further_BN, state.due_BN[:, ahead - 1 :]))
        return DecoderOutput(score_BNV, loss_BN, state.due_BN, tuple(further))

    def _judged(self, x_BND: Tensor, id_BN: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """Scores of the word that is so far ahead of each; and the losses of those that there are."""
        num_words = x_BND.shape[1]
        target_BN = nn.functional.pad(id_BN[:, ahead:], (0, num_words - id_BN[:, ahead:].shape[1]))
        score_BNV = self._score(self.context.own(x_BND))
        loss_BN = self.context.told(self.token_loss(score_BNV, self.context.own(target_BN)))
        if not self.training:
            score_BNV = self.context.told(score_BNV)[:, :num_words]
        return score_BNV, loss_BN[:, : max(0, id_BN.shape[1] - ahead)]

    def _score(self, x_BND: Tensor) -> Tensor:
        score_BNV: Tensor = self.out(self.norm(x_BND))
        return score_BNV

    def _written(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each record's words; one masked word where no record has any."""
        media = batch.media[self.writes]
        if num_media(media) == 0:
            id_B1 = torch.zeros_like(media.index_B)[:, None]
            return id_B1, torch.zeros_like(id_B1, dtype=torch.bool)
        id_BN = media.values["ids_UT"].index_select(0, media.index_B)
        mask_BN = media.values["mask_UT"].index_select(0, media.index_B) & media.present_B[:, None]
        return id_BN.masked_fill(~mask_BN, 0), mask_BN

    def _begin_read(self, batch: Batch) -> SandwichState:
        read = nothing_read(batch)
        for name in self.names:
            media = batch.media[name]
            if num_media(media):
                tokens = self.embedders[name](media.values)
                read = and_tokens(read, name, tokens.x_UTD, tokens.mask_UT)
                read = read._replace(medium={**read.medium, name: media.index_B})
        return read

    # Token by token ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score_next(
        self, id_BN: Tensor, mask_BN: Tensor | None = None, caches: list[LatentCache] | None = None
    ) -> tuple[Tensor, list[LatentCache]]:
        """Scores (B, N, V) of what follows each of these words, which follow those in the caches; and the new caches.

        Without `mask_BN` every word is one. With caches, `mask_BN` has the cached words too.
        """
        return self._through(self.words(id_BN), mask_BN, caches)

    @torch.no_grad()
    def write(
        self,
        batch: Batch,
        *,
        most: int,
        end: int,
        sampling: SamplingConfig,
        generator: Generator,
    ) -> Tensor:
        """Go on after each record's words: ids (B, N) of what is written, filled up with `end` after it.

        Records may begin with words of different number. Call it in evaluation mode.
        """
        state = self.embed(batch)
        for block in self.blocks:
            if isinstance(block, LayerBlock):
                break
            state = block(state)
        x_BTD, mask_BT = state.x_BTD, state.mask_BT
        last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)  # of what is really there
        score_BTV, caches = self._through(x_BTD, mask_BT, None, num_words=x_BTD.shape[1])
        score_BV = score_BTV[torch.arange(len(last_B)), last_B]
        ended_B = torch.zeros_like(last_B, dtype=torch.bool)
        written: list[Tensor] = []
        for _ in range(most):
            token_B = choose(score_BV, sampling, generator).masked_fill(ended_B, end)
            written.append(token_B)
            ended_B = ended_B | (token_B == end)
            if bool(ended_B.all()):
                break
            mask_BT = nn.functional.pad(mask_BT, (0, 1), value=True)
            score_BTV, caches = self._through(self.words(token_B[:, None]), mask_BT, caches)
            score_BV = score_BTV[:, -1]
        return torch.stack(written, dim=1) if written else last_B.new_zeros(len(last_B), 0)

    def _through(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None,
        caches: list[LatentCache] | None,
        *,
        num_words: int | None = None,
    ) -> tuple[Tensor, list[LatentCache]]:
        """The decoder's layers, which see the cached tokens too."""
        layers = self.layers
        num_cached = caches[0].latent_BSL.shape[1] if caches else 0
        if mask_BS is None:
            mask_BS = torch.ones(len(x_BTD), num_cached + x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device)
        seen = Seen.of(mask_BS, layers[0].frequency_R, layers[0].angle_scale, num_new=x_BTD.shape[1])
        found: list[LatentCache] = []
        for place, layer in enumerate(layers):
            x_BTD, cache = layer(x_BTD, seen, caches[place] if caches else None)
            found.append(cache)
        return self._score(x_BTD if num_words is None else x_BTD[:, -num_words:]), found


class DecoderLayer(nn.Module):
    """Attention, then one feed-forward or many experts; norms first."""

    frequency_R: Tensor

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        stretch = None if config.stretch is None else Stretch(**config.stretch.model_dump())
        self.register_buffer(
            "frequency_R", frequencies(config.turned_width, config.angle_base, stretch), persistent=False
        )
        self.angle_scale, score_scale = _magnitudes(stretch)
        self.attention_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = LatentAttention(
            width=config.width,
            num_heads=config.num_heads,
            query_rank=config.query_rank,
            latent_rank=config.latent_rank,
            plain_width=config.plain_width,
            turned_width=config.turned_width,
            value_width=config.value_width,
            score_scale=score_scale,
            bias=config.bias,
        )
        self.feedforward_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.feedforward = _feedforward(config, layer)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                keep_variance(module)

    def forward(self, x_BTD: Tensor, seen: Seen, cache: LatentCache | None = None) -> tuple[Tensor, LatentCache]:
        found_BTD, cache = self.attention(self.attention_norm(x_BTD), seen, cache)
        x_BTD = x_BTD + found_BTD
        normed_BTD = self.feedforward_norm(x_BTD)
        if isinstance(self.feedforward, MixtureOfExperts):
            return x_BTD + self.feedforward(normed_BTD, seen.real_BT), cache
        return x_BTD + self.feedforward(normed_BTD), cache


class LayerBlock(nn.Module):
    """One layer, on the state."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        self.context = Context()

    def forward(self, state: DecoderState) -> DecoderState:
        # The mask is of all tokens, where this rank holds but a part of them.
        seen = Seen.of(state.mask_BT, self.layer.frequency_R, self.layer.angle_scale, context=self.context)
        return state._replace(x_BTD=self.layer(state.x_BTD, seen)[0])


class JoinPrefix(nn.Module):
    """Puts what was read before the words."""

    def __init__(self, names: tuple[str, ...], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.place = {name: inputs.index(name) for name in names}

    def forward(self, state: DecoderState) -> DecoderState:
        x, mask = [], []
        for name, place in self.place.items():
            if name not in state.read.tokens:
                continue
            present_B = state.read.present_BM[:, place]
            x_BTD = state.read.tokens[name].index_select(0, state.read.medium[name])
            x.append(x_BTD.masked_fill(~present_B[:, None, None], 0.0))
            mask.append(state.read.masks[name].index_select(0, state.read.medium[name]) & present_B[:, None])
        read = SandwichState.begin({}, {}, {}, state.read.present_BM)
        return state._replace(
            read=read, x_BTD=torch.cat([*x, state.x_BTD], dim=1), mask_BT=torch.cat([*mask, state.mask_BT], dim=1)
        )


class FurtherBlock(nn.Module):
    """Predicts one word further than the block before, from that one's vectors and the next word; in training only."""

    def __init__(self, config: DecoderConfig, place: int) -> None:
        super().__init__()
        self.place = place
        self.before_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.word_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.join = keep_variance(nn.Linear(2 * config.width, config.width, bias=False))
        self.layer = DecoderLayer(config, config.num_layers + place)
        self.context = Context()

    def forward(self, state: DecoderState) -> DecoderState:
        if state.word_BND is None:
            return state
        num_words = state.word_BND.shape[1]
        before_BND = state.further[-1] if state.further else state.x_BTD[:, state.x_BTD.shape[1] - num_words :]
        # Also where no word is left: the experts of another rank may wait for this one.
        kept = max(0, num_words - self.place - 1)
        pair = self.word_norm(state.word_BND[:, self.place + 1 :]), self.before_norm(before_BND[:, :kept])
        mask_BN = state.mask_BT[:, state.mask_BT.shape[1] - num_words :][:, :kept]
        mask_BN = nn.functional.pad(mask_BN, (0, self.context.padded(kept) - kept))
        seen = Seen.of(mask_BN, self.layer.frequency_R, self.layer.angle_scale, context=self.context)
        x_BND = self.layer(self.join(self.context.own(torch.cat(pair, dim=-1))), seen)[0]
        x_BND = self.context.whole(x_BND)[:, :kept]
        return state._replace(further=(*state.further, x_BND))


def _feedforward(config: DecoderConfig, layer: int) -> nn.Module:
    experts = config.experts
    if experts is None or not config.has_experts(layer):
        return GatedFeedForward(width=config.width, hidden=config.hidden)
    return MixtureOfExperts(
        width=config.width,
        hidden=experts.hidden,
        num_shared=experts.num_shared,
        experts=Experts(num_experts=experts.num, width=config.width, hidden=experts.hidden),
        router=Router(
            width=config.width,
            num_experts=experts.num,
            num_chosen=experts.num_chosen,
            num_groups=experts.num_groups,
            groups_chosen=experts.groups_chosen,
            normalise=experts.normalise,
            scale=experts.scale,
            balance_speed=experts.balance_speed,
        ),
    )


def _magnitudes(stretch: Stretch | None) -> tuple[float, float]:
    """What turned channels, and all scores, are multiplied by."""
    if stretch is None:
        return 1.0, 1.0
    every = 1.0 if not stretch.magnitude_all else magnitude(stretch.factor, stretch.magnitude_all) ** 2
    if stretch.magnitude and stretch.magnitude_all:
        turned = magnitude(stretch.factor, stretch.magnitude) / magnitude(stretch.factor, stretch.magnitude_all)
        return turned, every
    return magnitude(stretch.factor), every


def written_text(config: DecoderConfig, signature: Signature) -> tuple[str, TextInput]:
    """Which text a decoder so described writes.

    Raises:
        ConfigError: it names none, or what is no text.
    """
    texts: dict[str, Any] = {name: shape for name, shape in signature.inputs.items() if isinstance(shape, TextInput)}
    name = config.writes
    if name is None and len(texts) == 1:
        name = next(iter(texts))
    if name is None or name not in texts:
        there = ", ".join(texts) or "none"
        given = "is not given and there is not just one" if name is None else f"{name!r} is no text"
        raise ConfigError(f"model.writes {given}: the texts here are {there}. Name one of them.")
    return name, texts[name]
