"""Puts records together: what they share once, what is bad aside.

Here        Request, View, Collator.
Elsewhere   which records come when (data/loader.py); decoding a cell (data/modality/).
Promise     a batch depends on its records, the seed and its number alone, so it can be made again anywhere; each
            distinct medium is decoded at most once for it, and not at all while the cache still holds it; one bad
            record never costs another.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import field_validator, model_validator

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.batch import Array, BadRecord, BatchArrays, MediaArrays
from dougong.data.corruption import CorruptConfig, Corruption, Corruptor, Spoiling, corrupt
from dougong.data.modality.medium import BadValue, Modality
from dougong.data.position import WHOLE, Share
from dougong.data.preparation import Preparation
from dougong.data.target import encode_target


class View(Config):
    """Some of the modalities; the others are withheld from the records that are seen so."""

    keep: tuple[str, ...]
    """Names of modalities. What a record lacks anyway stays absent."""

    beside: tuple[str, ...] = ()
    """Names of modalities that are encoded for a loss alone: the answer is found without them."""

    weight: float = 1.0
    """How often, in proportion to the other views' weights."""

    from_epoch: int = 0
    """Not seen so before this epoch, counted from 0: what is easy to learn from may come first."""

    until_epoch: int | None = None
    """Nor from this epoch on; None: to the end."""

    @field_validator("weight")
    @classmethod
    def _above_zero(cls, weight: float) -> float:
        if not 0 < weight < math.inf:
            raise ValueError(f"{weight} must be above 0: a view that is never seen is no view. Leave it out.")
        return weight

    @model_validator(mode="after")
    def _some_epoch(self) -> View:
        if self.until_epoch is not None and self.until_epoch <= self.from_epoch:
            raise ValueError(
                f"until_epoch {self.until_epoch} must be above from_epoch {self.from_epoch}: "
                "a view that is never seen is no view. Leave it out."
            )
        return self


class Request(NamedTuple):
    """The cells of one batch."""

    rows: npt.NDArray[np.int64]
    cells: dict[str, list[Any]]
    """By column, the target's included where it is known."""
    number: tuple[int, int]
    """Epoch and batch, for the seed."""

    share: Share = WHOLE
    """Which part of the batch these are the cells of."""

    size: int | None = None
    """How many records the whole batch has. None: these."""

    @property
    def place(self) -> slice:
        """Where these records stand in the whole batch."""
        return self.share.of(len(self.rows) if self.size is None else self.size)


