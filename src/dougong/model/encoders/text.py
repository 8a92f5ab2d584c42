"""Token ids to tokens, by BERT.

Here        TextEncoderConfig and what it builds.
Elsewhere   the tokenizer (data/modality/).
Promise     the same numbers as transformers' BertModel with the same weights, within 1e-5.
"""

from __future__ import annotations

from typing import Final, Literal

from torch import Tensor, nn
from transformers import BertModel

from dougong.core.errors import ConfigError
from dougong.core.signature import Input, TextInput
from dougong.model.encoders.encoder import Encoder, Tokens, TransformerConfig, TransformerLayer, wrong_input
from dougong.model.encoders.pretrained import architecture_of, make_model
from dougong.nn.split import Split

BERT_SPLIT: Final = Split(
    columns=(
        "layer.attention.self.query",
        "layer.attention.self.key",
        "layer.attention.self.value",
        "layer.intermediate.dense",
    ),
    rows=("layer.attention.output.dense", "layer.output.dense"),
    counts=("layer.attention.self.num_attention_heads",),
)
"""Of one of its layers, as transformers names its parts."""


class TextEncoderConfig(TransformerConfig):
    """BERT (Devlin et al. 2018, arXiv:1810.04805) without its pooler."""

    kind: Literal["text"] = "text"

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the pretrained folder, or the architecture, does not fit the input."""
        if not isinstance(given, TextInput):
            raise wrong_input(self.kind, given)
        model = make_model(
            BertModel,
            pretrained=self.pretrained,
            architecture=self.architecture or self._architecture(given),
            changes={
                "hidden_dropout_prob": self.dropout,
                "attention_probs_dropout_prob": self.dropout,
                "chunk_size_feed_forward": 0,
            },
            add_pooling_layer=False,
        )
        origin = f"pretrained {self.pretrained!r}" if self.pretrained is not None else "architecture"
        if model.config.is_decoder:
            raise ConfigError(f"{origin} is a decoder, which sees only what came before. Use a BERT encoder.")
        if model.config.vocab_size < given.vocabulary_size:
            raise ConfigError(
                f"{origin} knows {model.config.vocab_size} tokens and the text has ids up to "
                f"{given.vocabulary_size - 1}: the tokenizer is another one. Use the tokenizer of the same folder."
            )
        if model.config.max_position_embeddings < given.max_tokens:
            raise ConfigError(
                f"{origin} reads at most {model.config.max_position_embeddings} tokens and the text has up to "
                f"{given.max_tokens}. Set max_tokens to {model.config.max_position_embeddings} or less."
            )
        config = self if self.pretrained is None else self.with_architecture(architecture_of(model))
        layers: list[nn.Module] = [TransformerLayer(layer, BERT_SPLIT) for layer in model.encoder.layer]
        return Encoder(TextStem(model), layers, TextTail(), width=model.config.hidden_size, config=config)

    def _architecture(self, given: TextInput) -> dict[str, object]:
        return {
            "vocab_size": given.vocabulary_size,
            "max_position_embeddings": given.max_tokens,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": max(1, round(self.width * self.feedforward_ratio)),
            "initializer_range": self.initializer_range,
            "type_vocab_size": 1,
            # Padding is masked. Were one id declared to be padding, its embedding would never learn,
            # and a tokenizer may well give that id to a word.
            "pad_token_id": None,
        }


class TextStem(nn.Module):
    """Embeds words and places."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.embeddings = model.embeddings

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        return Tokens(self.embeddings(values["ids_UT"]), values["mask_UT"])


class TextTail(nn.Module):
    """Nothing is left to do: each of BERT's layers ends with a norm."""

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens
