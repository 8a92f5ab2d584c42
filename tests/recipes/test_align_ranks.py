"""Modalities are drawn together on many ranks as in one process, whatever records lack on which rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from absences import ABSENCES, BATCH
from in_double import Exact
from ranks import run_ranks
from torch import Tensor

from dougong.cli.main import main
from dougong.core.config import override, parse, to_yaml
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Announcer, Event, StepDone, read_events
from dougong.data.pairs import PairLoader
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.trainer import TrainConfig, train
from dougong.recipes.align import _lesson, check_align_ranks, fit_sides, open_align_tables, run_align
from dougong.recipes.alignment import AlignRecipe

PRESENT = {**ABSENCES, "everything again": "bbbbbbbb"}


@pytest.fixture(scope="module")
def tables(records: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training table with a batch of each kind, in order, whose ranks have media in common; and ordinary others."""
    folder = tmp_path_factory.mktemp("align-ranks")
    letters = "".join(PRESENT.values())
    for name, seed, present in (("train", 5, letters), ("validation", 6, "b" * 24), ("test", 7, "b" * 24)):
        found = records(len(present), seed=seed, missing=0.0)
        others = records(len(present), seed=seed + 10, missing=0.0)
        for start in range(0, len(present) if name == "train" else 0, BATCH):
            found[start + 5]["photo"] = found[start + 1]["photo"]
            found[start + 6]["remark"] = found[start]["remark"]
        rows = [
            {
                "photo": record["photo"] if letter in "pb" else None,
                "photo_again": other["photo"] if letter in "pb" and place % 3 else None,
                "remark": record["remark"] if letter in "rb" else None,
                "aside": other["remark"] if letter in "rb" and place % 2 else None,
                "colour": record["colour"],
            }
            for place, (record, other, letter) in enumerate(zip(found, others, present, strict=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=30)
    return folder


def recipe_for(tables: Path, settings: list[str]) -> AlignRecipe:
    values: dict[str, Any] = {
        "kind": "align",
        "name": "colours",
        "data": {
            **{part: str(tables / f"{part}.parquet") for part in ("train", "validation", "test")},
            "sides": {"picture": ["photo", "photo_again"], "words": ["remark", "aside"]},
            "group": "colour",
            "batch_size": BATCH,
            "preparation": {"image_size": 16},
        },
        "model": {
            "width": 16,
            "encoders": {
                "picture": {"kind": "image", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
                "words": {"kind": "text", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
            },
        },
        "train": {"steps": 6, "precision": "fp32", "evaluate_every": 3, "checkpoint_every": 3},
    }
    return parse(AlignRecipe, override(values, settings), where="test")


def own_ranks() -> Ranks:
    return Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE


# Steps ------------------------------------------------------------------------------------------------------------


def trained(tables: Path, folder: Path, settings: list[str]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Twice over the table, in its order. The first rank's weights after each step, and its losses."""
    ranks, recipe = own_ranks(), recipe_for(tables, settings)
    opened = open_align_tables(recipe.data, seed=0)
    preparation = fit_sides(recipe.data, opened.train)
    lesson = _lesson(recipe, opened, preparation, ranks)
    model = lesson.build().double()
    data = recipe.data
    loader = PairLoader(
        opened.train,
        preparation,
        data.sides,
        batch_size=data.batch_size,
        views=2,
        key=data.spare,
        share=ranks.share,
    )
    after: list[dict[str, Tensor]] = []
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            after.append({name: weight.clone() for name, weight in model.state_dict().items()})
            losses.append(event.loss)

    config = TrainConfig(steps=2 * loader.batches_per_epoch, precision="fp32")
    loss = lesson.learn(model, ranks).loss
    train(model, loss, Exact(loader), config, folder=folder, announce=Announcer(hear), ranks=ranks)
    return after, losses


WAYS: dict[str, list[str]] = {
    "plain": [],
    "spared": ["data.spare=colour"],
    "spared by degrees, temperature fixed": [
        "data.spare=remark",
        "objective.spare_alike=[0.3, 0.9]",
        "model.learn_temperature=false",
    ],
    "three sides, some ranks without a record": [
        "data.sides={picture: [photo, photo_again], words: [remark], more: [aside]}",
        "data.batch_size=3",
        "data.spare=colour",
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_side_is_absent_where_every_step_is_that_of_one_process(
    tables: Path, tmp_path: Path, way: str
) -> None:
    want, want_losses = trained(tables, tmp_path / "1", WAYS[way])
    assert max(want_losses) > 0.1
    for world in (2, 4):
        after, losses = run_ranks(trained, tables, tmp_path / str(world), WAYS[way], world=world)[0]
        np.testing.assert_allclose(losses, want_losses, rtol=1e-6, atol=1e-9)
        for step, (one, many) in enumerate(zip(want, after, strict=True), start=1):
            for key, weight in one.items():
                difference = (many[key] - weight).abs().max().item()
                assert difference < 1e-9, f"{world} ranks, step {step}: {key} differs by {difference}"


# Whole runs -------------------------------------------------------------------------------------------------------


def run_small(tables: Path, folder: Path, settings: list[str], resume: bool = False) -> tuple[bool, dict[str, Any]]:
    ranks = own_ranks()
    result = run_align(recipe_for(tables, settings), folder, quiet=True, ranks=ranks, resume=resume)
    return ranks.first, result.as_json()["figures"]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]


def stopped_after_three_steps(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    shutil.rmtree(folder / "bundle")
    return folder


def test_a_run_is_that_of_one_process_and_goes_on_at_any_number_of_ranks(tables: Path, tmp_path: Path) -> None:
    settings = ["data.spare=colour"]
    one, many = tmp_path / "one", tmp_path / "many"
    _, want = run_small(tables, one, settings)

    found = run_ranks(run_small, tables, many, settings, world=2, limit_seconds=120)

    # Sums in another order, in float32, and an optimizer that divides by a gradient's own size.
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-4)
    assert [first for first, _ in found] == [True, False]
    assert [figures for _, figures in found] == [want, want]
    names = [{path.name for path in folder.iterdir()} for folder in (one, many)]
    assert names[0] == names[1]
    written = [json.loads((folder / "evaluation.json").read_text()) for folder in (one, many)]
    assert written[0] == written[1]

    again = stopped_after_three_steps(many, tmp_path / "in one again")
    run_small(tables, again, settings, True)
    np.testing.assert_allclose(losses(again), losses(one), rtol=1e-3)
    again = stopped_after_three_steps(many, tmp_path / "on two again")
    run_ranks(run_small, tables, again, settings, True, world=2, limit_seconds=120)
    assert losses(again) == losses(many)
    assert json.loads((again / "evaluation.json").read_text()) == written[1]


def test_batches_of_records_that_hold_nothing_end_no_run(tables: Path, tmp_path: Path) -> None:
    whole = pq.read_table(tables / "train.parquet")
    some = whole.to_pylist()[:3]
    nothing = {**dict.fromkeys(some[0]), "colour": "red"}
    pq.write_table(pa.Table.from_pylist([*some, *[nothing] * 9], whole.schema), tmp_path / "train.parquet")
    settings = [f"data.train={tmp_path / 'train.parquet'}", "data.batch_size=2", "model.learn_temperature=false"]

    run_small(tables, tmp_path / "one", settings)
    run_ranks(run_small, tables, tmp_path / "many", settings, world=2, limit_seconds=120)

    assert len(losses(tmp_path / "one")) == 6
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-7)


def test_ranks_without_a_record_choose_their_precision_with_the_others(tables: Path, tmp_path: Path) -> None:
    settings = ["data.batch_size=2", "train.precision=auto", "train.steps=2", "model.learn_temperature=false"]

    found = run_ranks(run_small, tables, tmp_path / "run", settings, world=3, limit_seconds=120)

    assert [first for first, _ in found] == [True, False, False]
    assert len(losses(tmp_path / "run")) == 2


# What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.bridge.num_heads=2"], "a whole batch, and 2 ranks share each out. Leave model.bridge out, or train"),
        (["train.sampling.rate=0.2"], "train.sampling draws for whole batches, and 2 ranks share each out"),
        (["train.flow.every=5"], "train.flow looks into one process, and there are 2 ranks"),
        (["memory.activations=0.5"], "and there are 2 ranks. Say in memory.keep what each block keeps"),
    ],
)
def test_what_looks_at_a_whole_batch_is_refused_before_anything_is_written(
    tables: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    recipe = recipe_for(tables, settings)
    ranks = Ranks(None)
    ranks.world = 2
    with pytest.raises(ConfigError, match=message):
        check_align_ranks(recipe, tmp_path / "run", 2)
    with pytest.raises(ConfigError, match=message):
        run_align(recipe, tmp_path / "run", quiet=True, ranks=ranks)
    assert not (tmp_path / "run").exists()


def test_what_one_process_is_refused_for_is_said_before_ranks_are_connected(tables: Path, tmp_path: Path) -> None:
    check_align_ranks(recipe_for(tables, []), tmp_path / "run", 2)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="lacks the column 'heading'"):
        check_align_ranks(recipe_for(tables, ["data.group=heading"]), tmp_path / "run", 2)
    with pytest.raises(ConfigError, match="model.pairs names 'sound', which is no modality here"):
        check_align_ranks(recipe_for(tables, ["model.pairs=[[words, sound]]"]), tmp_path / "run", 2)
    with pytest.raises(RunError, match="there is no run to resume"):
        check_align_ranks(recipe_for(tables, []), tmp_path / "run", 2, resume=True)


@pytest.mark.slow
def test_our_launcher_trains_it_and_says_a_mistake_once(
    tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "colours.yaml"
    recipe.write_text(to_yaml(recipe_for(tables, ["data.spare=colour"])))
    run_small(tables, tmp_path / "one", ["data.spare=colour"])
    capfd.readouterr()
    command = ["train", str(recipe), "--ranks", "2", "--out", str(tmp_path / "many"), "--json"]

    assert main(command) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["run"] == str(tmp_path / "many")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-4)
    assert {path.name for path in (tmp_path / "many").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}

    assert main([*command, "--set", "model.bridge.num_heads=2", "--out", str(tmp_path / "other")]) == 2
    assert capfd.readouterr().err.count("Leave model.bridge out, or train in one process") == 1
