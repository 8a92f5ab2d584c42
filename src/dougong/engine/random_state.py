"""Every source of chance in a run: torch's generators, NumPy's and Python's.

Here        `seed_all`, `random_state`, `restore_random_state`, `random_state_kept`.
Elsewhere   seeds for a purpose (core/seeds.py); keeping the state with a checkpoint (engine/checkpoint.py).
Promise     a restored state draws the same numbers; the state is plain JSON.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Start every generator from one seed."""
    torch.manual_seed(seed)  # every device's
    random.seed(seed)
    np.random.seed(seed % 2**32)  # libraries draw from the global generator


def random_state() -> dict[str, Any]:
    """The state of every generator, as JSON can hold it."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": {
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `state` was taken."""
    torch.set_rng_state(_from_text(state["torch"]))
    if torch.cuda.is_available():
        for device, text in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(_from_text(text), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(numpy_state["key"], dtype=np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the numbers drawn after it are the same."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _to_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
