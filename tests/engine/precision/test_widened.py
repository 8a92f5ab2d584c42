"""Products of bf16 numbers that are carried out in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dougong.engine.precision.widened import Widened


def products(a_MK: Tensor, b_KN: Tensor, c_N: Tensor, whole_KN: Tensor) -> tuple[Tensor, ...]:
    batch = torch.ops.aten.bmm.default(a_MK[None], b_KN[None])
    return a_MK @ b_KN, torch.addmm(c_N, a_MK, b_KN), batch[0].exp(), a_MK.float() @ whole_KN


def test_only_products_of_bf16_are_widened_and_each_is_rounded_once() -> None:
    torch.manual_seed(0)
    a_MK, b_KN, c_N = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (64, 7), (7,)))
    given = a_MK, b_KN, c_N, torch.randn(64, 7)
    traced = make_fx(products, tracing_mode="fake")(*given)
    Widened()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    calls = [node for node in traced.graph.nodes if node.target in (torch.ops.aten.mm.default,)]
    assert [node.meta["val"].dtype for node in calls] == [torch.float32] * 2
    exact = a_MK.double() @ b_KN.double()
    plain, added, exponent, whole = traced(*given)
    assert torch.equal(plain, exact.bfloat16())
    assert torch.equal(added, (exact + c_N.double()).bfloat16())
    assert torch.equal(exponent, exact.bfloat16().exp())
    assert torch.equal(whole, a_MK.float() @ given[3])
