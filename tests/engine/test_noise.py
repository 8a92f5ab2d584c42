"""Noise that was put into gradients is measured."""

import pytest
import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.engine.noise import NoiseMeter


@pytest.mark.parametrize(("noise", "batches"), [(0.5, 0.25), (2.0, 4.0)])
def test_the_noise_scale_is_that_of_the_noise_that_was_put_in(noise: float, batches: float) -> None:
    """A gradient of length 1, and noise of a known one beside it, in many dimensions."""
    dims, window = 4000, 16
    model = nn.Linear(dims, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = NoiseMeter(model, optimizer, window=window, every=1000)
    generator = torch.Generator().manual_seed(0)
    signal = torch.full((1, dims), dims**-0.5)
    told = []
    for _ in range(3 * window):
        model.weight.grad = signal + noise * dims**-0.5 * torch.randn(1, dims, generator=generator)
        optimizer.step()
        told.append(meter.step())
    found = [each for each in told if each is not None]
    meter.close()

    assert [each.step for each in found] == [2 * window]
    assert found[0].batches == pytest.approx(batches, rel=0.1)
    assert found[0].noise == pytest.approx(noise**2, rel=0.1)


def test_noise_alone_has_no_scale() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = NoiseMeter(model, optimizer, window=2, every=2)
    found = []
    for sign in (1.0, -1.0) * 4:
        model.weight.grad = torch.full((1, 3), sign)
        optimizer.step()
        found.append(meter.step())
    told = [each for each in found if each is not None]

    assert told
    assert all(each.batches is None and each.signal is None for each in told)
    with pytest.raises(ConfigError, match="window 1 must be 2 or more"):
        NoiseMeter(model, optimizer, window=1)
