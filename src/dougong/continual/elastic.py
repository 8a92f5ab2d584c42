"""A frozen model and what tasks add to it, in one forward whose records may be of different tasks.

Here        Elastic (a BlockStack), ElasticOutput.
Elsewhere   what a task adds (continual/adapters.py, prompt.py, extra.py); training it (engine/trainer.py, called by
            continual/learn.py); asking it records (continual/taught.py).
Promise     the base is never written, and asked by itself it answers bit for bit as before, whatever has been added;
            a record's answer depends on its own task alone, so that a batch of many tasks answers as batches of one
            (within rounding); training sees and saves the numbers of the task that is learnt, and no others.

The base lies outside of this module's own parameters on purpose: what an optimizer steps, and what a checkpoint holds,
are a task's few numbers.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.continual.adapters import TaskParts, layers_of
from dougong.model.sandwich import BridgeBlock, Sandwich, SandwichOutput, SandwichState
from dougong.nn.batch import Batch, MediaBatch, only_media
from dougong.nn.block_stack import BlockStack
from dougong.nn.modules_by_name import ModulesByName

Key = str | None
"""Of what a task adds; None is the base as it is."""


class ElasticOutput(NamedTuple):
    """Shapes: B records, C outputs: of the one task that was asked, else as many as the widest of them has."""

    output_BC: Tensor
    """Beyond a task's own outputs stands the lowest finite number."""

    base: SandwichOutput
    """What the base's own parts said; `output_BC` in it is of use for records of the base alone."""


@dataclass
class _Route:
    """Which task each row of a forward is of."""

    keys: tuple[Key, ...]
    """Those that were asked, each once."""

    place_B: Tensor
    """Of each record, which of the keys."""

    place_U: dict[str, Tensor]
    """Of each distinct medium, by modality. A medium that two tasks are asked of stands twice."""

    media: Mapping[str, MediaBatch]
    hidden_BH: Tensor | None = None
    added_BD: Tensor | None = None
    told: dict[str, int] = field(default_factory=dict)
    """How many tokens were put behind each modality's own; the ones that a task alone made are there besides."""

    lent: tuple[str, ...] = ()
    """Modalities that the batch lacks, and whose place prompts took."""

    @property
    def one(self) -> bool:
        return len(self.keys) == 1


