"""Sound to tokens, by Wav2Vec2.

Here        AudioEncoderConfig and what it builds.
Elsewhere   decoding and resampling (data/modality/).
Promise     the same numbers as transformers' Wav2Vec2Model with the same weights, within 1e-5, in both its variants.
            Built from sizes, padding leaves no trace: a sound gives the same tokens alone and beside a longer one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import Wav2Vec2Model

from dougong.core.errors import ConfigError
from dougong.core.signature import AudioInput, Input
from dougong.model.encoders.encoder import Encoder, Tokens, TransformerConfig, TransformerLayer, wrong_input
from dougong.model.encoders.filterbank import PHASES, gabor_filters
from dougong.model.encoders.pretrained import architecture_of, make_model, read_json
from dougong.nn.split import Split
from dougong.nn.strided import fits_stride, strided_conv1d

WAV2VEC2_SPLIT: Final = Split(
    columns=(
        "layer.attention.q_proj",
        "layer.attention.k_proj",
        "layer.attention.v_proj",
        "layer.feed_forward.intermediate_dense",
    ),
    rows=("layer.attention.out_proj", "layer.feed_forward.output_dense"),
    counts=("layer.attention.num_heads",),
)
"""Of one of its layers, as transformers names its parts."""


class AudioEncoderConfig(TransformerConfig):
    """Wav2Vec2 (Baevski et al. 2020, arXiv:2006.11477), without its adapter and the masking of its pretraining."""

    kind: Literal["audio"] = "audio"

    conv_dim: tuple[int, ...] = (32, 64, 64, 64)
    """Channels after each convolution over the samples."""

    conv_kernel: tuple[int, ...] = (10, 8, 4, 4)
    """Steps that each of them looks at."""

    conv_stride: tuple[int, ...] = (5, 4, 4, 4)
    """Steps that each of them moves by; their product is the number of samples per frame."""

    first_filters: Literal["random", "gabor"] = "random"
    """gabor: the first convolution begins as a filter bank, and learns on from there. It then wants about 32
    milliseconds of samples in its kernel, and channels in fours."""

    activation: Literal["gelu", "relu"] = "gelu"
    """After each convolution. relu takes a fifth off the whole encoder's time on a CPU."""

    position_kernel: int = Field(default=16, gt=0)
    """Neighbouring frames that tell a frame its place."""

    stable_layer_norm: bool = True
    """Norm before each part of a layer rather than after it; learns from scratch without a long warm-up."""

    pool: int = Field(default=1, gt=0)
    """Average this many neighbouring frames after the last layer, for a shorter bridge."""

    def _sizes(self) -> tuple[str, ...]:
        return (
            *super()._sizes(),
            "conv_dim",
            "conv_kernel",
            "conv_stride",
            "first_filters",
            "activation",
            "position_kernel",
            "stable_layer_norm",
        )

    @model_validator(mode="after")
    def _convolutions(self) -> Self:
        lengths = {len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"conv_dim, conv_kernel and conv_stride have {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} entries: each convolution needs one of each. Give them the same length."
            )
        if min(*self.conv_dim, *self.conv_kernel, *self.conv_stride) < 1:
            raise ValueError("conv_dim, conv_kernel and conv_stride must be 1 or more: they count.")
        if self.first_filters == "gabor" and self.conv_dim[0] % PHASES:
            raise ValueError(
                f"first_filters=gabor cannot share out conv_dim[0]={self.conv_dim[0]}: each band takes {PHASES}. "
                f"Use {max(PHASES, self.conv_dim[0] // PHASES * PHASES)}, or first_filters random."
            )
        return self

    def build(self, given: Input) -> Encoder:
        """Raises: ConfigError: the pretrained folder, or the architecture, does not fit the input."""
        if not isinstance(given, AudioInput):
            raise wrong_input(self.kind, given)
        model = make_model(
            Wav2Vec2Model,
            pretrained=self.pretrained,
            architecture=self.architecture or self._architecture(),
            changes={
                "hidden_dropout": self.dropout,
                "activation_dropout": self.dropout,
                "attention_dropout": self.dropout,
                "feat_proj_dropout": self.dropout,
                # Both would make a training step depend on NumPy's random state, which no checkpoint keeps.
                "layerdrop": 0.0,
                "apply_spec_augment": False,
                "mask_time_prob": 0.0,
                "mask_feature_prob": 0.0,
            },
        )
        origin = f"pretrained {self.pretrained!r}" if self.pretrained is not None else "architecture"
        if model.adapter is not None:
            raise ConfigError(
                f"{origin} ends with an adapter, which shortens the sound once more. "
                "Use a model with add_adapter false, and pool in its place."
            )
        if self.pretrained is not None:
            _check_rate(self.pretrained, given)
        needed = _receptive_field(model)
        if given.max_samples < needed:
            raise ConfigError(
                f"{origin} needs {needed} samples for one frame and the sounds have at most {given.max_samples}. "
                "Use smaller conv_kernel and conv_stride, or longer sounds."
            )
        if self.first_filters == "gabor":
            first = model.get_submodule("feature_extractor.conv_layers.0.conv")
            assert isinstance(first, nn.Conv1d)
            assert first.bias is not None
            filters = gabor_filters(
                num_filters=self.conv_dim[0], kernel=self.conv_kernel[0], sample_rate=given.sample_rate
            )
            with torch.no_grad():
                first.weight.copy_(filters)
                first.bias.zero_()
        config = self if self.pretrained is None else self.with_architecture(architecture_of(model))
        layers: list[nn.Module] = [TransformerLayer(layer, WAV2VEC2_SPLIT) for layer in model.encoder.layers]
        tail = AudioTail(model, self.pool)
        return Encoder(AudioStem(model), layers, tail, width=model.config.hidden_size, config=config)

    def _architecture(self) -> dict[str, object]:
        return {
            "conv_dim": list(self.conv_dim),
            "conv_kernel": list(self.conv_kernel),
            "conv_stride": list(self.conv_stride),
            # A norm over each frame's channels; the other choice, over all of time, would count the padding in.
            "feat_extract_norm": "layer",
            "feat_extract_activation": self.activation,
            "conv_bias": True,
            "num_conv_pos_embeddings": self.position_kernel,
            "num_conv_pos_embedding_groups": math.gcd(self.width, 16),
            "do_stable_layer_norm": self.stable_layer_norm,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": max(1, round(self.width * self.feedforward_ratio)),
            "initializer_range": self.initializer_range,
        }


