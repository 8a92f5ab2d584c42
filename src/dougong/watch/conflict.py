"""Whether modalities, or objectives, pull what they share in different directions.

Here        `conflicts` (gradients of several losses of the same parameters, compared), Conflicts; `of_modalities`, the
            same of a model's modalities, each alone.
Elsewhere   how much of a step's gradient is chance (engine/noise.py); steps that balance such gradients in
            training (objectives/); measuring a step (engine/flow.py).
Promise     nothing is changed: no gradient that was there, and no weight. The angle to a gradient that is 0 is None,
            never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

SMALL: Final = 1e-20


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
    """Compare the gradients of losses, each computed anew by its function.

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
            found = torch.autograd.grad(loss(), trained, allow_unused=True)
            gradients[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    norm = {name: math.sqrt(_product(own, own)) for name, own in gradients.items()}
    names = tuple(losses)
    cosine: dict[tuple[str, str], float | None] = {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            length = norm[one] * norm[other]
            cosine[one, other] = _product(gradients[one], gradients[other]) / length if length > SMALL else None
    return Conflicts(names, norm, cosine)


def of_modalities(network: Sandwich, batch: Batch, loss_of: Callable[[Tensor, Batch], Tensor]) -> Conflicts:
    """Compare what each modality, with all others withheld, asks of the parameters that no one modality owns.

    `loss_of` makes the loss of the answers (B, C) to a batch.

    Raises:
        ConfigError: the network has one modality only, or nothing that is shared.
    """
    own = {id(parameter) for parameters in network.parts().values() for parameter in parameters}
    shared = [parameter for parameter in network.parameters() if id(parameter) not in own]

    def alone(name: str) -> Callable[[], Tensor]:
        media = {
            each: one if each == name else one._replace(present_B=torch.zeros_like(one.present_B))
            for each, one in batch.media.items()
        }
        kept = batch._replace(media=media)
        return lambda: loss_of(network(kept).output_BC, kept)

    return conflicts(shared, {name: alone(name) for name in network.names})


def _product(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in zip(some, others, strict=True))
