"""So that a strong modality does not silence the others.

Here        the three methods as formulas: `modulation` (OGM-GE), `blending_weights` (Gradient-Blending) and
            `pareto_weights` (MMPareto); ModulatedBackward and ParetoBackward, which take a step's gradients by them.
Elsewhere   the step they are part of (engine/step.py); the other two remedies, leaving modalities out and corrupting
            them, are the data's (data/collate.py, data/corruption.py).
Promise     each formula is its paper's, tested by hand-computed values; micro-batches add up; a modality that a batch
            lacks is left as it is, and parameters that belong to no modality get plain gradients.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dougong.engine.precision.choice import autocast
from dougong.engine.precision.weights import add_gradient
from dougong.engine.step import TrainParts
from dougong.nn.batch import Batch

SMALLEST = 1e-12


class Losses(NamedTuple):
    """A batch's losses, each a sum over records."""

    terms: dict[str, Tensor]
    """Of everything but the modalities' own decisions, by name; at least one."""

    own: dict[str, Tensor]
    """Of each modality's own decision, by name; those that the batch has."""

    @property
    def whole(self) -> Tensor:
        """The sum of the terms."""
        return functools.reduce(operator.add, self.terms.values())


def modulation(right_BM: Tensor, present_BM: Tensor, alpha: float) -> Tensor:
    """OGM-GE's factor of each modality's gradients, (M,).

    `right_BM` is each modality's own probability of the right class. A modality's ratio is its sum over the batch,
    over the mean of the others' sums; above 1 its factor is 1 - tanh(alpha ratio), else 1 (Peng et al. 2022,
    arXiv:2203.15332, equations 9 and 10; the mean of the others is for more than two modalities).

    Sums are over records that have every modality of the batch, since a sum over fewer records says nothing of skill.
    """
    here_M = present_BM.any(dim=0)
    full_B = (present_BM | ~here_M).all(dim=1)
    if int(here_M.sum()) < 2 or not bool(full_B.any()):
        return torch.ones_like(right_BM[0])
    score_M = (right_BM * full_B[:, None]).sum(dim=0) * here_M
    others_M = (score_M.sum() - score_M) / (here_M.sum() - 1)
    ratio_M = score_M / others_M.clamp(min=SMALLEST)
    factor_M = 1.0 - torch.tanh(alpha * ratio_M)
    return torch.where(here_M & (ratio_M > 1.0), factor_M, torch.ones_like(factor_M))


def blending_weights(
    train_before: Mapping[str, float],
    train_after: Mapping[str, float],
    held_out_before: Mapping[str, float],
    held_out_after: Mapping[str, float],
) -> dict[str, float]:
    """Gradient-Blending's weight of each head's loss, from losses before and after a stretch of training.

    Proportional to generalisation / overfitting squared, summing to 1 (Wang et al. 2020, arXiv:1905.12681, proposition
    1): generalisation is how far the held-out loss fell, overfitting how far the gap to training's grew. A head that
    no longer generalises weighs nothing; where none does, all weigh the same.
    """
    raw = {}
    for name in train_before:
        gained = held_out_before[name] - held_out_after[name]
        grown = (held_out_after[name] - train_after[name]) - (held_out_before[name] - train_before[name])
        # A gap that did not grow would weigh infinitely: noise of a thousandth is never exceeded in truth.
        raw[name] = max(gained, 0.0) / max(abs(grown), 1e-3) ** 2
    total = sum(raw.values())
    if total <= 0:
        return {name: 1.0 / len(raw) for name in raw}
    return {name: weight / total for name, weight in raw.items()}


def pareto_weights(whole: Tensor, own: Tensor) -> tuple[float, float]:
    """MMPareto's weights of two flat gradients of one encoder, which sum to 1.

    Where they agree (cosine not below 0), one half each; else those of the shortest vector between them (Wei and Hu
    2024, arXiv:2405.17730, after Sener and Koltun 2018, arXiv:1810.04650).
    """
    if float(whole @ own) >= 0.0:
        return 0.5, 0.5
    apart = whole - own
    share = float((own - whole) @ own / (apart @ apart).clamp(min=SMALLEST))
    share = min(1.0, max(0.0, share))
    return share, 1.0 - share


