"""A folder or a setting that does not fit is refused in one line: what was given, why it fails, what would work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from dougong.core.errors import ConfigError
from dougong.core.signature import AudioInput, ImageInput, TableInput, TextInput
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.table import TableEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
TEXT = TextInput(vocabulary_size=20, max_tokens=8)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


def refused(config: Any, given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config.build(given)
    message = str(caught.value)
    assert "\n" not in message
    assert "{" not in message  # an f-string without its f is still a string
    return message


def test_a_hub_name_is_not_fetched() -> None:
    message = refused(TextEncoderConfig(pretrained="bert-base-uncased"), TEXT)
    assert "'bert-base-uncased' is not a folder" in message
    assert "never fetched" in message


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in refused(TextEncoderConfig(pretrained=str(tmp_path)), TEXT)


def test_another_kind_of_model(vit: Path) -> None:
    assert "is a 'vit' model, and this encoder is made of a 'bert'" in refused(
        TextEncoderConfig(pretrained=str(vit)), TEXT
    )


def test_pickled_weights_are_not_read(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    message = refused(TextEncoderConfig(pretrained=str(bert)), TEXT)
    assert "may run code when read" in message


def test_damaged_weights(bert: Path) -> None:
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refused(TextEncoderConfig(pretrained=str(bert)), TEXT)


def test_weights_that_are_not_all_there(bert: Path) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 of the weights" in refused(TextEncoderConfig(pretrained=str(bert)), TEXT)


def test_weights_of_another_shape(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    assert "in other shapes" in refused(TextEncoderConfig(pretrained=str(bert)), TEXT)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (TextInput(vocabulary_size=21, max_tokens=8), "knows 20 tokens and the text has ids up to 20"),
        (TextInput(vocabulary_size=20, max_tokens=9), "Set max_tokens to 8 or less"),
        (ImageInput(height=16, width=16), "Use kind 'image'"),
    ],
)
def test_text_that_the_folder_cannot_read(bert: Path, given: Any, words: str) -> None:
    assert words in refused(TextEncoderConfig(pretrained=str(bert)), given)


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({}, ImageInput(height=32, width=16), "Set the image size to 16x16"),
        ({}, ImageInput(height=16, width=16, channels=1), "Set channels to 3"),
        ({"pool": 3}, ImageInput(height=16, width=16), "Use pool in [1, 2, 4]"),
    ],
)
def test_images_that_the_folder_cannot_see(vit: Path, settings: Any, given: Any, words: str) -> None:
    assert words in refused(ImageEncoderConfig(pretrained=str(vit), **settings), given)


def test_a_sampling_rate_that_the_folder_cannot_hear(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        conv_dim=(8,), conv_kernel=(4,), conv_stride=(2,), num_conv_pos_embeddings=4, **SIZES | {"hidden_size": 16}
    )
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 16000}')
    message = refused(AudioEncoderConfig(pretrained=str(tmp_path)), AudioInput(sample_rate=8000, max_samples=400))
    assert "Set sample_rate to 16000" in message


def test_sounds_that_are_shorter_than_a_frame() -> None:
    assert "needs" in refused(AudioEncoderConfig(), AudioInput(sample_rate=8000, max_samples=50))


def test_a_patch_that_leaves_a_rest() -> None:
    message = refused(ImageEncoderConfig(patch_size=7), ImageInput(height=16, width=8))
    assert "Use patch_size in [2, 4, 8]" in message


def test_a_table_without_columns() -> None:
    assert "without columns" in refused(TableEncoderConfig(), TableInput(num_numbers=0, category_sizes=()))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (TextEncoderConfig, {"width": 10, "num_heads": 4}, "Use num_heads in [1, 2, 5, 10]"),
        (TextEncoderConfig, {"pretrained": "a", "architecture": {}}, "Leave one out"),
        (TextEncoderConfig, {"pretrained": "a", "width": 128}, "width=128 cannot take effect beside pretrained"),
        (ImageEncoderConfig, {"architecture": {}, "patch_size": 4}, "cannot take effect beside architecture"),
        (AudioEncoderConfig, {"conv_dim": (8,)}, "Give them the same length"),
        (AudioEncoderConfig, {"conv_dim": (8,), "conv_kernel": (0,), "conv_stride": (1,)}, "must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_obeyed(kind: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**settings)
    assert words in str(caught.value)
