"""Whether inputs belong to their targets: asked of the first records themselves, before the network has learnt.

Here        Examiner, which listens to the first steps of any training; `examine`, the same of a table's records;
            Examined, the event of both; `score_pairs`.
Elsewhere   what comes of it (rules.py); measuring the network (engine/flow/); records that do not fit each other in
            a table (data/alignment.py).
Promise     training is changed by nothing: no random state, gradient or buffer. After `ROWS` records, or `STEPS` steps,
            nothing is listened to any more. Records that are not as many as their targets are not judged.

A small scorer (ridge regression on an input's own numbers and the sizes of its frequencies) learns from half of the
batches to say the target, and is asked about the other half: with each record's own target, and with the target of its
neighbours. An input that tells of a neighbour's target, and not of its own, is shifted. The network need not have
learnt anything for that, and could not: its loss of matched and of exchanged pairs is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dougong.core.events import Event
from dougong.engine.flow.inputs import named_inputs
from dougong.nn.batch import Batch

ROWS: Final = 384
STEPS: Final = 24
LEAST: Final = 96
"""Records below which nothing is said."""

SHIFTS: Final = (-2, -1, 0, 1, 2)
NUMBERS: Final = 128
"""An input's own numbers that are looked at, after neighbours were averaged; and half as many frequencies."""

KINDS: Final = 32
"""Into which ids are counted, at each of the first places of a row."""

PLACES: Final = 16
RIDGE: Final = 0.3
"""Of a kernel whose diagonal is 1 on average."""

SHUFFLES: Final = 6


@dataclass(frozen=True, kw_only=True)
class Examined(Event):
    """What the first records say."""

    rows: int
    pairs: dict[str, dict[str, float]]
    """Of each input: `at K`, how well it tells the target K records further on (correlation, on records that were not
    learnt from); `chance`, the best of some shuffled targets; `right`, how many of its own targets it tells."""

    still_norms: list[str]
    """Batch norms that have seen batches in training, and whose statistics are as they began."""


class Examiner:
    """Listens from the first step on, and is asked after each; `close` at the end.

    Other listeners of the same network are to be made after it, and asked and closed before it: the first that begins
    to listen must be the last to end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0
        self._inputs: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._mode: _Hearing | None = None
        self._given: dict[str, Tensor] | None = None
        self.done = False
        self._handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def close(self) -> None:
        """Nothing is hooked any more."""
        self._stop()
        self._handle.remove()

    def step(self) -> Examined | None:
        """After each optimizer step, or one that was skipped: what is known, once."""
        if self.done:
            return None
        self._keep()
        self.steps += 1
        rows = sum(len(target) for target in self._targets)
        # Where nothing could be heard in the first steps, nothing will be.
        if rows < ROWS and self.steps < (STEPS if rows else 8):
            return None
        self.done = True
        still = _still_norms(self.model)
        pairs = {name: score_pairs(rows_of, self._targets) for name, rows_of in self._inputs.items()}
        self._inputs, self._targets = {}, []
        self.close()
        told = {name: each for name, each in pairs.items() if each}
        return Examined(step=self.steps, rows=rows, pairs=told, still_norms=still)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._mode is None and torch.is_grad_enabled():
            with torch.no_grad():
                self._given = _features(model, args, kwargs)
            self._mode = _Hearing()
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch ships it without types

    def _stop(self) -> Tensor | None:
        if self._mode is None:
            return None
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch ships it without types
        return mode.target

    def _keep(self) -> None:
        target, given, self._given = self._stop(), self._given, None
        if target is None or not given:
            return
        if any(len(rows) != len(target) for rows in given.values()) or not _alike(given, self._inputs):
            return
        for name, rows in given.items():
            self._inputs.setdefault(name, []).append(rows)
        self._targets.append(target)


class _Hearing(TorchFunctionMode):
    """Hears the classes that a step's first cross entropy is given."""

    def __init__(self) -> None:
        super().__init__()
        self.target: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.target is None and func in (functional.cross_entropy, functional.nll_loss):
            target = (kwargs or {}).get("target", args[1] if len(args) > 1 else None)
            if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
                self.target = target.detach().cpu().clone()
        return func(*args, **(kwargs or {}))


