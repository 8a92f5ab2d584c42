"""A batch that lacks a modality, wholly or on some ranks, and whole recipes, on many ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from absences import ABSENCES, BATCH
from in_double import Exact
from ranks import RankFailure, run_ranks
from torch import Tensor
from torch.nn import functional

from dougong.cli.main import main
from dougong.core.config import parse, to_yaml
from dougong.core.errors import ConfigError
from dougong.core.events import Announcer, Event, StepDone, read_events
from dougong.data.columns import infer_roles
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.table import open_table
from dougong.data.target import infer_target
from dougong.engine import checkpoint
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.trainer import TrainConfig, train
from dougong.model.sandwich import SandwichConfig, SandwichOutput
from dougong.nn.batch import Batch
from dougong.recipes.losses import ObjectiveConfig, check_ranks
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe, train_recipe

PRESENT = {**ABSENCES, "some ranks have no record": "b"}


@pytest.fixture(scope="module")
def table(records: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch of each kind, in order."""
    letters = "".join(PRESENT.values())
    found = records(len(letters), seed=5, missing=0.0)
    for record, letter in zip(found, letters, strict=True):
        record["photo"] = record["photo"] if letter in "pb" else None
        record["remark"] = record["remark"] if letter in "rb" else None
    path = tmp_path_factory.mktemp("absent") / "t.parquet"
    pq.write_table(pa.Table.from_pylist(found), path)
    table = open_table(path)
    roles = infer_roles(table, target="colour", named=dict.fromkeys(("clip", "weight", "maker"), "ignore"))
    target = infer_target(table.column("colour"), "colour", None)
    fit_preparation(table, roles, target, PreparationConfig()).save(path.parent / "preparation")
    return path


def exact_loss(output: SandwichOutput, batch: Batch) -> Tensor:
    """Of all together, and of each modality's own head, where the model has some that are taught."""
    assert batch.target is not None
    loss = functional.cross_entropy(output.output_BC, batch.target, reduction="sum")
    for place, media in enumerate(batch.media.values()):
        if output.own_BMC is not None and media.present_B.any():
            own_BC, target_B = output.own_BMC[media.present_B, place], batch.target[media.present_B]
            loss = loss + functional.cross_entropy(own_BC, target_B, reduction="sum")
    return loss


def trained(
    table: Path, folder: Path, model_settings: dict[str, Any]
) -> tuple[list[dict[str, Tensor]], list[float], Evaluation]:
    """Twice over the table. The first rank's weights after each step, its losses, and what every rank judges."""
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE
    preparation = Preparation.load(table.parent / "preparation")
    torch.manual_seed(ranks.rank)
    model = parse(SandwichConfig, {"width": 16, **model_settings}, where="test").build(preparation.signature()).double()
    config = LoaderConfig(batch_size=BATCH, workers=0)
    loader = Exact(Loader(open_table(table), preparation, config, share=ranks.share))
    after: list[dict[str, Tensor]] = []
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            after.append({name: weight.clone() for name, weight in model.state_dict().items()})
            losses.append(event.loss)

    settings = TrainConfig(steps=2 * len(PRESENT), precision="fp32")
    train(model, exact_loss, loader, settings, folder=folder, announce=Announcer(hear), ranks=ranks)
    return after, losses, evaluate(model, loader, preparation.target, loss=exact_loss, ranks=ranks)


@pytest.mark.parametrize(
    "model_settings",
    [
        {},
        {"decide": "weighed"},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"bridge": {"kind": "bottleneck"}},
                {"own_heads": "taught"},
                {"bridge": {"kind": "merged"}},
                {"fusion": "late"},
            )
        ),
    ],
)
def test_whatever_modality_is_absent_where_every_step_is_that_of_one_process(
    table: Path, tmp_path: Path, model_settings: dict[str, Any]
) -> None:
    want, want_losses, want_judged = trained(table, tmp_path / "1", model_settings)
    for world in (2, 4):
        found = run_ranks(trained, table, tmp_path / str(world), model_settings, world=world)
        after, losses, _ = found[0]
        assert losses == pytest.approx(want_losses, rel=1e-5)
        for step, name in enumerate([*PRESENT, *PRESENT]):
            for key, weight in want[step].items():
                difference = (after[step][key] - weight).abs().max().item() if weight.numel() else 0.0
                assert difference < 1e-9, f"{world} ranks, step {step + 1}, {name}: {key} differs by {difference}"
        for _, _, judged in found:
            assert judged.row_B.tolist() == want_judged.row_B.tolist()
            np.testing.assert_allclose(judged.probability_BC, want_judged.probability_BC, atol=1e-6)  # type: ignore[arg-type]
            assert judged.metrics == pytest.approx(want_judged.metrics)
            assert judged.gate == pytest.approx(want_judged.gate)


def recipe_for(table: Path, plan: dict[str, Any] | None = None) -> Recipe:
    """Draws remarks and pictures together, some of which the records share; a batch of 50 leaves some ranks little."""
    return parse(
        Recipe,
        {
            "name": "small",
            "data": {
                "train": str(table),
                "target": "colour",
                "columns": {"clip": "ignore", "maker": "ignore"},
                "withhold": 0.3,
                "loader": {"batch_size": 50, "workers": 0},
                "conditions": {"all": ["photo", "remark", "table"], "remark": ["remark"]},
            },
            "model": {"width": 32, "align": ["photo", "remark"]},
            "train": {"steps": 6, "precision": "fp32", "evaluate_every": 3, "checkpoint_every": 3},
            "plan": plan or {},
        },
        where="test",
    )


