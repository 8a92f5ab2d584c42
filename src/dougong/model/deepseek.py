"""A decoder's weights and settings under the names of the Hugging Face format of DeepSeek-V3.

Here        `read_deepseek`, `write_deepseek`; `config_from`, `config_as`, and the table of names.
Elsewhere   the model (model/decoder.py).
Promise     what is written is read by transformers' DeepseekV3ForCausalLM, and what that saves is read here: weights
            come back bit for bit. A tensor that is missing, strange or of another shape is named, and nothing is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.files import inside, write_json
from dougong.model.decoder import Decoder, DecoderConfig, ExpertsConfig, StretchConfig

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
FILE_BYTES: Final = 4 * 2**30
"""Of one file of weights, about."""

LAYER_NAMES: Final = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query": "self_attn.q_b_proj",
    "attention.latent_down": "self_attn.kv_a_proj_with_mqa",
    "attention.latent_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.key_value": "self_attn.kv_b_proj",
    "attention.out": "self_attn.o_proj",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
    "feedforward.gate.weight": "mlp.gate_proj.weight",
    "feedforward.widen.weight": "mlp.up_proj.weight",
    "feedforward.narrow.weight": "mlp.down_proj.weight",
    "feedforward.router.weight_ED": "mlp.gate.weight",
    "feedforward.router.bias_E": "mlp.gate.e_score_correction_bias",
    "feedforward.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
    "feedforward.shared.widen.weight": "mlp.shared_experts.up_proj.weight",
    "feedforward.shared.narrow.weight": "mlp.shared_experts.down_proj.weight",
}
"""Ours, theirs; a linear layer's name stands for its weight and its bias."""

FURTHER_NAMES: Final = {
    "before_norm.weight": "hnorm.weight",
    "word_norm.weight": "enorm.weight",
    "join.weight": "eh_proj.weight",
}


def read_deepseek(folder: Path) -> tuple[DecoderConfig, int, dict[str, Tensor]]:
    """Settings, number of words, and weights by the names of a Decoder without other modalities.

    Raises:
        ConfigError: config.json is no DeepSeek-V3, or asks for what is not built here.
        CheckpointError: the weights are damaged, or stored in a form that is not read here.
    """
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        raise ConfigError(f"{folder} has no config.json that can be read. Give a folder of a saved model.") from None
    config = config_from(values, where=str(folder / "config.json"))
    theirs = _read_all(folder)
    strange = [name for name in theirs if name.endswith("weight_scale_inv")]
    if strange:
        raise CheckpointError(
            f"{folder} holds 8-bit weights with scales ({strange[0]}), which are not read here. Convert to bf16 first."
        )
    weights = dict(_ours(theirs, config, where=str(folder)))
    # Further layers that this config does not ask for have their own embedding and head; others are strange.
    kept = re.compile(rf"model\.layers\.({'|'.join(str(n) for n in range(config.num_layers))})\.")
    left = sorted(name for name in theirs if not name.startswith("model.layers.") or kept.match(name))
    if left:
        raise CheckpointError(f"{folder} has {left[0]}, which this architecture has no place for.")
    return config, int(values["vocab_size"]), weights


