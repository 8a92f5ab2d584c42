"""Products of bf16 numbers on a processor that has no units for them, in compiled code.

Here        Widened, a pass over a compiler's graph; `has_bf16_products`.
Elsewhere   what is compiled (engine/memory/segments.py).
Promise     a product of bf16 numbers is exact in fp32; so what differs from torch's own bf16 products is the order of
            adding up alone, and each result is rounded to bf16 once, as theirs is.

Without such units torch's own products in bf16 take 7 to 30 times as long as in fp32 (measured on AVX2). Widening what
goes in and rounding what comes out is cheap beside that. Each product is one operation to the compiler: were its casts
in the graph, they would be joined to what made those numbers, and 32 bits kept where 16 were.
The larger side is widened in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_ATEN = torch.ops.aten

PARTS: Final = 8
"""In about so many the larger side of a product is widened, one after the other."""

LEAST: Final = 64
"""Rows or columns of one part."""

_LIBRARY: Final[Any] = torch.library.Library("dougong", "DEF")  # type: ignore[no-untyped-call]  # as torch ships it


def _wide(name: str, schema: str, plain: Callable[..., Tensor]) -> Any:
    """An operation that does what `plain` does, in fp32; where there are no numbers, it tells what it would give."""

    def widened(*given: Tensor) -> Tensor:
        *added, a, b = given
        if a.dim() == 3 or any(x.dim() > 1 for x in added):
            return plain(*(x.float() for x in given)).bfloat16()
        wide_added = [x.float() for x in added]
        found = a.new_empty(len(a), b.shape[1])
        if added or a.numel() >= b.numel():
            wide_b = b.float()
            for rows, into in _parts(a, found, 0):
                into.copy_(plain(*wide_added, rows.float(), wide_b))
        else:
            wide_a = a.float()
            for columns, into in _parts(b, found, 1):
                into.copy_(plain(wide_a, columns.float()))
        return found

    _LIBRARY.define(f"wide_{name}{schema}")
    _LIBRARY.impl(f"wide_{name}", widened, "CPU")
    _LIBRARY.impl(f"wide_{name}", plain, "Meta")
    return getattr(torch.ops.dougong, f"wide_{name}").default


def _parts(given: Tensor, found: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of what is given and of what is to be found, so that little of it is there in 32 bits at a time."""
    size = max(LEAST, given.shape[dim] // PARTS)
    return zip(torch.split(given, size, dim), torch.split(found, size, dim), strict=True)


_WIDE: Final[dict[Any, Any]] = {
    _ATEN.mm.default: _wide("mm", "(Tensor a, Tensor b) -> Tensor", torch.mm),
    _ATEN.bmm.default: _wide("bmm", "(Tensor a, Tensor b) -> Tensor", torch.bmm),
    _ATEN.addmm.default: _wide("addmm", "(Tensor c, Tensor a, Tensor b) -> Tensor", torch.addmm),
    _ATEN.baddbmm.default: _wide("baddbmm", "(Tensor c, Tensor a, Tensor b) -> Tensor", torch.baddbmm),
}


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices by itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Widened(CustomGraphPass):
    """Has each product of bf16 numbers on a CPU computed in fp32, and rounded."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            # With factors of its own (`beta`, `alpha`) it stays as it is: nothing here makes such.
            if node.target in _WIDE and not node.kwargs and _is_bf16(node):
                node.target = _WIDE[node.target]

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_bf16(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"
