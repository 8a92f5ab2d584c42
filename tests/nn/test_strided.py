import pytest
import torch
from torch.nn import functional

from dougong.nn.strided import fits_stride, strided_conv1d


@pytest.mark.parametrize(
    ("steps", "kernel", "stride", "channels"), [(90, 12, 6, 1), (40, 8, 4, 3), (23, 15, 5, 2), (10, 10, 5, 3)]
)
def test_it_is_conv1d_with_its_gradients(steps: int, kernel: int, stride: int, channels: int) -> None:
    x_UTC = torch.randn(3, steps, channels, dtype=torch.double, requires_grad=True)
    weight_OCK = torch.randn(7, channels, kernel, dtype=torch.double, requires_grad=True)
    bias_O = torch.randn(7, dtype=torch.double, requires_grad=True)

    found_UFO = strided_conv1d(x_UTC, weight_OCK, bias_O, stride)
    wanted_UFO = functional.conv1d(x_UTC.transpose(1, 2), weight_OCK, bias_O, stride=stride).transpose(1, 2)

    along_UFO = torch.randn_like(found_UFO)
    inputs = (x_UTC, weight_OCK, bias_O)
    torch.testing.assert_close(found_UFO, wanted_UFO)
    torch.testing.assert_close(
        torch.autograd.grad(found_UFO, inputs, along_UFO), torch.autograd.grad(wanted_UFO, inputs, along_UFO)
    )


def test_a_kernel_that_is_not_whole_strides_long_does_not_fit() -> None:
    assert fits_stride(10, 5)
    assert not fits_stride(3, 2)
