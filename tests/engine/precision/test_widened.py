"""Products of bf16 numbers that are carried out in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dougong.engine.memory.allocated import most_allocated
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


def is_rounded_once(found: Tensor, exact: Tensor) -> bool:
    """To 8 bits, but for what adding up in fp32 leaves."""
    assert found.dtype == torch.bfloat16
    return bool(((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all())


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
        assert is_rounded_once(found, exact)
    for found in (added, batch_added):
        assert is_rounded_once(found, exact + c_N.double())
    assert torch.equal(whole, a_MK.float() @ given[3])


def test_large_sides_are_widened_in_parts() -> None:
    torch.manual_seed(0)
    wide = torch.ops.dougong
    for rows, columns in ((1000, 7), (7, 1000), (1, 1), (0, 5)):
        a_MK, b_KN, c_N = torch.randn(rows, 32), torch.randn(32, columns), torch.randn(columns)
        a_MK, b_KN, c_N = a_MK.bfloat16(), b_KN.bfloat16(), c_N.bfloat16()
        exact = a_MK.double() @ b_KN.double()
        assert is_rounded_once(wide.wide_mm(a_MK, b_KN), exact)
        assert is_rounded_once(wide.wide_addmm(c_N, a_MK, b_KN), exact + c_N.double())
    many_MK, few_KN = torch.randn(8192, 64).bfloat16(), torch.randn(64, 8).bfloat16()
    whole = 4 * many_MK.numel()
    assert most_allocated(lambda: wide.wide_mm(many_MK, few_KN)) < whole / 4
    assert most_allocated(lambda: wide.wide_mm(few_KN.t(), many_MK.t())) < whole / 4