def _still_norms(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None or not module.training:
            continue
        seen = module.num_batches_tracked
        if seen is not None and int(seen) > 1 and not bool(module.running_mean.any()):
            found.append(name)
    return found


def examine(batches: Iterable[Batch]) -> Examined:
    """The same of records in a table's own order, without a network: there a join that slipped by a row is seen
    whatever order they are trained in. Takes as many batches as it needs; those without classes say nothing."""
    inputs: dict[str, list[Tensor]] = {}
    targets: list[Tensor] = []
    for batch in batches:
        target = batch.target
        if target is None or target.ndim != 1 or target.is_floating_point():
            continue
        given = _features(nn.Identity(), (batch,), {})
        if _alike(given, inputs):
            for name, rows in given.items():
                inputs.setdefault(name, []).append(rows)
            targets.append(target.cpu())
        if sum(map(len, targets)) >= ROWS:
            break
    pairs = {name: score_pairs(rows, targets) for name, rows in inputs.items()}
    told = {name: each for name, each in pairs.items() if each}
    return Examined(step=0, rows=sum(map(len, targets)), pairs=told, still_norms=[])


def _alike(given: Mapping[str, Tensor], kept: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether a batch's rows can stand below those of others: some batches lack an input, or hold shorter ones."""
    widths = {name: rows.shape[1] for name, rows in given.items()}
    return not kept or widths == {name: rows[0].shape[1] for name, rows in kept.items()}


# What a record looks like --------------------------------------------------------------------------------------------


def _features(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A row of numbers of each record (B, F) for each input; F differs between inputs."""
    batch = args[0] if args and isinstance(args[0], Batch) else None
    found = {}
    for name, one in named_inputs(model, args, kwargs).items():
        value = one.value.detach()
        if not value.numel():
            continue
        rows = _of_ids(value) if not value.is_floating_point() else _of_numbers(value.float())
        if batch is not None:
            media = batch.media[name]
            rows = rows[media.index_B] * media.present_B[:, None]
        found[name] = rows.nan_to_num(0.0, 0.0, 0.0).cpu()
    return found


def _of_numbers(value: Tensor) -> Tensor:
    flat = value.flatten(1)
    if value.ndim == 4:
        side = max(1, int((NUMBERS / value.shape[1]) ** 0.5))
        few = functional.adaptive_avg_pool2d(value, (min(side, value.shape[2]), min(side, value.shape[3]))).flatten(1)
    else:
        few = functional.adaptive_avg_pool1d(flat[:, None], min(NUMBERS, flat.shape[1]))[:, 0]
    if value.shape[-1] < PLACES or value.ndim < 2:
        return few
    # A tone's place in time says nothing, the sizes of its frequencies do.
    size = torch.fft.rfft(value).abs().flatten(1, -2).mean(dim=1) if value.ndim > 2 else torch.fft.rfft(value).abs()
    return torch.cat(
        [few, functional.adaptive_avg_pool1d(size[:, None], min(NUMBERS // 2, size.shape[1]))[:, 0]], dim=1
    )


def _of_ids(value: Tensor) -> Tensor:
    rows = value.long().flatten(1) if value.ndim > 1 else value.long()[:, None]
    near = functional.one_hot(rows[:, :PLACES] % KINDS, KINDS).float().flatten(1)
    near = functional.pad(near, (0, PLACES * KINDS - near.shape[1]))  # batches are as long as their longest row
    far = functional.one_hot(rows % KINDS, KINDS).float().mean(dim=1)
    return torch.cat([near, far], dim=1)


# The scorer ----------------------------------------------------------------------------------------------------------


def score_pairs(rows: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, float]:
    """How well an input's rows tell the targets at and about them; nothing of too few or of one class.

    Shapes: a (B, F) and a (B,) for each batch. Neighbours are those of the same batch, which is taken for a ring: so a
    shift within batches is told, and one before shuffling cannot be.
    """
    if sum(map(len, targets)) < LEAST or len(targets) < 4:
        return {}
    classes = torch.unique(torch.cat(list(targets)))
    if len(classes) < 2 or len(classes) > 512:
        return {}
    learn = [place for place in range(len(targets)) if place % 2 == 0]
    ask = [place for place in range(len(targets)) if place % 2 == 1]
    x_ND, z_ND = (torch.cat([rows[place] for place in each]).double() for each in (learn, ask))
    mean_D, spread_D = x_ND.mean(dim=0), x_ND.std(dim=0)
    kept_D = spread_D > 1e-6 * (1 + mean_D.abs())
    if not bool(kept_D.any()):
        return {}
    x_ND = ((x_ND - mean_D) / spread_D.clamp(min=1e-12))[:, kept_D]
    z_ND = ((z_ND - mean_D) / spread_D.clamp(min=1e-12))[:, kept_D].clamp(-8, 8)
    scale = float(x_ND.square().sum(dim=1).mean())
    kernel_NN = x_ND @ x_ND.T / scale
    inverse_NN = torch.linalg.inv(kernel_NN + RIDGE * torch.eye(len(x_ND), dtype=torch.float64))
    told_MN = (z_ND @ x_ND.T / scale) @ inverse_NN

    def asked(of: Sequence[Tensor]) -> tuple[float, float]:
        known = torch.cat([of[place] for place in learn])
        wanted = torch.cat([of[place] for place in ask])
        y_NC = (known[:, None] == classes).double()
        w_MC = (wanted[:, None] == classes).double()
        mean_C = y_NC.mean(dim=0)
        said_MC = told_MN @ (y_NC - mean_C)
        real_MC = w_MC - mean_C
        both = float((said_MC * real_MC).sum())
        length = float(said_MC.norm() * real_MC.norm())
        right = float((classes[(said_MC + mean_C).argmax(dim=1)] == wanted).double().mean())
        return both / max(length, 1e-12), right

    found = {}
    for shift in SHIFTS:
        correlation, right = asked([target.roll(-shift) for target in targets])
        found[f"at {shift}"] = correlation
        if shift == 0:
            found["right"] = right
    random = torch.Generator().manual_seed(0)
    shuffled = [asked([t[torch.randperm(len(t), generator=random)] for t in targets])[0] for _ in range(SHUFFLES)]
    found["chance"] = max(shuffled)
    return found
