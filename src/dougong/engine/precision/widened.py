"""Products of bf16 numbers on a processor that has no units for them, in compiled code.

Here        Widened, a pass over a compiler's graph; `has_bf16_products`.
Elsewhere   what is compiled (engine/memory/segments.py).
Promise     a product of bf16 numbers is exact in fp32; so what differs from torch's own bf16 products is the order of
            adding up alone, and each result is rounded to bf16 once, as theirs is.

Without such units torch's own products in bf16 take 7 to 30 times as long as in fp32 (measured on AVX2). Widening what
goes in and rounding what comes out is cheap beside that. Each product is one operation to the compiler: were its casts
in the graph, they would be joined to what made those numbers, and 32 bits kept where 16 were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_ATEN = torch.ops.aten

_LIBRARY: Final[Any] = torch.library.Library("dougong", "DEF")  # type: ignore[no-untyped-call]  # as torch ships it


def _wide(name: str, schema: str, plain: Callable[..., Tensor]) -> Any:
    """An operation that does what `plain` does, in fp32; where there are no numbers, it tells what it would give."""

    def widened(*given: Any) -> Tensor:
        return plain(*(x.float() if isinstance(x, Tensor) else x for x in given)).bfloat16()

    _LIBRARY.define(f"wide_{name}{schema}")
    _LIBRARY.impl(f"wide_{name}", widened, "CPU")
    _LIBRARY.impl(f"wide_{name}", plain, "Meta")
    return getattr(torch.ops.dougong, f"wide_{name}").default


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
