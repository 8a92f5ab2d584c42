"""An export's graphs where a network is expected.

Here        EngineConfig, Engine (the interface), GraphEngine (an export's graphs), EngineNetwork (an engine as a
            model's network), `open_exported`; `media_of`, a batch as graphs take it.
Elsewhere   which graph is fed what (runtime.py); making exports, other engines (compress/); what a user holds
            (model.py).
Promise     the same code feeds the graphs here and where Dougong is not installed. An export's files are read once,
            when their sums have just been checked, and opened when first asked: a process may fork in between, and its
            children answer with what was checked, whatever has become of the folder.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.bundle import runtime
from dougong.core.bundle import Manifest
from dougong.core.config import Config
from dougong.core.errors import BundleError, ConfigError
from dougong.core.files import inside
from dougong.data.preparation import Preparation
from dougong.model.evidence import Opinion
from dougong.model.sandwich import Sandwich, SandwichOutput
from dougong.nn.batch import Batch

KIND: Final = "export"
"""What an export's manifest says that it is."""

PACKAGES: Final = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch", "inductor": "torch"}
"""What opens the graphs, by what they were exported for."""

CODE: Final = ("torch", "inductor")
"""Kinds of export that are code: what opens them runs what stands in them."""

Kind = Literal["openvino", "onnx", "torch", "inductor", "eager", "compiled"]


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


class GraphEngine(Engine):
    """An export, which is opened when it is first asked."""

    def __init__(self, folder: Path, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.config.apply_affinity()
        self.spec: dict[str, Any] = json.loads((folder / runtime.EXPORT).read_text(encoding="utf-8"))
        self.kind = self.spec["to"]
        self._contents = {name: _read(folder, name) for name in runtime.file_names(self.spec)}

    @functools.cached_property
    def call(self) -> runtime.Call:
        contents, self._contents = self._contents, {}
        return self.opened(contents)

    def opened(self, contents: Mapping[str, bytes]) -> runtime.Call:
        return runtime.open_graphs(self.spec, contents, self.config.threads)

    def run(self, batch: Batch) -> dict[str, Tensor]:
        media, quality = media_of(batch)
        found = runtime.run_parts(self.spec, self.call, media, quality)
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def precisions(self) -> dict[str, str]:
        return {}


def _read(folder: Path, name: str) -> bytes:
    path = inside(folder, f"{runtime.GRAPHS}/{name}")
    if path is None:
        raise BundleError(f"{folder} names the graph {name!r}, which lies outside of it. Do not trust this export.")
    return path.read_bytes()


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


def media_of(batch: Batch) -> tuple[runtime.Media, runtime.Arrays]:
    """A batch's media as NumPy arrays, and the figures of quality of those that have some."""
    media = {
        name: (
            {key: value.numpy() for key, value in one.values.items()},
            one.index_B.numpy(),
            one.present_B.numpy(),
        )
        for name, one in batch.media.items()
    }
    quality = {name: one.quality_UQ.numpy() for name, one in batch.media.items() if one.quality_UQ is not None}
    return media, quality


def open_exported(
    folder: Path, manifest: Manifest, config: EngineConfig | None = None, *, trusted: bool = False
) -> tuple[Preparation, Sandwich]:
    """What an export's sums were just checked of (`read_bundle`): its preparation, and its graphs as a network.

    A torch.export package is opened only where it is `trusted`: torch evaluates expressions that stand in it, and
    unpickles what it says is pickled, so it is code, and sums do not say whose. So are compiled graphs, which are a
    library of this machine's own instructions.

    Raises:
        BundleError: it lacks what an export has.
        ConfigError: its engine is not installed, or it is code and not trusted.
    """
    try:
        engine = GraphEngine(folder, config)
        package = PACKAGES[engine.kind]
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{folder} is no whole export. Take it from its source again.") from None
    # By what opens the graphs: not by what the manifest says.
    if engine.kind in CODE and not trusted:
        what = "a torch.export package" if engine.kind == "torch" else "compiled by AOTInductor"
        raise ConfigError(
            f"{folder} is {what}, which is code: torch runs what stands in it. Ask an export for "
            "openvino or onnx, or, if it is your own, its run.py."
        )
    if importlib.util.find_spec(package) is None:  # not imported: some start threads, which outlive no fork
        raise ConfigError(
            f"{folder} is answered by {package}, which is not installed. "
            "Install it with: pip install 'dougong[compress]'."
        )
    network = EngineNetwork(engine, list(manifest.signature.inputs))
    return Preparation.load(folder), cast(Sandwich, network)
