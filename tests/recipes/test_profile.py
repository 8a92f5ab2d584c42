"""What a profile says of a recipe's step: counted on the step that training takes, and every change carried out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dougong.cli.main import main
from dougong.core.config import override, parse, to_yaml
from dougong.core.errors import ConfigError, RunError
from dougong.core.sizes import bytes_as_text
from dougong.engine.parallel.plan import PlanConfig
from dougong.recipes import profile
from dougong.recipes.alignment import emoji_retrieval
from dougong.recipes.build import LaidOut, build_model, learn_preparation, open_records
from dougong.recipes.check import read_recipe_or_table
from dougong.recipes.decoding import DecodeRecipe
from dougong.recipes.known import AnyRecipe
from dougong.recipes.plan import Planned
from dougong.recipes.profile import Change, ProfileResult, cheapest, check_profile, profile_recipe
from dougong.recipes.recipe import Recipe

SMALL: dict[str, Any] = {
    "photo": {"kind": "image", "width": 32, "num_layers": 1, "num_heads": 2, "patch_size": 8},
    "remark": {"kind": "text", "width": 16, "num_layers": 1, "num_heads": 2},
}


def recipe_for(table: Path, *settings: str) -> Recipe:
    values = {
        "name": "small",
        "data": {
            "train": str(table),
            "target": "colour",
            "modalities": ["photo", "remark"],
            "loader": {"batch_size": 32, "workers": 0},
        },
        "model": {"width": 16, "bridge": {"num_blocks": 1, "num_heads": 2}, "encoders": SMALL},
        "train": {"precision": "fp32", "steps": 4},
    }
    return parse(Recipe, override(parse(Recipe, values, where="test").model_dump(mode="json"), settings), where="test")


def with_settings(recipe: LaidOut, settings: tuple[str, ...]) -> LaidOut:
    return parse(type(recipe), override(recipe.model_dump(mode="json"), settings), where="test")


def peak_of(recipe: LaidOut) -> int:
    """Counted by other code: on a rank of one that is rehearsed."""
    tables = open_records(recipe)
    planned = Planned(recipe, tables, learn_preparation(recipe, tables)[0])
    keep = planned.kept(PlanConfig(), 1)
    (held,) = planned.rehearsed(planned.choice(PlanConfig()), 1, keep)
    return held.peak


@pytest.fixture(scope="module", autouse=True)
def _few_turns() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, few in {"TURNS": 2, "REPEATS": 1, "BUDGETS": (0.6,), "SMALLER": (2,)}.items():
            patch.setattr(profile, name, few)
        yield


@pytest.fixture(scope="module")
def result(colour_table: Path) -> ProfileResult:
    return profile_recipe(recipe_for(colour_table))


def test_every_change_saves_what_it_says(result: ProfileResult) -> None:
    # Of its own, a rehearsed rank has what it sends to nobody.
    assert result.timeline.held.peak == pytest.approx(peak_of(result.recipe), rel=0.01)
    kinds = {change.settings[0].partition("=")[0] for change in result.changes}
    assert kinds == {"memory.recompute", "memory.activations", "train.precision", "data.loader.batch_size"}
    for change in result.changes:
        assert change.saved_bytes == result.timeline.held.peak - change.peak_bytes > 0
        if change.settings != ("memory.recompute=blocks",):  # takes as long, and tells no more than cheap
            changed = with_settings(result.recipe, change.settings)
            assert change.peak_bytes == pytest.approx(peak_of(changed), rel=0.03), change.settings


def test_what_is_told_adds_up(result: ProfileResult) -> None:
    told = json.loads(json.dumps(result.as_json()))

    assert sum(told["at_peak"].values()) == told["peak_bytes"]
    assert sum(part["bytes_at_peak"] for part in told["parts"]) == told["at_peak"]["activations"]
    columns = np.array([series["bytes"] for series in told["course"]["series"]])
    assert columns.sum(axis=0).max() == told["peak_bytes"]
    assert told["course"]["seconds"] == sorted(told["course"]["seconds"])
    assert {part["modality"] for part in told["parts"]} == {"", "photo", "remark"}
    assert told["records"] == 32
    assert 0 < told["modalities"]["photo"] < 32
    spent = sum(part["forward_seconds"] + part["backward_seconds"] for part in told["parts"])
    whole = spent + told["begin_seconds"] + told["optimizer_seconds"]
    assert whole == pytest.approx(told["course"]["seconds"][-1], rel=0.2)  # medians by visit, and by part
    assert 1 <= len(told["offered"]) <= 3


@pytest.mark.slow
def test_a_recipe_that_saves_already_is_counted_so(
    colour_table: Path, result: ProfileResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(profile, "build_model", lambda *given: built.append(build_model(*given)) or built[-1])

    less = profile_recipe(recipe_for(colour_table, "memory.recompute=blocks", "train.precision=bf16"))

    (model,) = built
    fresh = build_model(less.recipe, learn_preparation(less.recipe, open_records(less.recipe))[0])
    for name, value in fresh.state_dict().items():  # no weight was changed
        assert torch.equal(value, model.state_dict()[name])
    assert not any("forward" in vars(block) for block in model.blocks)
    found = {change.settings: change.peak_bytes for change in result.changes}
    assert less.timeline.held.peak < found["memory.recompute=blocks",]
    # Keeping more saves nothing, and is not said to.
    assert not any(change.settings[0].startswith(("memory.recompute", "train.precision")) for change in less.changes)


def test_a_decoder_is_profiled_as_it_is_trained(colour_table: Path) -> None:
    values = {
        "kind": "decode",
        "name": "writes",
        "data": {
            "train": str(colour_table),
            "modalities": ["remark"],
            "columns": {"remark": "text"},
            "loader": {"batch_size": 16, "workers": 0},
        },
        "model": {
            "width": 16,
            "num_layers": 2,
            "latent_rank": 8,
            "hidden": 32,
            "num_heads": 2,
            "experts": {"num": 2, "num_chosen": 1, "hidden": 16},
        },
        "train": {"precision": "fp32", "steps": 4, "accumulation": 2},
    }
    recipe = parse(DecodeRecipe, values, where="test")

    found = profile_recipe(recipe)

    assert found.timeline.held.peak == pytest.approx(peak_of(recipe), rel=0.01)
    assert found.num_records == 32
    assert [visit.phase for visit, _ in found.timeline.visits].count("optimizer") == 1
    assert [visit.part for visit, _ in found.timeline.visits if visit.phase == "forward"].count(0) >= 2
    assert found.changes


def test_settings_are_laid_over_what_a_table_would_be_trained_by(colour_table: Path) -> None:
    recipe = read_recipe_or_table(str(colour_table), target="colour", settings=["memory.recompute=blocks"])
    assert recipe.memory.recompute == "blocks"
    assert recipe.data.target == "colour"
    with pytest.raises(ConfigError, match="has no setting 'memory.recompte'"):
        read_recipe_or_table(str(colour_table), settings=["memory.recompte=blocks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=adaptive"],
        ["train.precision=fp16", "train.loss_scale=doubling"],
        ["train.precision=auto", "train.accumulation=3"],
        ["objective.balance=mmpareto", "model.own_heads=taught"],
        ["objective.balance=ogm-ge", "model.own_heads=watching"],
        ["memory.activations=0.8"],
        ["train.sampling={}", "train.ema=0.9"],
        ["data.withhold=0.3", "model.completion={}"],
    ],
)
def test_steps_of_every_kind_are_followed(colour_table: Path, settings: list[str]) -> None:
    recipe = recipe_for(colour_table, *settings)

    found = profile_recipe(recipe)

    told = found.as_json()
    assert sum(told["at_peak"].values()) == told["peak_bytes"] == int(found.timeline.total.max())
    assert found.changes
    for each in found.changes:
        with_settings(recipe, each.settings)  # can be set
    assert ("train.ema" in " ".join(found.notes)) == (recipe.train.ema is not None)
    if recipe.objective.balance == "mmpareto":  # what it would refuse is not offered
        assert not any("memory.recompute=cheap" in each.settings for each in found.changes)


def change(name: str, saved: int, seconds: float) -> Change:
    return Change((name,), "", 1000 - saved, saved, seconds, seconds, seconds)


def test_the_cheapest_changes_save_most_for_their_cost() -> None:
    slow, good = change("slow", 400, 0.4), change("good", 300, 0.1)
    worse = change("worse", 200, 0.2)
    free, faster = change("free", 100, 0.001), change("faster", 50, -0.5)
    # A hundredth of a step is noise: "free" has 100 for it, and "faster" is no faster than it.
    assert cheapest([slow, worse, good, faster, free], step_seconds=1.0) == (free, good, slow)
    assert cheapest([slow, worse, good, faster, free], step_seconds=1.0, most=5) == (free, good, slow)
    assert cheapest([slow, good, free], step_seconds=1.0, most=2) == (free, good)
    assert cheapest([], step_seconds=1.0) == ()
    alike = change("alike", 300, 0.1)
    assert set(cheapest([good, alike], step_seconds=1.0)) == {good, alike}


def test_what_cannot_be_profiled_is_said_in_one_line(colour_table: Path) -> None:
    with pytest.raises(ConfigError, match=r"emoji-retrieval learns to align. Leave --profile out"):
        check_profile(emoji_retrieval())
    with pytest.raises(ConfigError, match=r"plan is of several \(tensor 2\).* Add --set plan=null"):
        check_profile(recipe_for(colour_table, "plan.tensor=2"))


def test_a_step_that_is_not_finite_is_refused(colour_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "loss_of", lambda *_: lambda output, __: output.output_BC.sum() * float("nan"))
    with pytest.raises(RunError, match=r"the first step of small is not finite \(loss nan"):
        profile_recipe(recipe_for(colour_table))


def test_a_command_tells_people_and_programs(
    result: ProfileResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(to_yaml(result.recipe))
    given: list[AnyRecipe] = []

    def measured_before(recipe: AnyRecipe, _: object) -> ProfileResult:
        given.append(recipe)
        return result

    monkeypatch.setattr(profile, "profile_recipe", measured_before)

    assert main(["check", "small.yaml", "--profile", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["check", "small.yaml", "--profile", "--set", "train.steps=9", "--out", "page"]) == 0
    shown = capsys.readouterr().out

    assert [recipe.train.steps for recipe in given] == [4, 9]
    assert told["page"] == "runs/small-profile/profile.html"
    assert told["peak_bytes"] == result.timeline.held.peak
    kept = json.loads((tmp_path / "runs/small-profile/profile.json").read_text())
    assert {**kept, "page": told["page"]} == told
    assert (tmp_path / "page" / "profile.html").is_file()
    assert f"small: a step of 32 records, fp32, holds {bytes_as_text(told['peak_bytes'])} at most" in shown
    assert "activations: photo" in shown
    for change in result.offered:
        assert " ".join(f"--set {setting}" for setting in change.settings) in shown
    assert "EncoderBlock" not in shown  # it is a modality's own, whose name is told
    assert "BridgeBlock" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "page"], "--out page says nothing without --profile. Add that, or leave it out."),
        (["--profile", "--pictures", "worst.html"], "--pictures worst.html shows records, which --profile does not"),
        (["--profile", "--set", "plan.shard=2"], "the recipe's plan is of several (zero3 over 2)"),
        (["--profile", "--out", "taken"], "--out taken: taken is a file, and the page needs a folder. Name another."),
    ],
)
def test_wrong_use_gets_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert main(["check", "xor", *arguments]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
