from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dougong
from dougong.bundle.contribution import ContributionConfig, _with_tokens, measure_contribution
from dougong.bundle.model import Model
from dougong.core.errors import ConfigError, DataError
from dougong.data.table import open_table
from dougong.engine.contribution import Probe, recombine
from dougong.model.sandwich import FinishBlock, JoinBlock

Records = Callable[..., list[dict[str, Any]]]
SMALL = ContributionConfig(num_records=60, num_projected=15, num_with_tokens=3, num_permutations=2)


@pytest.fixture(scope="module")
def model(colour_run: Path) -> Model:
    return dougong.load(colour_run / "bundle")


@pytest.fixture(scope="module")
def unseen(records: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unseen") / "unseen.parquet"
    pq.write_table(pa.Table.from_pylist(records(80, seed=9, missing=0.1)), path)
    return path


def test_every_measure_of_a_model_adds_up(model: Model, unseen: Path) -> None:
    found = measure_contribution(model, unseen, SMALL)

    assert found.metric == "accuracy"
    assert found.num_records == 60
    assert list(found.modalities) == ["photo", "clip", "remark", "table"]
    assert sum(each.shapley for each in found.modalities.values()) == pytest.approx(found.all - found.none)
    assert sum(each.share for each in found.modalities.values()) == pytest.approx(1.0)
    assert sum(each.token_share for each in found.modalities.values()) == pytest.approx(1.0)
    assert len(found.sets) == 16
    assert found.sets["nothing"] == found.none < 0.6 < found.all
    assert found.num_projected == 13  # of 4 modalities: no multiple of 2 or 3
    assert 0.6 < found.additive_original <= 1.0
    assert found == measure_contribution(model, unseen, SMALL)


def test_sets_of_modalities_are_judged_as_views_are(model: Model, unseen: Path) -> None:
    whole = measure_contribution(model, unseen, SMALL.model_copy(update={"num_records": 100}))

    assert whole.num_records == 80
    for keep in (("photo", "clip", "remark", "table"), ("clip", "table"), ("remark",)):
        judged = model.evaluate(unseen, keep=keep).metrics["accuracy"]
        assert whole.sets[" + ".join(keep)] == pytest.approx(judged, abs=1e-6)


def test_whose_pictures_are_seen_does_not_matter_to_a_model_that_sees_none(model: Model, unseen: Path) -> None:
    blind = dougong.load(model.save(unseen.parent / "blind"))
    with torch.no_grad():
        for block in blind.network.blocks:
            if isinstance(block, FinishBlock) and block.name == "photo":
                block.project.weight.zero_()

    found = measure_contribution(blind, unseen, SMALL).modalities

    assert found["photo"].perceptual == found["photo"].perceptual_of_model == 0.0
    assert max(each.perceptual for each in found.values()) > 0.05


@pytest.mark.parametrize("fusion", ["bridge", "late"])
def test_all_tokens_are_the_whole_record_and_none_is_nothing(
    model: Model, unseen: Path, colour_run: Path, fusion: str
) -> None:
    network = model.network
    if fusion == "late":
        torch.manual_seed(0)
        config = network.config.model_copy(update={"fusion": "late"})
        network = config.build(model.preparation.signature()).eval()
    probe = Probe.on(network, open_table(unseen), model.preparation, most=10)
    with torch.inference_mode():
        one = recombine(probe.batch, np.array([[4, 4, 4, 4], [-1, -1, -1, -1]]))
        state = network.embed(recombine(probe.batch, np.array([[4, 4, 4, 4]])))
        behind = [i for i, block in enumerate(network.blocks) if isinstance(block, JoinBlock)]
        first = behind[0] if behind else len(network.blocks)
        for block in network.blocks[:first]:
            state = block(state)
        num_tokens = sum(int(mask.sum()) for mask in state.masks.values())
        keep_KT = torch.stack([torch.ones(num_tokens), torch.zeros(num_tokens)]).bool()
        following = _with_tokens(state, network.names, keep_KT)
        for block in network.blocks[first:]:
            following = block(following)

        torch.testing.assert_close(network.head(following).output_BC, network(one).output_BC, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_measured_is_refused(model: Model, tmp_path: Path, records: Records) -> None:
    rows = [{name: value for name, value in row.items() if name != "colour"} for row in records(5, seed=1, missing=0.0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "blind.parquet")
    with pytest.raises(DataError, match="records whose target is known"):
        measure_contribution(model, tmp_path / "blind.parquet", SMALL)

    one = Model(model.network, model.preparation.only(("remark",)), model.manifest)
    with pytest.raises(ConfigError, match="this model has one modality, remark"):
        measure_contribution(one, tmp_path / "blind.parquet", SMALL)
