"""Other quantisers, each at what it does by itself, on a model of ours.

Here        NNCF's default int8, ONNX Runtime's dynamic int8, torchao's dynamic int8 compiled: each as an Engine.
Elsewhere   who holds them against ours (quantise.py, compress_path.py).
Promise     all are given the same model, cut into the same graphs where they take graphs, and the same threads.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dougong.bundle import runtime
from dougong.bundle.exported import Engine, EngineConfig, media_of
from dougong.compress.backends import fastest_floats
from dougong.compress.engines.eager import Eager
from dougong.compress.export import Source, export, open_engine
from dougong.nn.batch import Batch

ONE_CORE: Final = EngineConfig(threads=1)


def peers_of(source: Source, calibration: Sequence[Batch], scratch: Path) -> dict[str, Engine]:
    """All three, by name."""
    graphs = {to: export(source, scratch / f"peer-{to}", to) for to in ("openvino", "onnx")}
    return {
        "NNCF default int8": nncf_default(graphs["openvino"], calibration),
        "ONNX Runtime dynamic int8": onnxruntime_dynamic(graphs["onnx"], scratch / "dynamic"),
        "torchao int8, compiled": torchao_int8(source),
    }


class Called(Engine):
    """Graphs of a peer, fed as ours are."""

    kind = "onnx"

    def __init__(self, spec: Mapping[str, Any], call: runtime.Call) -> None:
        self.spec, self.call = spec, call

    def run(self, batch: Batch) -> dict[str, Tensor]:
        found = runtime.run_parts(self.spec, self.call, *media_of(batch))
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def precisions(self) -> dict[str, str]:
        return {}


def nncf_default(folder: Path, calibration: Sequence[Batch]) -> Engine:
    import nncf

    engine = open_engine(folder, ONE_CORE)
    asked: dict[str, list[runtime.Arrays]] = {}

    def noting(name: str, given: runtime.Arrays) -> runtime.Arrays:
        asked.setdefault(name, []).append(given)
        return engine.call(name, given)

    for batch in calibration:
        runtime.run_parts(engine.spec, noting, *media_of(batch))

    class Rounded(runtime.OpenVinoGraphs):
        def written(self, name: str) -> Any:
            graph = super().written(name)
            if name not in asked:
                return graph
            for place, operation in enumerate(graph.get_ordered_ops()):
                operation.set_friendly_name(f"{operation.get_type_name()}_{place}")  # NNCF wants each to have its own
            return nncf.quantize(graph, nncf.Dataset(asked[name]), model_type=nncf.ModelType.TRANSFORMER)

    spec = {**engine.spec, "compute": fastest_floats()}  # what is left in floating point, as ours
    return Called(spec, Rounded(spec, folder / runtime.GRAPHS, ONE_CORE.threads))


def onnxruntime_dynamic(folder: Path, scratch: Path) -> Engine:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(folder, scratch)
    for path in sorted((scratch / "graphs").glob("*.onnx")):
        quantize_dynamic(str(folder / "graphs" / path.name), str(path), weight_type=QuantType.QInt8)
    return open_engine(scratch, ONE_CORE)


def torchao_int8(source: Source) -> Engine:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    network = copy.deepcopy(source.model.network)
    quantize_(network, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    return Eager(network, compiled=True)
