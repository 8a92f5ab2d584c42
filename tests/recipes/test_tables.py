"""Holds recipes/tables.py to its promise for collections that Dougong prepares: their own test is left as it is."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.data.sources import seen_and_spoken
from dougong.data.sources.uci_views import VIEWS
from dougong.recipes.known import read_recipe
from dougong.recipes.recipe import DataConfig
from dougong.recipes.run import train_recipe
from dougong.recipes.tables import open_tables


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOUGONG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def feature_files(tmp_path: Path) -> Path:
    """30 records of each digit, as the unpacked collection has them; each view is near its digit's own point."""
    folder = tmp_path / "features"
    folder.mkdir()
    random = np.random.default_rng(0)
    digit_N = np.repeat(np.arange(10), 30)
    for view in VIEWS:
        x_NF = random.normal(0, 3, (10, 4))[digit_N] + random.normal(0, 1, (300, 4))
        lines = [",".join(map(str, [*row, digit])) for row, digit in zip(x_NF, digit_N, strict=True)]
        (folder / f"mfeat-{view}.csv").write_text("\n".join(["0,1,2,3,0", *lines]) + "\n", encoding="utf-8")
    return folder


def test_the_recipe_of_three_views_trains_on_those_views_alone(feature_files: Path, tmp_path: Path) -> None:
    settings = [f"data.folder={feature_files}", "train.steps=30", "train.epochs=1"]

    result = train_recipe(read_recipe("uci-views", settings), tmp_path / "run", quiet=True)

    assert list(result.model.preparation.modalities) == ["fou", "kar", "zer"]
    assert result.evaluations["all"].metrics["accuracy"] > 0.5
    assert result.evaluations["all"].num_records == 60
    assert not result.tables.test_is_validation


def test_each_seed_has_a_split_of_its_own_that_stays(feature_files: Path, home: Path) -> None:
    data = DataConfig(source="uci-views", folder=str(feature_files), target="digit")

    rows = [open_tables(data, seed=seed).test.column("record_id").to_pylist() for seed in (0, 1, 0)]

    assert rows[0] == rows[2] != rows[1]
    assert sorted(path.name for path in (home / "uci-views").iterdir()) == ["seed-0", "seed-1"]


def test_seen_and_spoken_pairs_as_often_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    pictures = seen_and_spoken._Pictures(
        random.integers(0, 17, (100, 8, 8)).astype(float), np.repeat(np.arange(10), 10)
    )
    monkeypatch.setattr(seen_and_spoken, "_load_pictures", lambda: pictures)
    (tmp_path / "recordings").mkdir()
    for speaker in ("ann", "bob", "cem"):
        for digit in range(10):
            samples = random.uniform(-0.1, 0.1, 400)
            soundfile.write(tmp_path / "recordings" / f"{digit}_{speaker}_0.flac", samples, 8000)
    data = DataConfig(
        source="seen-and-spoken",
        folder=str(tmp_path / "recordings"),
        pairings=3,
        target="digit",
        columns={"speaker": "ignore"},
    )

    tables = open_tables(data, seed=0)

    assert [table.num_rows for table in (tables.train, tables.validation, tables.test)] == [30, 10, 10]
    assert {name: found.role for name, found in tables.roles.items() if found.role != "ignore"} == {
        "image": "image",
        "speech": "audio",
        "digit": "target",
    }


def test_xor_needs_nothing_and_says_that_it_is_synthetic() -> None:
    tables = open_tables(DataConfig(source="xor", target="answer"), seed=0)

    assert "synthetic" in tables.notes[0]
    assert tables.test.num_rows == 400


def test_settings_without_effect_or_without_a_folder_are_refused() -> None:
    with pytest.raises(ConfigError, match="pairings=2 has no effect on source digits"):
        parse(DataConfig, {"source": "digits", "pairings": 2}, where="data")
    with pytest.raises(ConfigError, match=r"seen-and-spoken needs data\.folder"):
        open_tables(DataConfig(source="seen-and-spoken", target="digit"), seed=0)
