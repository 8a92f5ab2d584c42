"""Where a trained model looks, taken from one forward and one backward.

Here        `look_inside` (maps of every head, rollout, gradient-weighted relevance, who asks whom), Inside, Map;
            `survey`, the same over many records; `unshared`, `catching`.
Elsewhere   a decoder that writes (watch/writing.py); whether a map is true (watch/faithful.py); the page
            (watch/inside.py); attention itself (nn/attention.py).
Promise     the answer that is looked into is the model's own, within rounding; a token that is padding or absent has
            exactly no relevance; relevance is never below 0.

Attention is not asked of the model: every call of torch's fused attention is carried out in its plain form meanwhile,
and what it weighed is kept. So encoders of transformers, the bridge and the completion are all seen, in whatever they
are written. Shapes: B records, U media, H heads, T tokens that ask, S tokens that are asked, M modalities, N tokens
that entered the model, of all modalities one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dougong.model.bridge import BETWEEN, BottleneckBlock, CrossBlock, MergedBlock
from dougong.model.encoders.audio import AudioTail
from dougong.model.encoders.image import ImageTail
from dougong.model.sandwich import (
    BridgeBlock,
    EncoderBlock,
    FinishBlock,
    JoinBlock,
    OwnBlock,
    Sandwich,
    SandwichOutput,
    SandwichState,
)
from dougong.nn.attention import Attention
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.pooling import AttentionPooling

Method = Literal["relevance", "rollout"]
METHODS: Final[tuple[Method, ...]] = ("relevance", "rollout")
ASKED: Final = "asked "


class Map(NamedTuple):
    """One attention of one block."""

    block: int
    """Its number among the model's blocks, from 0."""

    asking: str
    keys: tuple[tuple[str, int], ...]
    """Whose tokens are asked, in order, and how many."""

    weight_BHTS: Tensor
    mask_BT: Tensor
    """Which of the asking tokens are real."""

    mask_BS: Tensor


class Inside(NamedTuple):
    """What one batch shows. A modality that the whole batch lacks is in none of the mappings."""

    output: SandwichOutput
    target_B: Tensor
    """The output that is explained: of classes and labels its place, of a number 0."""

    maps: tuple[Map, ...]
    relevance: dict[str, Tensor]
    """(B, T) of the tokens that entered, each row's sum over all modalities being 1 (or 0, where nothing was looked
    at)."""

    rollout: dict[str, Tensor]
    masks: dict[str, Tensor]
    """(B, T): which of these tokens are real."""

    flow_BMM: Tensor
    """How much of what each modality's tokens asked for in the bridge they asked of each, itself included; a row sums
    to 1, or to 0 where it asked for nothing. What passes through a bottleneck counts for those that had filled it."""

    names: tuple[str, ...]
    """Of the M modalities."""

    def share(self, method: Method = "relevance") -> dict[str, Tensor]:
        """Each modality's part of the answer, (B,), by where the model looked."""
        return {name: found_BT.sum(dim=1) for name, found_BT in getattr(self, method).items()}


def look_inside(network: Sandwich, batch: Batch, target_B: Tensor | None = None) -> Inside:
    """Answer a batch and say where that came from. The network should be in evaluation mode.

    `relevance` is that of Chefer et al. 2021 (arXiv:2103.15679): in each attention the positive part of weight times
    gradient, averaged over heads, is added along the way from what entered to the pooled vectors, and at each encoder's
    end what it mixed is brought to the same weight as what was there before (their equations 8 and 9). We keep all
    modalities' tokens in one space, so that their four rules are one; the pooling, where they have a class token, is
    the last attention; and what a bottleneck passes on is walked through. `rollout` is that of Abnar and Zuidema 2020
    (arXiv:2005.00928), half identity and half attention, weighed at the end by pooling and gate.

    `target_B` says which output of each record is explained; None: the strongest.
    """
    batch = unshared(batch)
    with torch.enable_grad(), catching(network) as caught:
        walk = _Walk(network, batch, caught)
        output = walk.run()
        if target_B is None:
            target_B = output.output_BC.argmax(dim=1)
        score_B = output.output_BC.gather(1, target_B[:, None])[:, 0]
        weights = caught.weights()
        found = torch.autograd.grad(score_B.sum(), weights, allow_unused=True) if weights else ()
    gradients = {id(weight): gradient for weight, gradient in zip(weights, found, strict=True) if gradient is not None}
    with torch.no_grad():
        chains = {method: _Chain(network, walk, method, gradients).run(output) for method in METHODS}
        return Inside(
            output=SandwichOutput(*(_detached(each) for each in output)),
            target_B=target_B,
            maps=tuple(walk.maps(place) for place in range(len(walk.seen))),
            relevance=chains["relevance"],
            rollout=chains["rollout"],
            masks=walk.entered_masks(),
            flow_BMM=_flow(network.names, walk),
            names=network.names,
        )


