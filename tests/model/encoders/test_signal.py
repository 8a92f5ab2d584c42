"""A signal's windows: padding, lengths, spectra, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dougong.core.errors import ConfigError
from dougong.core.signature import SignalInput, TableInput
from dougong.model.encoders.encoder import Encoder
from dougong.model.encoders.signal import SignalEncoderConfig


def build(given: SignalInput, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    return SignalEncoderConfig(**{"width": 8, "num_heads": 2} | settings).build(given)


def values(samples_UCT: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    mask_UT = torch.arange(samples_UCT.shape[2]) < torch.tensor(lengths)[:, None]
    return {"samples_UCT": samples_UCT, "mask_UT": mask_UT}


@torch.no_grad()
@pytest.mark.parametrize("form", ["samples", "spectrum"])
@pytest.mark.parametrize(("window", "stride", "count"), [(16, None, 3), (16, 6, 6), (12, 12, 4), (60, None, 1)])
def test_a_signal_gives_the_same_tokens_beside_a_longer_one_whatever_is_in_its_padding(
    form: str, window: int, stride: int | None, count: int
) -> None:
    encoder = build(SignalInput(num_channels=2, max_samples=100), form=form, window=window, stride=stride)
    short_UCT, long_UCT = torch.randn(1, 2, 45), torch.randn(1, 2, 97)
    padded_UCT = torch.nn.functional.pad(short_UCT, (0, 52), value=float("nan"))

    alone = encoder(values(short_UCT, [45]))
    beside = encoder(values(torch.cat([padded_UCT, long_UCT]), [45, 97]))

    assert alone.mask_UT.sum() == beside.mask_UT[0].sum() == count
    torch.testing.assert_close(beside.x_UTD[0, :count], alone.x_UTD[0, :count], rtol=1e-5, atol=1e-5)
    assert beside.x_UTD.isfinite().all()


@pytest.mark.parametrize(("max_samples", "tokens"), [(1, 1), (6, 1), (256, 1), (257, 29), (4096, 32)])
def test_a_list_of_features_is_one_token_and_a_long_signal_some(max_samples: int, tokens: int) -> None:
    encoder = build(SignalInput(num_channels=1, max_samples=max_samples))

    found = encoder(values(torch.randn(2, 1, max_samples), [max_samples] * 2))
    found.x_UTD[..., 0].square().sum().backward()

    assert found.x_UTD.shape == (2, tokens, 8)
    assert found.mask_UT.all()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_windows_that_overlap_see_each_sample_where_it_lies() -> None:
    encoder = build(SignalInput(num_channels=1, max_samples=10), window=4, stride=3, num_layers=0)
    samples_UCT = torch.zeros(10, 1, 10)
    samples_UCT[range(10), 0, range(10)] = 1.0  # signal i has one at sample i and nowhere else

    x_UTD = encoder.stem(values(samples_UCT, [10] * 10)).x_UTD - encoder.stem.place_ND
    seen = [[window for window in range(3) if x_UTD[sample, window].abs().sum() > 1e-6] for sample in range(10)]

    assert seen == [[0], [0], [0], [0, 1], [1], [1], [1, 2], [2], [2], [2]]
    torch.testing.assert_close(x_UTD[4, 1], encoder.stem.embed.weight[:, 1])


@torch.no_grad()
def test_a_spectrum_hears_a_tone_whenever_it_began_and_as_loud_as_it_is() -> None:
    encoder = build(SignalInput(num_channels=1, max_samples=64), form="spectrum", num_layers=0)
    encoder.stem.embed = torch.nn.Identity()
    encoder.stem.place_ND.data = torch.zeros(1, 1)
    time_T = torch.arange(64)
    tones_UT = torch.stack([torch.sin(2 * torch.pi * 8 * time_T / 64 + turn) for turn in (0.0, 1.0, 2.0)])

    power_UF = encoder.stem(values(tones_UT[:, None], [64] * 3)).x_UTD[:, 0].exp() - 1e-3

    assert power_UF.argmax(dim=1).tolist() == [8, 8, 8]
    torch.testing.assert_close(power_UF, power_UF[:1].expand_as(power_UF), rtol=1e-3, atol=1e-4)
    # A sine's line under a Hann window of length W: (W / 4)^2 over the window's energy 3 W / 8.
    torch.testing.assert_close(power_UF[:, 8], torch.full((3,), 64 / 6), rtol=1e-3, atol=0)


def test_a_signal_of_no_samples_does_no_harm() -> None:
    encoder = build(SignalInput(num_channels=1, max_samples=40), window=8)

    tokens = encoder(values(torch.randn(2, 1, 40), [40, 0]))
    tokens.x_UTD.square().sum().backward()

    assert tokens.mask_UT.sum(dim=1).tolist() == [5, 1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_settings_that_do_not_fit_are_refused() -> None:
    signal = SignalInput(num_channels=1, max_samples=40)
    with pytest.raises(ConfigError, match=r"window=41 is longer than any signal here.*Use a window of up to 40\."):
        build(signal, window=41)
    with pytest.raises(ConfigError, match="an encoder of kind 'signal' cannot read table"):
        SignalEncoderConfig().build(TableInput(num_numbers=1, category_sizes=()))
    with pytest.raises(ValidationError, match="stride=9 is given with window=8: samples between"):
        SignalEncoderConfig(window=8, stride=9)
    with pytest.raises(ValidationError, match="stride=2 is given with window=None"):
        SignalEncoderConfig(stride=2)
    with pytest.raises(ValidationError, match=r"num_heads=3 cannot share out width=8: .* Use num_heads in \[1, 2, 4"):
        SignalEncoderConfig(width=8, num_heads=3)
