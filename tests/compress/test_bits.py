import torch

from dougong.compress.bits import Range, fit_range, to_eight, to_four
from dougong.compress.plan import GROUP, weight_bytes


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    weight_OI = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]

    rounded = to_eight(weight_OI)

    assert rounded.number_OI.dtype == torch.int8
    assert ((rounded.widened() - weight_OI).abs() <= 0.51 * rounded.scale_OG + 127 * 2**-11 * rounded.scale_OG).all()


def test_four_bits_have_sixteen_values_to_a_group() -> None:
    weight_OI = torch.randn(6, 3 * GROUP, generator=torch.Generator().manual_seed(0))

    rounded = to_four(weight_OI)

    assert int(rounded.number_OI.max()) <= 15
    assert rounded.scale_OG.shape == (6, 3)
    assert all(len(group.unique()) <= 16 for row in rounded.widened() for group in row.view(3, -1))
    assert (rounded.widened() - weight_OI).square().mean() < 0.02


def test_scales_are_numbers_that_sixteen_bits_have() -> None:
    weight_OI = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))

    for rounded in (to_eight(weight_OI), to_four(weight_OI)):
        assert torch.equal(rounded.scale_OG, rounded.scale_OG.half().float())


def test_error_correction_keeps_outputs_closer() -> None:
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(32, 160, generator=random)
    x_NI = torch.randn(400, 20, generator=random) @ torch.randn(20, 160, generator=random)  # inputs go together

    plain, corrected = to_four(weight_OI), to_four(weight_OI, x_NI.T @ x_NI)

    def wrong(rounded_OI: torch.Tensor) -> float:
        return float((x_NI @ (rounded_OI - weight_OI).T).square().mean())

    assert wrong(corrected.widened()) < 0.5 * wrong(plain.widened())


def test_inputs_that_never_were_do_no_harm() -> None:
    hessian_II = torch.zeros(64, 64)
    weight_OI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    assert to_four(weight_OI, hessian_II).widened().isfinite().all()


def test_zero_stays_zero_in_eight_bits_of_input() -> None:
    x_ND = torch.rand(100, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1

    found = fit_range(x_ND)

    assert float(found.rounded(torch.zeros(1))) == 0.0
    assert float((found.rounded(x_ND) - x_ND).abs().max()) < 0.2


def test_an_outlier_does_not_take_all_steps() -> None:
    x_ND = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    x_ND[0, 0] = 12.0

    assert fit_range(x_ND).high < 12.0


def test_all_zeros_have_a_range() -> None:
    found = fit_range(torch.zeros(4, 4))

    assert isinstance(found, Range)
    assert found.low < found.high


def test_bytes_are_what_lies_in_a_file() -> None:
    assert weight_bytes(10, 64, "w16a16") == 1280
    assert weight_bytes(10, 64, "w8a8") == weight_bytes(10, 64, "w8a16") == 680
    assert weight_bytes(10, 64, "w4a16") == 320 + 3 * 20