@dataclass(frozen=True)
class ModulatedBackward:
    """OGM-GE: gradients of the stronger modality's encoder are held back, and noise, in every encoder, keeps what that
    loses of wandering.

    How much each modality knows is read from its own head (model.own_heads). The paper reads it from its share of a
    linear classifier over the concatenation, which a head with a hidden layer does not have.
    """

    parts: Mapping[str, Sequence[nn.Parameter]]
    """Each modality's encoder, in the order of the model's modalities."""

    alpha: float
    noise: bool = True

    def __call__(self, parts: TrainParts, batch: Batch, num_records: float) -> Tensor:
        with autocast(parts.precision, parts.device_type):
            output = parts.model(batch)
            loss = parts.loss(output, batch).float() / num_records
        own_BMC = output.own_BMC.detach().float().softmax(dim=-1)
        assert batch.target is not None
        right_BM = own_BMC.gather(2, batch.target[:, None, None].expand(-1, own_BMC.shape[1], 1))[..., 0]
        present_BM = torch.stack([batch.media[name].present_B for name in self.parts], dim=1)
        factor_M = modulation(right_BM, present_BM, self.alpha)
        gradients = _gradients(loss, parts.model)
        for factor, parameters in zip(factor_M.tolist(), self.parts.values(), strict=True):
            if factor == 1.0 and not self.noise:
                continue
            for parameter in parameters:
                gradient = gradients.get(parameter)
                if gradient is None:
                    continue
                spread = gradient.std() if gradient.numel() > 1 else gradient.new_zeros(())
                gradients[parameter] = gradient * factor
                if self.noise:
                    gradients[parameter] += torch.randn_like(gradient) * spread
        _add(gradients)
        return loss.detach()


@dataclass(frozen=True)
class ParetoBackward:
    """MMPareto: each encoder steps along a mix of the whole loss's gradient and its own loss's that harms neither.

    The mix is lengthened to at least their sum's length, times `stretch`, as the paper does for better generalisation.
    """

    parts: Mapping[str, Sequence[nn.Parameter]]
    losses: Callable[[Any, Batch], Losses]
    stretch: float = 1.5

    def __call__(self, parts: TrainParts, batch: Batch, num_records: float) -> Tensor:
        with autocast(parts.precision, parts.device_type):
            losses = self.losses(parts.model(batch), batch)
            whole = losses.whole.float() / num_records
            own = {name: loss.float() / num_records for name, loss in losses.own.items()}
        from_own = _gradients(torch.stack(list(own.values())).sum(), parts.model, keep=True) if own else {}
        gradients = _gradients(whole, parts.model)
        total = whole.detach() + sum(loss.detach() for loss in own.values())
        encoders = {parameter for name in own for parameter in self.parts[name]}
        for name in own:
            shared = [p for p in self.parts[name] if p in gradients and p in from_own]
            if not shared:
                continue
            # Each modality's own loss reaches no other's encoder, so their sum's gradient there is its own.
            whole_F = torch.cat([gradients[p].flatten() for p in shared])
            own_F = torch.cat([from_own[p].flatten() for p in shared])
            for_whole, for_own = pareto_weights(whole_F, own_F)
            mixed_F = 2.0 * for_whole * whole_F + 2.0 * for_own * own_F
            short = float((whole_F + own_F).norm() / mixed_F.norm().clamp(min=SMALLEST))
            mixed_F = mixed_F * (self.stretch * max(1.0, short))
            start = 0
            for parameter in shared:
                gradients[parameter] = mixed_F[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
        for parameter, gradient in from_own.items():
            if parameter not in gradients:
                gradients[parameter] = gradient
            elif parameter not in encoders:
                gradients[parameter] = gradients[parameter] + gradient
        _add(gradients)
        return total


def _gradients(loss: Tensor, model: nn.Module, *, keep: bool = False) -> dict[nn.Parameter, Tensor]:
    """Of every parameter that the loss depends on."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def _add(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """As `backward` would: to what earlier micro-batches have left."""
    for parameter, gradient in gradients.items():
        add_gradient(parameter, gradient)
