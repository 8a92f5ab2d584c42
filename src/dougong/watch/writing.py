"""Where a decoder looks while it writes a word.

Here        `look_at_word`, Written: maps of every head and layer, gradient-weighted relevance and rollout of one word
            of each record, over the words before it and what was read of other modalities.
Elsewhere   models that decide (watch/attention.py, whose way of catching attention this uses); the decoder
            (model/decoder.py); whether a map is true (watch/faithful.py).
Promise     the scores that are explained are the decoder's own, within rounding; a word that comes later, padding, and
            what a record lacks have exactly no relevance; relevance is never below 0.

What an encoder made of a picture or a recording are tokens before the words, and stand for themselves here: their way
back through the encoder is not walked. Shapes: B records, H heads, N words, T tokens (those that were read, then the
words).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.decoder import Decoder, DecoderOutput, JoinPrefix, LayerBlock
from dougong.nn.batch import Batch
from dougong.watch.attention import catching, unshared


class Written(NamedTuple):
    """How one word of each record came about."""

    output: DecoderOutput
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
    """Whose tokens these are, by modality; the written one last."""

    mask_BT: Tensor

    def of(self, name: str) -> Tensor:
        """Relevance of one modality's tokens, (B, its tokens)."""
        span = self.spans[name]
        return self.relevance_BT[:, span.start : span.stop]


def look_at_word(
    network: Decoder, batch: Batch, place_B: Tensor | None = None, word_B: Tensor | None = None
) -> Written:
    """Score what follows each record's word at `place_B` (None: its last), and say where that came from.

    `word_B` is the word whose score is explained; None: the likeliest. `relevance` is that of Chefer et al. 2021
    (arXiv:2103.15679) for self-attention: the positive part of weight times gradient, averaged over heads, is added
    layer by layer. `rollout` is that of Abnar and Zuidema 2020 (arXiv:2005.00928), half identity and half attention.
    The network should be in evaluation mode, and whole: not cut for several ranks.

    Raises:
        ConfigError: a place is before the first word of its record, or after its last.
    """
    batch = unshared(batch)
    layers: list[Tensor] = []
    spans: dict[str, range] = {}
    with torch.enable_grad(), catching(network) as caught:
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
        output = network.head(state)
        num_words = state.id_BN.shape[1]
        start = state.x_BTD.shape[1] - num_words
        spans[network.writes] = range(start, start + num_words)
        lengths_B = state.mask_BT[:, start:].sum(dim=1)
        place_B = (lengths_B - 1).clamp(min=0) if place_B is None else place_B
        if bool(((place_B < 0) | (place_B >= lengths_B.clamp(min=1))).any()):
            wrong = int(((place_B < 0) | (place_B >= lengths_B.clamp(min=1))).nonzero()[0, 0])
            length, asked = int(lengths_B[wrong]), int(place_B[wrong])
            raise ConfigError(
                f"record {wrong} has {length} words, and the one at {asked} was asked for: places count from 0. "
                "Use one below the number of its words."
            )
        every_B = torch.arange(len(place_B), device=place_B.device)
        score_BV = output.score_BNV[every_B, place_B]
        word_B = score_BV.argmax(dim=1) if word_B is None else word_B
        found = torch.autograd.grad(score_BV[every_B, word_B].sum(), layers, allow_unused=True)
    with torch.no_grad():
        weights = [weight.detach() for weight in layers]
        held = torch.eye(state.mask_BT.shape[1], device=place_B.device).expand(len(place_B), -1, -1)
        relevance_BTT = rollout_BTT = held
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                relevance_BTT = relevance_BTT + (weight * gradient).clamp(min=0).mean(dim=1) @ relevance_BTT
            rollout_BTT = 0.5 * rollout_BTT + 0.5 * weight.mean(dim=1) @ rollout_BTT
        rows = [each[every_B, start + place_B] * state.mask_BT for each in (relevance_BTT, rollout_BTT)]
        relevance_BT, rollout_BT = (row / row.sum(dim=1, keepdim=True).clamp(min=1e-30) for row in rows)
    return Written(
        output=DecoderOutput(output.score_BNV.detach(), output.loss_BN.detach(), output.due_BN, ()),
        place_B=place_B,
        word_B=word_B,
        weight_BHTT=tuple(weights),
        relevance_BT=relevance_BT,
        rollout_BT=rollout_BT,
        spans=spans,
        mask_BT=state.mask_BT,
    )
