"""Codes are the nearest, are followed and revived, and stay as they are in evaluation."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput
from dougong.model.vq import Codebook, Coded, PictureTokenizer, TokenizerConfig
from dougong.nn.batch import Batch, MediaBatch


def build(**settings: object) -> PictureTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig.model_validate({"width": 8, "num_codes": 6, "code_width": 3} | settings)
    return config.build(ImageInput(height=16, width=24))


def batch_of(pixels_UCHW: torch.Tensor) -> Batch:
    count = len(pixels_UCHW)
    media = MediaBatch({"pixels_UCHW": pixels_UCHW}, torch.arange(count), torch.ones(count, dtype=torch.bool))
    return Batch({"photo": media}, None)


def plain_codebook(code_KE: torch.Tensor, **settings: object) -> Codebook:
    """One that neither narrows nor widens."""
    width = code_KE.shape[1]
    values = {"width": width, "code_width": width, "num_codes": len(code_KE), "revive_below": 0.0} | settings
    codebook = Codebook(TokenizerConfig.model_validate(values))
    for layer in (codebook.narrow, codebook.widen):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    codebook.code_KE.copy_(code_KE)
    codebook.used_K.fill_(1.0)
    codebook.sum_KE.copy_(code_KE)
    return codebook


def cells(*rows: list[float]) -> Coded:
    """One picture of one row of cells."""
    x_UDHW = torch.tensor(rows).T[None, :, None].requires_grad_()
    return Coded(x_UDHW, torch.full((1, 1, len(rows)), -1), torch.zeros(1))


def test_each_cell_gets_its_nearest_code_and_gradients_pass_through() -> None:
    codebook = plain_codebook(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])).eval()
    state = cells([3.0, 1.0], [0.5, 0.0])

    out = codebook(state)
    out.x_UDHW.sum().backward()

    assert out.code_UHW.tolist() == [[[1, 0]]]
    torch.testing.assert_close(out.x_UDHW[0, :, 0].T, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    # ((3-4)^2 + 1^2 + 0.5^2 + 0) / 4
    torch.testing.assert_close(out.strayed_U, torch.tensor([2.25 / 4]))
    torch.testing.assert_close(state.x_UDHW.grad, torch.ones(1, 2, 1, 2))


def test_codes_follow_the_mean_of_what_chose_them() -> None:
    codebook = plain_codebook(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), decay=0.75).train()

    codebook(cells([1.0, 0.0], [2.0, 0.0], [9.0, 0.0]))

    # used: .75 * 1 + .25 * [2, 1]; sum: .75 * code + .25 * [3, 9]
    torch.testing.assert_close(codebook.used_K, torch.tensor([1.25, 1.0]))
    torch.testing.assert_close(codebook.code_KE[:, 0], torch.tensor([0.25 * 3 / 1.25, 0.75 * 10 + 0.25 * 9]))


def test_a_code_that_nobody_uses_begins_anew_from_a_real_cell() -> None:
    codebook = plain_codebook(torch.tensor([[0.0, 0.0], [99.0, 0.0]]), revive_below=0.5).train()
    codebook.used_K[1] = 0.1

    codebook(cells([5.0, 5.0]))

    assert codebook.code_KE[1].tolist() == [5.0, 5.0]
    assert codebook.used_K[1] > 0.5


def test_evaluation_changes_nothing_and_repeats_itself() -> None:
    tokenizer = build()
    pixels_UCHW = torch.randn(3, 3, 16, 24)
    tokenizer.train()(batch_of(pixels_UCHW))
    tokenizer.eval()
    before = {name: weight.clone() for name, weight in tokenizer.state_dict().items()}

    first, second = tokenizer.encode(pixels_UCHW), tokenizer.encode(pixels_UCHW.flip(0))

    assert torch.equal(first, second.flip(0))
    assert all(torch.equal(weight, before[name]) for name, weight in tokenizer.state_dict().items())
    assert first.shape == (3, 6)
    whole = tokenizer(batch_of(pixels_UCHW))
    assert torch.equal(whole.code_UHW.flatten(1), first)
    torch.testing.assert_close(tokenizer.decode(first), whole.x_UDHW, rtol=0, atol=1e-5)


def test_a_code_is_of_its_own_cell_alone() -> None:
    tokenizer = build()
    plain_UCHW = torch.full((1, 3, 16, 24), 0.3)
    marked_UCHW = plain_UCHW.clone()
    marked_UCHW[:, :, :8, 8:16] = torch.randn(3, 8, 8) * 5  # the second cell
    tokenizer.train()(batch_of(torch.cat([plain_UCHW, marked_UCHW])))  # codes are made of these cells
    tokenizer.eval()

    plain_P, marked_P = tokenizer.encode(plain_UCHW)[0], tokenizer.encode(marked_UCHW)[0]

    assert len(set(plain_P.tolist())) == 1
    assert (plain_P != marked_P).nonzero().flatten().tolist() == [1]


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="cell=6 is no power of 2"):
        TokenizerConfig(cell=6)
    with pytest.raises(ConfigError, match="cell=16 cannot share out pictures of 16x24 pixels"):
        build(cell=16)


def test_a_batch_without_pictures_says_nothing_of_any_code() -> None:
    model = build(revive_below=0.5).train()
    model(batch_of(torch.randn(3, 3, 16, 24)))
    before = {name: value.clone() for name, value in model.codebook.state_dict().items()}

    empty = model(batch_of(torch.zeros(0, 3, 16, 24)))
    build().train()(batch_of(torch.zeros(0, 3, 16, 24)))  # before any picture was met, too

    assert empty.x_UDHW.shape == (0, 3, 16, 24)
    for name, value in model.codebook.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_codes_are_the_same_whatever_is_rounded_around() -> None:
    model = build(num_codes=200).train()
    model(batch_of(torch.randn(8, 3, 16, 24)))
    pixels = torch.randn(16, 3, 16, 24)
    exact = model.eval().encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(pixels), exact)
