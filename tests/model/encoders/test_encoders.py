"""What encoders promise beyond parity: padding, absent values, pooling, gradients."""

from __future__ import annotations

import pytest
import torch

from dougong.core.signature import AudioInput, ImageInput, TableInput, TextInput
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.encoder import Tokens
from dougong.model.encoders.filterbank import gabor_filters
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.table import TableEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig

SOUND = AudioInput(sample_rate=8000, max_samples=4000)


@torch.no_grad()
def test_a_sound_gives_the_same_tokens_beside_a_longer_one() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoderConfig(width=16, num_layers=2, pool=2).build(SOUND)
    samples_UT = torch.randn(1, 1700)
    long_UT = torch.cat([torch.nn.functional.pad(samples_UT, (0, 2300)), torch.randn(1, 4000)])
    length_U = torch.tensor([1700, 4000])

    alone = encoder({"samples_UT": samples_UT, "mask_UT": torch.ones(1, 1700, dtype=torch.bool)})
    beside = encoder({"samples_UT": long_UT, "mask_UT": torch.arange(4000) < length_U[:, None]})

    count = int(alone.mask_UT.sum())
    assert int(beside.mask_UT[0].sum()) == count
    torch.testing.assert_close(beside.x_UTD[0, :count], alone.x_UTD[0, :count], rtol=1e-5, atol=1e-5)


def test_a_sound_too_short_for_a_frame_or_empty_still_has_one() -> None:
    encoder = AudioEncoderConfig(width=16, num_layers=1).build(SOUND)
    mask_UT = torch.arange(30) < torch.tensor([30, 0])[:, None]

    tokens = encoder({"samples_UT": torch.randn(2, 30) * mask_UT, "mask_UT": mask_UT})
    tokens.x_UTD.sum().backward()

    assert tokens.mask_UT.sum(dim=1).tolist() == [1, 1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_training_asks_for_no_gradient_of_the_samples() -> None:
    encoder = AudioEncoderConfig(width=16, num_layers=1).build(SOUND)
    encoder.stem.by_products = False  # transformers' own path, which is the one that would ask
    asked: list[bool] = []
    encoder.stem.features.conv_layers[0].register_forward_pre_hook(lambda _, args: asked.append(args[0].requires_grad))

    encoder({"samples_UT": torch.randn(2, 4000), "mask_UT": torch.ones(2, 4000, dtype=torch.bool)})

    assert encoder.training
    assert asked == [False]


def test_sounds_packed_behind_each_other_give_the_frames_they_give_alone() -> None:
    encoder = AudioEncoderConfig(
        width=16, num_layers=1, conv_dim=(8, 16), conv_kernel=(64, 8), conv_stride=(32, 4), first_filters="gabor"
    ).build(SOUND)
    encoder.double()
    length_U = torch.tensor([4000, 1, 287, 288, 289, 1700])  # 288 make one frame
    mask_UT = torch.arange(4000) < length_U[:, None]
    samples_UT = torch.randn(mask_UT.shape, dtype=torch.double) * mask_UT
    found = []
    for packed in (True, False):
        encoder.stem.by_products = packed
        encoder.zero_grad()
        tokens = encoder({"samples_UT": samples_UT, "mask_UT": mask_UT})
        tokens.x_UTD[tokens.mask_UT].square().sum().backward()
        found.append((tokens.x_UTD[tokens.mask_UT], tokens.mask_UT, [p.grad for p in encoder.parameters()]))

    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].sum(dim=1).tolist() == [30, 1, 1, 1, 1, 12]


def test_pooled_frames_are_the_mean_of_those_there_are() -> None:
    tail = AudioEncoderConfig(width=4, num_heads=1, num_layers=0, stable_layer_norm=False, pool=2).build(SOUND).tail
    x_UTD = torch.tensor([[1.0, 3.0, 5.0, 100.0, 100.0]])[..., None].expand(1, 5, 4)

    x_UTD, mask_UT = tail(Tokens(x_UTD, torch.tensor([[True, True, True, False, False]])))

    assert x_UTD[0, :, 0].tolist() == [2.0, 5.0, 0.0]
    assert mask_UT.tolist() == [[True, True, False]]


