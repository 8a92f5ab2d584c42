"""Whether modalities, or objectives, pull what they share in different directions.

Here        `conflicts` (gradients of several losses of the same parameters, compared), Conflicts; `of_terms`, the same
            of the terms of one loss; `of_modalities`, of a network's modalities, each alone; `conflicts_told`, of both,
            in training.
Elsewhere   how much of a step's gradient is chance (engine/noise.py); steps that balance such gradients in
            training (objectives/); measuring a step (step.py).
Promise     nothing is changed: no gradient that was there, and no weight. The angle to a gradient that is 0 is None,
            never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.engine.flow.places import modalities_of
from dougong.engine.flow.probes import undisturbed
from dougong.engine.step import Loss, TermsOf
from dougong.nn.batch import Batch, first_records

SMALL: Final = 1e-20
FEW: Final = 16
"""Records that are asked about in training: as many losses' gradients are taken as there are terms and modalities."""


class Conflicts(NamedTuple):
    """Of K losses of the same parameters."""

    names: tuple[str, ...]
    norm: dict[str, float]
    """Of each loss's gradient."""

    cosine: dict[tuple[str, str], float | None]
    """Of each pair, in the names' order: below 0 they pull against each other. None where one does not pull."""

    def worst(self) -> tuple[str, str] | None:
        """The pair that agrees least, if any two pull against each other."""
        below = {pair: value for pair, value in self.cosine.items() if value is not None and value < 0}
        return min(below, key=lambda pair: below[pair]) if below else None


def conflicts(parameters: Sequence[Tensor], losses: Mapping[str, Callable[[], Tensor]]) -> Conflicts:
    """Compare the gradients of losses, each computed by its function.

    A cosine below 0 is the conflict of Yu et al. 2020 (PCGrad, arXiv:2001.06782); here it is told, not mended.

    Raises:
        ConfigError: there are fewer than two losses, or none of the parameters is trained.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if len(losses) < 2 or not trained:
        raise ConfigError(f"{len(losses)} losses of {len(trained)} trained parameters: there is nothing to compare.")
    gradients: dict[str, list[Tensor]] = {}
    with torch.enable_grad():
        for name, loss in losses.items():
            value = loss()
            found: Sequence[Tensor | None] = [None] * len(trained)
            if value.requires_grad:
                found = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
            gradients[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    norm = {name: math.sqrt(_product(own, own)) for name, own in gradients.items()}
    names = tuple(losses)
    cosine: dict[tuple[str, str], float | None] = {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            length = norm[one] * norm[other]
            cosine[one, other] = _product(gradients[one], gradients[other]) / length if length > SMALL else None
    return Conflicts(names, norm, cosine)


def of_terms(network: nn.Module, batch: Batch, terms_of: TermsOf) -> Conflicts:
    """Compare what each term of a loss asks of the parameters that no one modality owns.

    Raises:
        ConfigError: the loss has one term only, or nothing is shared.
    """
    with torch.enable_grad():
        terms = terms_of(network(batch), batch)
    return conflicts(_shared(network), {name: (lambda term=term: term) for name, term in terms.items()})  # type: ignore[misc]


def of_modalities(network: nn.Module, batch: Batch, loss: Loss) -> Conflicts:
    """Compare what each modality, with all others withheld, asks of the parameters that no one modality owns.

    Raises:
        ConfigError: the batch has one modality only, or nothing is shared.
    """

    def alone(name: str) -> Callable[[], Tensor]:
        nobody_B = torch.zeros_like(batch.media[name].present_B)
        media = {
            each: one if each == name else one._replace(present_B=nobody_B, there_B=None)
            for each, one in batch.media.items()
        }
        kept = batch._replace(media=media)
        return lambda: loss(network(kept), kept)

    there = [name for name, media in batch.media.items() if bool(media.present_B.any())]
    return conflicts(_shared(network), {name: alone(name) for name in there})


def conflicts_told(network: nn.Module, batch: Batch, terms_of: TermsOf) -> list[dict[str, Any]]:
    """Of terms and of modalities, as FlowMeasured has them, by the first records of a batch; nothing of what asks
    nothing, or of what there is one only."""
    few = first_records(batch, FEW)

    def whole(output: Any, given: Batch) -> Tensor:
        return sum(terms_of(output, given).values(), torch.zeros(()))

    compared: dict[str, Callable[[], Conflicts]] = {
        "objectives": lambda: of_terms(network, few, terms_of),
        "modalities": lambda: of_modalities(network, few, whole),
    }
    told: list[dict[str, Any]] = []
    for of, compare in compared.items():
        with undisturbed(network):
            try:
                found = compare()
            except ConfigError:  # there is nothing to compare
                continue
        for (one, other), cosine in found.cosine.items():
            if cosine is None:
                continue
            norms = {"one_norm": found.norm[one], "other_norm": found.norm[other]}
            told.append({"of": of, "one": one, "other": other, "cosine": cosine, **norms})
    return told


def _shared(network: nn.Module) -> list[nn.Parameter]:
    owned = modalities_of(network)
    return [parameter for parameter in network.parameters() if parameter not in owned]


def _product(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in zip(some, others, strict=True))
