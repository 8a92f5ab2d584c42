"""How one layer can be shared out by ranks that compute it together.

Here        Split, Splittable, `splits_of`, `same`.
Elsewhere   doing it (engine/parallel/tensor.py).
Promise     a declaration changes nothing: a layer that is not shared out computes as if it had none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn


class Split(NamedTuple):
    """Names of what a module owns, with dots where it lies deeper, by how it is cut.

    What is between the columns and the rows must treat every head, or hidden channel, alike and by itself.
    """

    columns: tuple[str, ...] = ()
    """Linear layers that are cut by their outputs, in order: whole heads."""

    rows: tuple[str, ...] = ()
    """Linear layers that are cut by their inputs; their outputs are added up."""

    counts: tuple[str, ...] = ()
    """Attributes that count what is shared out, as heads; each rank has its part."""

    pieces: tuple[tuple[str, int], ...] = ()
    """Parameters that are cut along a dimension."""

    shared: tuple[str, ...] = ()
    """Children that do nothing (`same`) but stand where what all ranks have enters what each computes a part of."""

    summed: tuple[str, ...] = ()
    """Children that do nothing but stand where the parts are added up."""

    tokens: tuple[str, ...] = ()
    """Children that do nothing but stand where every rank needs all tokens, and computes alike with them: where ranks
    share out the tokens between layers, they are put together here."""

    vocabulary: tuple[str, ...] = ()
    """An embedding, the layer that scores words, and their loss: cut by words."""


@runtime_checkable
class Splittable(Protocol):
    """A module that can be shared out."""

    def split(self) -> Split: ...


def splits_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Split]]:
    """Every module that can be shared out, by its name."""
    for name, module in model.named_modules():
        if isinstance(module, Splittable):
            assert isinstance(module, nn.Module)
            yield name, module, module.split()


def same() -> nn.Identity:
    """A place in a layer that a split can name."""
    return nn.Identity()
