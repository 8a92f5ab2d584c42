"""LitServe, whose processes find its class in a file of its own (serve_sides.py starts it)."""

from __future__ import annotations

import os
from typing import Any

import litserve  # only in the peers' environment
from serve_sides import MODELS, MOST, WAIT_SECONDS, asked


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """One model, batched."""

    def setup(self, device: Any) -> None:
        """In the worker."""
        self.compute = MODELS[os.environ["SIDE_MODEL"]]()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would say where to look for it
        """What it asks about."""
        return asked(request)

    def batch(self, inputs: Any) -> Any:
        """As they are."""
        return list(inputs)

    def predict(self, inputs: Any) -> Any:
        """Of each value."""
        return self.compute(inputs)

    def unbatch(self, output: Any) -> Any:
        """As they are."""
        return output

    def encode_response(self, output: Any) -> Any:
        """As the others have it."""
        return {"answer": output}


def run(port: int) -> None:
    """Serve until ended."""
    api = Api(max_batch_size=MOST, batch_timeout=WAIT_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
