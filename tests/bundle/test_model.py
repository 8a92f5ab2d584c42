import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

import dougong
from dougong.bundle.model import Model, Prediction
from dougong.core.errors import BundleError, ConfigError, DataError

MODALITIES = ("photo", "clip", "remark", "table")
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(colour_run: Path) -> Model:
    return dougong.load(colour_run / "bundle")


@pytest.fixture(scope="module")
def unseen(records: Records) -> list[dict[str, Any]]:
    return records(40, seed=9, missing=0.2)


def right(answers: list[Prediction], rows: list[dict[str, Any]]) -> float:
    return sum(answer.answer == row["colour"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def test_a_table_never_seen_here_is_learnt_with_no_options(model: Model, unseen: list[dict[str, Any]]) -> None:
    assert tuple(model.preparation.modalities) == MODALITIES
    assert right(model.predict(unseen), unseen) > 0.9


@pytest.mark.parametrize("withheld", MODALITIES)
def test_any_one_modality_may_be_withheld(model: Model, records: Records, withheld: str) -> None:
    rows = records(40, seed=8, missing=0.0)

    answers = model.predict(rows, withhold=[withheld])

    assert right(answers, rows) > 0.8
    assert all(answer.absent == (withheld,) and answer.gate[withheld] == 0.0 for answer in answers)


def test_every_record_is_answered_whatever_it_lacks(model: Model) -> None:
    empty, alone = model.predict([{"photo": None, "remark": None}, {"remark": "it is cold like the sea"}])

    assert empty.answer is not None
    assert empty.absent == MODALITIES
    assert alone.answer is not None
    assert sum(alone.probabilities.values()) == pytest.approx(1.0, abs=1e-4)


def test_what_is_saved_and_loaded_answers_the_same(model: Model, unseen: list[dict[str, Any]], tmp_path: Path) -> None:
    model.save(tmp_path / "again")

    assert dougong.load(tmp_path / "again").predict(unseen) == model.predict(unseen)


def test_how_records_are_given_changes_nothing(model: Model, unseen: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = model.predict(unseen)
    lines = [{"remark": row["remark"], "weight": row["weight"]} for row in unseen]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    assert model.predict(pa.Table.from_pylist(unseen)) == expected
    assert model.predict(str(tmp_path / "rows.jsonl")) == model.predict(lines)


def test_a_picture_in_memory_will_do(model: Model, records: Records) -> None:
    row = records(1, seed=3, missing=0.0)[0]
    picture = Image.open(io.BytesIO(row["photo"]["bytes"]))

    (by_picture,) = model.predict([{"photo": picture}])
    (by_bytes,) = model.predict([{"photo": row["photo"]}])

    assert by_picture == by_bytes


def test_a_bad_record_gets_its_reason_and_its_neighbours_their_answers(
    model: Model, unseen: list[dict[str, Any]]
) -> None:
    spoiled = [dict(row) for row in unseen[:3]]
    spoiled[1]["photo"] = {"bytes": b"no picture", "path": None}

    first, bad, last = model.predict(spoiled)

    assert bad.answer is None
    assert bad.error == "photo: is not a picture"
    assert bad.row == 1
    assert [first.answer, last.answer] == [answer.answer for answer in model.predict([unseen[0], unseen[2]])]


def test_a_path_cannot_leave_the_folder(model: Model, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "inner").mkdir()

    (answer,) = model.predict([{"photo": "../secret.png"}], folder=tmp_path / "inner")

    assert answer.answer is None
    assert answer.error == "photo: path '../secret.png' leads out of the table's folder"


def test_an_altered_bundle_is_refused(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "altered")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(BundleError, match="model.safetensors"):
        dougong.load(folder)


def test_a_bundle_holds_nothing_that_could_run(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "bundle")

    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads((folder / "bundle.json").read_text())

    assert endings == {".json", ".safetensors", ".md"}
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"bundle.json"}


def test_the_card_holds_the_measured_figures(colour_run: Path) -> None:
    figures = json.loads((colour_run / "evaluation.json").read_text())["conditions"]
    card = (colour_run / "bundle" / "README.md").read_text()

    for name, found in figures.items():
        assert f"| {name} | {found['metrics']['accuracy']:.4f} |" in card


def test_what_is_no_record_is_refused_in_one_line(model: Model) -> None:
    with pytest.raises(DataError, match=r"columns colour, and the model reads photo, clip"):
        model.predict([{"colour": "red"}])
    with pytest.raises(DataError, match="cannot read int as records"):
        model.predict(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="withhold 'smell' is no modality of this model"):
        model.predict([{"remark": "x"}], withhold=["smell"])