def write_deepseek(model: Decoder, folder: Path) -> None:
    """config.json and *.safetensors of a decoder; what it reads of other modalities has no place there.

    Raises:
        ConfigError: the model reads other modalities.
    """
    if model.names:
        raise ConfigError(
            f"the decoder reads {', '.join(model.names)}, for which this format has no names. Save a bundle instead."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_as(model.config, num_words=model.words.num_embeddings))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _theirs(model):
        if size + tensor.nbytes > FILE_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def config_from(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
    """Our settings from their config.json.

    Raises:
        ConfigError: it is of another architecture, or asks for what is not built here.
    """
    if values.get("model_type") != "deepseek_v3":
        raise ConfigError(f"{where}: model_type is {values.get('model_type')!r}, and deepseek_v3 is read here.")
    for key, expected in (
        ("hidden_act", "silu"),
        ("tie_word_embeddings", False),
        ("rope_interleave", True),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
    ):
        if values.get(key, expected) != expected:
            raise ConfigError(f"{where}: {key}={values[key]!r} is not built here, only {expected!r}.")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{where}: rope type {kind!r} is not built here, only 'default' and 'yarn'.")
    stretch = None
    if kind == "yarn":
        stretch = StretchConfig(
            factor=rope["factor"],
            original=rope.get("original_max_position_embeddings") or values["max_position_embeddings"],
            fast=rope.get("beta_fast") or 32.0,
            slow=rope.get("beta_slow") or 1.0,
            magnitude=rope.get("mscale"),
            magnitude_all=rope.get("mscale_all_dim"),
        )
    experts = ExpertsConfig(
        num=values["n_routed_experts"],
        num_chosen=values["num_experts_per_tok"],
        num_shared=values["n_shared_experts"],
        hidden=values["moe_intermediate_size"],
        num_groups=values["n_group"],
        groups_chosen=values["topk_group"],
        normalise=values["norm_topk_prob"],
        scale=values["routed_scaling_factor"],
    )
    has_experts = values["first_k_dense_replace"] < values["num_hidden_layers"]
    return DecoderConfig(
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_dense=values["first_k_dense_replace"],
        num_heads=values["num_attention_heads"],
        query_rank=values["q_lora_rank"],
        latent_rank=values["kv_lora_rank"],
        plain_width=values["qk_nope_head_dim"],
        turned_width=values["qk_rope_head_dim"],
        value_width=values["v_head_dim"],
        hidden=values["intermediate_size"],
        experts=experts if has_experts else None,
        angle_base=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        stretch=stretch,
        norm_epsilon=values["rms_norm_eps"],
        bias=values.get("attention_bias", False),
    )


def config_as(config: DecoderConfig, *, num_words: int, max_words: int = 4096) -> dict[str, Any]:
    """Their config.json from our settings."""
    experts = config.experts or ExpertsConfig()
    rope: dict[str, Any] = {"rope_theta": config.angle_base, "rope_type": "default"}
    if config.stretch is not None:
        stretch = config.stretch
        max_words = int(stretch.original * stretch.factor)
        rope |= {
            "rope_type": "yarn",
            "factor": stretch.factor,
            "original_max_position_embeddings": stretch.original,
            "beta_fast": stretch.fast,
            "beta_slow": stretch.slow,
        }
        rope |= {} if stretch.magnitude is None else {"mscale": stretch.magnitude}
        rope |= {} if stretch.magnitude_all is None else {"mscale_all_dim": stretch.magnitude_all}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": num_words,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "moe_intermediate_size": experts.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "n_shared_experts": experts.num_shared,
        "n_routed_experts": experts.num,
        "routed_scaling_factor": experts.scale,
        "kv_lora_rank": config.latent_rank,
        "q_lora_rank": config.query_rank,
        "qk_rope_head_dim": config.turned_width,
        "v_head_dim": config.value_width,
        "qk_nope_head_dim": config.plain_width,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_chosen,
        "num_experts_per_tok": experts.num_chosen,
        "first_k_dense_replace": config.num_dense if config.experts is not None else config.num_layers,
        "norm_topk_prob": experts.normalise,
        "hidden_act": "silu",
        "max_position_embeddings": max_words,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "attention_bias": config.bias,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": config.num_further,
    }


def _layer_names(config: DecoderConfig, layer: int) -> dict[str, str]:
    """Our names of one layer's weights that theirs have one to one, and theirs."""
    names = {}
    for ours, theirs in LAYER_NAMES.items():
        if ours.startswith("attention.query_") and config.query_rank is None:
            continue
        if ours.startswith("feedforward."):
            routed = ours.startswith(("feedforward.router", "feedforward.shared"))
            if routed != config.has_experts(layer):
                continue
            if ours.startswith("feedforward.shared") and config.experts is not None and not config.experts.num_shared:
                continue
        if ours == "attention.query" and config.query_rank is None:
            theirs = "self_attn.q_proj"
        if ours.endswith(("weight", "weight_ED", "bias_E")):
            names[ours] = theirs
            continue
        names[f"{ours}.weight"] = f"{theirs}.weight"
        if config.bias and ours in ("attention.query_down", "attention.latent_down", "attention.out"):
            names[f"{ours}.bias"] = f"{theirs}.bias"
    return names


