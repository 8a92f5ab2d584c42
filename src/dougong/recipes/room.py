"""Whether what a recipe trains has room, before it takes any.

Here        MEMORY_SHARE; `shelf_folder`; `building`, in which a recipe's model is built; `check_state`.
Elsewhere   how much there is (engine/planner/cluster.py); activations, and layouts on several ranks (recipes/plan.py).
Promise     a model whose state has no room is refused in one line, with what would work, and is not killed for it. One
            whose weights are to lie on the disk is built there.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text
from dougong.engine.memory.offload import MEANS, OffloadConfig, passing_bytes
from dougong.engine.memory.shelf import weights_in
from dougong.engine.planner.cluster import free_bytes

MEMORY_SHARE: Final = 0.9
"""Of a device's memory, that is planned with."""


def shelf_folder(offload: OffloadConfig, run: Path | None) -> Path:
    """Where a run's state lies; None: that of no run."""
    if offload.folder is None:
        return Path(tempfile.gettempdir()) if run is None else run / "offload"
    if run is None:
        return Path(offload.folder)
    # Of this run alone, since it is emptied.
    return Path(offload.folder) / f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def building(offload: OffloadConfig, run: Path | None, *, ranks: int = 1) -> Iterator[None]:
    """A model may be built inside, by so many ranks of this machine at a time.

    Raises:
        ConfigError: its weights have no room.
    """
    if "weights" in offload.on_disk:
        with weights_in(shelf_folder(offload, run)):
            yield
        return
    room, taken, known = MEMORY_SHARE * free_bytes() / ranks, 0, set()

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal taken
        if parameter is None or id(parameter) in known:
            return
        known.add(id(parameter))
        taken += parameter.nbytes
        if taken > room:
            raise ConfigError(
                f"the model's weights alone take more than the {bytes_as_text(room)} that may be planned with. Use "
                "memory.offload: disk, or a smaller model."
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def check_state(model: nn.Module, offload: OffloadConfig, *, ranks: int = 1) -> None:
    """Of a model that has been built, whole on each of so many ranks of this machine.

    Raises:
        ConfigError: what its step holds beside its weights and activations has no room.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    gradients = 0 if "gradients" in offload.on_disk else trained
    optimizer = 0 if "optimizer" in offload.on_disk else len(MEANS) * trained
    room = MEMORY_SHARE * free_bytes() / ranks
    passing = passing_bytes(model, offload)
    if gradients + optimizer + passing <= room:
        return
    if gradients + optimizer == 0:
        raise ConfigError(
            f"memory.offload has {bytes_as_text(passing)} on their way between disk and memory at one time, and there "
            f"are {bytes_as_text(room)} that may be planned with. Use a model of smaller blocks, or more memory."
        )
    raise ConfigError(
        f"beside its weights a step holds {bytes_as_text(gradients)} of gradients and {bytes_as_text(optimizer)} that "
        f"the optimizer keeps, and there are {bytes_as_text(room)} that may be planned with. Use memory.offload: disk, "
        "or a smaller model."
    )
