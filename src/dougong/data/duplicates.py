"""Media that are the same, or nearly so, within a part and across the parts of a split.

Here        find_duplicates, Duplicates, DuplicateGroup; fingerprint_image|text|sound|array|row, near_pairs.
Elsewhere   refusing a split that shares media (data/leak.py).
Promise     every record is compared with every part's by content; near ones are found by bands of a fingerprint and
            then compared, in memory that grows with the number of media and never with its square.

Fingerprints are made from formulas: pictures by the signs of their lowest cosine waves and of their differences
(pHash, dHash: Zauner 2010), texts by MinHash of letter fives (Broder 1997), sound, signals and volumes by the signs of
random projections (Charikar 2002) of their log-mel energies or samples, rows of numbers by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import math
import re
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dougong.core.seeds import derive_seed
from dougong.data.columns import ColumnRole
from dougong.data.features import Kind, Side, in_slots, log_mel, read_sound, sides_of, value_key
from dougong.data.modality.array import list_content, read_array
from dougong.data.modality.image import ImageConfig, open_picture
from dougong.data.modality.medium import BadValue, media_bytes
from dougong.data.table import Table, cells_of

MOST_MEDIA: Final[dict[Kind, int]] = {
    "image": 10_000,
    "text": 20_000,
    "audio": 5_000,
    "signal": 5_000,
    "volume": 1_000,
    "table": 50_000,
}
"""Looked at for near ones; of more, an even share is. Exact ones are looked for in all."""

FEWEST_NUMBERS: Final = 3
"""Columns of numbers from which a row is taken for one of a kind: two records may well share a category or two."""

NEIGHBOURS: Final = 8
"""Compared on each side within a band: where many media share one, only those most alike."""

BANDS: Final = 16
LETTERS: Final = 5
HASHES: Final = 64
ROWS_NAMED: Final = 5
LISTED: Final = 50
COMPARED_AT_ONCE: Final = 4096

SAME_WORDS: Final = 0.8
"""Of the letter fives of two texts."""

SAME_WAVES: Final = 10
"""Of 64 signs, that may differ between near pictures."""

SAME_PIXELS: Final = 0.035
SAME_PIXEL: Final = 0.2
"""Mean and largest difference of 16 x 16 thumbnails, of 1."""

SAME_PICTURE: Final = 0.985
SAME_SOUND: Final = 0.985
SAME_NUMBERS: Final = 0.998
"""Correlations."""

ROUNDED_DIGITS: Final = 4
MOST_CHANNELS: Final = 8

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Fingerprint(NamedTuple):
    """What finds the medium, and what is compared then."""

    keys: Keys
    """One of each band."""

    check: npt.NDArray[np.float32]


class DuplicateGroup(NamedTuple):
    """Media that are the same or nearly so."""

    num_media: int
    """Different by content; 1: only exact copies."""

    num_rows: dict[str, int]
    """By part."""

    rows: dict[str, tuple[int, ...]]
    """The first few, by part."""


class Duplicates(NamedTuple):
    """What one column holds more than once."""

    column: str
    kind: Kind
    num_rows: dict[str, int]
    num_media: int
    num_repeats: int
    """Rows whose very medium stands in an earlier row."""

    num_exact_across: int
    """Media that stand in several parts."""

    num_near: int
    """Groups of different media that are nearly the same."""

    num_near_across: int
    num_near_rows_across: int
    """Rows in those groups."""

    num_compared: int
    """Media that were looked at for near ones, of num_media."""

    groups: tuple[DuplicateGroup, ...]
    """Near ones and those across parts, across first."""

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "groups": [group._asdict() for group in self.groups]}


def find_duplicates(
    parts: Mapping[str, Table], roles: Mapping[str, ColumnRole], *, most_media: int | None = None
) -> tuple[Duplicates, ...]:
    """Look through the media, texts and rows of numbers of all parts that have them. Targets are no media."""
    found = []
    for side in sides_of(roles, with_target=False):
        if side.kind == "table" and sum(roles[name].role == "number" for name in side.columns) < FEWEST_NUMBERS:
            continue
        having = {part: table for part, table in parts.items() if set(side.columns) <= set(table.schema.names)}
        found.append(_duplicates_of(having, side, most_media or MOST_MEDIA[side.kind]))
    return tuple(found)


class _Media:
    """The distinct media of a column, where they stand, and the fingerprints of those looked at: the ones of the
    smallest digests, so that which they are depends neither on the order nor on how often they stand."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.number: dict[bytes, int] = {}
        self.counts: list[dict[str, int]] = []
        self.rows: list[dict[str, list[int]]] = []
        self.fingerprints: dict[bytes, Fingerprint] = {}
        self._largest: list[tuple[int, bytes]] = []

    def keep(self, digest: bytes, make: Callable[[], Fingerprint]) -> None:
        """Make and keep its fingerprint if it is among the smallest digests so far."""
        order = -int.from_bytes(digest, "big")
        if len(self._largest) >= self.most and order < self._largest[0][0]:
            return
        try:
            self.fingerprints[digest] = make()
        except BadValue:
            return  # the check of every record says so
        heapq.heappush(self._largest, (order, digest))
        if len(self._largest) > self.most:
            del self.fingerprints[heapq.heappop(self._largest)[1]]

    def add(self, digest: bytes, part: str, row: int) -> bool:
        """Whether it is new."""
        new = digest not in self.number
        if new:
            self.number[digest] = len(self.counts)
            self.counts.append({})
            self.rows.append({})
        place = self.number[digest]
        self.counts[place][part] = self.counts[place].get(part, 0) + 1
        named = self.rows[place].setdefault(part, [])
        if len(named) < ROWS_NAMED:
            named.append(row)
        return new


