"""What every engine does: answer a batch, and tell what ran.

Here        EngineConfig, Engine (the interface), Eager (torch itself, compiled or not), EngineNetwork (an engine as a
            model's network), `fastest` (which of several, by measurement).
Elsewhere   engines of exported graphs (graphs.py, openvino.py); making exports (compress/export.py).
Promise     all answer the same batch alike, within rounding of their own number formats; what an engine says of its
            precision is read back from it, never from what was asked of it.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.compress.clock import Timed, interleaved
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.model.evidence import Opinion
from dougong.model.sandwich import Sandwich, SandwichOutput
from dougong.nn.batch import Batch

Kind = Literal["openvino", "onnx", "torch", "eager", "compiled"]
LARGEST_BATCH: Final = 64


class EngineConfig(Config):
    """How an engine uses the machine."""

    threads: int | None = Field(default=None, gt=0)
    """None leaves their number to the engine."""

    cores: tuple[int, ...] | None = None
    """The processor's cores that this process may run on, by number; None: all. Linux alone can keep to some."""

    def apply_affinity(self) -> None:
        """Keep this process, and threads it starts from now on, to the cores.

        Raises:
            ConfigError: this system cannot, or has no such core.
        """
        if self.cores is None:
            return
        if not hasattr(os, "sched_setaffinity"):
            raise ConfigError(f"cores={list(self.cores)}: this system keeps no process to cores. Leave cores out.")
        try:
            os.sched_setaffinity(0, self.cores)
        except (OSError, ValueError):
            known = sorted(os.sched_getaffinity(0))
            raise ConfigError(
                f"cores={list(self.cores)}: this process may run on {known}. Use some of those."
            ) from None


class Engine(ABC):
    """Something that answers batches. Shapes: B records, M modalities, C outputs."""

    kind: Kind

    @abstractmethod
    def run(self, batch: Batch) -> dict[str, Tensor]:
        """What the model says, by name as Roof has it (compress/parts.py): `output_BC` always."""

    @abstractmethod
    def precisions(self) -> dict[str, str]:
        """The number format in which each layer really ran, by its name in the model: its weights' and, after a slash,
        its inputs'. Empty where an engine does not tell."""


class Eager(Engine):
    """The model as it is, or compiled by torch."""

    def __init__(self, network: Sandwich, config: EngineConfig | None = None, *, compiled: bool = False) -> None:
        config = config or EngineConfig()
        config.apply_affinity()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.kind = "compiled" if compiled else "eager"
        self._network = network.eval()
        self._run: Any = torch.compile(network, dynamic=True) if compiled else network

    def run(self, batch: Batch) -> dict[str, Tensor]:
        with torch.inference_mode():
            output: SandwichOutput = self._run(batch)
        found = {"output_BC": output.output_BC, "weight_BM": output.weight_BM, "conflict_B": output.conflict_B}
        if output.opinion is not None:
            found["vacuity_B"] = output.opinion.vacuity_B
        return {name: value for name, value in found.items() if value is not None} | {
            "completed_BM": output.completed_BM
        }

    def precisions(self) -> dict[str, str]:
        kinds = {
            name: str(module.weight.dtype).removeprefix("torch.")
            for name, module in self._network.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        }
        return {name: f"{kind}/{kind}" for name, kind in kinds.items()}


class EngineNetwork(nn.Module):
    """An engine where a network is expected: what predicts and judges need not know which it is."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        super().__init__()
        self.engine = engine
        self.names = tuple(names)
        # Where it is: whoever asks a network looks at its weights.
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, batch: Batch) -> SandwichOutput:
        found = self.engine.run(batch)
        output_BC = found["output_BC"]
        none_BM = torch.zeros(len(output_BC), len(self.names), dtype=torch.bool)
        vacuity_B = found.get("vacuity_B")
        return SandwichOutput(
            output_BC=output_BC,
            fused_BD=output_BC.new_zeros(len(output_BC), 0),  # inner values stay inside an engine
            weight_BM=found.get("weight_BM"),
            vector_BMD=output_BC.new_zeros(*none_BM.shape, 0),
            aligned={},
            truth={},
            completed_BM=found.get("completed_BM", none_BM),
            completed={},
            opinion=None if vacuity_B is None else Opinion(output_BC.exp(), vacuity_B),
            conflict_B=found.get("conflict_B"),
        )


def fastest(engines: Mapping[str, Engine], batch: Batch, *, turns: int = 9) -> tuple[str, dict[str, Timed]]:
    """The name of the engine that answers this batch fastest, and what was measured of all, in turn."""
    runs = {name: functools.partial(engine.run, batch) for name, engine in engines.items()}
    timings = interleaved(runs, turns=turns)
    return min(timings, key=lambda name: timings[name].median), timings
