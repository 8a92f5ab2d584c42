"""Products of bf16 numbers on a processor that has no units for them, in compiled code.

Here        Widened, a pass over a compiler's graph; `has_bf16_products`.
Elsewhere   what is compiled (engine/memory/segments.py).
Promise     a product of bf16 numbers is exact in fp32; so what differs from torch's own bf16 products is the order of
            adding up alone, and each result is rounded to bf16 once, as theirs is.

Without such units torch's own products in bf16 take 7 to 30 times as long as in fp32 (measured on AVX2). Widening what
goes in and rounding what comes out is cheap beside that, and a compiler does both while it writes those numbers anyway.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_ATEN = torch.ops.aten
_PRODUCTS: Final = (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default)


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices by itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Widened(CustomGraphPass):
    """Has each product of bf16 numbers on a CPU computed in fp32, and rounded."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _PRODUCTS and _is_bf16(node):
                self._widen(graph, node)

    def _widen(self, graph: Graph, node: Node) -> None:
        with graph.inserting_before(node):
            wide: dict[Any, Node] = {}
            for given in node.all_input_nodes:
                if _is_bf16(given):
                    wide[given] = _cast(graph, given, torch.float32)
        node.args = tuple(wide.get(each, each) if isinstance(each, Node) else each for each in node.args)
        value = node.meta["val"]
        node.meta["val"] = value.to(torch.float32)
        with graph.inserting_after(node):
            rounded = _cast(graph, node, torch.bfloat16)
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_bf16(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    made = graph.call_function(torch.ops.prims.convert_element_type.default, (node, dtype))
    made.meta["val"] = node.meta["val"].to(dtype)
    return made
