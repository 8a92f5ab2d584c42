"""Signals and volumes: NumPy files or raw columns of numbers.

Here        SignalConfig, SignalModality, VolumeConfig, VolumeModality; `list_content`, a cell of raw numbers as bytes.
Elsewhere   fetching the file (medium.py).
Promise     no array is unpickled, none is read before its claimed size is found small enough, none has NaN in it.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from dougong.core.config import Config
from dougong.core.signature import SignalInput, VolumeInput
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.damage.numbers import SIGNALS, VOLUMES
from dougong.data.modality.medium import BadValue, Modality, media_bytes, media_key
from dougong.data.quality import SIGNAL, VOLUME, Quality, signal_quality, volume_quality

LARGEST_NUMBERS: Final = 64 * 2**20


class SignalConfig(Config):
    """Channels over time; what is longer than `max_samples` is cut at the end."""

    kind: Literal["signal"] = "signal"
    column: str
    num_channels: int = 1
    max_samples: int = 4096
    mean: float = 0.0
    scale: float = 1.0


class VolumeConfig(Config):
    """Voxels, cut or padded around the centre to one size."""

    kind: Literal["volume"] = "volume"
    column: str
    depth: int
    height: int
    width: int
    mean: float = 0.0
    scale: float = 1.0


class _ArrayModality(Modality):
    def __init__(self, config: SignalConfig | VolumeConfig) -> None:
        self._config = config

    @property
    def columns(self) -> tuple[str, ...]:
        return (self._config.column,)

    def key(self, cells: tuple[Any, ...]) -> Hashable:
        cell = cells[0]
        return media_key(list_content(cell) if isinstance(cell, list) else cell)


class SignalModality(_ArrayModality):
    """Decoded as (C, T)."""

    quality_names = SIGNAL

    def __init__(self, config: SignalConfig) -> None:
        super().__init__(config)
        self.config = config

    def signature(self) -> SignalInput:
        return SignalInput(num_channels=self.config.num_channels, max_samples=self.config.max_samples)

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        samples = read_array(cells[0], folder)
        samples = samples[None] if samples.ndim == 1 else samples
        if samples.ndim != 2 or samples.shape[0] != self.config.num_channels:
            raise BadValue(f"has shape {samples.shape}, not ({self.config.num_channels}, time)")
        return _standardised(samples[:, : self.config.max_samples], self.config)

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        longest = max((medium.shape[1] for medium in media), default=1)
        samples_UCT = np.zeros((len(media), self.config.num_channels, longest), np.float32)
        mask_UT = np.zeros((len(media), longest), np.bool_)
        for index, medium in enumerate(media):
            samples_UCT[index, :, : medium.shape[1]] = medium
            mask_UT[index, : medium.shape[1]] = True
        return {"samples_UCT": samples_UCT, "mask_UT": mask_UT}

    @property
    def damages(self) -> Mapping[str, Damage]:
        return SIGNALS

    def quality(self, values: Mapping[str, Array]) -> Quality:
        return signal_quality(values["samples_UCT"], values["mask_UT"], self.config.max_samples)


class VolumeModality(_ArrayModality):
    """Decoded as (D, H, W)."""

    quality_names = VOLUME

    def __init__(self, config: VolumeConfig) -> None:
        super().__init__(config)
        self.config = config

    def signature(self) -> VolumeInput:
        return VolumeInput(depth=self.config.depth, height=self.config.height, width=self.config.width)

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        voxels = read_array(cells[0], folder)
        if voxels.ndim != 3:
            raise BadValue(f"has {voxels.ndim} dimensions, not the 3 of a volume")
        voxels = _standardised(voxels, self.config)
        for axis, size in enumerate((self.config.depth, self.config.height, self.config.width)):
            extra = voxels.shape[axis] - size
            if extra > 0:
                voxels = voxels.take(range(extra // 2, extra // 2 + size), axis)
            elif extra < 0:
                around = [(0, 0)] * 3
                around[axis] = (-extra // 2, -extra - -extra // 2)
                voxels = np.pad(voxels, around)
        return voxels

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        size = (self.config.depth, self.config.height, self.config.width)
        return {"voxels_U1DHW": np.stack(media)[:, None] if media else np.zeros((0, 1, *size), np.float32)}

    @property
    def damages(self) -> Mapping[str, Damage]:
        return VOLUMES

    def quality(self, values: Mapping[str, Array]) -> Quality:
        return volume_quality(values["voxels_U1DHW"])


def read_array(cell: Any, folder: Path) -> Array:
    """A float array from nested lists of numbers, or from the bytes or path of a .npy file.

    Raises:
        BadValue: not numbers, ragged, too many, or not finite.
    """
    if isinstance(cell, list):
        array = _grid(cell)
    else:
        content = io.BytesIO(media_bytes(cell, folder))
        try:
            version = np.lib.format.read_magic(content)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reader(content)
            if dtype.hasobject:
                raise BadValue("holds Python objects, which are never unpickled")
            if int(np.prod(shape, dtype=np.float64)) > LARGEST_NUMBERS:
                raise BadValue(f"claims {shape} numbers, over the limit of {LARGEST_NUMBERS:,}")
            missing = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize - len(content.getbuffer()) + content.tell()
            if missing > 0:
                raise BadValue(f"is truncated: {missing} bytes of its numbers are not there")
            if dtype.kind not in "biuf":
                raise BadValue(f"holds {dtype}, not real numbers")
            content.seek(0)
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
                array = np.load(content, allow_pickle=False).astype(np.float32)
        except BadValue:
            raise
        except Exception as error:  # a broken header may raise anything, SyntaxError among it
            raise BadValue(f"is not a whole .npy file ({str(error)[:80]})") from None
    if array.size == 0:
        raise BadValue("is empty")
    if not np.isfinite(array).all():
        raise BadValue("has values that are not numbers (NaN or infinite)")
    return array


def list_content(cell: list[Any]) -> bytes:
    """Equal for the same numbers in the same shape, whether a file stores them as whole or as single or double ones."""
    try:
        array = _grid(cell)
    except BadValue:
        return repr(cell).encode("utf-8", "surrogatepass")
    return repr(array.shape).encode() + array.tobytes()


def _grid(cell: list[Any]) -> Array:
    try:
        with np.errstate(over="ignore"):
            return np.asarray(cell, np.float32)
    except (TypeError, ValueError):
        raise BadValue("is not an even grid of numbers") from None


def _standardised(array: Array, config: SignalConfig | VolumeConfig) -> Array:
    with np.errstate(over="ignore"):
        changed: Array = ((array - config.mean) / config.scale).astype(np.float32)
    if not np.isfinite(changed).all():
        raise BadValue("has values too far from the others to be computed with")
    return changed
