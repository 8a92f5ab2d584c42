"""A model's weights by name, to a file and back.

Here        `distinct_weights`, `write_weights`, `mapped_weights`, `put_weights`.
Elsewhere   checkpoints (engine/checkpoint.py); bundles (above).
Promise     a weight that stands in a model twice stands in the file once; nothing is ever unpickled; weights go
            into a model that has exactly these names and shapes, or not at all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dougong.core.errors import CheckpointError


def distinct_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, detached but not copied; of tied ones, the first name. Of spread ones, the part here."""
    distinct: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, weight in model.state_dict().items():
        weight = local_part(weight)
        place = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
        if weight.numel() == 0 or place not in seen:
            seen.add(place)
            distinct[name] = weight
    return distinct


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that is spread; the tensor itself where it is not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)


def mapped_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, which is mapped: to be copied at once, and read no further than they are.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). Use another checkpoint.") from None


def put_weights(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Copy weights into the model.

    Raises:
        CheckpointError: a name or a shape differs; the model is as before.
    """
    own = distinct_weights(model)
    if own.keys() != weights.keys():
        missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise CheckpointError(
            f"{where} is of another model: it lacks {_some(missing)} and has {_some(extra)} besides. "
            "Build the model with the settings of that run."
        )
    for name, weight in own.items():
        if weight.shape != weights[name].shape:
            raise CheckpointError(
                f"{where} is of another model: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(weight.shape)} here. Build the model with the settings of that run."
            )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