def _duplicates_of(parts: Mapping[str, Table], side: Side, most: int) -> Duplicates:
    media = _Media(most)
    num_rows = {}
    for part, table in parts.items():
        num_rows[part] = 0
        known: dict[Hashable, bytes | None] = {}
        columns = [name for name in side.columns if name in table.schema.names]
        if len(columns) < len(side.columns):
            continue
        for chunk in range(table.num_chunks):
            rows = table.read(chunk, columns)
            for row, cells in zip(
                table.numbers_of(chunk), zip(*(cells_of(rows.column(n)) for n in columns), strict=True), strict=True
            ):
                key = value_key(side, cells)
                if key is None:
                    continue
                if key not in known:
                    known[key] = _digest(side, cells, table.folder)
                digest = known[key]
                if digest is None:
                    continue
                num_rows[part] += 1
                if media.add(digest, part, int(row)):
                    media.keep(digest, functools.partial(_fingerprint, side, cells, table.folder))
    return _summary(side, media, num_rows)


def _summary(side: Side, media: _Media, num_rows: dict[str, int]) -> Duplicates:
    compared = [media.number[digest] for digest in media.fingerprints]
    groups_of = _near_groups(list(media.fingerprints.values()), side.kind)
    near = [[compared[place] for place in group] for group in groups_of]
    in_near = {place for group in near for place in group}
    across = [[place] for place, counts in enumerate(media.counts) if len(counts) > 1 and place not in in_near]
    groups = [_group(media, places) for places in [*near, *across]]
    groups.sort(key=lambda group: (len(group.num_rows) < 2, -sum(group.num_rows.values())))
    near_across = [group for group in groups if group.num_media > 1 and len(group.num_rows) > 1]
    return Duplicates(
        column=side.name,
        kind=side.kind,
        num_rows=num_rows,
        num_media=len(media.counts),
        num_repeats=sum(num_rows.values()) - len(media.counts),
        num_exact_across=sum(len(counts) > 1 for counts in media.counts),
        num_near=len(near),
        num_near_across=len(near_across),
        num_near_rows_across=sum(sum(group.num_rows.values()) for group in near_across),
        num_compared=len(compared),
        groups=tuple(groups[:LISTED]),
    )


def _group(media: _Media, places: list[int]) -> DuplicateGroup:
    counts: dict[str, int] = {}
    rows: dict[str, list[int]] = {}
    for place in places:
        for part, count in media.counts[place].items():
            counts[part] = counts.get(part, 0) + count
            rows.setdefault(part, []).extend(media.rows[place][part])
    return DuplicateGroup(
        len(places), counts, {part: tuple(sorted(named)[:ROWS_NAMED]) for part, named in rows.items()}
    )


def _digest(side: Side, cells: tuple[Any, ...], folder: Path) -> bytes | None:
    """Of the content, wherever it lies."""
    cell = cells[0]
    if side.kind == "table":
        content = repr(cells).encode("utf-8", "surrogatepass")
    elif side.kind == "text":
        content = cell.encode("utf-8", "surrogatepass")
    elif isinstance(cell, list):
        content = list_content(cell)
    else:
        try:
            content = media_bytes(cell, folder)
        except BadValue:
            return None
    return hashlib.blake2b(content, digest_size=16).digest()


