"""Spoils media on purpose: in training, so that a model learns to stand it; in judging, to see whether it does.

Here        Corruption, CorruptConfig, `corrupt`, Corruptor, `parse_corruption`.
Elsewhere   the formulas (data/damage/); spoiling the media of a batch (data/collate.py); what the figures mean
            (engine/robustness.py).
Promise     level 0 is the medium itself, bit for bit; a medium is spoilt the same way whatever stands beside it in
            its batch, and in judging whatever batch it comes in; the medium given is never written into.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import field_validator, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.modality.medium import Modality


class Corruption(Config):
    """One modality spoilt, always as strongly."""

    modality: str
    """Its name: a column's, or "table"."""

    kind: str | None = None
    """One that this kind of modality knows. None: any of them that changes the medium, each medium by its own chance.
    """

    level: float
    """From 0, not at all, to 1."""

    @field_validator("level")
    @classmethod
    def _a_level(cls, level: float) -> float:
        return _checked_level(level)

    def __str__(self) -> str:
        return f"{self.modality}{'' if self.kind is None else ':' + self.kind}={self.level:g}"


class CorruptConfig(Config):
    """What is spoilt in training, medium by medium."""

    chance: float | dict[str, float] = 0.5
    """Of each medium to be spoilt; or by modality, those that are not named never."""

    levels: tuple[float, float] = (0.0, 1.0)
    """The weakest and the strongest; any between is as likely."""

    kinds: dict[str, tuple[str, ...]] = {}
    """By modality, only these. Not named: all that it knows."""

    spare_one: bool = True
    """Leave each record of two or more modalities one that is as it was: where all would be spoilt, the one that is
    spoilt least is given back to all records that share it. So there always is something better to learn to rely on."""

    @field_validator("chance")
    @classmethod
    def _chances(cls, chance: float | dict[str, float]) -> float | dict[str, float]:
        for share in chance.values() if isinstance(chance, dict) else (chance,):
            if not 0 <= share <= 1:
                raise ValueError(f"{share} is no chance. Use 0 (never) to 1 (always).")
        return chance

    @field_validator("levels")
    @classmethod
    def _in_order(cls, levels: tuple[float, float]) -> tuple[float, float]:
        low, high = map(_checked_level, levels)
        if low > high or high == 0:
            raise ValueError(f"{levels} is no range from weak to strong. Use for example (0.0, 1.0).")
        return levels

    @model_validator(mode="after")
    def _kinds_that_come(self) -> CorruptConfig:
        for name, kinds in self.kinds.items():
            if not kinds:
                raise ValueError(f"kinds of {name!r} are none. To leave {name} as it is, give it no chance.")
            if self.chance_of(name) == 0:
                raise ValueError(f"kinds of {name!r} can take no effect: its chance is 0. Leave them out.")
        return self

    def chance_of(self, name: str) -> float:
        """Of a modality's medium to be spoilt."""
        return self.chance.get(name, 0.0) if isinstance(self.chance, dict) else self.chance

    def only(self, names: Sequence[str]) -> CorruptConfig | None:
        """The same for fewer modalities; None where nothing is left to spoil."""
        chance = self.chance
        if isinstance(chance, dict):
            chance = {name: share for name, share in chance.items() if name in names}
            if not chance:
                return None
        kinds = {name: kinds for name, kinds in self.kinds.items() if name in names}
        return self.model_copy(update={"chance": chance, "kinds": kinds})


def _checked_level(level: float) -> float:
    if not 0 <= level <= 1:  # NaN is not
        raise ValueError(f"{level} is no level. Use 0 (as it was) to 1 (spoilt the most).")
    return level


def corrupt(modality: Modality, medium: Array, kind: str | None, level: float, random: np.random.Generator) -> Array:
    """A decoded medium, spoilt. At level 0, or where nothing of the kind can change it, the same array comes back.

    Without a kind, those that could not change the medium at any level are passed over: a grey picture has no colour to
    lose. One that is too weak to change it this time is not: else weak levels would spoil as often as strong ones.

    Raises:
        ConfigError: the modality knows no such kind.
    """
    damages = modality.damages
    if kind is not None and kind not in damages:
        raise ConfigError(f"{kind!r} is no corruption of this modality. Use one of {', '.join(damages)}.")
    if level == 0:
        return medium
    for name in random.permutation(list(damages)) if kind is None else [kind]:
        changed = damages[str(name)](medium, level, random)
        if not np.array_equal(changed, medium, equal_nan=True):
            return changed
        if _can_change(damages[str(name)], medium):
            return medium
    return medium


def _can_change(damage: Damage, medium: Array) -> bool:
    return not np.array_equal(damage(medium, 1.0, np.random.default_rng(0)), medium, equal_nan=True)


