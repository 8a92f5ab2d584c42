"""Holds recipes/weigh.py to its promise: votes weigh as much as records that training did not see bear out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dougong.bundle.model import load
from dougong.core.config import parse
from dougong.data.batch import BatchArrays
from dougong.data.loader import Loader, LoaderConfig
from dougong.model.votes import Ballot, weigh
from dougong.objectives.decision import decision_loss
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import RunResult, run_recipe
from dougong.recipes.weigh import learn_weights, weigh_votes


@pytest.fixture(scope="module")
def result(colour_table: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    values = {
        "name": "weighed",
        "data": {"train": str(colour_table), "target": "colour", "modalities": ["photo", "remark"], "withhold": 0.2},
        "model": {"width": 16, "bridge": {"num_heads": 2}, "decide": "weighed"},
        "train": {"steps": 8, "precision": "fp32"},
    }
    return run_recipe(parse(Recipe, values, where="test"), tmp_path_factory.mktemp("run") / "run", quiet=True)


def batches(result: RunResult) -> Iterator[BatchArrays]:
    return Loader(result.tables.validation, result.model.preparation, LoaderConfig(batch_size=8)).one_pass()


def test_a_run_learns_them_and_its_bundle_keeps_them(result: RunResult) -> None:
    learnt = result.model.network.votes
    assert learnt.weight_V.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (learnt.weight_V > 0).all()
    assert learnt.weight_V.std() > 1e-4
    again = load(result.folder / "bundle").network.votes
    assert torch.equal(again.weight_V, learnt.weight_V)
    assert torch.equal(again.scale, learnt.scale)


def test_nothing_else_of_a_model_changes(result: RunResult) -> None:
    network = result.model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weigh_votes(network, batches(result), "single_label")
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"votes.weight_V", "votes.scale"}


@pytest.mark.parametrize("knowing", [0, 1])
def test_one_who_knows_weighs_more_than_one_who_guesses_as_loudly(knowing: int) -> None:
    torch.manual_seed(0)
    target_B = torch.randint(3, (400,))
    logit_BVC = 3.0 * torch.nn.functional.one_hot(torch.randint(3, (400, 2)), 3).double()
    logit_BVC[:, knowing] = 3.0 * torch.nn.functional.one_hot(target_B, 3) + torch.randn(400, 3)
    ballot = Ballot(logit_BVC, torch.ones(400, 2, dtype=torch.bool))

    learnt = learn_weights(ballot, target_B, "single_label")

    assert learnt.weight_V.mean().item() == pytest.approx(1.0)
    assert learnt.weight_V[knowing] > 10 * learnt.weight_V[1 - knowing]
    weighed = decision_loss(weigh(ballot, *learnt), target_B, "single_label")
    assert weighed < 0.7 * decision_loss(logit_BVC.mean(dim=1), target_B, "single_label")


def test_of_a_number_the_mean_stays_a_mean() -> None:
    torch.manual_seed(0)
    target_B = torch.randn(200).double()
    logit_BVC = torch.stack([target_B, torch.randn(200).double()], dim=1)[..., None]
    learnt = learn_weights(Ballot(logit_BVC, torch.ones(200, 2, dtype=torch.bool)), target_B, "regression")
    assert learnt.scale == 1.0
    assert learnt.weight_V[0] > 5 * learnt.weight_V[1]