def _fingerprint(side: Side, cells: tuple[Any, ...], folder: Path) -> Fingerprint:
    cell = cells[0]
    if side.kind == "image":
        return fingerprint_image(open_picture(media_bytes(cell, folder), ImageConfig(column="").largest_pixels))
    if side.kind == "text":
        return fingerprint_text(cell)
    if side.kind == "audio":
        return fingerprint_sound(*read_sound(media_bytes(cell, folder)))
    if side.kind == "table":
        return fingerprint_row(cells)
    return fingerprint_array(np.asarray(read_array(cell, folder), np.float64))


def fingerprint_image(picture: Image.Image) -> Fingerprint:
    """Signs of 63 low cosine waves about their median (pHash), and of differences to the right and below (dHash)."""
    grey = picture.convert("L")
    small = np.asarray(grey.resize((32, 32), Image.Resampling.BOX), np.float64)
    waves = (_cosines(32)[:8] @ small @ _cosines(32)[:8].T).ravel()
    signs = waves > np.median(waves[1:])
    signs[0] = False  # the mean, which says how light the picture is
    right = np.diff(np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.float64), axis=1) > 0
    below = np.diff(np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.float64), axis=0) > 0
    bits = np.concatenate([signs, right.ravel(), below.ravel()])
    thumbnail = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() / 255
    return Fingerprint(_bands(bits), np.concatenate([thumbnail, signs.astype(np.float32)]))


@functools.cache
def _cosines(size: int) -> Floats:
    """The cosine transform (DCT-II), orthonormal: row k is cos(pi k (2 n + 1) / (2 size))."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    waves: Floats = np.cos(np.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def fingerprint_text(text: str) -> Fingerprint:
    """The least of 64 hashes of its letter fives, case, punctuation and spaces put aside."""
    plain = " ".join(re.findall(r"\w+", text[:100_000].lower())) or text[:100]
    pieces = {plain[i : i + LETTERS] for i in range(max(1, len(plain) - LETTERS + 1))}
    numbers = np.array(sorted({zlib.crc32(piece.encode("utf-8", "surrogatepass")) for piece in pieces}), np.uint64)
    multiply, add = _hash_numbers()
    # Modulo the prime 2**31 - 1, so that no product leaves 64 bits.
    least = ((numbers[None] % np.uint64(2**31 - 1) * multiply[:, None] + add[:, None]) % np.uint64(2**31 - 1)).min(
        axis=1
    )
    rows = least.reshape(BANDS, HASHES // BANDS)
    keys = np.array([_number(row.tobytes()) for row in rows], np.uint64)
    # Only equality is asked of them: the lowest bits, which float32 holds exactly.
    return Fingerprint(keys, (least & np.uint64(0xFFFFFF)).astype(np.float32))


@functools.cache
def _hash_numbers() -> tuple[Keys, Keys]:
    random = np.random.default_rng(derive_seed(0, "minhash"))
    return (
        random.integers(1, 2**31 - 1, HASHES, np.uint64),
        random.integers(0, 2**31 - 1, HASHES, np.uint64),
    )


def fingerprint_sound(samples: Floats, rate: int) -> Fingerprint:
    """Log-mel energies in 32 parts of its length, silence cut off, each band's mean and the loudness put aside."""
    # Silence at both ends for all, a fine step and a high floor: noise and another beginning change little then.
    samples = np.pad(samples, int(0.05 * rate))
    slots = in_slots(log_mel(samples, rate, steps=8, floor=3e-3, silence=3e-2), 32)
    return _projected(slots - slots.mean(axis=0))


def fingerprint_array(array: Floats) -> Fingerprint:
    """A signal's first channels in 128 parts, a volume in 8 x 8 x 8, mean and scale put aside."""
    if array.ndim == 2:
        array = array[:MOST_CHANNELS]
    for axis in range(array.ndim):
        if array.ndim >= 3 or axis == array.ndim - 1:
            num = 8 if array.ndim >= 3 else min(128, array.shape[axis])
            array = np.moveaxis(in_slots(np.moveaxis(array, axis, 0), num), 0, axis)
    return _projected(array - array.mean())


def _projected(values: Floats) -> Fingerprint:
    flat = values.ravel() / max(float(np.linalg.norm(values)), 1e-12)
    signs = _directions(len(flat)) @ flat > 0
    return Fingerprint(_bands(signs), flat.astype(np.float32))


@functools.lru_cache(maxsize=8)
def _directions(size: int) -> Floats:
    directions: Floats = np.random.default_rng(derive_seed(0, "directions")).standard_normal((16 * BANDS, size))
    return directions


