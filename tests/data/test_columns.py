"""Holds data/columns.py to its promise: every column gets a role and a reason, and a named role wins."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest
from data_builders import inline, npy, picture, rows, sound

from dougong.core.errors import ConfigError, DataError
from dougong.data.columns import ColumnRole, infer_roles

SIXTY = [f"word{i}" for i in range(60)]


def role_of(cells: Any, name: str = "x") -> ColumnRole:
    cells = cells if isinstance(cells, pa.Array) else pa.array(cells)
    table = rows(**{name: cells, "spare": pa.array([0.5] * len(cells)), "label": pa.array(["a"] * len(cells))})
    return infer_roles(table, target=None, named={})[name]


def roles(named: Mapping[str, str] | None = None, target: str | None = None, **columns: Any) -> dict[str, str]:
    return {name: found.role for name, found in infer_roles(rows(**columns), target=target, named=named or {}).items()}


@pytest.mark.parametrize(
    ("cells", "role", "reason"),
    [
        ([inline(picture())], "image", "by its first bytes"),
        ([inline(picture(form="JPEG"))], "image", "by its first bytes"),
        ([inline(picture(form="WEBP"))], "image", "by its first bytes"),
        ([picture(form="BMP"), None], "image", "by its first bytes"),
        ([inline(sound(form="WAV"))], "audio", "by its first bytes"),
        ([inline(sound(form="OGG"))], "audio", "by its first bytes"),
        ([sound()], "audio", "by its first bytes"),
        ([inline(npy([1.0]))], "signal", "by its first bytes"),
        ([{"bytes": None, "path": "a.flac"}], "audio", "by its file names"),
        ([{"path": "a.PNG"}, {"path": None}, None], "image", "by its file names"),
        (["a/b.jpeg", "c.png"], "image", "paths, by their endings"),
        (["a.mp3"], "audio", "paths, by their endings"),
        (["a.npy"], "signal", "paths, by their endings"),
        ([inline(b"what is this")], "ignore", "bytes of no known kind"),
        ([{"bytes": "text", "path": 7}], "ignore", "bytes of no known kind"),
        ([1.5, None], "number", "numbers"),
        ([1, 2], "number", "numbers"),
        (list(range(60)), "ignore", "it counts the rows"),
        (list(range(0, 120, 2)), "number", "numbers"),
        ([True, False], "category", "true or false"),
        ([[1.0, 2.0], [3.0]], "signal", "lists of numbers"),
        ([[[1, 2]], [[3]]], "signal", "lists of numbers"),
        ([[[[1.0]]]], "volume", "3 nested lists"),
        ([["a"]], "ignore", "lists of string are no modality"),
        (["red", "blue", "red", "blue", "red"], "category", "2 short values that repeat"),
        (pa.array(["red", "blue", "red", "blue", "red"]).dictionary_encode(), "category", "2 short values that repeat"),
        (["what is it", "who is it there"], "text", "text of 4 words on average"),
        (pa.array(["what is it"], pa.large_string()), "text", "text of 3 words on average"),
        (pa.array(["what is it"], pa.string_view()), "text", "text of 3 words on average"),
        (SIXTY, "ignore", "one word, different in every row: a name"),
        ([None, None], "ignore", "it is empty"),
        (pa.array([None, None], pa.string()), "ignore", "it is empty"),
        (pa.array([0], pa.timestamp("ms")), "ignore", "timestamp[ms] is no modality"),
    ],
)
def test_each_kind_of_column_gets_its_role_with_a_reason(cells: Any, role: str, reason: str) -> None:
    assert role_of(cells) == (role, reason)


@pytest.mark.parametrize("name", ["id", "ID", "patient_id"])
def test_whole_numbers_named_as_an_id_are_ignored(name: str) -> None:
    assert role_of([7, 7, 9], name) == ("ignore", "whole numbers named as an id")
    assert role_of([7.5, 7.0], name).role == "number"


def test_a_few_bad_values_do_not_change_a_role() -> None:
    assert role_of([inline(b"broken")] * 5 + [inline(picture())]).role == "image"
    assert role_of(["a.png"] * 19 + ["n/a"]).role == "image"
    assert role_of(["a.png"] * 8 + ["n/a"] * 2).role == "category"


def test_a_named_role_wins_over_every_guess() -> None:
    found = infer_roles(rows(x=["a.png"], y=[1.5], label=["a"]), target=None, named={"x": "text", "y": "category"})
    assert found["x"] == found["y"]._replace(role="text") == ("text", "named in the recipe")
    assert found["y"].role == "category"
    assert roles({"label": "text", "x": "target"}, label=["what is it"], x=[1.5]) == {"label": "text", "x": "target"}


def test_the_target_is_the_named_one_or_one_called_so() -> None:
    columns = {"x": [1.5], "Answer": ["yes"], "word": ["no"]}
    assert roles(**columns)["Answer"] == "target"
    assert roles(target="word", **columns)["word"] == "target"
    assert roles(target="word", **columns)["Answer"] != "target"
    assert infer_roles(rows(**columns), target=None, named={"x": "target"})["x"].reason == "named in the recipe"


def test_where_nothing_is_decided_a_target_is_only_what_is_named_so() -> None:
    columns = rows(x=[1.5], answer=["it is red and round"])
    assert infer_roles(columns, target=None, named={}, decides=False)["answer"].role == "text"
    assert infer_roles(columns, target="x", named={}, decides=False)["x"].role == "target"
    with pytest.raises(DataError, match="leaves nothing to read: every column is ignored"):
        infer_roles(columns, target="x", named={"answer": "ignore"}, decides=False)


@pytest.mark.parametrize(
    ("named", "target", "message"),
    [
        ({"gone": "text"}, None, r"column 'gone' is not in \. It has x, y, label"),
        ({"x": "txt"}, None, r"column 'x': 'txt' is not a role\. Use one of text, image, audio"),
        ({"x": "target", "y": "target"}, None, "x, y are all named as target: a model here has one"),
        ({"x": "target"}, "y", "y, x are all named as target: a model here has one"),
        ({"x": "number"}, "x", "column 'x' is named as target and as number: it can be one of them"),
    ],
)
def test_names_that_cannot_be_obeyed_are_refused(named: dict[str, str], target: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        roles(named, target, x=[1.5], y=[2.5], label=["a"])


def test_no_target_and_nothing_to_predict_from_are_said() -> None:
    with pytest.raises(DataError, match=r"no column is named as the target of \. Name one of x, z as target"):
        roles(x=[1.5], z=[2.5])
    with pytest.raises(DataError, match=r"no column is named as the target of \. Name one of x, label as target"):
        roles({"label": "text"}, x=[1.5], label=["a"])
    with pytest.raises(DataError, match=r"target 'w' is not a column of \. Name one of x, y as target"):
        roles(target="w", x=[1.5], y=[2.5])
    with pytest.raises(DataError, match=r"leaves nothing to predict 'y' from: every other column is ignored"):
        roles(target="y", id=[1], y=[2.5])