class Survey(NamedTuple):
    """One attention over many records; means over real tokens that ask."""

    block: int
    asking: str
    entropy: float
    """Of a row, as a share of the most that its real keys allow: 0 looks at one token, 1 at all alike."""

    agreement: float
    """Mean cosine of two heads' rows; 1 where all heads do the same, and where there is one."""

    padding_mass: float
    """Attention that goes to tokens that are not there. Above 0 is a fault of a mask."""

    asked: dict[str, float]
    """Share of the attention by whose tokens they are."""


def survey(network: Sandwich, batches: Iterable[Batch]) -> list[Survey]:
    """How the model's attentions behave over batches."""
    sums: dict[tuple[int, str], dict[str, float]] = {}
    for batch in batches:
        with torch.no_grad(), catching(network) as caught:
            walk = _Walk(network, unshared(batch), caught)
            walk.run()
            for place in range(len(walk.seen)):
                one = walk.maps(place)
                _add(sums.setdefault((one.block, one.asking), {}), _measured(one))
    found = []
    for (block, asking), totals in sorted(sums.items()):
        rows = max(totals["rows"], 1.0)
        asked = {key.removeprefix(ASKED): value / rows for key, value in totals.items() if key.startswith(ASKED)}
        mean = {key: totals[key] / rows for key in ("entropy", "agreement", "padding")}
        found.append(Survey(block, asking, mean["entropy"], mean["agreement"], mean["padding"], asked))
    return found


def unshared(batch: Batch) -> Batch:
    """The same records, each with media of its own: else what one record's answer says of a medium is another's too."""
    media = {}
    for name, one in batch.media.items():
        index_U = one.index_B[one.present_B]
        own_B = torch.zeros_like(one.index_B)
        own_B[one.present_B] = torch.arange(len(index_U), device=own_B.device)
        media[name] = MediaBatch(
            {key: value[index_U] for key, value in one.values.items()},
            own_B,
            one.present_B,
            quality_UQ=None if one.quality_UQ is None else one.quality_UQ[index_U],
        )
    return Batch(media, batch.target)


# Catching ----------------------------------------------------------------------------------------------------------


@dataclass
class Caught:
    """Weights as they are computed; `by` is the module of ours that computes them, None for others'."""

    by: nn.Module | None = None
    attended: list[tuple[nn.Module | None, Tensor]] = field(default_factory=list)
    pooled: dict[int, Tensor] = field(default_factory=dict)

    def weights(self) -> list[Tensor]:
        return [weight for weight in (*(w for _, w in self.attended), *self.pooled.values()) if weight.requires_grad]


