"""Weights, gradients and what the optimizer keeps, on the disk, but for the blocks that are at work.

Here        OffloadConfig, `apply_offload`, Offloaded.
Elsewhere   the files (shelf.py); activations (recompute.py, saved.py); checkpoints, which are whole without these files
            (engine/checkpoint.py).
Promise     the numbers are those of a run without it, bit for bit; so is everything that looks at weights: they are
            where the model says, and may be read, judged and saved as ever. What a step needs in memory at one time is
            a block's weights and gradients, beside activations; the rest is the system's to drop or to keep.

A block's weights are asked for while the one before it works, forwards and backwards. A gradient is put into its file
when it arrives, and its memory let go. The optimizer goes from block to block, the next being read and the one before
being written meanwhile. Embedding and head are one unit more. (Rajbhandari et al. 2021, arXiv:2104.07857; Ren et al.
2021, arXiv:2101.06840, whose gradients and optimizer are where the processor is, as all is here.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.memory.shelf import Shelf, Slot
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack

Place = Literal["memory", "disk"]

MEANS: Final = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""

REST: Final = "rest"
"""The unit of what is in no block."""


class OffloadConfig(Config):
    """What lies on the disk."""

    optimizer: Place = "memory"
    """The optimizer's state: half of all, where weights and gradients are in fp32."""

    gradients: Place = "memory"
    weights: Place = "memory"

    folder: str | None = None
    """Where. None: in the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _all_of_it(cls, given: Any) -> Any:
        """`offload: disk` is all three."""
        if given in ("memory", "disk"):
            return {"optimizer": given, "gradients": given, "weights": given}
        return given

    @model_validator(mode="after")
    def _somewhere(self) -> OffloadConfig:
        if self.folder is not None and not self.on_disk:
            raise ValueError(
                f"folder={self.folder} has no effect where nothing lies on the disk. Use disk, or no folder."
            )
        return self

    @property
    def on_disk(self) -> tuple[str, ...]:
        """Which of the three."""
        return tuple(kind for kind in ("weights", "gradients", "optimizer") if getattr(self, kind) == "disk")


class Offloaded:
    """A model of whose state some lies on the disk."""

    def __init__(self, model: BlockStack[Any, Any], config: OffloadConfig, folder: Path) -> None:
        self.model, self.config = model, config
        self._unit_of: dict[nn.Parameter, str] = {}
        self._name_of: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters():
            self._name_of[parameter] = name
            self._unit_of[parameter] = _unit_of(name)
        self.units = [f"block-{place}" for place in range(len(model.blocks))]
        self.units = [unit for unit in [REST, *self.units] if unit in self._unit_of.values()]
        self.shelf = Shelf(folder, {unit: self._slots(unit) for unit in self.units})
        self._arriving: str | None = None
        """The unit whose gradients arrive."""

        self._by = 1.0
        """By what gradients are to be multiplied."""

        self._undo: list[Callable[[], None]] = []
        self._weights = config.weights == "disk"
        if self._weights:
            for parameter in self._unit_of:
                self._shelve(parameter)
            for place, block in enumerate(model.blocks):
                self._undo.append(block.register_forward_pre_hook(self._ahead_of(place)).remove)
        if config.gradients == "disk":
            for parameter in self._unit_of:
                if parameter.requires_grad:
                    undo = parameter.register_post_accumulate_grad_hook(self._arrived).remove  # type: ignore[no-untyped-call]
                    self._undo.append(undo)

    def _slots(self, unit: str) -> dict[str, dict[str, Slot]]:
        own = {self._name_of[p]: p for p, its in self._unit_of.items() if its == unit}
        slots = {name: Slot(p.dtype, tuple(local_part(p).shape)) for name, p in own.items()}
        trained = {name: slot for name, slot in slots.items() if own[name].requires_grad}
        kinds = {}
        if self.config.weights == "disk":
            kinds["weight"] = slots
        if self.config.gradients == "disk":
            kinds["gradient"] = trained
        if self.config.optimizer == "disk":
            kinds |= dict.fromkeys(MEANS, trained)
        return kinds

    def _lying(self, kind: str, parameter: nn.Parameter) -> Tensor:
        return self.shelf.tensor(self._unit_of[parameter], kind, self._name_of[parameter])

    def _shelve(self, parameter: nn.Parameter) -> None:
        self.shelf.write(self._unit_of[parameter], "weight", self._name_of[parameter], parameter)
        parameter.data = self._lying("weight", parameter)

    # Weights -------------------------------------------------------------------------------------------------

    def _ahead_of(self, place: int) -> Callable[..., None]:
        following = f"block-{place + 1}"
        following = following if following in self.units else REST

        def ahead(*_: Any) -> None:
            if following in self.units:
                self.shelf.soon(following, ["weight"])

        return ahead

    # Gradients -----------------------------------------------------------------------------------------------

    def _arrived(self, parameter: nn.Parameter) -> None:
        unit = self._unit_of[parameter]
        if unit != self._arriving:
            if self._arriving is not None:
                self.shelf.behind(self._arriving)
            self._arriving = unit
            before = self._before(unit)
            if before is not None:
                self.shelf.soon(before, ["weight"])
        lying, gradient = self._lying("gradient", parameter), parameter.grad
        assert gradient is not None
        if gradient.data_ptr() != lying.data_ptr():  # else it has been added to what lies there
            self.shelf.write(unit, "gradient", self._name_of[parameter], gradient)
            parameter.grad = lying

    def _before(self, unit: str) -> str | None:
        place = self.units.index(unit)
        return self.units[place - 1] if place else None

    # The optimizer -------------------------------------------------------------------------------------------

    def take(self, optimizer: Optimizer) -> None:
        """Have this optimizer step unit by unit; what it keeps lies on the disk, if it is to.

        Raises:
            ConfigError: it keeps something else.
        """
        if self.config.optimizer == "disk":
            if type(optimizer) is not AdamW:
                raise ConfigError(
                    f"memory.offload.optimizer=disk puts the two fp32 means of AdamW there, and the optimizer is "
                    f"{type(optimizer).__name__}. Use memory.offload.optimizer: memory."
                )
            for parameter in self._trained(optimizer):
                means = {kind: _spread_like(parameter, self._lying(kind, parameter)) for kind in MEANS}
                optimizer.state[parameter] = {"step": torch.zeros(()), **means}
        step = optimizer.step

        def by_unit(*_: Any) -> None:
            groups = optimizer.param_groups
            # From the last: those before it have been looked at last, and are needed first by the next step.
            order = self.units[::-1]
            try:
                for place, unit in enumerate(order):
                    for following in order[place + 1 : place + 2]:
                        self.shelf.soon(following, ["weight", "gradient", *MEANS])
                    own = [[p for p in group["params"] if self._unit_of.get(p, REST) == unit] for group in groups]
                    if self._by != 1.0:
                        self._multiplied([p for each in own for p in each])
                    optimizer.param_groups = [
                        {**group, "params": each} for group, each in zip(groups, own, strict=True)
                    ]
                    step()
                    for parameter in itertools.chain(*own):
                        parameter.grad = None  # a multiplied one is in memory
                    self.shelf.behind(unit)
            finally:
                optimizer.param_groups = groups
            self._arriving, self._by = None, 1.0

        optimizer.step = by_unit  # type: ignore[method-assign, assignment]

    def multiply(self, gradients: Sequence[Tensor], by: float) -> None:
        """When the optimizer comes to them: they need not be read for it, nor written."""
        self._by = by

    def _multiplied(self, parameters: Sequence[nn.Parameter]) -> None:
        """What lies on the disk stays as it is there."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad * self._by

    def _trained(self, optimizer: Optimizer) -> Sequence[nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"] if p in self._unit_of]

    def close(self) -> None:
        """The model is in memory again, as far as it was, and the files are gone."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.shelf.close()


def apply_offload(model: BlockStack[Any, Any], config: OffloadConfig, folder: Path) -> Offloaded:
    """Put on the disk what is to lie there, in place; after all else that is done to the model.

    Raises:
        ConfigError: the folder has no room, or the model is on a device that cannot compute with files.
    """
    strange = next((p.device.type for p in model.parameters() if p.device.type != "cpu"), None)
    if strange is not None:
        raise ConfigError(
            f"memory.offload maps files into the processor's memory, and the model is on {strange}. Train on the "
            "processor, or spread the state by plan.shard."
        )
    return Offloaded(model, config, folder)


def _spread_like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """What is here of a tensor that is spread as this parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _unit_of(name: str) -> str:
    parts = name.split(".")
    return f"block-{parts[1]}" if parts[0] == "blocks" else REST
