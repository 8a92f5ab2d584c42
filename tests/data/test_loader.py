"""Holds data/loader.py to its promise: the order follows from the seed, from any position, in bounded memory."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_builders import fitted, inline, parquet, picture, rows
from pydantic import ValidationError

from dougong.core.errors import ConfigError, DataError
from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.image import ImageModality
from dougong.data.modality.medium import media_key
from dougong.data.position import Position
from dougong.data.preparation import Preparation
from dougong.data.table import Table, open_table

NUM_ROWS = 103
PER_PICTURE = 5
PICTURES = [picture(seed=seed) for seed in range(-(-NUM_ROWS // PER_PICTURE))]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Neighbours share a picture; 11 row groups; two records are bad."""
    images = [inline(PICTURES[row // PER_PICTURE]) for row in range(NUM_ROWS)]
    images[50] = inline(b"no picture")
    images[7] = None
    labels = [("no", "yes")[row % 2] for row in range(NUM_ROWS)]
    path = tmp_path_factory.mktemp("loader") / "a.parquet"
    return open_table(
        parquet(
            path, rows_per_group=10, image=images, x=[row + 0.5 for row in range(NUM_ROWS)], label=[*labels[:-1], None]
        )
    )


@pytest.fixture(scope="module")
def preparation(table: Table) -> Preparation:
    return fitted(table)


def loader(table: Table, preparation: Preparation, *, train: bool = True, seed: int = 0, **settings: Any) -> Loader:
    config = LoaderConfig(**{"batch_size": 8, "workers": 0, **settings})
    return Loader(table, preparation, config, seed=seed, train=train)


def seen(batch: BatchArrays) -> list[int]:
    return [*batch.row_B.tolist(), *(bad.row for bad in batch.bad)]


def epoch_of(made: Loader, epoch: int = 0) -> list[BatchArrays]:
    found = []
    for after, batch in made.batches(Position(epoch)):
        found.append(batch)
        if after.epoch > epoch:
            return found
    raise AssertionError("batches are without end")


def assert_alike(one: BatchArrays, other: BatchArrays) -> None:
    np.testing.assert_array_equal(one.row_B, other.row_B)
    np.testing.assert_array_equal(one.target, other.target)
    assert one.bad == other.bad
    for name, media in one.media.items():
        np.testing.assert_array_equal(media.index_B, other.media[name].index_B)
        for key, values in media.values.items():
            np.testing.assert_array_equal(values, other.media[name].values[key])


def test_one_pass_gives_every_record_once_and_in_order(table: Table, preparation: Preparation) -> None:
    batches = list(loader(table, preparation, train=False).one_pass())
    assert [sorted(seen(batch)) for batch in batches] == [
        list(range(start, min(start + 8, NUM_ROWS))) for start in range(0, NUM_ROWS, 8)
    ]
    assert [bad for batch in batches for bad in batch.bad] == [
        (50, "image", "is not a picture"),
        (102, "label", "the target is missing"),
    ]


@pytest.mark.parametrize("settings", [{}, {"window_rows": 25}, {"group_by": "image"}, {"window_bytes": 1}])
def test_every_epoch_of_training_gives_every_record_once(
    table: Table, preparation: Preparation, settings: dict[str, Any]
) -> None:
    made = loader(table, preparation, **settings)
    orders = []
    for epoch in range(2):
        orders.append([row for batch in epoch_of(made, epoch) for row in seen(batch)])
        assert sorted(orders[-1]) == list(range(NUM_ROWS))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_the_values_of_a_record_stay_together(table: Table, preparation: Preparation) -> None:
    for batch in epoch_of(loader(table, preparation, window_rows=25, group_by="image")):
        labels = [int(row % 2) for row in batch.row_B]
        assert batch.target is not None
        assert batch.target.tolist() == labels
        number = preparation.modalities["table"].config.numbers[0]  # type: ignore[attr-defined]
        x_B = batch.media["table"].values["numbers_UN"][batch.media["table"].index_B, 0] * number.scale + number.mean
        np.testing.assert_allclose(x_B, batch.row_B + 0.5, rtol=1e-5)
        images = batch.media["image"]
        for place, row in enumerate(batch.row_B):
            assert images.present_B[place] == (row != 7)
            if images.present_B[place]:
                modality = preparation.modalities["image"]
                want = modality.stack([modality.decode((PICTURES[row // PER_PICTURE],), Path())], None)
                np.testing.assert_array_equal(
                    images.values["pixels_UCHW"][images.index_B[place]], want["pixels_UCHW"][0]
                )


@pytest.mark.parametrize("settings", [{}, {"window_rows": 25, "group_by": "image"}])
def test_the_same_batches_come_from_any_position_and_nothing_before_it_is_decoded(
    table: Table, preparation: Preparation, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(islice(loader(table, preparation, **settings).batches(Position()), 40))
    counts: Counter[Any] = Counter()
    real = ImageModality.decode

    def counted(self: ImageModality, cells: tuple[Any, ...], folder: Path) -> Any:
        counts[self.key(cells)] += 1
        return real(self, cells, folder)

    monkeypatch.setattr(ImageModality, "decode", counted)
    for place in (0, 1, 5, 12, 13, 20, 30):
        counts.clear()
        after, batch = next(loader(table, preparation, **settings).batches(whole[place][0]))
        assert after == whole[place + 1][0]
        assert_alike(batch, whole[place + 1][1])
        in_batch = {media_key(PICTURES[row // PER_PICTURE]) for row in seen(batch)} | {media_key(b"no picture")}
        assert set(counts) <= in_batch
        assert set(counts.values()) <= {1}


def test_a_run_that_goes_on_reads_no_window_before_its_own(
    table: Table, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(table, preparation, window_rows=10)
    made.batches_per_epoch  # noqa: B018, it looks into the table once
    chunks: list[int] = []
    real = type(table).read
    monkeypatch.setattr(
        type(table), "read", lambda self, chunk, columns: chunks.append(chunk) or real(self, chunk, columns)
    )
    next(made.batches(Position(0, made.batches_per_epoch - 1)))
    assert len(chunks) == 1


def test_the_position_after_the_last_batch_begins_the_next_epoch(table: Table, preparation: Preparation) -> None:
    made = loader(table, preparation)
    positions = [after for after, _ in islice(made.batches(Position()), made.batches_per_epoch + 1)]
    assert positions[-3:] == [Position(0, made.batches_per_epoch - 1), Position(1, 0), Position(1, 1)]


def test_the_order_follows_from_the_seed(table: Table, preparation: Preparation) -> None:
    one, same, other = (
        [seen(batch) for batch in epoch_of(loader(table, preparation, seed=seed))] for seed in (0, 0, 1)
    )
    assert one == same != other


def test_two_workers_give_the_same_batches_as_none(table: Table, preparation: Preparation) -> None:
    here, there = (
        list(islice(loader(table, preparation, workers=workers, group_by="image").batches(Position(0, 3)), 15))
        for workers in (0, 2)
    )
    for (after, batch), (other_after, other) in zip(here, there, strict=True):
        assert after == other_after
        assert_alike(batch, other)


def test_the_last_batch_is_smaller_and_none_is_empty(table: Table, preparation: Preparation) -> None:
    sizes = [len(seen(batch)) for batch in epoch_of(loader(table, preparation))]
    assert sizes == [8] * 12 + [7]
    assert loader(table, preparation).batches_per_epoch == 13
    assert [len(seen(batch)) for batch in epoch_of(loader(table, preparation, batch_size=1000))] == [NUM_ROWS]


def test_records_that_share_a_medium_come_together(table: Table, preparation: Preparation) -> None:
    order = [row for batch in epoch_of(loader(table, preparation, group_by="image")) for row in seen(batch)]
    place = {row: index for index, row in enumerate(order)}
    for start in range(0, NUM_ROWS - PER_PICTURE, PER_PICTURE):
        group = [row for row in range(start, start + PER_PICTURE) if row not in (7, 50)]
        # A bad record stands at its batch's end.
        assert max(place[row] for row in group) - min(place[row] for row in group) <= len(group) + 1


def test_no_more_records_of_a_medium_come_together_than_asked(table: Table, preparation: Preparation) -> None:
    settings = {"group_by": "image", "records_per_medium": 2, "batch_size": 1}
    order = [row // PER_PICTURE for batch in epoch_of(loader(table, preparation, **settings)) for row in seen(batch)]
    runs = Counter(order[start : start + 3].count(order[start]) for start in range(len(order)))
    assert runs[2] > 20
    assert sum(order[i] == order[i + 1] == order[i + 2] for i in range(len(order) - 2)) < 8


def test_auto_finds_the_medium_that_is_shared_and_none_where_none_is(table: Table, preparation: Preparation) -> None:
    def orders(source: Table, learnt: Preparation, wanted: str | None) -> list[list[int]]:
        return [seen(batch) for batch in epoch_of(loader(source, learnt, group_by=wanted))]

    assert orders(table, preparation, "auto") == orders(table, preparation, "image")
    hardly_shared = [inline(content) for content in [*PICTURES, *PICTURES[:3]]]
    single = rows(image=hardly_shared, label=["no", "yes"] * 12)
    learnt = fitted(single)
    assert orders(single, learnt, "auto") == orders(single, learnt, None) != orders(single, learnt, "image")


def test_records_without_a_medium_are_no_group(preparation: Preparation) -> None:
    half = rows(image=[None] * 50 + [inline(PICTURES[0])] * 50, x=[0.5] * 100, label=["no", "yes"] * 50)
    order = [row for batch in epoch_of(loader(half, preparation, group_by="image")) for row in seen(batch)]
    places = [order.index(row) for row in range(50)]
    assert max(places) - min(places) > 50  # the group of the others stands among them
    shared = [order.index(row) for row in range(50, 100)]
    assert max(shared) - min(shared) == 49


def test_what_groups_need_not_be_an_input(table: Table, preparation: Preparation) -> None:
    fewer = preparation.only(["table"])
    whole = [seen(batch) for batch in epoch_of(loader(table, preparation, group_by="image"))]
    some = [seen(batch) for batch in epoch_of(loader(table, fewer, group_by="image"))]
    assert [sorted(rows) for rows in some] == [sorted(rows) for rows in whole]


@pytest.mark.parametrize(
    ("settings", "most_rows"), [({"window_rows": 25}, 23), ({"window_rows": 1}, 10), ({"window_bytes": 1}, 10)]
)
def test_no_more_rows_are_held_than_one_window_has(
    table: Table, preparation: Preparation, settings: dict[str, Any], most_rows: int
) -> None:
    made = loader(table, preparation, **settings)
    held: list[int] = []
    for _ in islice(made.batches(Position()), 40):
        assert made._held is not None
        held.append(sum(block.num_rows for block in made._held[1]))
    assert max(held) == most_rows


def test_a_window_is_bounded_by_what_its_rows_take_in_memory(tmp_path: Path) -> None:
    images = [inline(picture(64, seed=row // 50)) for row in range(400)]  # the file holds each once, memory 50 times
    table = open_table(parquet(tmp_path / "a.parquet", rows_per_group=50, image=images, label=["no", "yes"] * 200))
    most = 600_000
    made = loader(table, fitted(table), window_bytes=most)
    assert table.read(0, table.schema.names).nbytes * 3 < most < table.read(0, table.schema.names).nbytes * 4
    held = set()
    for _ in epoch_of(made):
        assert made._held is not None
        held.add(sum(block.nbytes for block in made._held[1]))
    assert most / 3 < max(held) <= most


def test_rows_from_other_windows_do_not_mix(table: Table, preparation: Preparation) -> None:
    batches = epoch_of(loader(table, preparation, window_rows=10))
    for batch in batches:
        assert len({row // 10 for row in seen(batch)}) == 1


def test_a_table_is_refused_that_the_preparation_cannot_read(preparation: Preparation) -> None:
    with pytest.raises(DataError, match=r"lacks the column 'image'\. Leave its cells empty where unknown\."):
        loader(rows(x=[1.5], label=["no"]), preparation)
    with pytest.raises(DataError, match="holds no records"):
        loader(rows(image=[], x=[], label=[]), preparation)


def test_names_that_are_not_there_are_refused(table: Table, preparation: Preparation) -> None:
    with pytest.raises(ConfigError, match=r"group_by 'picture' is no column of the table\. Use one of image, x, label"):
        loader(table, preparation, group_by="picture")
    with pytest.raises(ConfigError, match=r"a view names 'pixels', which is no modality\. Use some of image, table"):
        Loader(table, preparation, LoaderConfig(), views=(View(keep=("pixels",)),))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "0 must be at least 1"),
        ({"window_rows": -1}, "-1 must be at least 1"),
        ({"workers": -1}, r"-1 must be 0 \(decode in this process\) or more"),
        ({"records_per_medium": 2}, "records_per_medium limits groups, and group_by makes none"),
        ({"group_by": "image", "records_per_medium": 0}, "0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoaderConfig(**settings)