class _PlainAttention(TorchFunctionMode):
    """Carries fused attention out in its plain form."""

    def __init__(self, caught: Caught) -> None:
        super().__init__()
        self._caught = caught

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            each = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        score_BHTS = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(score_BHTS.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            score_BHTS = score_BHTS.masked_fill(~attn_mask, torch.finfo(score_BHTS.dtype).min)
        elif attn_mask is not None:
            score_BHTS = score_BHTS + attn_mask
        weight_BHTS = score_BHTS.softmax(dim=-1)
        if not weight_BHTS.requires_grad and torch.is_grad_enabled():
            weight_BHTS.requires_grad_()  # of a frozen layer
        self._caught.attended.append((self._caught.by, weight_BHTS))
        return functional.dropout(weight_BHTS, dropout_p) @ value


@contextmanager
def catching(network: nn.Module) -> Iterator[Caught]:
    """While it lasts, every fused attention is carried out in its plain form, and its weights are kept."""
    caught = Caught()

    def begin(module: nn.Module, _: Any) -> None:
        caught.by = module

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        caught.by = None

    def pooled(module: nn.Module, _: Any, found: Any) -> None:
        caught.pooled[id(module)] = found.weight_BT

    handles = []
    for module in network.modules():
        if isinstance(module, Attention):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        elif isinstance(module, AttentionPooling):
            handles.append(module.register_forward_hook(pooled))
    try:
        with _PlainAttention(caught):
            yield caught
    finally:
        for handle in handles:
            handle.remove()


class _SeenBlock(NamedTuple):
    """One attention of one block, as it was caught."""

    block: int
    asking: str
    keys: tuple[tuple[str, int], ...]
    caught_RHTS: Tensor
    """As it was computed, by which its gradient is known; of media before they are joined to records."""

    mask_RT: Tensor
    mask_RS: Tensor
    joined: bool
    gather: str = ""
    """Of a bottleneck that is being filled: from whom."""

    rows: slice = slice(None)
    """Which of its tokens ask: modalities that are merged were computed as one."""

    @property
    def weight_RHTS(self) -> Tensor:
        return self.caught_RHTS.detach()[:, :, self.rows]


class _Walk:
    """A forward whose states are kept."""

    def __init__(self, network: Sandwich, batch: Batch, caught: Caught) -> None:
        self.network, self.batch, self.caught = network, batch, caught
        self.before: list[SandwichState] = []
        self.seen: list[_SeenBlock] = []
        self.gathers: list[_SeenBlock] = []
        self.last: SandwichState

    def run(self) -> SandwichOutput:
        state = self.network.embed(self.batch)
        joined = False
        for number, block in enumerate(self.network.blocks):
            self.before.append(state)
            first = len(self.caught.attended)
            state = block(state)
            joined = joined or isinstance(block, JoinBlock)
            self._note(number, block, self.caught.attended[first:], joined=joined)
        self.last = state
        return self.network.head(state)

    def entered_masks(self) -> dict[str, Tensor]:
        """Which of the tokens that entered are real, by record; a picture's class token is left out."""
        state = self.before[0] if self.before else self.last
        return {
            name: by_record(mask_UT[:, self.num_classes(name) :], state, name, self.network.names)
            for name, mask_UT in state.masks.items()
        }

    def num_classes(self, name: str) -> int:
        """Tokens before the first that has a place: a vision transformer's class token."""
        return int(name in self.network.grids)

    def maps(self, place: int) -> Map:
        one = self.seen[place]
        if one.joined:
            return Map(one.block, one.asking, one.keys, one.weight_RHTS, one.mask_RT, one.mask_RS)
        state = self.before[one.block]
        of_records = (
            by_record(each, state, one.asking, self.network.names)
            for each in (one.weight_RHTS, one.mask_RT, one.mask_RS)
        )
        return Map(one.block, one.asking, one.keys, *of_records)

    def _note(
        self, number: int, block: nn.Module, attended: Sequence[tuple[nn.Module | None, Tensor]], *, joined: bool
    ) -> None:
        state = self.before[number]
        if isinstance(block, EncoderBlock) and block.name in state.tokens:
            mask = state.masks[block.name]
            for _, weight in attended:
                own = ((block.name, mask.shape[1]),)
                self.seen.append(_SeenBlock(number, block.name, own, weight, mask, mask, joined))
        if not isinstance(block, BridgeBlock):
            return
        by = {id(module): weight for module, weight in attended}
        here = [name for name in self.network.names if name in state.tokens]
        inner: Any = block.block  # a module's own children are of no type
        if isinstance(inner, MergedBlock) and here:
            counts = [state.tokens[name].shape[1] for name in here]
            mask_BS = torch.cat([state.masks[name] for name in here], dim=1)
            keys: tuple[tuple[str, int], ...] = tuple(zip(here, counts, strict=True))
            weight, end = by[id(inner.attention)], 0
            for name, count in keys:
                rows = slice(end, end + count)
                end += count
                mask_BT = state.masks[name]
                self.seen.append(_SeenBlock(number, name, keys, weight, mask_BT, mask_BS, joined=True, rows=rows))
        for name in here if isinstance(inner, CrossBlock | BottleneckBlock) else ():
            attention = inner.attention[name] if isinstance(inner, BottleneckBlock) or len(inner.names) > 1 else None
            if attention is None or id(attention) not in by:
                continue
            weight = by[id(attention)]
            if isinstance(inner, CrossBlock):
                others = [other for other in here if other != name]
                keys = tuple((other, state.tokens[other].shape[1]) for other in others)
                mask_BS = torch.cat([state.masks[other] for other in others], dim=1)
            else:
                num = inner.bottleneck_ND.shape[0]
                keys = ((name, state.tokens[name].shape[1]), (BETWEEN, num))
                ones = state.masks[name].new_ones(len(state.masks[name]), num)
                mask_BS = torch.cat([state.masks[name], ones], dim=1)
                filled = by[id(inner.gather[name])]
                mask = state.masks[name]
                whose = ((name, mask.shape[1]),)
                self.gathers.append(_SeenBlock(number, BETWEEN, whose, filled, ones, mask, joined=True, gather=name))
            self.seen.append(_SeenBlock(number, name, keys, weight, state.masks[name], mask_BS, joined=True))


def by_record(x_U: Tensor, state: SandwichState, name: str, names: tuple[str, ...]) -> Tensor:
    """Rows of media as rows of records; zeros where a record has none."""
    present_B = state.present_BM[:, names.index(name)]
    x_B = x_U.index_select(0, state.medium[name])
    return x_B * present_B.view(-1, *[1] * (x_B.ndim - 1)).to(x_B.dtype)


# Relevance -----------------------------------------------------------------------------------------------------------


class _Chain:
    """How much each token holds of each that entered, walked through the blocks."""

    def __init__(self, network: Sandwich, walk: _Walk, method: Method, gradients: Mapping[int, Tensor]) -> None:
        self.network, self.walk, self.method, self.gradients = network, walk, method, gradients
        self.keep, self.add = (1.0, 1.0) if method == "relevance" else (0.5, 0.5)
        first = walk.before[0] if walk.before else walk.last
        self.spans: dict[str, range] = {}
        end = 0
        for name, x_UTD in first.tokens.items():
            self.spans[name] = range(end, end + x_UTD.shape[1])
            end += x_UTD.shape[1]
        self.num_entered = end
        self.held = {
            name: torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1) * first.masks[name][:, :, None]
            for name, x in first.tokens.items()
        }
        self.joined = False

    def run(self, output: SandwichOutput) -> dict[str, Tensor]:
        total_BN = output.output_BC.new_zeros(output.output_BC.shape[0], self.num_entered)
        for number, block in enumerate(self.network.blocks):
            state = self.walk.before[number]
            if isinstance(block, OwnBlock) and block.name in state.tokens and self._own_counts():
                total_BN = total_BN + self._pooled(block.pool, state, block.name, 1.0 / len(self.network.names))
            self._step(number, block, state)
        last = self.walk.last
        if not self.network.only_votes:
            for place, name in enumerate(self.network.names):
                if name in last.tokens:
                    weight: float | Tensor = 1.0 / len(self.network.names)
                    if output.weight_BM is not None:
                        weight = output.weight_BM[:, place, None]
                    total_BN = total_BN + self._pooled(self.network.pools[name], last, name, weight)
        sum_B1 = total_BN.sum(dim=1, keepdim=True)
        total_BN = total_BN / sum_B1.clamp(min=torch.finfo(total_BN.dtype).tiny)
        found = {}
        for name, span in self.spans.items():
            found[name] = total_BN[:, span.start + self.walk.num_classes(name) : span.stop]
        # A class token stands for no place: what it holds of itself is left out, and the rest shared out anew.
        rest_B1 = torch.cat(list(found.values()), dim=1).sum(dim=1, keepdim=True) if found else sum_B1
        return {name: own_BT / rest_B1.clamp(min=1e-30) for name, own_BT in found.items()}

    def _own_counts(self) -> bool:
        """Whether what modalities decide by themselves is part of the answer."""
        return self.network.decide != "fused"

    def _weight(self, seen: _SeenBlock) -> Tensor:
        """Heads together."""
        return positive(seen.caught_RHTS, self.gradients, self.method)[:, :, seen.rows].mean(dim=1)

    def _pooled(self, pool: nn.Module, state: SandwichState, name: str, counts: float | Tensor) -> Tensor:
        how_RT = positive(self.walk.caught.pooled[id(pool)], self.gradients, self.method)
        own_RN = (how_RT[:, None] @ self.held[name])[:, 0]
        if not self.joined:
            own_RN = self._entered(own_RN, state, name)
        return own_RN * counts if self.method == "rollout" else own_RN

    def _entered(self, own_UT: Tensor, state: SandwichState, name: str) -> Tensor:
        """From this modality's media and tokens to records, and the tokens of all modalities."""
        own_B = by_record(own_UT, state, name, self.network.names)
        span = self.spans[name]
        return functional.pad(own_B, (span.start, self.num_entered - span.stop))

    def _step(self, number: int, block: nn.Module, state: SandwichState) -> None:
        if isinstance(block, FinishBlock) and block.name in self.held:
            held_UTN, mask_UT = self.held[block.name], state.masks[block.name]
            if self.method == "relevance":
                held_UTN = evened(held_UTN, mask_UT)
            self.held[block.name] = finished(block.finisher, held_UTN, mask_UT)
        elif isinstance(block, JoinBlock):
            self.held = {name: self._entered(held, state, name) for name, held in self.held.items()}
            self.joined = True
        elif isinstance(block, BridgeBlock | EncoderBlock):
            self._attend(number, block)
        following = self.walk.before[number + 1] if number + 1 < len(self.walk.before) else self.walk.last
        self._sync(following)

    def _attend(self, number: int, block: nn.Module) -> None:
        before = dict(self.held)
        if isinstance(block, BridgeBlock) and isinstance(block.block, BottleneckBlock):
            filled = [each for each in self.walk.gathers if each.block == number]
            weights = [self._weight(each) * each.mask_RS[:, None] for each in filled]
            held = [weight @ before[each.gather] for weight, each in zip(weights, filled, strict=True)]
            before[BETWEEN] = torch.stack(held).mean(dim=0)
        for each in self.walk.seen:
            if each.block != number:
                continue
            weight_RTS = self._weight(each)
            weight_RTS = weight_RTS * each.mask_RT[:, :, None] * each.mask_RS[:, None, :]
            start, added = 0, torch.zeros_like(before[each.asking])
            for name, count in each.keys:
                added = added + weight_RTS[:, :, start : start + count] @ before[name]
                start += count
            self.held[each.asking] = self.keep * before[each.asking] + self.add * added

    def _sync(self, state: SandwichState) -> None:
        """What was completed holds nothing of what entered; what left is gone."""
        if not self.joined:
            return
        for name, x_BTD in state.tokens.items():
            if name not in self.held:
                self.held[name] = x_BTD.new_zeros(*x_BTD.shape[:2], self.num_entered)
            more = x_BTD.shape[1] - self.held[name].shape[1]
            if more > 0:
                self.held[name] = functional.pad(self.held[name], (0, 0, 0, more))
        self.held = {name: held for name, held in self.held.items() if name in state.tokens}


