"""How many bits each layer gets.

Here        Choice, Compute, Plan, `read_plan`; what a choice means in bits and bytes.
Elsewhere   finding a plan (quantise.py); carrying it out (engines/); what really ran (engines/eager.py).
Promise     a plan names layers as the model does, so that it can be read, written by hand, and held against what ran.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, Self

from dougong.core.config import Config, parse
from dougong.core.errors import ConfigError

Choice = Literal["w16a16", "w8a16", "w8a8", "w4a16"]
"""Bits of weights and of activations. a16 computes in the plan's floating point (Compute); w16 is stored as float16."""

Compute = Literal["f32", "bf16"]
"""Floating point in which all is computed that is not computed in whole numbers: float32, or bfloat16, which processors
with units for it do about twice as fast, to three digits."""

BF16: Final = "bf16"

CHOICES: Final[tuple[Choice, ...]] = ("w16a16", "w8a16", "w8a8", "w4a16")
BLIND: Final[tuple[Choice, ...]] = ("w16a16", "w8a16")
"""What can be chosen without a record: 8 bits of weights round so little that nothing need be known."""

UNIFORM: Final[dict[str, Choice]] = {"16": "w16a16", "8": "w8a8", "4": "w4a16", **{each: each for each in CHOICES}}
"""What people may say for all layers alike."""

GROUP: Final = 32
"""Weights in a row that share a scale, at 4 bits."""


class Plan(Config):
    """A choice for each layer; what is not named is left as it is."""

    layers: dict[str, Choice] = {}
    """By the layers' names in the model."""

    compute: Compute = "f32"

    @classmethod
    def uniform(cls, choice: Choice, layers: Mapping[str, Iterable[Choice]], compute: Compute = "f32") -> Self:
        """The same for all; where a layer cannot have it (a look-up has no activations, and of what no record reaches
        nothing is known), 8 bits of its weights alone."""
        chosen: dict[str, Choice] = {name: choice if choice in known else "w8a16" for name, known in layers.items()}
        return cls(layers=chosen, compute=compute)

    def counts(self) -> dict[str, int]:
        """How many layers have each choice."""
        found = Counter(self.layers.values())
        return {choice: found[choice] for choice in CHOICES if found[choice]}


def weight_bits(choice: Choice) -> int:
    return int(choice[1:].split("a")[0])


def weight_bytes(rows: int, columns: int, choice: Choice) -> int:
    """What the weights of a layer take in a file, scales included."""
    bits = weight_bits(choice)
    if bits == 16:
        return 2 * rows * columns
    if bits == 8:
        return rows * columns + 4 * rows
    groups = columns // GROUP if columns % GROUP == 0 else 1
    return -(-rows * columns // 2) + 3 * rows * groups  # a float16 scale and a zero point


def read_choice(bits: str) -> Choice:
    """What `--bits` says of all layers.

    Raises:
        ConfigError: it says nothing of the kind.
    """
    if bits not in UNIFORM:
        raise ConfigError(f"--bits {bits!r} is no choice of bits. Use mixed, or one of {', '.join(UNIFORM)}.")
    return UNIFORM[bits]


def read_plan(file: Path) -> Plan:
    """A plan from a JSON file of layers' names and choices, such as `dougong export --json` tells.

    Raises:
        ConfigError: no such file, no JSON, or no plan.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plan {file} cannot be read as JSON ({error}). Give layers' names with choices.") from None
    compute = "f32"
    if isinstance(values, dict) and isinstance(values.get("plan"), dict):
        values, compute = values["plan"], values.get("compute", compute)
    return parse(Plan, {"layers": values, "compute": compute}, where=f"--plan {file.name}")
