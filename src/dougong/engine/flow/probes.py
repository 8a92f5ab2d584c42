"""How far a network's answer and loss hang on each of its inputs.

Here        `probe_inputs`; `undisturbed`, in which a network can be asked without leaving a trace.
Elsewhere   what the inputs are (inputs.py); what its losses pull (conflict.py).
Promise     nothing is changed: no weight, buffer, random state or mode, and no hook of the network's own is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dougong.engine.flow.inputs import Given, named_inputs
from dougong.engine.flow.outputs import answer_of
from dougong.engine.random_state import random_state_kept
from dougong.nn.batch import Batch


def probe_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor | None]
) -> dict[str, dict[str, float]]:
    """How far answer and loss hang on each input: its rows exchanged among the records, its tokens reordered. Of a
    modality that no record of the batch has, nothing is told."""
    given = named_inputs(model, args, kwargs)
    modes = [(module, module.training) for module in model.modules()]
    found: dict[str, dict[str, float]] = {}
    model.eval()
    try:
        with torch.no_grad(), undisturbed(model):
            own = model(*args, **kwargs)
            own_loss, own_answer = loss(own), answer_of(own)
            if own_answer is None:
                return {}
            usual = float((own_answer - own_answer.mean(dim=0)).abs().mean())
            for name, one in given.items():
                told: dict[str, float] = {"usual": usual}
                for what, changed in _changes(name, one, args, kwargs):
                    other = model(*changed[0], **changed[1])
                    answer, other_loss = answer_of(other), loss(other)
                    if answer is not None and answer.shape == own_answer.shape:
                        told[f"{what}_moves"] = float((answer - own_answer).abs().mean()) / max(usual, 1e-6)
                    if own_loss is not None and other_loss is not None:
                        told[f"{what}_costs"] = float(other_loss - own_loss)
                        told["loss"] = float(own_loss)
                found[name] = told
    finally:
        for module, mode in modes:
            module.training = mode
    return found


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A network can be asked, and its hooks are silent; afterwards buffers and random state are as they were.

    A buffer that nobody wrote to is not written to here either: a backward that is still to come may have saved it, as
    it does places of tokens.
    """
    before, after = model._forward_pre_hooks, model._forward_hooks
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    model._forward_pre_hooks, model._forward_hooks = type(before)(), type(after)()
    try:
        with random_state_kept():
            yield
    finally:
        model._forward_pre_hooks, model._forward_hooks = before, after
        with torch.no_grad():
            for buffer, version, was in kept:
                if buffer._version != version:
                    buffer.copy_(was)


Changed = tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]


def _changes(name: str, one: Given, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Changed]:
    num = args[0].num_records if args and isinstance(args[0], Batch) else len(one.value)
    if num < 2:
        return
    rolled = torch.arange(num).roll(max(1, num // 2))
    if args and isinstance(args[0], Batch):
        batch, media = args[0], args[0].media[name]
        if not bool(media.present_B.any()):  # as in a batch that shows records by another view
            return
        exchanged = media._replace(index_B=media.index_B[rolled], present_B=media.present_B[rolled])
        yield "exchange", ((batch._replace(media={**batch.media, name: exchanged}), *args[1:]), dict(kwargs))
        reordered = _reordered(one.value, one.mask)
        if reordered is not None:
            key = next(k for k, v in media.values.items() if v is one.value)
            other = media._replace(values={**media.values, key: reordered})
            yield "reorder", ((batch._replace(media={**batch.media, name: other}), *args[1:]), dict(kwargs))
        return

    for change, new in (
        ("exchange", one.value[rolled.to(one.value.device)]),
        ("reorder", _reordered(one.value, one.mask)),
    ):
        if new is not None:
            yield change, (tuple(_put(one.value, new, each) for each in args), _put(one.value, new, dict(kwargs)))


def _put(old: Tensor, new: Tensor, within: Any) -> Any:
    """The same value, with one tensor in another's place."""
    if within is old:
        return new
    if isinstance(within, Mapping):
        return type(within)({key: _put(old, new, each) for key, each in within.items()})  # type: ignore[call-arg]
    return within


def _reordered(value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Token ids of each row turned by half of the real ones; None for what is no sequence of ids."""
    if value.ndim != 2 or value.is_floating_point() or value.shape[1] < 4:
        return None
    lengths = torch.full((len(value),), value.shape[1]) if mask is None else mask.sum(dim=1).cpu()
    rows = [torch.cat([row[: int(n)].roll(int(n) // 2), row[int(n) :]]) for row, n in zip(value, lengths, strict=True)]
    return torch.stack(rows)