def parse_corruption(text: str) -> Corruption:
    """From `MODALITY=LEVEL` or `MODALITY:KIND=LEVEL`. A name may hold colons: the last one parts it from the kind.

    Raises:
        ConfigError: it is neither, or the level is none.
    """
    what, equals, number = text.rpartition("=")
    try:
        level = float(number) if equals and what else math.nan
        if not 0 <= level <= 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--corrupt {text!r} does not read MODALITY=LEVEL or MODALITY:KIND=LEVEL, with a level from 0 to 1. "
            "Use for example --corrupt image:blur=0.5, or --corrupt all."
        ) from None
    name, colon, kind = what.rpartition(":")
    return Corruption(modality=name if colon else what, kind=kind if colon else None, level=level)


def check_corruptions(corruptions: Sequence[Corruption], modalities: Mapping[str, Modality]) -> None:
    """Refuse what is not there.

    Raises:
        ConfigError: a modality is not there, does not know the kind, or stands twice.
    """
    seen: set[str] = set()
    for one in corruptions:
        _check_kinds(one.modality, () if one.kind is None else (one.kind,), modalities)
        if one.modality in seen:
            raise ConfigError(f"corruption names {one.modality!r} twice. Give each modality one corruption.")
        seen.add(one.modality)


def check_config(config: CorruptConfig, modalities: Mapping[str, Modality]) -> None:
    """The same for training's."""
    for name in config.chance if isinstance(config.chance, dict) else ():
        _check_kinds(name, (), modalities)
    for name, kinds in config.kinds.items():
        _check_kinds(name, kinds, modalities)


def _check_kinds(name: str, kinds: Sequence[str], modalities: Mapping[str, Modality]) -> None:
    if name not in modalities:
        raise ConfigError(f"corruption names {name!r}, which is no modality. Use some of {', '.join(modalities)}.")
    for kind in kinds:
        if kind not in modalities[name].damages:
            known = ", ".join(modalities[name].damages)
            raise ConfigError(f"{kind!r} is no corruption of {name!r}. Use one of {known}.")


class Spoiling(NamedTuple):
    """What is to be done to one medium."""

    kind: str | None
    level: float
    seed: int


class Corruptor:
    """Decides what is spoilt, of which media, and how strongly."""

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        seed: int,
        training: CorruptConfig | None = None,
        judging: Sequence[Corruption] = (),
    ) -> None:
        """One of `training` and `judging`.

        Raises:
            ConfigError: both, or what is not there.
        """
        if training is not None and judging:
            raise ConfigError("corrupt and corruptions both say what is spoilt. Give one of them.")
        check_corruptions(judging, modalities)
        if training is not None:
            check_config(training, modalities)
        self._seed, self._training = seed, training
        self._judging = {one.modality: one for one in judging}

    @property
    def idle(self) -> bool:
        """Whether nothing is ever spoilt."""
        return self._training is None and not self._judging

    def choose(
        self,
        keys: Mapping[str, Sequence[Hashable]],
        index: Mapping[str, npt.NDArray[np.int64]],
        there: Mapping[str, npt.NDArray[np.bool_]],
        number: tuple[int, int],
    ) -> dict[str, list[Spoiling | None]]:
        """For each modality's U media, what is done to each.

        `index` and `there` are, by modality, which medium each of B records has, and whether it has any.
        """
        chosen = {name: [self._one(name, key, number) for key in own] for name, own in keys.items()}
        if self._training is not None and self._training.spare_one:
            _spare(chosen, index, there)
        return chosen

    def _one(self, name: str, key: Hashable, number: tuple[int, int]) -> Spoiling | None:
        # By the medium itself, not its place: then neither a neighbour nor the batch's size says what becomes of it.
        if self._training is None:
            one = self._judging.get(name)
            if one is None or one.level == 0:
                return None
            return Spoiling(one.kind, one.level, derive_seed(self._seed, "corrupt", name, repr(key)))
        seed = derive_seed(self._seed, "corrupt", name, *number, repr(key))
        random = np.random.default_rng(seed)
        if random.random() >= self._training.chance_of(name):
            return None
        level = float(random.uniform(*self._training.levels))
        kinds = self._training.kinds.get(name)
        kind = None if kinds is None else str(random.choice(kinds))
        return Spoiling(kind, level, derive_seed(seed, "damage")) if level > 0 else None


def _spare(
    chosen: dict[str, list[Spoiling | None]],
    index: Mapping[str, npt.NDArray[np.int64]],
    there: Mapping[str, npt.NDArray[np.bool_]],
) -> None:
    num_records = len(next(iter(there.values())))
    for record in range(num_records):
        own = [(name, int(index[name][record])) for name in chosen if there[name][record]]
        levels = {place: one.level for place in own if (one := chosen[place[0]][place[1]]) is not None}
        if len(own) > 1 and len(levels) == len(own):
            name, medium = min(levels, key=levels.__getitem__)
            chosen[name][medium] = None