class Collator:
    """Makes batches of requests."""

    def __init__(
        self,
        preparation: Preparation,
        folder: Path,
        *,
        seed: int,
        augment: bool = False,
        views: Sequence[View] = (),
        one_view_a_batch: bool = False,
        withhold: float = 0.0,
        corrupt: CorruptConfig | None = None,
        corruptions: Sequence[Corruption] = (),
        quality: bool = False,
        withheld_beside: bool = False,
        spared: Sequence[str] = (),
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        """`withhold` is each modality's chance to be left out of a record, never of one that has no other; those
        that are `spared` have none.

        With `withheld_beside`, it is encoded all the same, for a loss alone.

        With `one_view_a_batch`, all records of a batch are seen alike, so that a withheld modality costs nothing.
        `corrupt` spoils media by chance, `corruptions` all of a modality alike, a medium the same way in every batch.
        `quality` measures it also where the preparation does not ask for it.

        Raises:
            ConfigError: two of these say different things, or one of them says nothing.
        """
        if views and withhold:
            raise ConfigError("views and withhold both say what is left out. Give one of them.")
        if one_view_a_batch and not views:
            raise ConfigError("one_view_a_batch has no views to choose from. Give views, or leave it out.")
        if not 0 <= withhold < 1:
            raise ConfigError(f"withhold {withhold} is no chance. Use 0 or more and less than 1.")
        self.preparation = preparation
        self.folder = folder
        self._seed = seed
        self._augment = augment
        self._withhold = withhold
        self._withheld_M = np.array([name not in spared for name in preparation.modalities], np.bool_)
        self._corruptor = Corruptor(preparation.modalities, seed=seed, training=corrupt, judging=corruptions)
        self._quality = quality or preparation.quality
        self._withheld_beside = withheld_beside
        names = list(preparation.modalities)
        self._views = tuple(views)
        self._view_VM = np.array([[name in view.keep for name in names] for view in views], np.bool_)
        self._beside_VM = np.array([[name in view.beside for name in names] for view in views], np.bool_)
        self._one_view_a_batch = one_view_a_batch
        self._cache = _Cache(cache_bytes)

    def __call__(self, request: Request, note: Callable[[str], None] | None = None) -> BatchArrays:
        """`note` is told each modality before its media are decoded."""
        names = list(self.preparation.modalities)
        keys = {name: self._keys(modality, request) for name, modality in self.preparation.modalities.items()}
        has_BM = np.array([[key is not None for key in keys[name]] for name in names], np.bool_)
        has_BM = has_BM.reshape(len(names), len(request.rows)).T
        kept_BM, there_BM = self._choose(has_BM, request)

        reasons: dict[int, tuple[str, str]] = {}
        media: dict[str, dict[Hashable, Array]] = {}
        for place, (name, modality) in enumerate(self.preparation.modalities.items()):
            if note is not None:
                note(name)
            media[name] = self._decode(name, modality, request, keys[name], there_BM[:, place], reasons)
        target = self._target(request, reasons)

        good = np.array([index for index in range(len(request.rows)) if index not in reasons], np.int64)
        there = {name: there_BM[good, place] for place, name in enumerate(names)}
        distinct, index = {}, {}
        for name in names:
            distinct[name], index[name] = _share([keys[name][i] for i in good], there[name])
        spoilt = None if self._corruptor.idle else self._corruptor.choose(distinct, index, there, request.number)
        # Each rank alters its media in its own way, as it does not know how many the others have.
        rank = ("rank", request.share.rank) if request.share.rank else ()
        numbered = request.share.world > 1  # else there is nobody to recognise them
        arrays = {}
        for place, (name, modality) in enumerate(self.preparation.modalities.items()):
            random = self._random("augment", name, *request.number, *rank) if self._augment else None
            own, level_U = [media[name][key] for key in distinct[name]], None
            if spoilt is not None:
                own, level_U = _spoil(modality, own, spoilt[name])
            values = modality.stack(own, random)
            arrays[name] = MediaArrays(
                values,
                index[name],
                kept_BM[good, place],
                there[name],
                self._measured(modality, values, request, good, index[name], there[name]) if self._quality else None,
                level_U,
                np.array([_number(key) for key in distinct[name]], np.int64) if numbered else None,
            )
        bad = tuple(BadRecord(int(request.rows[index]), *why) for index, why in sorted(reasons.items()))
        return BatchArrays(arrays, None if target is None else target[good], request.rows[good], bad)

    def _keys(self, modality: Modality, request: Request) -> list[Hashable]:
        return [_key(modality, cells) for cells in _cells(modality, request)]

    def _choose(
        self, has_BM: npt.NDArray[np.bool_], request: Request
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """What each record is seen with; and that with what is only encoded."""
        random = self._random("views", *request.number)
        # Drawn for the whole batch, so that a record is seen alike, whoever has it.
        size = len(has_BM) if request.size is None else request.size
        if self._views:
            chance = _chances(self._views, request.number[0])
            if self._one_view_a_batch:
                chosen = random.choice(len(self._views), 1, p=chance)
            else:
                chosen = random.choice(len(self._views), size, p=chance)[request.place]
            kept_BM = has_BM & self._view_VM[chosen]
            return kept_BM, kept_BM | (has_BM & self._beside_VM[chosen])
        if not self._withhold:
            return has_BM, has_BM
        drawn_BM = random.random((size, has_BM.shape[1]))[request.place]
        kept_BM = has_BM & ((drawn_BM >= self._withhold) | ~self._withheld_M)
        emptied = ~kept_BM.any(axis=1)
        kept_BM[emptied] = has_BM[emptied]
        return kept_BM, has_BM if self._withheld_beside else kept_BM

    def _decode(
        self,
        name: str,
        modality: Modality,
        request: Request,
        keys: list[Hashable],
        kept_B: npt.NDArray[np.bool_],
        reasons: dict[int, tuple[str, str]],
    ) -> dict[Hashable, Array]:
        """Each distinct medium, decoded; the reason beside each record whose medium is bad."""
        found: dict[Hashable, Array] = {}
        bad: dict[Hashable, str] = {}
        cells = _cells(modality, request)
        for index in np.flatnonzero(kept_B):
            key = keys[index]
            if key not in found and key not in bad:
                medium = self._cache.get((name, key))
                if medium is None:
                    try:
                        medium = modality.decode(cells[index], self.folder)
                    except BadValue as error:
                        medium = str(error)
                    self._cache.put((name, key), medium)
                if isinstance(medium, str):
                    bad[key] = medium
                else:
                    found[key] = medium
            if key in bad:
                reasons.setdefault(int(index), (name, bad[key]))
        return found

    @staticmethod
    def _measured(
        modality: Modality,
        values: dict[str, Array],
        request: Request,
        good: npt.NDArray[np.int64],
        index_B: npt.NDArray[np.int64],
        there_B: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float32]:
        """Figures of each distinct medium (U, Q), those last that only its cells show."""
        figures_UQ = modality.quality(values)
        if figures_UQ.shape[1] == len(modality.quality_names):
            return figures_UQ
        cells = _cells(modality, request)
        _, first = np.unique(index_B[there_B], return_index=True)
        own = [modality.cell_quality(cells[place]) for place in good[there_B][first]]
        own_UQ = np.array(own, np.float32).reshape(len(figures_UQ), len(modality.quality_names) - figures_UQ.shape[1])
        return np.concatenate([figures_UQ, own_UQ], axis=1)

    def _target(self, request: Request, reasons: dict[int, tuple[str, str]]) -> Array | None:
        target = self.preparation.target
        if target.name not in request.cells:
            return None
        cells = request.cells[target.name]
        try:
            return encode_target(cells, target)
        except BadValue:
            pass
        usable = []
        for index, cell in enumerate(cells):
            try:
                encode_target([cell], target)
                usable.append(index)
            except BadValue as error:
                reasons.setdefault(index, (target.name, str(error)))
        encoded = encode_target([cells[index] for index in usable], target)
        padded = np.zeros((len(cells), *encoded.shape[1:]), encoded.dtype)
        padded[usable] = encoded
        return padded

    def _random(self, *purpose: str | int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._seed, *purpose))


def _chances(views: Sequence[View], epoch: int) -> npt.NDArray[np.float64]:
    """Each view's share in an epoch; where none is meant for it, all are."""
    open_V = [view.from_epoch <= epoch and (view.until_epoch is None or epoch < view.until_epoch) for view in views]
    weights = np.array([view.weight for view in views]) * (open_V if any(open_V) else [True] * len(views))
    chances: npt.NDArray[np.float64] = weights / weights.sum()
    return chances


def _cells(modality: Modality, request: Request) -> list[tuple[Any, ...]]:
    return list(zip(*(request.cells[column] for column in modality.columns), strict=True))


def _key(modality: Modality, cells: tuple[Any, ...]) -> Hashable:
    key = modality.key(cells)
    try:
        hash(key)
    except TypeError:
        return repr(key)  # a cell of a wrong type: its decoding will say so
    return key


def _share(keys: list[Hashable], there_B: npt.NDArray[np.bool_]) -> tuple[list[Hashable], npt.NDArray[np.int64]]:
    """The distinct media of good records, in the order in which they are first met, and which of them each has."""
    place: dict[Hashable, int] = {}
    index_B = np.zeros(len(keys), np.int64)
    for index in np.flatnonzero(there_B):
        index_B[index] = place.setdefault(keys[index], len(place))
    return list(place), index_B


def _number(key: Hashable) -> int:
    """The same for the same medium in every process; Python's own hash of a text is not."""
    content = key if isinstance(key, bytes) else repr(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def _spoil(
    modality: Modality, media: list[Array], spoilt: Sequence[Spoiling | None]
) -> tuple[list[Array], npt.NDArray[np.float32]]:
    """The media, those that are to be spoilt replaced, and how strongly each was."""
    changed = [
        medium if one is None else corrupt(modality, medium, one.kind, one.level, np.random.default_rng(one.seed))
        for medium, one in zip(media, spoilt, strict=True)
    ]
    # What came back as it was is not spoilt, whatever was asked.
    level_U = np.array(
        [
            0.0 if one is None or after is before else one.level
            for one, before, after in zip(spoilt, media, changed, strict=True)
        ],
        np.float32,
    )
    return changed, level_U


class _Cache:
    """Decoded media, the longest unused forgotten first. A string stands for a bad one and says why."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, Array | str] = OrderedDict()

    def get(self, key: Hashable) -> Array | str | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None

    def put(self, key: Hashable, medium: Array | str) -> None:
        size = _size(key, medium)
        if size > self._most_bytes:
            return
        self._kept[key] = medium
        self._bytes += size
        while self._bytes > self._most_bytes:
            self._bytes -= _size(*self._kept.popitem(last=False))


def _size(key: Hashable, medium: Array | str) -> int:
    """About what they take, with their place in the cache: the arrays' numbers may be the least of it."""
    return 300 + _key_bytes(key) + (len(medium) if isinstance(medium, str) else medium.nbytes)


def _key_bytes(key: Hashable) -> int:
    return sys.getsizeof(key) + (sum(map(_key_bytes, key)) if isinstance(key, tuple) else 0)
