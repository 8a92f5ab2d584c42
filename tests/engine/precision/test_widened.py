"""Products of bf16 numbers that are carried out in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dougong.engine.precision.widened import Widened


def products(a_MK: Tensor, b_KN: Tensor, c_N: Tensor, whole_KN: Tensor) -> tuple[Tensor, ...]:
    a_1MK, b_1KN = a_MK[None], b_KN[None]
    return (
        torch.mm(a_MK, b_KN),
        torch.addmm(c_N, a_MK, b_KN),
        torch.bmm(a_1MK, b_1KN)[0],
        torch.baddbmm(c_N, a_1MK, b_1KN)[0],
        torch.mm(a_MK.float(), whole_KN),
    )


def test_products_of_bf16_alone_are_widened_and_each_is_rounded_once() -> None:
    torch.manual_seed(0)
    a_MK, b_KN, c_N = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (64, 7), (7,)))
    given = a_MK, b_KN, c_N, torch.randn(64, 7)
    traced = make_fx(products, tracing_mode="fake")(*given)
    Widened()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes if "mm" in str(node.target)]
    wide = ["dougong.wide_mm.default", "dougong.wide_addmm.default", "dougong.wide_bmm.default"]
    assert names == [*wide, "dougong.wide_baddbmm.default", "aten.mm.default"]
    exact = a_MK.double() @ b_KN.double()
    plain, added, batch, batch_added, whole = traced(*given)
    for found in (plain, batch):
        assert torch.equal(found, exact.bfloat16())
    for found in (added, batch_added):
        assert torch.equal(found, (exact + c_N.double()).bfloat16())
    assert torch.equal(whole, a_MK.float() @ given[3])