def _theirs(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight under their names; experts one by one."""
    config, state = model.config, model.state_dict()
    yield "model.embed_tokens.weight", state["words.weight"]
    yield "model.norm.weight", state["norm.weight"]
    yield "lm_head.weight", state["out.weight"]
    for number in range(config.num_layers + config.num_further):
        further = number - config.num_layers
        ours, theirs = f"blocks.{number}.layer", f"model.layers.{number}"
        for own, other in _layer_names(config, number).items():
            yield f"{theirs}.{other}", state[f"{ours}.{own}"]
        if config.has_experts(number):
            wide, narrow = (state[f"{ours}.feedforward.experts.{part}"] for part in ("widen_E2FD", "narrow_EDF"))
            for expert in range(len(wide)):
                yield f"{theirs}.mlp.experts.{expert}.gate_proj.weight", wide[expert, 0]
                yield f"{theirs}.mlp.experts.{expert}.up_proj.weight", wide[expert, 1]
                yield f"{theirs}.mlp.experts.{expert}.down_proj.weight", narrow[expert]
        if further >= 0:
            for own, other in FURTHER_NAMES.items():
                yield f"{theirs}.{other}", state[f"blocks.{number}.{own}"]
            # Theirs has a copy of these for each.
            yield f"{theirs}.embed_tokens.weight", state["words.weight"]
            yield f"{theirs}.shared_head.norm.weight", state["norm.weight"]
            yield f"{theirs}.shared_head.head.weight", state["out.weight"]


def _ours(theirs: dict[str, Tensor], config: DecoderConfig, *, where: str) -> Iterator[tuple[str, Tensor]]:
    """Every weight under our names; what is used is taken out of `theirs`."""

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise CheckpointError(f"{where} lacks {name}. Give a folder with all of the model's files.")
        return theirs.pop(name)

    yield "words.weight", take("model.embed_tokens.weight")
    yield "norm.weight", take("model.norm.weight")
    yield "out.weight", take("lm_head.weight")
    for number in range(config.num_layers):
        ours, prefix = f"blocks.{number}.layer", f"model.layers.{number}"
        for own, other in _layer_names(config, number).items():
            yield f"{ours}.{own}", take(f"{prefix}.{other}")
        if not config.has_experts(number):
            continue
        assert config.experts is not None
        if f"{prefix}.mlp.experts.gate_up_proj" in theirs:  # as transformers holds them in memory
            wide_EFD = take(f"{prefix}.mlp.experts.gate_up_proj")
            wide_E2FD = wide_EFD.view(len(wide_EFD), 2, -1, wide_EFD.shape[-1])
            narrow_EDF = take(f"{prefix}.mlp.experts.down_proj")
        else:
            each = [f"{prefix}.mlp.experts.{expert}" for expert in range(config.experts.num)]
            wide_E2FD = torch.stack(
                [torch.stack([take(f"{e}.gate_proj.weight"), take(f"{e}.up_proj.weight")]) for e in each]
            )
            narrow_EDF = torch.stack([take(f"{e}.down_proj.weight") for e in each])
        yield f"{ours}.feedforward.experts.widen_E2FD", wide_E2FD
        yield f"{ours}.feedforward.experts.narrow_EDF", narrow_EDF
        yield f"{ours}.feedforward.router.load_E", torch.zeros(config.experts.num)


def _read_all(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    names = [SINGLE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index} cannot be read. Give a folder with all of the model's files.") from None
    found: dict[str, Tensor] = {}
    for name in names:
        file = inside(folder, name)
        if file is None or not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}. Give a folder with all of the model's files.")
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}).") from None
    return found
