"""Holds data/preparation.py to its promise: learnt from training alone, and loaded again it decodes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_builders import LABELS, fitted, inline, npy, picture, rows, sound, sound_of
from pydantic import ValidationError
from tokenizers import Tokenizer

from dougong.core.errors import BundleError, ConfigError, DataError
from dougong.core.signature import AudioInput, ImageInput, SignalInput, TableInput, TextInput, VolumeInput
from dougong.data import preparation as preparation_module
from dougong.data.columns import infer_roles
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.split import split_table
from dougong.data.table import Table, table_of_rows

NAMED = {"question": "text", "scan": "volume", "colour": "category", "note": "text"}


def everything(folder: Path, num_rows: int = 24) -> Table:
    """Each kind of modality, and each missing somewhere."""
    columns: dict[str, list[Any]] = {
        "image": [inline(picture(50, 50, seed=row)) for row in range(num_rows)],
        "speech": [inline(sound(0.05, seed=row)) for row in range(num_rows)],
        "question": [f"what is number {row}" for row in range(num_rows)],
        "note": ["yes", "no"] * (num_rows // 2),
        "ecg": [[float(row), 1.0, 2.0] for row in range(num_rows)],
        "scan": [npy(np.full((2, 3, 4), row)) for row in range(num_rows)],
        "age": [20.0 + row for row in range(num_rows)],
        "always": [0.1] * num_rows,
        "colour": ["red", "blue"] * (num_rows // 2),
    }
    for place, name in enumerate(columns):
        columns[name][place] = None
    labels = ["no", "yes"] * (num_rows // 2)
    return table_of_rows(pa.table({**columns, "label": labels}), folder)


def cells_of_row(table: Table, columns: tuple[str, ...], row: int) -> tuple[Any, ...]:
    held = table.read(0, list(columns))
    return tuple(held.column(name)[row].as_py() for name in columns)


def test_every_kind_of_column_becomes_its_modality(tmp_path: Path) -> None:
    preparation = fitted(everything(tmp_path), NAMED)
    inputs = preparation.signature().inputs
    assert inputs["image"] == ImageInput(height=48, width=48)  # 50 pixels, to a multiple of 8
    assert inputs["speech"] == AudioInput(sample_rate=8000, max_samples=1600 + 800)
    assert isinstance(inputs["question"], TextInput)
    assert inputs["note"].max_tokens == 16  # type: ignore[union-attr]
    assert inputs["ecg"] == SignalInput(num_channels=1, max_samples=3)
    assert inputs["scan"] == VolumeInput(depth=2, height=3, width=4)
    assert inputs["table"] == TableInput(num_numbers=2, category_sizes=(3,))
    assert preparation.columns == ["image", "speech", "question", "note", "ecg", "scan", "age", "always", "colour"]
    assert preparation.target == LABELS


def test_saved_and_loaded_it_decodes_every_record_the_same(tmp_path: Path) -> None:
    table = everything(tmp_path)
    preparation = fitted(table, NAMED)
    names = preparation.save(tmp_path / "kept")
    loaded = Preparation.load(tmp_path / "kept")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert loaded.signature() == preparation.signature()
    assert list(loaded.modalities) == list(preparation.modalities)
    compared = 0
    for name, modality in preparation.modalities.items():
        for row in range(table.num_rows):
            cells = cells_of_row(table, modality.columns, row)
            if modality.key(cells) is not None:
                media = [one.decode(cells, tmp_path) for one in (modality, loaded.modalities[name])]
                np.testing.assert_array_equal(media[0], media[1])
                stacked = [
                    one.stack([media[0]], np.random.default_rng(0)) for one in (modality, loaded.modalities[name])
                ]
                for key in stacked[0]:
                    np.testing.assert_array_equal(stacked[0][key], stacked[1][key])
                compared += 1
    assert compared == 24 * 7 - 6  # the table modality's row has its other columns


def test_the_same_table_teaches_the_same(tmp_path: Path) -> None:
    kept = [tmp_path / "one", tmp_path / "two"]
    for folder in kept:
        fitted(everything(tmp_path), NAMED).save(folder)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in kept]
    assert files[0] == files[1]


def test_only_training_records_teach(tmp_path: Path) -> None:
    def table(odd: bool) -> Table:
        held_out = {number for chunk in range(parts[1].num_chunks) for number in parts[1].numbers_of(chunk).tolist()}
        strange = [odd and row in held_out for row in range(200)]
        return rows(
            age=[1e6 if is_odd else float(row % 7) for row, is_odd in enumerate(strange)],
            colour=["violet" if is_odd else ("red", "blue")[row % 2] for row, is_odd in enumerate(strange)],
            question=["zyx wvu zyx wvu" if is_odd else "what is it" for is_odd in strange],
            image=[inline(picture(64 if is_odd else 16, seed=row % 9)) for row, is_odd in enumerate(strange)],
            speech=[inline(sound(1.0 if is_odd else 0.1)) for is_odd in strange],
            label=["no", "yes"] * 100,
        )

    parts = split_table(rows(x=list(range(200))), 0.3, unit=None, seed=0)
    assert parts[1].num_rows > 30
    for odd in (False, True):
        train, _ = split_table(table(odd), 0.3, unit=None, seed=0)
        preparation = fitted(train, {"question": "text", "colour": "category"})
        preparation.save(tmp_path / str(odd))
    for name in ("preparation.json", "tokenizer-0.json"):
        assert (tmp_path / "False" / name).read_bytes() == (tmp_path / "True" / name).read_bytes()
    assert "violet" not in (tmp_path / "True" / "preparation.json").read_text()


def test_a_constant_number_column_is_not_blown_up() -> None:
    preparation = fitted(rows(x=[0.1] * 30, z=[0.3, 0.5] * 15, label=["a", "b"] * 15))
    table = preparation.modalities["table"]
    np.testing.assert_allclose(table.decode((0.1, 0.4), Path()), [0, 0], atol=1e-9)
    np.testing.assert_allclose(table.decode((0.2, 0.5), Path()), [0.1, 1], atol=1e-9)


def test_constant_signals_are_not_blown_up() -> None:
    preparation = fitted(rows(ecg=[[0.1] * 1000] * 10, label=["a", "b"] * 5))
    assert preparation.modalities["ecg"].config.scale == 1.0  # type: ignore[attr-defined]


def test_numbers_are_learnt_of_all_records_and_the_bad_ones_do_not_teach() -> None:
    cells = [str(value) for value in range(1000)] + ["abc", "inf"]
    preparation = fitted(rows(x=cells, label=["a", "b"] * 501), {"x": "number"})
    column = preparation.modalities["table"].config.numbers[0]  # type: ignore[attr-defined]
    assert column.mean == pytest.approx(499.5)
    assert column.scale == pytest.approx(np.arange(1000).std())


def test_the_largest_numbers_have_a_scale() -> None:
    preparation = fitted(rows(x=[-1e308, 1e308], label=["a", "b"]))
    np.testing.assert_allclose(preparation.modalities["table"].decode((1e308,), Path()), [1])


def test_the_commonest_categories_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_module, "MOST_CATEGORIES", 2)
    preparation = fitted(rows(x=["a", "z", "z", "y", "y"], label=["a", "b"] * 2 + ["a"]), {"x": "category"})
    assert preparation.modalities["table"].config.categories[0].values == ("y", "z")  # type: ignore[attr-defined]


def test_sound_keeps_the_rate_that_most_recordings_have() -> None:
    speech = [inline(sound_of(np.ones(1000), rate=rate)) for rate in (8000, 8000, 8000, 44_100, 44_100, 22_050)]
    preparation = fitted(rows(speech=speech, label=["a", "b"] * 3))
    assert preparation.signature().inputs["speech"].sample_rate == 8000  # type: ignore[union-attr]


def test_large_pictures_are_looked_at_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    real = preparation_module.open_picture

    def watched(content: bytes, largest: int) -> Any:
        assert all(max(picture.size) <= preparation_module.LOOKED_AT_PIXELS for picture in held)
        held.append(real(content, largest))
        return held[-1]

    monkeypatch.setattr(preparation_module, "open_picture", watched)
    images = [inline(picture(600, 300, seed=seed)) for seed in range(4)]
    preparation = fitted(rows(image=images, label=["a", "b"] * 2))
    assert len(held) == 4
    assert preparation.signature().inputs["image"] == ImageInput(height=64, width=64)


def test_what_most_arrays_are_is_expected_of_all() -> None:
    ecg = [npy([1.0]), npy([[1.0]]), *[npy([[1.0, 2.0], [3.0, 5.0]])] * 4]
    assert fitted(rows(ecg=ecg, label=["a", "b"] * 3)).signature().inputs["ecg"] == SignalInput(
        num_channels=2, max_samples=2
    )


def test_a_column_called_like_the_table_modality_loses_nothing() -> None:
    texts = {name: ["what is it", "who is it"] for name in ("table", "columns")}
    preparation = fitted(rows(**texts, x=[1.5, 2.5], label=["a", "b"]), {"table": "text", "columns": "text"})
    assert sorted(preparation.columns) == ["columns", "table", "x"]


def test_fewer_modalities_are_the_same_ones(tmp_path: Path) -> None:
    preparation = fitted(everything(tmp_path), NAMED)
    fewer = preparation.only(["speech", "image"])
    assert list(fewer.modalities) == ["image", "speech"]
    assert fewer.modalities["image"] is preparation.modalities["image"]


@pytest.mark.parametrize(
    ("role", "cells", "message"),
    [
        ("text", [None, None], r"column 'x' has no value in the records looked at\. Set columns: {x: ignore}"),
        ("text", [7, 8], "column 'x' has no text in the records looked at: the first holds 7"),
        (
            "image",
            ["gone.png", "../a.png"],
            "column 'x' has no usable value: the last one looked at path '../a.png' lea",
        ),
        (
            "image",
            [7, 8],
            "column 'x' has no usable value: the last one looked at holds int, not a file's bytes or path",
        ),
        ("audio", [b"no", b"sound"], "column 'x' has no usable value: the last one looked at is not sound"),
        (
            "number",
            ["one", "two"],
            "column 'x' has no usable value: the last one looked at x holds 'two', not a number",
        ),
        ("volume", [[1.0], [2.0]], "the last one looked at has 1 dimensions, which is no volume"),
        ("signal", [["a"], ["b"]], "the last one looked at is not an even grid of numbers"),
    ],
)
def test_a_column_with_no_usable_value_is_refused(role: str, cells: list[Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        fitted(rows(x=cells, label=["a", "b"]), {"x": role})
    assert message.replace("\\", "") in str(caught.value)


def test_a_few_unusable_media_do_not_stop_the_learning() -> None:
    images = [inline(b"broken"), None, inline(picture()), {"bytes": None, "path": "../x.png"}]
    assert list(fitted(rows(image=images, label=["a", "b"] * 2)).modalities) == ["image"]


def test_a_given_tokenizer_and_given_pixel_figures_are_taken(tmp_path: Path) -> None:
    table = everything(tmp_path)
    fitted(table, NAMED).modalities["question"].tokenizer.save(str(tmp_path / "t.json"))  # type: ignore[attr-defined]
    preparation = fitted(
        table,
        NAMED,
        tokenizer=str(tmp_path / "t.json"),
        image_mean=(0.1, 0.2, 0.3),
        image_scale=(1, 1, 2),
        image_size=32,
    )
    assert preparation.modalities["image"].config.mean == (0.1, 0.2, 0.3)  # type: ignore[attr-defined]
    assert preparation.signature().inputs["image"] == ImageInput(height=32, width=32)
    given = Tokenizer.from_file(str(tmp_path / "t.json"))
    assert preparation.modalities["note"].tokenizer.get_vocab() == given.get_vocab()  # type: ignore[attr-defined]
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer '.*t\.json' cannot be read \(.*\)\. Name a tokenizer\.json\."):
        fitted(table, NAMED, tokenizer=str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 2},
        {"max_seconds": 0.0},
        {"image_size": 0},
        {"sample_rate": -1},
        {"vocabulary_size": 0},
        {"image_scale": (1.0, 0.0, 1.0)},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"must be (above 0|at least 3)"):
        PreparationConfig(**settings)


@pytest.mark.parametrize("broken", ["preparation.json", "tokenizer-0.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"modalities": 7}', b"\xff\xfe"])
def test_a_preparation_that_was_altered_is_not_loaded(broken: str, content: bytes | None, tmp_path: Path) -> None:
    table = rows(question=["what is it", "who is it"], label=["a", "b"])
    fit_preparation(table, infer_roles(table, target=None, named={}), LABELS, PreparationConfig()).save(tmp_path)
    if content is None:
        (tmp_path / broken).unlink()
    else:
        (tmp_path / broken).write_bytes(content)
    with pytest.raises(BundleError, match=r"has no readable preparation \(.*\)\. Save the bundle again\."):
        Preparation.load(tmp_path)
