"""Completion goes the whole way: settings, training, resuming, bundle, predictions, report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dougong
from dougong.core.config import override, parse
from dougong.core.errors import ConfigError
from dougong.core.events import read_events
from dougong.core.signature import Signature, TableInput, Target
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.recipes.compare import _arrangements
from dougong.recipes.known import read_recipe
from dougong.recipes.losses import completion_losses
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.training import encodes_withheld

SETTINGS = ["model.completion.num_tokens=2", "objective.completion_weight=0.5", "data.withhold=0.4"]


def recipe_for(table: Path) -> Recipe:
    values: dict[str, Any] = {
        "name": "gaps",
        "data": {
            "train": str(table),
            "target": "colour",
            "modalities": ["photo", "remark", "table"],
            "loader": {"batch_size": 32},
        },
        "model": {"width": 16, "bridge": {"num_heads": 2}, "completion": {"num_heads": 2}},
        "train": {"steps": 6, "precision": "fp32", "checkpoint_every": 2, "keep": 5},
    }
    return parse(Recipe, override(values, SETTINGS), where="test")


def losses(folder: Path) -> dict[int, float]:
    return {
        event["step"]: event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"
    }


def test_a_model_with_completion_learns_resumes_is_kept_and_says_what_it_made_up(
    colour_table: Path, tmp_path: Path
) -> None:
    whole = run_recipe(recipe_for(colour_table), tmp_path / "whole", quiet=True)
    run_recipe(recipe_for(colour_table), tmp_path / "cut", quiet=True)
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:  # as if it had been killed after step 2
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again = run_recipe(recipe_for(colour_table), tmp_path / "cut", resume=True, quiet=True)

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    settings = ["objective.completion_weight=0", "train.steps=1"]
    lighter = parse(Recipe, override(recipe_for(colour_table).model_dump(mode="json"), settings), where="test")
    run_recipe(lighter, tmp_path / "lighter", quiet=True)
    # The same weights and records at first; half of about 1 for each that was withheld.
    assert losses(tmp_path / "whole")[1] > losses(tmp_path / "lighter")[1] + 0.2

    mine, theirs = whole.model.network.state_dict(), again.model.network.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    records = [{"remark": "it is warm like fire number 3"}, {"remark": None}, {"weight": 1.0, "maker": "g1"}]
    loaded = dougong.load(tmp_path / "whole" / "bundle")
    answers = loaded.predict(records)
    assert answers == whole.model.predict(records)
    assert [answer.completed for answer in answers] == [("photo", "table"), (), ("photo", "remark")]
    assert [answer.absent for answer in answers] == [
        ("photo", "table"),
        ("photo", "remark", "table"),
        ("photo", "remark"),
    ]
    assert all(share > 0 for share in answers[0].gate.values())
    assert set(answers[1].gate.values()) == {0.0}

    samples = json.loads((tmp_path / "whole" / "samples.json").read_text())
    for given in (sample["inputs"].values() for sample in samples):
        nothing = all(one["absent"] for one in given)
        assert [one.get("completed", False) for one in given] == [one["absent"] and not nothing for one in given]
    assert "not given; completed from the others" in (tmp_path / "whole" / "report.html").read_text()


def test_only_what_was_withheld_and_is_there_counts() -> None:
    torch.manual_seed(0)
    shape = TableInput(num_numbers=2, category_sizes=())
    target = Target(name="answer", task="single_label", labels=("a", "b"))
    signature = Signature(inputs={"left": shape, "right": shape}, target=target)
    config = SandwichConfig.model_validate({"width": 8, "bridge": {"num_heads": 2}, "completion": {"num_heads": 2}})
    model = config.build(signature).train()

    def media(present: list[bool], there: list[bool]) -> MediaBatch:
        values = {
            "numbers_UN": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
            "known_UN": torch.ones(4, 2, dtype=torch.bool),
            "categories_UK": torch.zeros(4, 0, dtype=torch.int64),
        }
        return MediaBatch(values, torch.arange(4), torch.tensor(present), torch.tensor(there))

    # The right one: 0 has it, 1 was kept from it, 2 lacks it, 3 was kept from it and has nothing else either.
    batch = Batch(
        {
            "left": media([True, True, True, False], [True, True, True, False]),
            "right": media([True, False, False, False], [True, True, False, True]),
        },
        None,
    )
    output = model(batch)

    truth_KD = output.truth["right"]
    spread = (truth_KD - truth_KD.mean(dim=0)).square().mean()
    wanted = (output.completed["right"][1] - truth_KD[1]).square().mean() / spread
    torch.testing.assert_close(completion_losses(output, batch), wanted)
    assert completion_losses(model.eval()(batch), batch).item() == 0.0


def test_completion_without_anything_withheld_is_refused(colour_table: Path) -> None:
    values = recipe_for(colour_table).model_dump(mode="json")
    values["data"]["withhold"] = 0.0
    with pytest.raises(
        ConfigError, match=r"model.completion is learnt from what is withheld, and nothing is\. Set data"
    ):
        parse(Recipe, values, where="test")


def test_the_named_recipe_completes_what_it_learnt_to_do_without(colour_table: Path, tmp_path: Path) -> None:
    named = read_recipe("complete-views")
    assert encodes_withheld(named)
    table = [f"data.train={colour_table}", "data.source=null", "data.target=colour", "data.columns={}"]
    settings = [*table, "data.modalities=[photo, remark, table]", "train.steps=2"]

    result = run_recipe(read_recipe("complete-views", settings), tmp_path / "run", quiet=True)

    (answer,) = result.model.predict([{"remark": "it is warm like fire number 3"}])
    assert answer.completed == ("photo", "table")


def test_a_comparison_s_baselines_go_without_completion() -> None:
    recipe = read_recipe("vqa-demo", ["model.completion.num_tokens=1", "model.completion.num_heads=6"])

    found = {name: altered.model.completion is not None for name, altered in _arrangements(recipe)}

    assert found == {"question only": False, "image only": False, "late concat": False, "sandwich": True}


def test_completion_is_learnt_from_what_sampling_leaves_out_beside(colour_table: Path, tmp_path: Path) -> None:
    def recipe(*settings: str) -> Recipe:
        values = override(recipe_for(colour_table).model_dump(mode="json"), ["data.withhold=0", "train.steps=1"])
        return parse(Recipe, override(values, ["train.sampling.rate=0.5", *settings]), where="test")

    with pytest.raises(ConfigError, match=r"none of it is encoded\. Set train\.sampling\.beside: true, or objective"):
        recipe()
    with pytest.raises(ConfigError, match=r"model.completion is learnt from what is withheld, and nothing is"):
        recipe("train.sampling.rate=0", "train.sampling.highest=0", "train.sampling.beside=true")
    run_recipe(recipe("train.sampling.beside=true"), tmp_path / "beside", quiet=True)
    run_recipe(recipe("objective.completion_weight=0"), tmp_path / "lighter", quiet=True)

    # The same weights, records and draws; half of about 1 for each that was left out.
    assert losses(tmp_path / "beside")[1] > losses(tmp_path / "lighter")[1] + 0.2
