"""Where a model that writes looks while it writes a word.

Here        `look_at_word`, Written: maps of every head and layer, gradient-weighted relevance and rollout of one word
            of each record, over the words before it and what was read of other modalities.
Elsewhere   models that decide (watch/attention.py, whose way of catching attention this uses); models that write
            (model/decoder.py, model/writer.py, of which captions are looked into); whether a map is true
            (watch/faithful.py).
Promise     the scores that are explained are the model's own, within rounding; a word that comes later, padding, and
            what a record lacks have exactly no relevance; relevance is never below 0.

What an encoder made of a picture or a recording are tokens before the words, and stand for themselves here: their way
back through the encoder is not walked. Shapes: B records, H heads, N words, T tokens (those that were read, then the
words).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.decoder import Decoder, JoinPrefix, LayerBlock
from dougong.model.writer import WriteBlock, Writer
from dougong.nn.batch import Batch
from dougong.watch.attention import Caught, catching, unshared

COMPLETED: Final = "(completed)"
"""Among spans: tokens that a model made up of what is given, before it writes."""


class Written(NamedTuple):
    """How one word of each record came about."""

    score_BNV: Tensor
    """Of what comes after each word."""

    place_B: Tensor
    """The word after which was asked, counted from 0 among the words."""

    word_B: Tensor
    """The word that is explained, as its number in the vocabulary."""

    weight_BHTT: tuple[Tensor, ...]
    """Of each layer: how much each token looked at each. A row sums to 1."""

    relevance_BT: Tensor
    """A row sums to 1."""

    rollout_BT: Tensor
    spans: dict[str, range]
    """Whose tokens these are, by modality; the written one last, and before it those that were completed."""

    mask_BT: Tensor

    def of(self, name: str) -> Tensor:
        """Relevance of one modality's tokens, (B, its tokens)."""
        span = self.spans[name]
        return self.relevance_BT[:, span.start : span.stop]


def look_at_word(
    network: Decoder | Writer, batch: Batch, place_B: Tensor | None = None, word_B: Tensor | None = None
) -> Written:
    """Score what follows each record's word at `place_B` (None: its last), and say where that came from.

    `word_B` is the word whose score is explained; None: the likeliest. `relevance` is that of Chefer et al. 2021
    (arXiv:2103.15679) for self-attention: the positive part of weight times gradient, averaged over heads, is added
    layer by layer. `rollout` is that of Abnar and Zuidema 2020 (arXiv:2005.00928), half identity and half attention.
    The network should be in evaluation mode, and whole: not cut for several ranks.

    Raises:
        ConfigError: a place is before the first word of its record, or after its last; or the model writes no words.
    """
    batch = unshared(batch)
    with torch.enable_grad(), catching(network) as caught:
        asked = (
            _asked_of_decoder(network, batch, caught)
            if isinstance(network, Decoder)
            else _asked_of_writer(network, batch, caught)
        )
        num_words = asked.score_BNV.shape[1]
        start = asked.mask_BT.shape[1] - num_words
        lengths_B = asked.mask_BT[:, start:].sum(dim=1)
        place_B = (lengths_B - 1).clamp(min=0) if place_B is None else place_B
        if bool(((place_B < 0) | (place_B >= lengths_B.clamp(min=1))).any()):
            wrong = int(((place_B < 0) | (place_B >= lengths_B.clamp(min=1))).nonzero()[0, 0])
            length, at = int(lengths_B[wrong]), int(place_B[wrong])
            raise ConfigError(
                f"record {wrong} has {length} words, and the one at {at} was asked for: places count from 0. "
                "Use one below the number of its words."
            )
        every_B = torch.arange(len(place_B), device=place_B.device)
        score_BV = asked.score_BNV[every_B, place_B]
        word_B = score_BV.argmax(dim=1) if word_B is None else word_B
        found = torch.autograd.grad(score_BV[every_B, word_B].sum(), asked.layers, allow_unused=True)
    with torch.no_grad():
        weights = [weight.detach() for weight in asked.layers]
        held = torch.eye(asked.mask_BT.shape[1], device=place_B.device).expand(len(place_B), -1, -1)
        relevance_BTT = rollout_BTT = held
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                relevance_BTT = relevance_BTT + (weight * gradient).clamp(min=0).mean(dim=1) @ relevance_BTT
            rollout_BTT = 0.5 * rollout_BTT + 0.5 * weight.mean(dim=1) @ rollout_BTT
        counts_T = torch.zeros(asked.mask_BT.shape[1], dtype=torch.bool, device=place_B.device)
        for span in asked.spans.values():
            counts_T[span.start : span.stop] = True
        rows = [each[every_B, start + place_B] * (asked.mask_BT & counts_T) for each in (relevance_BTT, rollout_BTT)]
        relevance_BT, rollout_BT = (row / row.sum(dim=1, keepdim=True).clamp(min=1e-30) for row in rows)
    return Written(
        score_BNV=asked.score_BNV.detach(),
        place_B=place_B,
        word_B=word_B,
        weight_BHTT=tuple(weights),
        relevance_BT=relevance_BT,
        rollout_BT=rollout_BT,
        spans=asked.spans,
        mask_BT=asked.mask_BT,
    )


class _Asked(NamedTuple):
    """A forward whose attention was kept."""

    layers: list[Tensor]
    spans: dict[str, range]
    score_BNV: Tensor
    mask_BT: Tensor


def _asked_of_decoder(network: Decoder, batch: Batch, caught: Caught) -> _Asked:
    layers: list[Tensor] = []
    spans: dict[str, range] = {}
    state = network.embed(batch)
    for block in network.blocks:
        if isinstance(block, JoinPrefix):
            counts = {name: state.read.tokens[name].shape[1] for name in block.place if name in state.read.tokens}
            for name, count in counts.items():
                start = max((span.stop for span in spans.values()), default=0)
                spans[name] = range(start, start + count)
        first = len(caught.attended)
        state = block(state)
        if isinstance(block, LayerBlock):
            layers += [weight for _, weight in caught.attended[first:]]
    num_words = state.id_BN.shape[1]
    start = state.x_BTD.shape[1] - num_words
    spans[network.writes] = range(start, start + num_words)
    return _Asked(layers, spans, network.head(state).score_BNV, state.mask_BT)


def _asked_of_writer(network: Writer, batch: Batch, caught: Caught) -> _Asked:
    """Of a caption. The mark before what is given says whether anything is, and has no part in the maps."""
    if "caption" not in network.config.directions:
        raise ConfigError("this model has learnt to draw and not to caption: it writes no words to look into.")
    layers: list[Tensor] = []
    state = network.embed(batch)
    state = state._replace(streams={"caption": state.streams["caption"]})
    for block in network.blocks:
        first = len(caught.attended)
        state = block(state)
        if isinstance(block, WriteBlock):
            layers += [weight for _, weight in caught.attended[first:]]
    stream = state.streams["caption"]
    start = stream.x_RTD.shape[1] - stream.target_RN.shape[1]
    made = 0 if stream.completed is None else stream.completed.made_RKD.shape[1]
    spans = {network.picture: range(1, start - made)} if start - made > 1 else {}
    if made:
        spans[COMPLETED] = range(start - made, start)
    spans[network.words] = range(start, stream.x_RTD.shape[1])
    return _Asked(layers, spans, network.head(state).written["caption"].score_RNV, stream.mask_RT)