def positive(weight: Tensor, gradients: Mapping[int, Tensor], method: Method) -> Tensor:
    """What counts of an attention that was caught: rollout takes it as it is, relevance the positive part of it times
    its gradient, which is found by its identity."""
    if method == "rollout":
        return weight.detach()
    gradient = gradients.get(id(weight))
    return torch.zeros_like(weight) if gradient is None else (weight.detach() * gradient).clamp(min=0)


def evened(held_UTN: Tensor, mask_UT: Tensor) -> Tensor:
    """What an encoder mixed into each token, made to count as much as what the token was (equations 8 and 9 of Chefer
    et al.): gradients that came a long way are small, and without this the map were that of the identity."""
    own_UTN = torch.eye(held_UTN.shape[1], device=held_UTN.device) * mask_UT[:, :, None]
    mixed_UTN = (held_UTN - own_UTN).clamp(min=0)
    sum_UT1 = mixed_UTN.sum(dim=2, keepdim=True)
    return own_UTN + mixed_UTN / sum_UT1.clamp(min=torch.finfo(sum_UT1.dtype).tiny)


def finished(finisher: nn.Module, held_UTN: Tensor, mask_UT: Tensor) -> Tensor:
    """What an encoder's end does to tokens: a class token goes, neighbours are averaged."""
    if isinstance(finisher, ImageTail):
        held_UTN = held_UTN[:, 1:]
        if finisher.pool > 1:
            (rows, columns), pool = finisher.grid, finisher.pool
            held = held_UTN.view(len(held_UTN), rows, pool, columns, pool, -1)
            held_UTN = held.mean(dim=(2, 4)).flatten(1, 2)
    elif isinstance(finisher, AudioTail) and finisher.pool > 1:
        rest = -held_UTN.shape[1] % finisher.pool
        real_UT = functional.pad(mask_UT, (0, rest))
        held_UTN = functional.pad(held_UTN * mask_UT[..., None], (0, 0, 0, rest))
        count_UT = real_UT.view(len(real_UT), -1, finisher.pool).sum(dim=2)
        summed = held_UTN.view(len(held_UTN), -1, finisher.pool, held_UTN.shape[2]).sum(dim=2)
        held_UTN = summed / count_UT.clamp(min=1)[..., None]
    return held_UTN