class Elastic(BlockStack[SandwichState, ElasticOutput]):
    """Shapes: U distinct media, B records, T tokens, D channels, P prompt tokens, S tasks, R rank."""

    def __init__(
        self,
        base: Sandwich,
        parts: Mapping[str, TaskParts],
        *,
        active: Key = None,
        carriers: Mapping[str, str | None] | None = None,
    ) -> None:
        """`active` is the key that records are of where nothing else is said. `carriers` has, by key, the modality
        whose place prompts take; the others ask it as they ask each other."""
        super().__init__()
        self._base = (base.eval().requires_grad_(False),)  # in a tuple: no child, so no parameter of this module
        self.parts_by_key = ModulesByName(dict(parts))
        self.keys = tuple(parts)
        self.active = active
        self.carriers = dict(carriers or {})
        bridge = [place for place, block in enumerate(base.blocks) if isinstance(block, BridgeBlock)]
        self._bridged = bool(bridge)
        blocks: list[nn.Module] = []
        for place, block in enumerate(base.blocks):
            if bridge and place == bridge[0]:
                blocks.append(_TellBlock(self))
            blocks.append(_Lent(block))
            if bridge and place == bridge[-1]:
                blocks.append(_ForgetBlock(self))
        self.blocks = nn.ModuleList(blocks)
        self._route: contextvars.ContextVar[_Route | None] = contextvars.ContextVar("route", default=None)
        self._asked: contextvars.ContextVar[Sequence[Key] | None] = contextvars.ContextVar("asked", default=None)
        self._stacks: dict[tuple[str, tuple[Key, ...]], tuple[Tensor, Tensor] | None] = {}
        self._hooks = self._attach(base)

    @property
    def base(self) -> Sandwich:
        return self._base[0]

    def detach(self) -> None:
        """Take every trace off the base; this module is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()

    def part(self, key: str) -> TaskParts:
        found = self.parts_by_key[key]
        assert isinstance(found, TaskParts)
        return found

    def answer(self, batch: Batch, keys: Sequence[Key]) -> ElasticOutput:
        """One forward of records each of its own task, one key for each."""
        token = self._asked.set(keys)
        try:
            output: ElasticOutput = self(batch)
            return output
        finally:
            self._asked.reset(token)

    def forward(self, batch: Batch) -> ElasticOutput:
        batch, route = self._routed(batch)
        token = self._route.set(route)
        try:
            return super().forward(batch)
        finally:
            self._route.reset(token)

    def embed(self, batch: Batch) -> SandwichState:
        return self.base.embed(batch)

    def head(self, state: SandwichState) -> ElasticOutput:
        route = self._current()
        if not self._bridged:  # nobody asked there
            for place, key in enumerate(route.keys):
                if key is not None:
                    self._extras(route, self.part(key), (route.place_B == place).nonzero()[:, 0])
        said = self.base.head(state)
        hidden_BH = route.hidden_BH
        if self.base.only_votes:
            hidden_BH = said.fused_BD if route.added_BD is None else said.fused_BD + route.added_BD
        assert hidden_BH is not None
        if route.one:
            (key,) = route.keys
            return ElasticOutput(said.output_BC if key is None else self.part(key).outputs(hidden_BH), said)
        rows = [(route.place_B == place).nonzero()[:, 0] for place in range(len(route.keys))]
        answers = [
            said.output_BC.index_select(0, row_R)
            if key is None
            else self.part(key).outputs(hidden_BH.index_select(0, row_R))
            for key, row_R in zip(route.keys, rows, strict=True)
        ]
        widest = max(answer_RC.shape[1] for answer_RC in answers)
        floor = torch.finfo(hidden_BH.dtype).min
        output_BC = hidden_BH.new_full((len(hidden_BH), widest), floor)
        for row_R, answer_RC in zip(rows, answers, strict=True):
            padded_RC = functional.pad(answer_RC, (0, widest - answer_RC.shape[1]), value=floor)
            output_BC = output_BC.index_copy(0, row_R, padded_RC.to(output_BC.dtype))
        return ElasticOutput(output_BC, said)

    def train(self, mode: bool = True) -> Elastic:
        """The base stays as it is in use: what is frozen draws no dropout."""
        super().train(mode)
        self.base.eval()
        self._stacks.clear()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Elastic:
        self.base._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch ships it without types
        self._stacks.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # as above
        return self

    # Which row is of which task ------------------------------------------------------------------------------

    def _routed(self, batch: Batch) -> tuple[Batch, _Route]:
        asked = self._asked.get()
        count = batch.num_records
        given = [self.active] * count if asked is None else list(asked)
        assert len(given) == count, f"{len(given)} keys for {count} records"
        keys = tuple(sorted(set(given), key=lambda key: key or "")) or (self.active,)
        like = next(iter(batch.media.values())).index_B
        place = {key: number for number, key in enumerate(keys)}
        place_B = torch.tensor([place[key] for key in given], dtype=torch.int64, device=like.device)
        media: dict[str, MediaBatch] = {}
        place_U: dict[str, Tensor] = {}
        for name in self.base.names:
            one = batch.media.get(name)
            if one is None:  # no column of this task's table
                one = MediaBatch({"none": torch.zeros(0, device=like.device)}, torch.zeros_like(like), like < 0)
            if len(keys) > 1:
                one, place_U[name] = _by_task(one, place_B)
            media[name] = one
        return Batch(media, batch.target), _Route(keys, place_B, place_U, batch.media)

    def _current(self) -> _Route:
        route = self._route.get()
        assert route is not None, "an Elastic is asked as a whole, by calling it"
        return route

    # Low-rank changes ----------------------------------------------------------------------------------------

    def _attach(self, base: Sandwich) -> list[Any]:
        hooks: list[Any] = []
        for name, layer in layers_of(base, base.names).items():

            def change(
                _layer: nn.Module, given: tuple[Tensor, ...], said: Tensor, name: str = name, of: str | None = layer[1]
            ) -> Tensor | None:
                route = self._route.get()
                return None if route is None else self._changed(name, of, route, given[0], said)

            hooks.append(layer.linear.register_forward_hook(change))
        if not base.only_votes:
            hooks.append(base.decision.register_forward_pre_hook(self._add_extras))
            hooks.append(base.decision.out.register_forward_pre_hook(self._keep_hidden))
        return hooks

    def _changed(self, name: str, of: str | None, route: _Route, x: Tensor, y: Tensor) -> Tensor | None:
        """A layer's answer with each row's own change; None where no row has one."""
        if route.one and torch.is_grad_enabled():  # learning: one product is faster forwards, and more so backwards
            (key,) = route.keys
            found = None if key is None else self.part(key).change(name)
            if found is None:
                return None
            down_RI, up_OR = found
            return y + functional.linear(functional.linear(x, down_RI), up_OR)
        stacked = self._stacked(name, route.keys)
        if stacked is None:
            return None
        x_NTI = x[:, None] if x.dim() == 2 else x.flatten(1, -2)
        # A product for each row, also where all are of one task: of one shape, it rounds alike whoever else is here.
        if route.one:
            down_NIR, up_NRO = (each.expand(len(x), -1, -1) for each in stacked)
        else:
            place_N = route.place_B if of is None else route.place_U[of]
            assert len(place_N) == len(x), f"{name} has {len(x)} rows, and {len(place_N)} are known"
            down_NIR, up_NRO = (each.index_select(0, place_N) for each in stacked)
        return y + torch.bmm(torch.bmm(x_NTI, down_NIR), up_NRO).view(y.shape)

    def _stacked(self, name: str, keys: tuple[Key, ...]) -> tuple[Tensor, Tensor] | None:
        """All tasks' changes of a layer, as one tensor each way; zeros where a task leaves it as it is."""
        # One task's alone are few, and whoever teaches it asks in between: nothing old may stay.
        keep = len(keys) > 1 and not torch.is_grad_enabled()
        if keep and (name, keys) in self._stacks:
            return self._stacks[name, keys]
        found = [None if key is None else self.part(key).change(name) for key in keys]
        given = [each for each in found if each is not None]
        stacked = None
        if given:
            rank = max(len(down_RI) for down_RI, _ in given)
            zero = torch.zeros_like(given[0][0][:0]), torch.zeros_like(given[0][1][:, :0])
            pairs = [zero if each is None else each for each in found]
            down_SIR = torch.stack([functional.pad(d.t(), (0, rank - len(d))) for d, _ in pairs])
            up_SRO = torch.stack([functional.pad(u, (0, rank - u.shape[1])).t() for _, u in pairs])
            stacked = down_SIR.contiguous(), up_SRO.contiguous()
        if keep:
            self._stacks[name, keys] = stacked
        return stacked

    # Prompts, and modalities of a task alone -----------------------------------------------------------------

    def tell(self, state: SandwichState) -> SandwichState:
        """Put prompts, and tokens of modalities that a task alone has, where modalities find them."""
        route = self._current()
        tokens, masks = dict(state.tokens), dict(state.masks)
        count = len(route.place_B)
        record_BD = _mean_of_all(tokens, masks, count, self.base.width, next(self.base.parameters()))
        told: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for place, key in enumerate(route.keys):
            if key is None:
                continue
            part, carrier = self.part(key), self.carriers.get(key)
            row_R = (route.place_B == place).nonzero()[:, 0]
            said: list[tuple[Tensor, Tensor]] = []
            if part.prompt is not None:
                prompt_RPD = part.prompt(record_BD.index_select(0, row_R))
                said.append((prompt_RPD, prompt_RPD.new_ones(prompt_RPD.shape[:2], dtype=torch.bool)))
            said += self._extras(route, part, row_R)
            if carrier is None or not said:
                continue
            pieces = torch.cat([x for x, _ in said], dim=1), torch.cat([mask for _, mask in said], dim=1)
            told.setdefault(carrier, []).append((row_R, *pieces))
        route.told, route.lent = {}, tuple(name for name in told if name not in tokens)
        for name, found in told.items():
            x_BTD, mask_BT = _side_by_side(found, count)
            own = [(tokens[name], masks[name])] if name in tokens else []
            tokens[name] = torch.cat([*(x for x, _ in own), x_BTD], dim=1)
            masks[name] = torch.cat([*(mask for _, mask in own), mask_BT], dim=1)
            route.told[name] = x_BTD.shape[1]
        return state._replace(tokens=tokens, masks=masks)

    def forget(self, state: SandwichState) -> SandwichState:
        """Take them away again: they have been asked, and have no voice of their own."""
        route = self._current()
        tokens = {name: x for name, x in state.tokens.items() if name not in route.lent}
        masks = {name: mask for name, mask in state.masks.items() if name not in route.lent}
        for name, count in route.told.items():
            if name in tokens:
                tokens[name], masks[name] = tokens[name][:, :-count], masks[name][:, :-count]
        return state._replace(tokens=tokens, masks=masks)

    def _extras(self, route: _Route, part: TaskParts, row_R: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens of the modalities that these records' task alone has; their vectors are kept for the head."""
        found: list[tuple[Tensor, Tensor]] = []
        for name in part.extra_names:
            if name not in route.media:
                continue
            one = route.media[name]
            there = only_media(
                one._replace(index_B=one.index_B[row_R], present_B=one.present_B[row_R], there_B=None, quality_UQ=None)
            )
            if not bool(there.present_B.any()):
                continue
            said = part.own_encoder(name)(there.values)
            x_RTD = said.x_UTD.index_select(0, there.index_B).masked_fill(~there.present_B[:, None, None], 0.0)
            mask_RT = said.mask_UT.index_select(0, there.index_B) & there.present_B[:, None]
            found.append((x_RTD, mask_RT))
            vector_RD = said.vector_UD.index_select(0, there.index_B).masked_fill(~there.present_B[:, None], 0.0)
            if route.added_BD is None:
                route.added_BD = vector_RD.new_zeros(len(route.place_B), vector_RD.shape[1])
            route.added_BD = route.added_BD.index_add(0, row_R, vector_RD)
        return found

    def _add_extras(self, _module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        route = self._route.get()
        if route is None or route.added_BD is None:
            return None
        return (given[0] + route.added_BD.to(given[0].dtype),)

    def _keep_hidden(self, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        route = self._route.get()
        if route is not None:
            route.hidden_BH = given[0]


class _Lent(nn.Module):
    """A block of the base, whose parameters stay the base's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)

    def forward(self, state: SandwichState) -> SandwichState:
        following: SandwichState = self._block[0](state)
        return following


class _TellBlock(nn.Module):
    """Before the bridge."""

    def __init__(self, whole: Elastic) -> None:
        super().__init__()
        self._whole = (whole,)

    def forward(self, state: SandwichState) -> SandwichState:
        return self._whole[0].tell(state)


class _ForgetBlock(_TellBlock):
    """Behind the bridge."""

    def forward(self, state: SandwichState) -> SandwichState:
        return self._whole[0].forget(state)


def _side_by_side(told: Sequence[tuple[Tensor, Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """What some tasks tell their own rows, in the same places: a record is of one task, so as many stand before it as
    its own task has, and no more for all the others'. Of each task: its rows, their tokens and masks."""
    longest = max(x_RTD.shape[1] for _, x_RTD, _ in told)
    _, like, _ = told[0]
    x_BTD = like.new_zeros(count, longest, like.shape[2])
    mask_BT = torch.zeros(count, longest, dtype=torch.bool, device=like.device)
    for row_R, x_RTD, mask_RT in told:
        room = longest - x_RTD.shape[1]
        x_BTD = x_BTD.index_copy(0, row_R, functional.pad(x_RTD, (0, 0, 0, room)))
        mask_BT = mask_BT.index_copy(0, row_R, functional.pad(mask_RT, (0, room)))
    return x_BTD, mask_BT


def _by_task(media: MediaBatch, place_B: Tensor) -> tuple[MediaBatch, Tensor]:
    """The same media, one for each pair of medium and task, and the task of each."""
    count = next(iter(media.values.values())).shape[0]
    there_B = media.present_B if media.there_B is None else media.there_B
    if count == 0 or not bool(there_B.any()):
        values = {key: value[:0] for key, value in media.values.items()}
        return media._replace(values=values, quality_UQ=None, level_U=None, id_U=None), place_B[:0]
    pair_V, index_P = torch.unique(place_B[there_B] * count + media.index_B[there_B], return_inverse=True)
    medium_V = pair_V % count
    index_B = torch.zeros_like(media.index_B)
    index_B[there_B] = index_P

    def chosen(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.index_select(0, medium_V)

    return media._replace(
        values={key: value.index_select(0, medium_V) for key, value in media.values.items()},
        index_B=index_B,
        quality_UQ=chosen(media.quality_UQ),
        level_U=chosen(media.level_U),
        id_U=chosen(media.id_U),
    ), pair_V // count


def _mean_of_all(
    tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int, width: int, like: Tensor
) -> Tensor:
    """What each record's tokens say on average, before modalities ask each other; zeros of one that has none."""
    sum_BD, number_B1 = like.new_zeros(count, width), like.new_zeros(count, 1)
    for name, x_BTD in tokens.items():
        mask_BT1 = masks[name][..., None]
        sum_BD = sum_BD + x_BTD.masked_fill(~mask_BT1, 0.0).sum(dim=1)
        number_B1 = number_B1 + mask_BT1.sum(dim=1)
    return sum_BD / number_B1.clamp(min=1)


@contextlib.contextmanager
def elastic(base: Sandwich, parts: Mapping[str, TaskParts], **settings: Any) -> Iterator[Elastic]:
    """An Elastic that leaves no trace on its base."""
    made = Elastic(base, parts, **settings)
    try:
        yield made
    finally:
        made.detach()
