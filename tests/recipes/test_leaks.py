"""Holds recipes/tables.py to its promise: tables that share a unit or a medium are refused, unless it is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.core.config import parse
from dougong.core.errors import ConfigError, DataError, RunError
from dougong.recipes.check import check_recipe_or_table
from dougong.recipes.recipe import DataConfig, Recipe
from dougong.recipes.run import run_recipe
from dougong.recipes.tables import Tables, open_tables

Records = Callable[..., list[dict[str, Any]]]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def opened(**data: Any) -> Tables:
    return open_tables(parse(DataConfig, {"target": "colour", **data}, where="data"), seed=0)


def test_a_run_on_tables_that_share_a_medium_is_refused(records: Records, tmp_path: Path) -> None:
    train, test = records(60, seed=0, missing=0.0), records(30, seed=1, missing=0.0)
    test[4]["photo"] = train[7]["photo"]
    data = {"train": write(tmp_path / "a.parquet", train), "test": write(tmp_path / "b.parquet", test)}

    with pytest.raises(DataError) as caught:
        opened(**data)
    assert str(caught.value) == (
        "the split leaks: 1 image media of 'photo' are in train and in test (1 and 1 records; such as row 7 of train "
        "and row 4 of test), so figures would be of what was learnt by heart. Remove those records from one side, or "
        "set data.allow_leak: true to go on."
    )
    recipe = parse(Recipe, {"name": "r", "data": {"target": "colour", **data}, "train": {"steps": 2}}, where="r")
    with pytest.raises(DataError, match="the split leaks"):
        run_recipe(recipe, tmp_path / "run", quiet=True)
    # What was refused before it began is no run: once the tables are mended, the same command works.
    write(tmp_path / "b.parquet", records(30, seed=1, missing=0.0))
    run_recipe(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match="holds a run already"):
        run_recipe(recipe, tmp_path / "run", quiet=True)
    write(tmp_path / "b.parquet", test)

    allowed = opened(**data, allow_leak=True)
    assert len(allowed.leaks) == 1
    assert allowed.notes[0].startswith("data.allow_leak: 1 image media of 'photo' are in train and in test")


def test_a_unit_in_training_and_validation_is_refused_and_clean_tables_are_not(
    records: Records, tmp_path: Path
) -> None:
    sides = [
        [{**record, "who": f"{side}{number % 5}"} for number, record in enumerate(records(40, seed=seed, missing=0.2))]
        for seed, side in enumerate("abc")
    ]
    names = ("train", "validation", "test")
    data = {name: write(tmp_path / f"{name}.parquet", side) for name, side in zip(names, sides, strict=True)}

    assert opened(**data, unit="who", columns={"who": "ignore"}).leaks == ()

    sides[1][0]["who"] = "a3"
    write(tmp_path / "validation.parquet", sides[1])
    with pytest.raises(DataError, match="1 values of the unit 'who' are in train and in validation .8 and 1 records"):
        opened(**data, unit="who", columns={"who": "ignore"})
    assert opened(**data, columns={"who": "ignore"}).leaks == ()


def test_a_table_without_the_unit_is_told(records: Records, tmp_path: Path) -> None:
    train = [{**record, "who": f"a{number % 5}"} for number, record in enumerate(records(40, seed=0, missing=0.0))]
    data = {
        "train": write(tmp_path / "a.parquet", train),
        "test": write(tmp_path / "b.parquet", records(20, seed=1, missing=0.0)),
    }

    notes = opened(**data, unit="who", columns={"who": "ignore"}, validation_share=0.4).notes

    assert "test has no column 'who': whether it shares units is not known" in notes


def test_check_tells_of_a_leak_of_duplicates_and_of_pairs(records: Records, tmp_path: Path) -> None:
    train, test = records(120, seed=0, missing=0.0), records(30, seed=1, missing=0.0)
    test[4]["photo"] = train[7]["photo"]
    data = {"train": write(tmp_path / "a.parquet", train), "test": write(tmp_path / "b.parquet", test)}
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndata: {{train: {data['train']}, test: {data['test']}, target: colour}}\n"
    )

    found = check_recipe_or_table(str(tmp_path / "r.yaml")).as_json()

    assert [leak["num_shared"] for leak in found["leaks"]] == [1]
    assert any(line.endswith("a run would refuse this") for line in found["warnings"])
    photo = next(one for one in found["duplicates"] if one["column"] == "photo")
    assert photo["num_exact_across"] == 1
    pairs = {(pair["left"], pair["right"]): pair for pair in found["alignments"]}
    assert pairs["photo", "clip"]["related"]
    assert pairs["photo", "colour"]["auc"] > 0.85


def test_a_joined_table_is_trained_on_as_any(records: Records, tmp_path: Path) -> None:
    whole = [{"id": number, **record} for number, record in enumerate(records(60, seed=0, missing=0.0))]
    for name in ("base", "photos"):
        (tmp_path / name).mkdir()
    base = write(tmp_path / "base" / "b.parquet", [{k: r[k] for k in ("id", "clip", "colour")} for r in whole])
    listing = []
    for record in whole[10:]:
        (tmp_path / "photos" / f"{record['id']}.png").write_bytes(record["photo"]["bytes"])
        listing.append({"id": record["id"], "photo": f"{record['id']}.png"})
    photos = write(tmp_path / "photos" / "p.parquet", listing[::-1])
    values = {
        "name": "joined",
        "data": {"train": base, "target": "colour", "join": [{"table": photos, "key": "id"}]},
        "train": {"steps": 3, "precision": "fp32"},
    }

    result = run_recipe(parse(Recipe, values, where="r"), tmp_path / "run", quiet=True)

    assert set(result.model.preparation.modalities) == {"clip", "photo"}
    assert "joined to b.parquet: p.parquet: 50 of 60 records matched, 10 unmatched" in result.notes
    assert all(not found.bad for found in result.evaluations.values())


def test_copies_under_other_names_are_on_one_side_of_our_own_split(records: Records, tmp_path: Path) -> None:
    some = records(120, seed=0, missing=0.0)
    for place in range(5):  # exact copies, too few for the medium to be the unit
        some[100 + place]["photo"] = {**some[place]["photo"], "path": f"again-{place}.png"}
    train = write(tmp_path / "a.parquet", some)

    for seed in range(6):
        data = parse(DataConfig, {"target": "colour", "train": train, "validation_share": 0.4}, where="data")
        tables = open_tables(data, seed=seed)
        sides = [
            {cell["bytes"] for cell in part.column("photo").to_pylist()} for part in (tables.train, tables.validation)
        ]
        assert not sides[0] & sides[1]
        assert any("those with the same photo on one side" in note for note in tables.notes)


def both(tables: Tables, column: str) -> set[bytes]:
    """What stands on two sides."""
    sides = [{cell["bytes"] for cell in part.column(column).to_pylist()} for part in (tables.train, tables.validation)]
    return sides[0] & sides[1]


def test_media_that_are_shared_far_down_a_table_are_on_one_side(records: Records, tmp_path: Path) -> None:
    # Two questions of each picture, all the first ones before all the second ones: the first half shows no copy.
    some = records(1100, seed=0, missing=0.0)
    again = [{**record, "clip": some[-place]["clip"], "size": 1.0} for place, record in enumerate(some)]
    train = write(tmp_path / "a.parquet", [*some, *again])

    tables = opened(train=train)

    assert tables.unit == "photo"
    assert not both(tables, "photo")
    assert 0.05 < tables.validation.num_rows / 2200 < 0.15


def test_copies_of_a_unit_under_other_names_are_on_its_side(records: Records, tmp_path: Path) -> None:
    some = records(60, seed=0, missing=0.0)
    pictures = [record["photo"]["bytes"] for record in some]
    for place, record in enumerate(some):  # each picture three times, once under a name of its own
        (tmp_path / f"{place // 3}.png").write_bytes(pictures[place // 3])
        (tmp_path / f"copy-{place}.png").write_bytes(pictures[place // 3])
        record["photo"] = f"copy-{place}.png" if place % 3 == 2 else f"{place // 3}.png"
    train = write(tmp_path / "a.parquet", some)

    for seed in range(4):
        data = parse(DataConfig, {"target": "colour", "train": train, "validation_share": 0.3}, where="data")
        tables = open_tables(data, seed=seed)
        sides = [
            {(tmp_path / name).read_bytes() for name in part.column("photo").to_pylist()}
            for part in (tables.train, tables.validation)
        ]
        assert tables.unit == "photo"
        assert not sides[0] & sides[1]


def test_a_column_that_no_model_reads_keeps_nobody_together(records: Records, tmp_path: Path) -> None:
    some = records(120, seed=0, missing=0.0)
    for place, record in enumerate(some):
        record["photo"] = some[place // 4 * 4]["photo"]
    train = write(tmp_path / "a.parquet", some)

    assert opened(train=train, validation_share=0.3).unit == "photo"
    unread = opened(train=train, validation_share=0.3, modalities=["clip", "remark"])
    assert unread.unit is None
    assert both(unread, "photo")


def test_a_blank_is_no_reason_to_be_on_one_side(records: Records, tmp_path: Path) -> None:
    some = records(200, seed=0, missing=0.0)
    for record in some[::4]:
        record["photo"] = some[0]["photo"]
    tables = opened(train=write(tmp_path / "a.parquet", some), validation_share=0.3)

    assert tables.unit is None
    assert both(tables, "photo") == {some[0]["photo"]["bytes"]}


def test_where_all_would_hang_together_the_unit_alone_is_kept_and_it_is_said(records: Records, tmp_path: Path) -> None:
    # Each picture is asked about in four recordings, each recording asked of four pictures.
    media = records(80, seed=0, missing=0.0)
    some = [
        {**media[0], "photo": media[place]["photo"], "clip": media[(place + asked) % 80]["clip"]}
        for place in range(80)
        for asked in range(4)
    ]
    for place, record in enumerate(some):
        record["colour"] = media[place % 80]["colour"]
    tables = opened(train=write(tmp_path / "a.parquet", some), validation_share=0.3)

    assert tables.unit == "photo"
    assert not both(tables, "photo")
    assert any(note.startswith("clip: what several records share may be on both sides") for note in tables.notes)


def test_a_unit_that_is_no_column_is_refused_by_name(records: Records, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", records(30, seed=0, missing=0.0))
    other = write(tmp_path / "b.parquet", records(30, seed=1, missing=0.0))
    with pytest.raises(ConfigError, match="data.unit 'patiant' is no column of a.parquet. Use one of photo"):
        opened(train=path, validation=other, unit="patiant")