@torch.no_grad()
def test_pooled_patches_are_the_mean_of_neighbours() -> None:
    given = ImageInput(height=16, width=8)
    torch.manual_seed(0)
    fine = ImageEncoderConfig(width=8, num_heads=2, patch_size=2).build(given)
    coarse = ImageEncoderConfig(width=8, num_heads=2, patch_size=2, pool=2).build(given)
    coarse.load_state_dict(fine.state_dict())
    values = {"pixels_UCHW": torch.randn(2, 3, 16, 8)}

    fine_UTD, coarse_UTD = fine(values).x_UTD, coarse(values).x_UTD

    assert (fine.tail.grid, coarse.tail.grid) == ((8, 4), (4, 2))
    want_UD = fine_UTD.view(2, 8, 4, 8)[:, 2:4, 2:4].mean(dim=(1, 2))  # second row, second column
    torch.testing.assert_close(coarse_UTD.view(2, 4, 2, 8)[:, 1, 1], want_UD)


def test_an_unknown_number_leaves_no_trace_but_that_it_is_unknown() -> None:
    torch.manual_seed(0)
    encoder = TableEncoderConfig(width=8).build(TableInput(num_numbers=2, category_sizes=(3, 2)))
    known_UN = torch.tensor([[True, False], [True, True]])
    categories_UK = torch.tensor([[0, 1], [2, 0]])

    def tokens(garbage: float) -> torch.Tensor:
        numbers_UN = torch.tensor([[0.5, garbage], [0.5, 0.0]])
        values = {"numbers_UN": numbers_UN, "known_UN": known_UN, "categories_UK": categories_UK}
        return encoder(values).x_UTD  # type: ignore[no-any-return]

    spoiled = tokens(float("nan"))
    spoiled.square().sum().backward()

    assert torch.equal(spoiled, tokens(7.0))
    assert not torch.equal(spoiled[0, 1], spoiled[1, 1])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_every_word_learns_even_the_first_id() -> None:
    encoder = TextEncoderConfig(width=8, num_heads=2).build(TextInput(vocabulary_size=5, max_tokens=4))

    values = {"ids_UT": torch.tensor([[0, 1, 2, 0]]), "mask_UT": torch.tensor([[True, True, True, False]])}
    encoder(values).x_UTD[..., 0].square().sum().backward()

    weight = encoder.stem.embeddings.word_embeddings.weight
    assert weight.grad[0].abs().sum() > 0


def test_a_filter_bank_hears_each_tone_in_its_own_band() -> None:
    filters_FK = gabor_filters(num_filters=96, kernel=256, sample_rate=8000)[:, 0]
    seconds_K = torch.arange(256) / 8000
    loudest = []
    for hertz in (200.0, 500.0, 1000.0, 2000.0, 3500.0):
        for turn in (0.0, 1.0, 2.0):
            heard_F = (filters_FK @ torch.sin(2 * torch.pi * hertz * seconds_K + turn)).square()
            loudest.append(int(heard_F.view(24, 4).sum(dim=1).argmax()))

    assert loudest == sorted(loudest)
    assert len(set(loudest)) == 5  # whenever the wave began
    torch.testing.assert_close(filters_FK.norm(dim=1), torch.ones(96))


def test_a_convolutional_stem_gives_the_same_patches_in_number() -> None:
    pixels = {"pixels_UCHW": torch.randn(2, 3, 32, 48)}
    shape = ImageInput(height=32, width=48)
    by_patch = ImageEncoderConfig(width=16, num_layers=1).build(shape)
    by_convolution = ImageEncoderConfig(width=16, num_layers=1, stem="convolution").build(shape)

    assert by_convolution(pixels).x_UTD.shape == by_patch(pixels).x_UTD.shape == (2, 24, 16)
    with pytest.raises(ValueError, match="patch_size=6 cannot be reached by halving"):
        ImageEncoderConfig(patch_size=6, stem="convolution")
