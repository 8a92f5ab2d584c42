"""Engines of exported graphs.

Here        GraphEngine: an export's folder as an Engine; `media_of`, a batch as graphs take it.
Elsewhere   which graph is fed what (compress/runtime.py); what OpenVINO tells of itself (openvino.py).
Promise     the same code feeds the graphs here and where Dougong is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong.compress import runtime
from dougong.compress.engines.engine import Engine, EngineConfig
from dougong.nn.batch import Batch


class GraphEngine(Engine):
    """An export, loaded. Its graphs are opened by runtime.py, or by `call` where an engine has more to tell."""

    def __init__(self, folder: Path, config: EngineConfig | None = None, call: runtime.Call | None = None) -> None:
        config = config or EngineConfig()
        config.apply_affinity()
        self.spec: dict[str, Any] = json.loads((folder / runtime.EXPORT).read_text(encoding="utf-8"))
        self.kind = self.spec["to"]
        self.call = runtime.open_graphs(folder, self.spec, config.threads) if call is None else call

    def run(self, batch: Batch) -> dict[str, Tensor]:
        media, quality = media_of(batch)
        found = runtime.run_parts(self.spec, self.call, media, quality)
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def precisions(self) -> dict[str, str]:
        return {}


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