def run_small(
    table: Path, folder: Path, plan: dict[str, Any] | None = None, resume: bool = False
) -> tuple[bool, dict[str, Any]]:
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE
    result = run_recipe(recipe_for(table, plan), folder, quiet=True, ranks=ranks, resume=resume)
    return ranks.first, result.as_json()["figures"]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]


def test_a_recipe_has_the_losses_and_figures_of_one_process(colour_table: Path, tmp_path: Path) -> None:
    _, want = run_small(colour_table, tmp_path / "one")

    found = run_ranks(run_small, colour_table, tmp_path / "many", world=2, limit_seconds=120)

    # Sums in another order, in float32, and an optimizer that divides by a gradient's own size.
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4)
    assert [figures for _, figures in found] == [want, want]
    one, many = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "many"))
    assert one == many


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "pipeline": 2},
    {"shard": 2, "tensor": 2},
    {"pipeline": 2, "chunks": 2, "schedule": "zbv"},
    {"pipeline": 2, "shard": 2, "sharding": "zero2"},
    {"shard": 4, "sharding": "zero1"},
]


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2, 3, 4))])
def test_a_recipe_on_any_layout_is_as_in_one_process_and_goes_on_at_any_other(
    place: int, colour_table: Path, tmp_path: Path
) -> None:
    _, want = run_small(colour_table, tmp_path / "one")
    want_losses = losses(tmp_path / "one")
    many = tmp_path / "many"

    found = run_ranks(run_small, colour_table, many, LAYOUTS[place], world=4, limit_seconds=120)

    # Sums in another order, in float32, and an optimizer that divides by a gradient's own size.
    np.testing.assert_allclose(losses(many), want_losses, rtol=1e-3)
    assert [figures for _, figures in found] == [want] * 4
    for name, again in (("other", LAYOUTS[place - 1]), ("one again", None)):
        shutil.copytree(many, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
        shutil.rmtree(tmp_path / name / "bundle")
        if again is None:
            run_small(colour_table, tmp_path / name, None, True)
        else:
            run_ranks(run_small, colour_table, tmp_path / name, again, True, world=4, limit_seconds=120)
        np.testing.assert_allclose(losses(tmp_path / name), want_losses, rtol=1e-3)


def run_and_die(table: Path, folder: Path, victim: int) -> None:
    """That rank is killed in the middle of writing the second checkpoint."""

    def sync(path: Path) -> None:
        if dist.get_rank() == victim and "step-00000006" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sync_file = sync
    run_small(table, folder, {"shard": 2})


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_while_it_writes_costs_no_more_than_the_steps_since_the_last_checkpoint(
    victim: int, colour_table: Path, tmp_path: Path
) -> None:
    run_small(colour_table, tmp_path / "one")
    many = tmp_path / "many"

    with pytest.raises(RankFailure, match=f"rank {victim} of 2 ended with exit status -9"):
        run_ranks(run_and_die, colour_table, many, victim, world=2, limit_seconds=120)

    assert sorted(path.name for path in (many / "checkpoints").iterdir()) == [
        ".step-00000006.writing",
        "step-00000003",
    ]
    run_small(colour_table, many, None, True)
    np.testing.assert_allclose(losses(many), losses(tmp_path / "one"), rtol=1e-3)
    assert sorted(path.name for path in (many / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_what_needs_the_whole_batch_in_one_place_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"balance=mmpareto works on a whole batch, and 2 ranks share"):
        check_ranks(ObjectiveConfig(balance="mmpareto"), SandwichConfig(), 2)
    check_ranks(ObjectiveConfig(balance="mmpareto"), SandwichConfig(), 1)
    check_ranks(ObjectiveConfig(), SandwichConfig(), 2)
    with pytest.raises(ConfigError, match="objective.rank_weight works on a whole batch, and 2 ranks share each out"):
        check_ranks(ObjectiveConfig(), SandwichConfig(fusion="late", decide="confidence"), 2)


def test_sparing_one_medium_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    ranks = Ranks(None)
    ranks.world = 2
    recipe = parse(Recipe, {"name": "x", "data": {"corrupt": {}}}, where="test")
    with pytest.raises(ConfigError, match=r"Set data\.corrupt\.spare_one: false, or train in one process"):
        train_recipe(recipe, tmp_path / "run", ranks=ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_our_launcher_trains_a_recipe_and_says_a_mistake_once(
    colour_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(to_yaml(recipe_for(colour_table)))
    run_small(colour_table, tmp_path / "one")
    capfd.readouterr()
    command = ["train", str(recipe), "--ranks", "2", "--out", str(tmp_path / "many"), "--json"]

    assert main(command) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["run"] == str(tmp_path / "many")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4)
    one, many = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "many"))
    assert one == many

    assert main(command) == 2
    assert capfd.readouterr().err.count("holds a run already. Go on with it by --resume") == 1


@pytest.mark.slow
def test_torchrun_trains_a_recipe_and_stops_and_goes_on(colour_table: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(to_yaml(recipe_for(colour_table)))
    run_small(colour_table, tmp_path / "one")

    def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "-m", "dougong", "train", str(recipe), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    done = torchrun("--out", str(tmp_path / "many"), "--json")
    again = torchrun("--out", str(tmp_path / "many"))

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one rank alone speaks
    assert told["run"] == str(tmp_path / "many")
    assert Path(told["report"]).exists()
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4)
    assert again.returncode != 0
    assert "dougong: " + str(tmp_path / "many") + " holds a run already. Go on with it by --resume" in again.stderr
    assert "dougong (rank 1): " not in again.stderr  # it was refused before any was connected
