"""The colour run's bundle, taught two more tasks: which way stripes lie in a picture, how high a tone is."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # task_builders

from task_builders import Rows, quick, stripes, table_of, tones

from dougong.continual.learn import learn, learn_original
from dougong.data.table import open_table


@pytest.fixture(scope="session")
def base(colour_run: Path) -> Path:
    """Never taught anything."""
    return colour_run / "bundle"


@pytest.fixture(scope="session")
def taught(base: Path, colour_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read alone; `copied` gives one to change."""
    folder = tmp_path_factory.mktemp("taught") / "bundle"
    shutil.copytree(base, folder)
    learn_original(folder, open_table(colour_table))
    learn(
        folder, "stripes", table_of(stripes(120, seed=1)), quick(), target="lies", description="which way stripes lie"
    )
    learn(folder, "tones", table_of(tones(120, seed=2)), quick(), target="pitch", description="how high a tone is")
    return folder


@pytest.fixture
def copied(taught: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def mixed(records: Callable[..., Rows]) -> tuple[Rows, list[str]]:
    """Records of all three tasks, shuffled, and which each is of."""
    colours = [{k: v for k, v in row.items() if k != "colour"} for row in records(20, seed=5, missing=0.1)]
    rows = [*colours, *stripes(20, seed=6), *tones(20, seed=7)]
    names = ["original"] * 20 + ["stripes"] * 20 + ["tones"] * 20
    order = np.random.default_rng(0).permutation(60)
    return [rows[i] for i in order], [names[i] for i in order]
