"""Keys say which records share a value, and nothing else of a batch changes."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dougong.core.errors import ConfigError
from dougong.core.signature import Target
from dougong.data.columns import ColumnRole
from dougong.data.keyed import KeyedLoader, keys_by_row
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import PreparationConfig, fit_preparation
from dougong.data.split import part_of
from dougong.data.table import Table, table_of_rows

KEYS = ["red", "blue", None, "red", " ", "blue", "red", None]


@pytest.fixture
def table() -> Table:
    rows = {"text": [f"number {row}" for row in range(8)], "key": KEYS}
    return table_of_rows(pa.table(rows), Path())


def test_equal_values_have_equal_keys_and_unknown_ones_their_own(table: Table) -> None:
    keys = keys_by_row(table, "key")

    assert keys[0] == keys[3] == keys[6]
    assert keys[1] == keys[5]
    assert len({keys[row] for row in (0, 1, 2, 4, 7)}) == 5
    part = part_of(table, np.array([3, 5, 6]))
    assert {row: keys_by_row(part, "key")[row] for row in (3, 5, 6)} == {3: 0, 5: 1, 6: 0}
    with pytest.raises(ConfigError, match="no column 'shade' that tells records apart. Use one of text, key"):
        keys_by_row(table, "shade")


def test_batches_are_those_of_the_loader_with_keys_as_their_target(table: Table) -> None:
    preparation = fit_preparation(
        table, {"text": ColumnRole("text", "")}, Target(name="", task="regression"), PreparationConfig()
    )
    plain = Loader(table, preparation, LoaderConfig(batch_size=3, workers=0), seed=1, train=True)
    keys = keys_by_row(table, "key")
    keyed = KeyedLoader(plain, keys)

    assert keyed.batches_per_epoch == 3
    later = [itertools.islice(one.batches(Position(1, 1)), 5) for one in (keyed, plain)]
    both = [(a[1], b[1]) for a, b in zip(*later, strict=True) if a[0] == b[0]]
    assert len(both) == 5
    for ours, theirs in (*zip(keyed.one_pass(), plain.one_pass(), strict=True), *both):
        assert theirs.target is None
        assert ours.target is not None
        assert ours.target.dtype == np.int64
        assert ours.row_B.tolist() == theirs.row_B.tolist()
        assert ours.target.tolist() == [keys[row] for row in ours.row_B.tolist()]
        assert (ours.media["text"].values["ids_UT"] == theirs.media["text"].values["ids_UT"]).all()
