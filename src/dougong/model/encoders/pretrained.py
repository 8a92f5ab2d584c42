"""transformers' models, from a folder, from an exact architecture, or from sizes.

Here        `make_model`, `architecture_of`.
Elsewhere   what is kept of them (text.py, image.py, audio.py).
Promise     nothing is fetched, nothing is unpickled, no code of the folder runs; a folder that does not fit is refused
            in one line; what is read is float32 and complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dougong.core.errors import ConfigError

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

# Neither sizes nor behaviour, so a bundle does not keep them; `auto_map` would name code to run.
_LEFT_OUT = frozenset(
    {
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
        "problem_type",
        "auto_map",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "attn_implementation",
    }
)


def make_model(
    kind: type[ModelT],
    *,
    pretrained: str | None,
    architecture: dict[str, Any],
    changes: dict[str, Any],
    **options: Any,
) -> ModelT:
    """A model of `kind` with the folder's weights, or random ones; `changes` stand over what the architecture says.

    Raises:
        ConfigError: the folder or the architecture is not one of this kind.
    """
    if pretrained is None:
        return kind(_config(kind, architecture, changes, where="architecture"), **options)
    folder = Path(pretrained).expanduser()
    architecture = read_json(folder, "config.json", pretrained)
    _check_weights(folder)
    config = _config(kind, architecture, changes, where=f"pretrained {pretrained!r}")
    try:
        with _quiet():
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # so that they are reported here, in our words
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # safetensors, json and transformers each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"pretrained {pretrained!r} cannot be read: {reason[0][:200]} "
            "Save the model there anew with save_pretrained."
        ) from error
    model: ModelT
    model, report = loaded
    lacking = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"pretrained {pretrained!r} lacks {len(lacking)} of the weights its config.json asks for, "
            f"or has them in other shapes, such as {lacking[0]}. Save the model there anew with save_pretrained."
        )
    return model


def architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    """What builds this model again, as plain JSON."""
    values = {key: value for key, value in model.config.to_dict().items() if key not in _LEFT_OUT}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def read_json(folder: Path, name: str, pretrained: str) -> dict[str, Any]:
    """A JSON file of a pretrained folder.

    Raises:
        ConfigError: there is no such folder or file, or it is not JSON.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"pretrained {pretrained!r} is not a folder: models are never fetched from a hub. Download the model "
            "and give the folder that holds its config.json and model.safetensors."
        )
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"pretrained {pretrained!r} has no {name}: it is not a folder that save_pretrained wrote. "
            "Give the folder that holds config.json and model.safetensors."
        ) from None
    except ValueError as error:
        raise ConfigError(f"pretrained {pretrained!r}: {name} is not JSON ({error}). Download it anew.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"pretrained {pretrained!r}: {name} holds no settings. Download it anew.")
    return values


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = "Its *.bin may run code when read, so it never is. " if any(folder.glob("*.bin")) else ""
    raise ConfigError(
        f"pretrained {str(folder)!r} has no *.safetensors. {pickled}"
        "Download the safetensors file, or save the model there anew with save_pretrained."
    )


def _config(
    kind: type[PreTrainedModel], architecture: dict[str, Any], changes: dict[str, Any], *, where: str
) -> PreTrainedConfig:
    config_class = kind.config_class
    assert config_class is not None
    expected, given = config_class.model_type, architecture.get("model_type", config_class.model_type)
    if given != expected:
        raise ConfigError(
            f"{where} is a {given!r} model, and this encoder is made of a {expected!r}. "
            f"Use the encoder of the other kind, or a {expected!r} model."
        )
    values = {key: value for key, value in architecture.items() if key not in _LEFT_OUT and key != "model_type"}
    try:
        make: Any = config_class  # its keywords are gathered at run time
        config: PreTrainedConfig = make(**values | changes, attn_implementation="sdpa")
        return config
    except Exception as error:  # transformers' own validation raises its own kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where} is no {expected!r} architecture: {reason} Copy it from a config.json.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of weights: what matters of them is raised."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as it comes
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # as it comes
