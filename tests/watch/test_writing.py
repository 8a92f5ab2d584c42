"""Where a small decoder looks, over a picture and words."""

import pytest
import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.decoder import Decoder, DecoderConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.watch.writing import look_at_word

WORDS = 61


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    target = Target(name="named", task="single_label", labels=("a", "b"))
    inputs = {
        "words": TextInput(vocabulary_size=WORDS, max_tokens=16),
        "photo": ImageInput(height=16, width=16),
    }
    return DecoderConfig(width=32, num_layers=2, experts=None).build(Signature(inputs=inputs, target=target)).eval()


def batch() -> Batch:
    """Three records: one of four words, one without a picture."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    ids = torch.randint(4, WORDS, (3, 6), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 4:] = False
    every, there = torch.arange(3), torch.ones(3).bool()
    return Batch(
        {
            "words": MediaBatch({"ids_UT": ids, "mask_UT": mask}, every, there),
            "photo": MediaBatch({"pixels_UCHW": pixels}, every, torch.tensor([True, True, False])),
        },
        None,
    )


def test_what_is_explained_is_the_decoders_own_answer(model: Decoder) -> None:
    with torch.no_grad():
        own = model(batch()).score_BNV

    found = look_at_word(model, batch())

    torch.testing.assert_close(found.score_BNV, own, rtol=1e-5, atol=1e-5)
    assert found.place_B.tolist() == [3, 5, 5]
    assert found.word_B.tolist() == [int(own[b, place].argmax()) for b, place in enumerate((3, 5, 5))]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_later_words_padding_and_an_absent_picture_have_exactly_no_relevance(model: Decoder) -> None:
    found = look_at_word(model, batch(), torch.tensor([2, 2, 2]))

    for row_BT in (found.relevance_BT, found.rollout_BT):
        words = found.spans["words"]
        assert float(row_BT[:, words.start + 3 :].abs().max()) == 0.0
        assert float(row_BT[2, : words.start].abs().max()) == 0.0
        assert float(row_BT.min()) >= 0.0
        torch.testing.assert_close(row_BT.sum(dim=1), torch.ones(3))
    assert float(found.rollout_BT[:2, : words.start].sum(dim=1).min()) > 0.0
    assert found.of("photo").shape[1] == words.start
    assert [weight.shape[2:] for weight in found.weight_BHTT] == [found.mask_BT.shape[1:] * 2] * 2
    with pytest.raises(ConfigError, match="record 0 has 4 words, and the one at 4 was asked for"):
        look_at_word(model, batch(), torch.tensor([4, 4, 4]))


def test_relevance_is_that_of_the_paper_added_up_by_hand(model: Decoder) -> None:
    found = look_at_word(model, batch())
    caught: list[Tensor] = []

    def plain(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **given: object) -> Tensor:
        score = query @ key.transpose(-1, -2) * scale
        allowed = given.get("attn_mask")
        if not isinstance(allowed, Tensor):
            allowed = torch.ones(score.shape[-2:], dtype=torch.bool)
            allowed = allowed.tril() if given.get("is_causal") else allowed
        weight = score.masked_fill(~allowed, -1e30).softmax(dim=-1)
        caught.append(weight)
        return weight @ value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
        output = model(batch())
    layers = caught[-2:]  # the encoder's come first
    every = torch.arange(3)
    score = output.score_BNV[every, found.place_B, found.word_B].sum()
    gradients = torch.autograd.grad(score, layers)
    held = torch.eye(layers[0].shape[-1]).expand(3, -1, -1)
    for weight, gradient in zip(layers, gradients, strict=True):
        held = held + (weight * gradient).clamp(min=0).mean(dim=1) @ held
    row = held[every, found.spans["words"].start + found.place_B] * found.mask_BT

    torch.testing.assert_close(found.relevance_BT, (row / row.sum(dim=1, keepdim=True)).detach(), rtol=1e-4, atol=1e-6)
