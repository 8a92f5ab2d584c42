"""How one layer can be shared out by ranks that compute it together.

Here        Split, and the Splittable modules that say theirs.
Elsewhere   doing it (engine/parallel/tensor.py).
Promise     a declaration changes nothing: a layer that is not shared out computes as if it had none.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class Split(NamedTuple):
    """Names of what a module owns, by how it is cut.

    A module with columns and rows is computed in between by each rank alone: every linear layer of `columns` gives a
    part of the channels, and the linear layers of `rows` add the parts up. What is between them must treat every head,
    or hidden channel, alike and by itself.
    """

    columns: tuple[str, ...] = ()
    """Linear layers that are cut by their outputs, in order: whole heads."""

    rows: tuple[str, ...] = ()
    """Linear layers that are cut by their inputs; their outputs are added up."""

    counts: tuple[str, ...] = ()
    """Attributes that count what is shared out, as heads, and must be multiples of the number of ranks."""

    pieces: tuple[tuple[str, int], ...] = ()
    """Parameters that are cut along one dimension, as of experts; what is computed with them is added up too."""

    vocabulary: tuple[str, ...] = ()
    """Embeddings and output layers that are cut by words."""


@runtime_checkable
class Splittable(Protocol):
    """A module that can be shared out."""

    def split(self) -> Split: ...