def _check_rate(pretrained: str, given: AudioInput) -> None:
    folder = Path(pretrained).expanduser()
    if not (folder / "preprocessor_config.json").exists():
        return
    rate = read_json(folder, "preprocessor_config.json", pretrained).get("sampling_rate", given.sample_rate)
    if rate != given.sample_rate:
        raise ConfigError(
            f"pretrained {pretrained!r} hears {rate} samples a second and the sounds have {given.sample_rate}. "
            f"Set sample_rate to {rate}."
        )


def _receptive_field(model: Wav2Vec2Model) -> int:
    """The samples that one frame needs."""
    field = 1
    for kernel, stride in zip(reversed(model.config.conv_kernel), reversed(model.config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


class AudioStem(nn.Module):
    """Samples to frames that know their place."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.features = model.feature_extractor
        # Else transformers asks for the gradient of the samples themselves.
        self.features._requires_grad = False
        self.projection = model.feature_projection
        self.position = model.encoder.pos_conv_embed
        # The variant with stable norms has its norm at the end, in the tail.
        self.norm = nn.Identity() if model.config.do_stable_layer_norm else model.encoder.layer_norm
        self.dropout = model.encoder.dropout
        self.steps = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.receptive_field = _receptive_field(model)
        # On a GPU, and over all of time, transformers' own path does as well.
        self.by_products = model.config.feat_extract_norm == "layer" and all(
            fits_stride(kernel, stride) for kernel, stride in self.steps
        )

    def forward(self, values: dict[str, Tensor]) -> Tokens:
        samples_UT, mask_UT = values["samples_UT"], values["mask_UT"]
        num_frames_U = self._num_frames(mask_UT.sum(dim=1)).clamp(min=1)  # too short a sound is padded to one frame
        num_frames = int(self._num_frames(torch.tensor(samples_UT.shape[1])).clamp(min=1))
        frame_mask_UT = torch.arange(num_frames, device=mask_UT.device) < num_frames_U[:, None]
        if self.by_products and samples_UT.device.type == "cpu":
            frames_UTD = self._packed_frames(samples_UT, num_frames_U, num_frames)
        else:
            lacking = max(0, self.receptive_field - samples_UT.shape[1])
            features_UCT = self.features(functional.pad(samples_UT, (0, lacking)))
            frames_UTD = self.projection(features_UCT.transpose(1, 2))[0]
        frames_UTD = frames_UTD.masked_fill(~frame_mask_UT[..., None], 0.0)  # or neighbours' places would show padding
        return Tokens(self.dropout(self.norm(frames_UTD + self.position(frames_UTD))), frame_mask_UT)

    def _packed_frames(self, samples_UT: Tensor, num_frames_U: Tensor, num_frames: int) -> Tensor:
        """The same frames without convolving the padding: all sounds behind each other, as one.

        Each begins at a block of as many samples as a frame moves by, and ends with what its last frame still sees.
        Frames that see two sounds are left out.
        """
        hop = math.prod(stride for _, stride in self.steps)
        more = -(-self.receptive_field // hop) - 1  # blocks that a frame sees besides its own
        num_blocks_U = num_frames_U + more
        num_blocks = int(num_blocks_U.max()) if len(num_blocks_U) else 0
        lacking = num_blocks * hop - samples_UT.shape[1]
        block_UNS = functional.pad(samples_UT, (0, lacking)).view(-1, num_blocks, hop)
        kept_UN = torch.arange(num_blocks) < num_blocks_U[:, None]
        x_TC = block_UNS[kept_UN].view(1, -1, 1)
        layers: Any = self.features.conv_layers  # a list of modules knows nothing of their kind
        for layer in layers:
            x_TC = strided_conv1d(x_TC, layer.conv.weight, layer.conv.bias, layer.conv.stride[0])
            x_TC = layer.activation(layer.layer_norm(x_TC))
        frame_TD: Tensor = self.projection(x_TC)[0][0]
        first_U = num_blocks_U.cumsum(0) - num_blocks_U
        place_UT = (first_U[:, None] + torch.arange(num_frames)).clamp(max=len(frame_TD) - 1)
        return frame_TD.index_select(0, place_UT.flatten()).view(*place_UT.shape, -1)

    def _num_frames(self, num_samples: Tensor) -> Tensor:
        for kernel, stride in self.steps:
            num_samples = torch.div(num_samples - kernel, stride, rounding_mode="floor") + 1
        return num_samples


class AudioTail(nn.Module):
    """The last norm, where the layers leave one; then neighbours are averaged."""

    def __init__(self, model: Wav2Vec2Model, pool: int) -> None:
        super().__init__()
        self.norm = model.encoder.layer_norm if model.config.do_stable_layer_norm else nn.Identity()
        self.pool = pool

    def forward(self, tokens: Tokens) -> Tokens:
        x_UTD: Tensor = self.norm(tokens.x_UTD)
        if self.pool == 1:
            return Tokens(x_UTD, tokens.mask_UT)
        rest = -x_UTD.shape[1] % self.pool
        mask_UT = functional.pad(tokens.mask_UT, (0, rest))
        x_UTD = functional.pad(x_UTD.masked_fill(~tokens.mask_UT[..., None], 0.0), (0, 0, 0, rest))
        count_UT = mask_UT.view(mask_UT.shape[0], -1, self.pool).sum(dim=2)
        sum_UTD = x_UTD.view(x_UTD.shape[0], -1, self.pool, x_UTD.shape[2]).sum(dim=2)
        return Tokens(sum_UTD / count_UT.clamp(min=1)[..., None], count_UT > 0)
