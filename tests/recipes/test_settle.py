"""What becomes of a recipe before any rank is connected."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dougong.cli.main import main
from dougong.core.config import from_yaml, override, parse, to_yaml
from dougong.core.errors import ConfigError, RunError
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner import cluster
from dougong.recipes.recipe import Recipe
from dougong.recipes.settle import SETTINGS, lay_out, settle_recipe


def recipe_for(table: Path, *settings: str) -> Recipe:
    values: dict[str, Any] = {
        "name": "small",
        "data": {"train": str(table), "target": "colour", "loader": {"batch_size": 16}},
        "model": {"width": 16},
        "train": {"steps": 3, "accumulation": 2},
    }
    return parse(Recipe, override(values, list(settings)), where="test")


@pytest.mark.parametrize(
    ("setting", "world", "message"),
    [
        ("plan.tensor=3", 3, r"tensor=3 cannot share out .*num_attention_heads=1.*Use tensor in \[1\]"),
        ("plan.pipeline=64", 64, r"makes 64 stages, and the model has \d+ blocks. Use \d+ stages or fewer"),
        ("plan.tensor=2", 3, r"takes 2 ranks at a time, and there are 3. Use a product in \[1, 3\]"),
    ],
)
def test_a_wrong_layout_is_refused_before_any_rank_is_connected(
    colour_table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    world: int,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_out(recipe_for(colour_table, setting), tmp_path / "run", world)

    def connect(*given: Any, **named: Any) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr(dist, "init_process_group", connect)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(world)), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(recipe_for(colour_table)))
    assert main(["train", str(file), "--set", setting, "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_refused_with_what_would_fit(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(colour_table)
    assert lay_out(recipe, tmp_path / "run", 2) == recipe
    monkeypatch.setattr(cluster, "free_bytes", lambda: 2e4)
    with pytest.raises(ConfigError, match=r"each of the 2 ranks here may have 8.79 KiB. No layout of them fits: use"):
        lay_out(recipe, tmp_path / "run", 2)


def test_a_layout_that_is_left_open_is_chosen_and_written(colour_table: Path, tmp_path: Path) -> None:
    recipe = recipe_for(colour_table, "plan=null")
    chosen = lay_out(recipe, tmp_path / "run", 4).plan
    assert isinstance(chosen, PlanConfig)

    settled = settle_recipe(recipe, tmp_path / "run", resume=False, world=4)

    assert settled.plan == chosen
    kept = from_yaml((tmp_path / "run" / SETTINGS).read_text(), where="test")
    assert parse(Recipe, kept, where="test").plan == chosen
    (tmp_path / "run" / "preparation").mkdir()
    with pytest.raises(RunError, match="holds a run already"):
        lay_out(recipe, tmp_path / "run", 4)
    (tmp_path / "run" / "preparation").rmdir()
    assert settle_recipe(recipe, tmp_path / "run", resume=True).plan == PlanConfig()  # on one, there is one
