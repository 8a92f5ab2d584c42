"""torch itself as an engine, and which of several is the fastest.

Here        Eager (the model as it is, or compiled), `fastest` (which of several, by measurement).
Elsewhere   what every engine does, and exports' (bundle/exported.py); OpenVINO's (openvino.py); making exports
            (compress/export.py).
Promise     all answer the same batch alike, within rounding of their own number formats; what an engine says of its
            precision is read back from it, never from what was asked of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dougong.bundle.exported import Engine, EngineConfig
from dougong.compress.clock import Timed, interleaved
from dougong.model.sandwich import Sandwich, SandwichOutput
from dougong.nn.batch import Batch


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


def fastest(engines: Mapping[str, Engine], batch: Batch, *, turns: int = 9) -> tuple[str, dict[str, Timed]]:
    """The name of the engine that answers this batch fastest, and what was measured of all, in turn."""
    runs = {name: functools.partial(engine.run, batch) for name, engine in engines.items()}
    timings = interleaved(runs, turns=turns)
    return min(timings, key=lambda name: timings[name].median), timings