def fingerprint_row(cells: tuple[Any, ...]) -> Fingerprint:
    """Its numbers to so many digits, on two grids half a step apart: one of them does not cut between near numbers."""
    numbers = [_number_of(cell) for cell in cells]
    words = [str(cell) for cell, number in zip(cells, numbers, strict=True) if number is None]
    grids = []
    for half in (0.0, 0.5):
        rounded = [_rounded(number, half) for number in numbers if number is not None]
        grids.append(_number(repr((rounded, words)).encode("utf-8", "surrogatepass")))
    return Fingerprint(np.array(grids, np.uint64), np.array([0.0], np.float32))


def _number_of(cell: Any) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        number = float(cell)
        return number if math.isfinite(number) else None
    return None


def _rounded(number: float, half: float) -> tuple[int, int]:
    """Its first digits, and where they stand."""
    place = math.floor(math.log10(abs(number))) if number else 0
    shift = ROUNDED_DIGITS - 1 - place
    # In two steps: ten to the power of so many is no float where the number is almost 0.
    digits = math.floor(number * 10.0 ** (shift // 2) * 10.0 ** (shift - shift // 2) + half)
    if abs(digits) >= 10**ROUNDED_DIGITS:  # rounded up to one digit more
        return digits // 10, place + 1
    return digits, place


def _bands(bits: npt.NDArray[np.bool_]) -> Keys:
    """Sixteen bits of the fingerprint each."""
    return np.packbits(bits).view(">u2").astype(np.uint64)


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def near_pairs(fingerprints: Sequence[Fingerprint], kind: Kind) -> Ints:
    """Pairs of places whose media are nearly the same, (P, 2)."""
    sizes = np.array([len(fingerprint.check) for fingerprint in fingerprints])
    found = [np.zeros((0, 2), np.int64)]
    for size in np.unique(sizes):  # signals differ in size, and what differs in size is never near
        places = np.flatnonzero(sizes == size)
        keys_NB = np.stack([fingerprints[int(place)].keys for place in places])
        check_NF = np.stack([fingerprints[int(place)].check for place in places])
        pairs = _candidates(keys_NB, check_NF)
        if kind != "table":  # whose keys are all there is to a row
            kept = [np.zeros(0, np.bool_)]
            for start in range(0, len(pairs), COMPARED_AT_ONCE):
                left, right = pairs[start : start + COMPARED_AT_ONCE].T
                kept.append(_are_near(check_NF[left], check_NF[right], kind))
            pairs = pairs[np.concatenate(kept)]
        found.append(places[pairs])
    return np.concatenate(found)


def _candidates(keys_NB: Keys, check_NF: npt.NDArray[np.float32]) -> Ints:
    """Neighbours in the order of a band's key; of the many that share one key, in the order of a projection."""
    random = np.random.default_rng(derive_seed(0, "lean"))
    lean_N = check_NF @ random.standard_normal(check_NF.shape[1], np.float32)
    pairs = [np.zeros((0, 2), np.int64)]
    for keys_N in keys_NB.T:
        order = np.lexsort((lean_N, keys_N))
        for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-step], order[step:]
            same = keys_N[one] == keys_N[other]
            pairs.append(np.sort(np.stack([one[same], other[same]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _are_near(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32], kind: Kind) -> npt.NDArray[np.bool_]:
    if kind == "text":
        return np.asarray((left == right).mean(axis=1) >= SAME_WORDS)
    if kind == "image":
        waves = (left[:, -64:] != right[:, -64:]).sum(axis=1) <= SAME_WAVES
        one, other = left[:, :-64], right[:, :-64]
        apart = np.abs(one - other)
        pixels = (apart.mean(axis=1) <= SAME_PIXELS) & (apart.max(axis=1) <= SAME_PIXEL)
        return np.asarray(waves & pixels & (_correlation(one, other) >= SAME_PICTURE))
    least = SAME_SOUND if kind == "audio" else SAME_NUMBERS
    return np.asarray((left * right).sum(axis=1) >= least)


def _correlation(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    left, right = left - left.mean(axis=1, keepdims=True), right - right.mean(axis=1, keepdims=True)
    scale = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    # Two pictures of one colour each are alike if that colour is, which the pixels say.
    return np.where(scale < 1e-6, 1.0, (left * right).sum(axis=1) / np.maximum(scale, 1e-12)).astype(np.float32)


def _near_groups(fingerprints: list[Fingerprint], kind: Kind) -> list[list[int]]:
    parent = list(range(len(fingerprints)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, other in near_pairs(fingerprints, kind):
        parent[root(int(one))] = root(int(other))
    groups: dict[int, list[int]] = {}
    for place in range(len(parent)):
        groups.setdefault(root(place), []).append(place)
    return [group for group in groups.values() if len(group) > 1]
