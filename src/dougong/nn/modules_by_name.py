"""Modules under names that a user chose.

Here        ModulesByName.
Elsewhere   nn.ModuleDict, which refuses names such as "keys" or "a.b" that a column of a table may well have.
Promise     any names will do, and a parameter's full name still shows which one it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn


class ModulesByName(nn.Module):
    """A fixed mapping of modules; the order counts, as the parameters' names hold each one's place."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}
        for place, (name, module) in enumerate(modules.items()):
            self._keys[name] = f"{place}_{re.sub(r'[^0-9A-Za-z]', '_', name)}"
            self.add_module(self._keys[name], module)

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(self._keys[name])
