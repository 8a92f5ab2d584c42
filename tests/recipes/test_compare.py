import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from dougong.core.errors import ConfigError
from dougong.recipes.compare import _arrangements, compare
from dougong.recipes.interval import paired_gain
from dougong.recipes.known import read_recipe
from dougong.recipes.losses import check_objective


def small_vqa(path: Path, pictures: int) -> Path:
    """Pictures of one colour with three questions each, typed and hummed."""
    random = np.random.default_rng(pictures)
    rows = []
    for number in range(pictures):
        content = io.BytesIO()
        Image.new("RGB", (64, 64), tuple(random.integers(0, 255, 3))).save(content, format="PNG")
        for question in ("is it red?", "is it green?", "is it blue?"):
            sound = io.BytesIO()
            soundfile.write(sound, 0.1 * random.standard_normal(2400), 8000, format="FLAC")
            rows.append(
                {
                    "image": {"bytes": content.getvalue(), "path": None},
                    "question": question,
                    "speech": {"bytes": sound.getvalue(), "path": None},
                    "answer": str(random.choice(["yes", "no"])),
                    "voice": "v",
                    "image_id": number,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
def test_every_row_of_a_comparison_is_trained_and_judged_alike(tmp_path: Path) -> None:
    train, test = small_vqa(tmp_path / "train.parquet", 30), small_vqa(tmp_path / "test.parquet", 9)
    settings = ["data.source=null", f"data.train={train}", f"data.test={test}", "train.steps=3"]
    recipe = read_recipe("vqa-demo", [*settings, "data.validation_share=0.2"])

    found = compare(recipe, tmp_path / "run", quiet=True)

    assert [row.name for row in found.rows] == ["majority", "question only", "image only", "late concat", "sandwich"]
    assert set(found.rows[-1].figures) == {"written", "spoken"}
    assert all(0 <= figure <= 1 for row in found.rows for figure in row.figures.values())
    runs = [tmp_path / "run", *(tmp_path / "run" / "baselines").iterdir()]
    orders = {tuple(line.split('"num_records"')[1][:8] for line in steps(run)) for run in runs}
    assert len(runs) == 4
    assert len(orders) == 1  # the same batches for all
    assert found.gains["written"].low <= found.gains["written"].value <= found.gains["written"].high
    page = (tmp_path / "run" / "report.html").read_text()
    assert "late concat" in page


def steps(run: Path) -> list[str]:
    return [line for line in (run / "events.jsonl").read_text().splitlines() if '"StepDone"' in line]


def test_a_gain_of_whole_units_is_less_sure_than_one_of_records() -> None:
    random = np.random.default_rng(0)
    better = np.repeat(random.random(50) < 0.6, 10)
    theirs = np.zeros(500, np.bool_)

    by_unit = paired_gain(better, theirs, list(np.repeat(np.arange(50), 10)))
    by_record = paired_gain(better, theirs, list(range(500)))

    assert by_unit.value == by_record.value == better.mean()
    assert by_unit.high - by_unit.low > 2 * (by_record.high - by_record.low)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.gate_quality=true", "data.preparation.quality=true"],
        ["model.decide=gated"],
        ["objective.gate_weight=0.5", "data.corrupt={}"],
        ["model.completion.num_tokens=1", "objective.completion_weight=0.5"],
    ],
)
def test_baselines_leave_out_what_only_a_bridge_has(settings: list[str]) -> None:
    found = _arrangements(read_recipe("vqa-demo", settings))
    assert [recipe.model.fusion for _, recipe in found] == ["late", "late", "late", "bridge"]
    for name, recipe in found:
        check_objective(recipe.objective, recipe.model)
        assert (recipe.model.completion is None) or name == "sandwich"


def test_without_conditions_there_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="data.conditions are none. Name two or more"):
        _arrangements(read_recipe("vqa-demo", ["data.conditions={}"]))
