"""The modules of a network that are told of, and whose they are.

Here        Place, `places_of`, `modalities_of`, `sides_of`.
Elsewhere   what is told of each (step.py).
Promise     every weight is in one place; of a network of very many modules neighbours are told of together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import nn

MOST_PLACES: Final = 400
"""Modules that are told of one by one; of more, neighbours are told of together."""

SHARED: Final = "shared"
"""The side of what no one modality owns."""


class Place(NamedTuple):
    """A module that holds weights itself, or several of one path."""

    name: str
    kind: str
    parameters: list[nn.Parameter]


def places_of(model: nn.Module) -> list[Place]:
    """Modules that hold weights themselves; of very many, those around them."""
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    found = [Place(name, type(module).__name__, list(module.parameters(recurse=False))) for name, module in owners]
    depth = max((place.name.count(".") for place in found), default=0)
    while len(found) > MOST_PLACES and depth > 0:
        together: dict[str, list[nn.Parameter]] = {}
        for place in found:
            together.setdefault(".".join(place.name.split(".")[:depth]), []).extend(place.parameters)
        found = [Place(name, "several", parameters) for name, parameters in together.items()]
        depth -= 1
    return found


def modalities_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """Whose own each parameter is, where the network says so (`parts`); what is not here is shared."""
    parts = getattr(model, "parts", None)
    if not callable(parts):
        return {}
    return {parameter: name for name, parameters in parts().items() for parameter in parameters}


def sides_of(model: nn.Module, modality_of: Mapping[nn.Parameter, str]) -> dict[str, str]:
    """Of every module, by name, the one modality that owns its weights, or SHARED; without any, as what holds it."""
    found = {"": SHARED}
    for name, module in model.named_modules():
        owners = {modality_of.get(parameter, SHARED) for parameter in module.parameters()}
        around = found[name.rpartition(".")[0]] if name else SHARED
        found[name] = owners.pop() if len(owners) == 1 else SHARED if owners else around
    return found