# Over modalities and records -----------------------------------------------------------------------------------------


def _flow(names: tuple[str, ...], walk: _Walk) -> Tensor:
    num_records = walk.last.present_BM.shape[0]
    total_BMM = torch.zeros(num_records, len(names), len(names))
    for each in walk.seen:
        if not each.joined or not isinstance(walk.network.blocks[each.block], BridgeBlock):
            continue
        row_BT = each.weight_RHTS.mean(dim=1) * each.mask_RT[:, :, None] * each.mask_RS[:, None]
        start, place = 0, names.index(each.asking)
        for name, count in each.keys:
            mass_B = row_BT[:, :, start : start + count].sum(dim=(1, 2)).cpu()
            start += count
            if name != BETWEEN:
                total_BMM[:, place, names.index(name)] += mass_B
                continue
            filled = [one.gather for one in walk.gathers if one.block == each.block]
            for other in filled:
                total_BMM[:, place, names.index(other)] += mass_B / len(filled)
    return total_BMM / total_BMM.sum(dim=2, keepdim=True).clamp(min=1e-30)


def _measured(one: Map) -> dict[str, float]:
    """Sums over the real rows of one attention."""
    # A record in which there is nobody to ask has no row: its softmax over nothing is discarded by the model.
    asking_BT = one.mask_BT & one.mask_BS.any(dim=1, keepdim=True)
    weight_BHTS = one.weight_BHTS.double()
    num_heads = weight_BHTS.shape[1]
    real_BS = one.mask_BS[:, None, None, :]
    on_real = weight_BHTS * real_BS
    most_B = one.mask_BS.sum(dim=1).clamp(min=2).double().log()
    entropy_BHT = -(on_real * on_real.clamp(min=1e-30).log()).sum(dim=-1) / most_B[:, None, None]
    unit_BHTS = functional.normalize(on_real, dim=-1)
    cosine_BT = unit_BHTS.sum(dim=1).square().sum(dim=-1)
    agreement_BT = (
        (cosine_BT - num_heads) / (num_heads * (num_heads - 1)) if num_heads > 1 else torch.ones_like(cosine_BT)
    )
    found = {
        "rows": float(asking_BT.sum()),
        "entropy": float((entropy_BHT.mean(dim=1) * asking_BT).sum()),
        "agreement": float((agreement_BT * asking_BT).sum()),
        "padding": float(((weight_BHTS * ~real_BS).sum(dim=-1).mean(dim=1) * asking_BT).sum()),
    }
    start = 0
    for name, count in one.keys:
        mass_BT = on_real[..., start : start + count].sum(dim=-1).mean(dim=1)
        found[ASKED + name] = found.get(ASKED + name, 0.0) + float((mass_BT * asking_BT).sum())
        start += count
    return found


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + (value if math.isfinite(value) else 0.0)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    return value
