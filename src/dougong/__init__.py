"""Dougong: records of several modalities to a trained, explained and usable model.

Here        fit, load: the whole job in two calls. Heavy parts load when they are used.
Elsewhere   the command line (cli/); whole runs (recipes/); a trained model (bundle/model.py).
Promise     `import dougong` loads no tensor library.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dougong.bundle.model import Model, load
    from dougong.recipes.fit import fit

# transformers loads torchao where it is installed, which then warns of kernels that this machine cannot load, and torch
# of what torchao registers.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["Model", "fit", "load"]

_HOMES = {"fit": "dougong.recipes.fit", "load": "dougong.bundle.model", "Model": "dougong.bundle.model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dougong' has no attribute {name!r}. It has {', '.join(__all__)}.")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
