"""What a network is given, by name, in figures.

Here        Given, `named_inputs`; `inputs_told`, `rows_of` (a number of each row's content), `follows` (whether targets
            are an input's own next tokens).
Elsewhere   asking how far the answer hangs on each (probes.py); whether inputs belong to their targets
            (engine/examine.py).
Promise     a batch of ours, keyword arguments and positional ones are told alike; no content is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dougong.nn.batch import Batch

SMALL = 1e-12


class Given(NamedTuple):
    """One input of a network, of B records."""

    value: Tensor
    mask: Tensor | None = None
    """Which of its tokens are real."""

    present_B: Tensor | None = None
    """Which records have it, for the answer or for a loss beside it."""


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Given]:
    """What a network is given, by name: modalities of our batches, keyword arguments, or the parameters' names."""
    if args and isinstance(args[0], Batch):
        found = {}
        for name, media in args[0].media.items():
            mask = media.values.get("mask_UT")
            value = next(v for key, v in media.values.items() if key != "mask_UT")
            found[name] = Given(value, mask, media.present_B if media.there_B is None else media.there_B)
        return found
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    flat: dict[str, Tensor] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif isinstance(value, Mapping):
            flat.update({str(key): each for key, each in value.items() if isinstance(each, Tensor)})
    masks = {name: value for name, value in flat.items() if "mask" in name and value.ndim >= 2}
    found = {}
    for name, value in flat.items():
        if name in masks or name in ("labels", "label", "targets", "target") or value.ndim < 1:
            continue
        mask = next((m for m in masks.values() if value.ndim >= 2 and m.shape == value.shape[: m.ndim]), None)
        found[name] = Given(value, None if mask is None else mask.bool())
    return found


def inputs_told(given: Mapping[str, Given]) -> dict[str, dict[str, float]]:
    """Of each: how many rows, how much of it is there and real, where and how wide its numbers lie."""
    found = {}
    for name, one in given.items():
        told: dict[str, float] = {"rows": float(len(one.value))}
        if one.present_B is not None:
            told["present"] = float(one.present_B.float().mean())
        if one.mask is not None:
            told["masked"] = 1 - float(one.mask.float().mean())
            told["length"] = float(one.mask.shape[-1])
        if one.value.numel():
            value = one.value.detach()
            if value.is_floating_point():
                finite = value.isfinite()
                told["not_finite"] = 1 - float(finite.float().mean())
                kept = value[finite].float() if told["not_finite"] else value.float().flatten()
                if kept.numel():
                    told.update(
                        mean=float(kept.mean()), spread=float(kept.std(correction=0)), largest=float(kept.abs().max())
                    )
                if value.ndim == 4 and value.shape[1] <= 4:
                    for place, mean in enumerate(value.float().mean(dim=(0, 2, 3)).tolist()):
                        told[f"channel {place}"] = mean
                if value.ndim in (2, 3) and value.shape[-1] >= 16 and not told["not_finite"]:
                    told["pitch"] = _pitch(value.float())
            else:
                told.update(mean=float(value.float().mean()), spread=float(value.float().std(correction=0)))
                told["kinds"] = _kinds(value)
                if one.mask is not None and one.mask.shape == value.shape:
                    told["kinds_real"] = _kinds(value[one.mask])
                    told["kinds_hidden"] = _kinds(value[~one.mask])
            if len(value) > 1:
                same = (value == value[:1]).flatten(1).all(dim=1)
                told["all_alike"] = float(same.all())
        found[name] = told
    return found


def _kinds(value: Tensor) -> float:
    """How many values there are."""
    return float(torch.unique(value).numel())


def _pitch(value: Tensor) -> float:
    """The middle of the spectrum along the last axis, from 0 to 1: a wrong rate moves it."""
    power = torch.fft.rfft(value - value.mean(dim=-1, keepdim=True)).abs().square()
    place = torch.linspace(0, 1, power.shape[-1], device=power.device)
    return float((power * place).sum() / power.sum().clamp(min=SMALL))


def rows_of(given: Mapping[str, Given]) -> dict[str, list[int]]:
    """A number of each row's content."""
    found = {}
    for name, one in given.items():
        if one.value.ndim < 1 or not one.value.numel():
            continue
        flat = one.value.detach().flatten(1) if one.value.ndim > 1 else one.value.detach()[:, None]
        weigh = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.float64).sin()
        sums = flat.double() @ weigh
        found[name] = [hash(round(number, 6)) for number in sums.nan_to_num().tolist()]
    return found


def follows(given: Iterable[Given], target: Tensor) -> dict[str, float]:
    """Whether targets are an input's own next tokens, or the very same ones: the share of them that is."""
    found: dict[str, float] = {}
    for one in given:
        ids = one.value
        if ids.ndim != 2 or ids.is_floating_point() or target.is_floating_point() or ids.shape[1] < 3:
            continue
        rows, length = len(ids), target.numel() // max(1, len(ids))
        if target.numel() != rows * length or length not in (ids.shape[1], ids.shape[1] - 1):
            continue
        wanted = target.reshape(rows, length)
        known = wanted >= 0
        known_next = known[:, : ids.shape[1] - 1]
        if bool(known_next.any()):
            following = wanted[:, : ids.shape[1] - 1] == ids[:, 1:]
            found["next"] = float(following[known_next].float().mean())
            found["same"] = float((wanted == ids[:, :length])[known].float().mean())
    return found
