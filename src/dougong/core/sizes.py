"""Numbers of bytes and of seconds as people write them.

Here        `read_bytes`, `bytes_as_text`, `read_seconds`.
Elsewhere   who asks for them.
Promise     "80GiB" is 80 times 2 to the 30th, "80GB" 80 times 10 to the 9th; anything else is refused with an example.
"""

from __future__ import annotations

import re
from typing import Final

from dougong.core.errors import ConfigError

UNITS: Final = {
    "B": 1,
    **{f"{letter}iB": 1024 ** (place + 1) for place, letter in enumerate("KMGT")},
    **{f"{letter}B": 1000 ** (place + 1) for place, letter in enumerate("kMGT")},
    "KB": 1000,
}

SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}

_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def read_bytes(text: str) -> float:
    """
    Raises:
        ConfigError: it is no number of bytes.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None or found[2] not in UNITS:
        raise ConfigError(f"{text!r} is no number of bytes. Write for example 80GiB, 512MiB or 16GB.")
    size: float = float(found[1]) * UNITS[found[2]]
    return size


def bytes_as_text(count: float) -> str:
    """In the largest unit of which there is one."""
    for letter, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:.3g} {letter}iB"
    return f"{count:.0f} B"


def read_seconds(text: str, option: str = "") -> float:
    """A time above 0; `option` is who asked for it.

    Raises:
        ConfigError: it is no time.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None or found[2] not in SECONDS or not float(found[1]):
        raise ConfigError(f"{option} {text!r} is no time. Write for example 5ms, 2s or 10min.".lstrip())
    seconds: float = float(found[1]) * SECONDS[found[2]]
    return seconds
