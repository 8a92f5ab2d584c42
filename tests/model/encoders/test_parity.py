"""Our encoders give the numbers of transformers' own models, from a folder of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model

from dougong.core.signature import AudioInput, ImageInput, TextInput
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.encoder import Encoder
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.3,  # far from zero, so that a wrong order of parts would show
}


def shake(model: torch.nn.Module) -> None:
    """Norms and biases start at one and zero, where swapping two of them would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def saved(model: Any, folder: Path) -> Any:
    shake(model)
    model.save_pretrained(folder)
    return model.eval()


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_text_agrees_with_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = saved(BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)), tmp_path)
    encoder = TextEncoderConfig(pretrained=str(tmp_path)).build(TextInput(vocabulary_size=50, max_tokens=12)).eval()
    ids_UT = torch.randint(0, 50, (3, 12))
    mask_UT = torch.arange(12) < torch.tensor([12, 7, 1])[:, None]

    theirs = bert(input_ids=ids_UT, attention_mask=mask_UT.long()).last_hidden_state
    ours = encoder({"ids_UT": ids_UT, "mask_UT": mask_UT})

    agree(ours.x_UTD[mask_UT], theirs[mask_UT])


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_image_agrees_with_vit(tmp_path: Path, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    vit = saved(ViTModel(ViTConfig(image_size=size, patch_size=4, **SIZES)), tmp_path)
    encoder = ImageEncoderConfig(pretrained=str(tmp_path)).build(ImageInput(height=size[0], width=size[1])).eval()
    pixels_UCHW = torch.randn(2, 3, *size)

    theirs = vit(pixel_values=pixels_UCHW).last_hidden_state
    ours = encoder({"pixels_UCHW": pixels_UCHW})

    agree(ours.x_UTD, theirs[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_audio_agrees_with_wav2vec2(tmp_path: Path, stable: bool, norm: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "conv_dim": (8, 12),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    config = Wav2Vec2Config(do_stable_layer_norm=stable, feat_extract_norm=norm, **sizes, **SIZES)
    wav2vec2 = saved(Wav2Vec2Model(config), tmp_path)
    given = AudioInput(sample_rate=16000, max_samples=400)
    encoder = AudioEncoderConfig(pretrained=str(tmp_path)).build(given).eval()
    mask_UT = torch.arange(400) < torch.tensor([400, 230, 40])[:, None]
    samples_UT = torch.randn(3, 400) * mask_UT

    theirs = wav2vec2(samples_UT, attention_mask=mask_UT.long()).last_hidden_state
    ours = encoder({"samples_UT": samples_UT, "mask_UT": mask_UT})

    frames_UT = wav2vec2._get_feature_vector_attention_mask(theirs.shape[1], mask_UT.long())
    assert torch.equal(ours.mask_UT, frames_UT)
    agree(ours.x_UTD[frames_UT], theirs[frames_UT])


def rebuilt(encoder: Encoder, given: Any) -> Encoder:
    """As a bundle does it: settings through JSON, then the weights."""
    config = encoder.resolved()
    again = type(config).model_validate_json(config.model_dump_json()).build(given)  # type: ignore[attr-defined]
    again.load_state_dict(encoder.state_dict())
    return again.eval()


@torch.no_grad()
def test_a_pretrained_encoder_is_rebuilt_without_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(ViTModel(ViTConfig(image_size=16, patch_size=4, hidden_act="relu", **SIZES)), tmp_path)
    given = ImageInput(height=16, width=16)
    encoder = ImageEncoderConfig(pretrained=str(tmp_path), pool=2).build(given).eval()
    for file in tmp_path.iterdir():
        file.unlink()
    values = {"pixels_UCHW": torch.randn(2, 3, 16, 16)}

    again = rebuilt(encoder, given)

    assert "pretrained" not in again.resolved().model_dump(exclude_none=True)
    assert torch.equal(again(values).x_UTD, encoder(values).x_UTD)
