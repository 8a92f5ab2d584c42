"""The peer that wants its service in a file of its own (serve_sides.py starts it)."""

from __future__ import annotations

import os
from typing import Any

import bentoml  # only in the peers' environment
from serve_sides import MODELS, MOST


@bentoml.service(workers=1, logging={"access": {"enabled": False}})  # type: ignore[untyped-decorator, unused-ignore]
class Served:
    """One model, batched."""

    def __init__(self) -> None:
        self._compute = MODELS[os.environ["SIDE_MODEL"]]()

    @bentoml.api(route="/", batchable=True, max_batch_size=MOST, max_latency_ms=1000)  # type: ignore[untyped-decorator, unused-ignore]
    def predict(self, x: list[Any]) -> Any:
        """Of each value."""
        return self._compute(x)
