"""mosec, whose processes find its class in a file of its own (serve_sides.py starts it)."""

from __future__ import annotations

import os
import sys
from typing import Any

import mosec  # only in the peers' environment
from serve_sides import MODELS, MOST, WAIT_SECONDS, asked


class Served(mosec.Worker):  # type: ignore[misc, unused-ignore]
    """One model, batched."""

    def __init__(self) -> None:
        self.compute = MODELS[os.environ["SIDE_MODEL"]]()

    def forward(self, data: Any) -> Any:
        """Of each value."""
        return [{"answer": value} for value in self.compute([asked(each) for each in data])]


def run(port: int) -> None:
    """Serve until ended."""
    sys.argv = ["mosec", "--port", str(port), "--address", "127.0.0.1", "--timeout", "10000"]
    server = mosec.Server()
    server.append_worker(Served, num=1, max_batch_size=MOST, max_wait_time=round(1000 * WAIT_SECONDS))
    server.run()
