from pathlib import Path

import pytest

from dougong.core.bundle import Manifest, write_bundle
from dougong.data.columns import infer_roles
from dougong.data.preparation import PreparationConfig, fit_preparation
from dougong.data.table import open_table
from dougong.data.target import infer_target


@pytest.fixture(scope="session")
def hollow_bundle(colour_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model nobody loads: for servers whose workers answer without one."""
    table = open_table(colour_table)
    roles = infer_roles(table, target="colour", named={})
    target = infer_target(table.head(240, ["colour"]).column("colour"), "colour", None)
    preparation = fit_preparation(table, roles, target, PreparationConfig())
    folder = tmp_path_factory.mktemp("bundles") / "colours"
    with write_bundle(folder, Manifest(name="colours", signature=preparation.signature(), model={})) as building:
        preparation.save(building)
    return folder
