"""Libraries that only some of this area's work needs.

Here        `needed`.
Elsewhere   which extra brings which (pyproject.toml).
Promise     one that is not installed is told in one line, with what installs it, before any work is lost.
"""

from __future__ import annotations

import importlib
from typing import Any

from dougong.core.errors import ConfigError


def needed(module: str, extra: str) -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(
            f"this needs {package}, which is not installed. Install it with: pip install 'dougong[{extra}]'."
        ) from None
