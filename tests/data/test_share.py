"""What several processes get of one loader's batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dougong.data.batch import BatchArrays
from dougong.data.collate import View
from dougong.data.columns import infer_roles
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position, Share
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.table import Table, open_table
from dougong.data.target import infer_target


@pytest.fixture(scope="module")
def prepared(records: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """22 records, some media twice, some bad."""
    path = tmp_path_factory.mktemp("share") / "t.parquet"
    found = records(22, seed=3, missing=0.3)
    for index in range(0, 20, 4):
        found[index + 2]["photo"] = found[index]["photo"]
    for index in (5, 9, 13, 17):
        found[index]["photo"] = {"bytes": f"no picture {index}".encode(), "path": None}
    pq.write_table(pa.Table.from_pylist(found), path)
    table = open_table(path)
    roles = infer_roles(table, target="colour", named={"clip": "ignore"})
    target = infer_target(table.column("colour"), "colour", None)
    return table, fit_preparation(table, roles, target, PreparationConfig())


def batches(prepared: tuple[Table, Preparation], share: Share, *, count: int = 9, **options: Any) -> list[BatchArrays]:
    table, preparation = prepared
    loader = Loader(
        table, preparation, LoaderConfig(batch_size=6, workers=0), seed=1, train=True, share=share, **options
    )
    return [arrays for _, (_, arrays) in zip(range(count), loader.batches(Position()), strict=False)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"views": (View(keep=("photo", "table")), View(keep=("remark",), beside=("photo",)))},
    "one view a batch": {"views": (View(keep=("photo",)), View(keep=("remark",))), "one_view_a_batch": True},
    "withheld": {"withhold": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world", [2, 4, 7])
def test_the_shares_put_together_are_the_whole_batches(prepared: Any, world: int, name: str) -> None:
    whole = batches(prepared, Share(), **OPTIONS[name])
    shares = [batches(prepared, Share(rank, world), **OPTIONS[name]) for rank in range(world)]

    for want, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert np.concatenate([part.row_B for part in parts]).tolist() == want.row_B.tolist()
        assert np.concatenate([part.target for part in parts]).tolist() == want.target.tolist()  # type: ignore[union-attr]
        assert [record for part in parts for record in part.bad] == list(want.bad)
        for modality, media in want.media.items():
            mine = [part.media[modality] for part in parts]
            assert np.concatenate([one.present_B for one in mine]).tolist() == media.present_B.tolist()
            assert np.concatenate([one.there_B for one in mine]).tolist() == media.there_B.tolist()  # type: ignore[type-var]
    assert any(want.bad for want in whole)
    if world == 7:
        assert any(len(part.row_B) == 0 for share in shares for part in share)


def test_a_medium_has_one_number_on_every_rank_and_another_one_has_another(prepared: Any) -> None:
    numbers: dict[int, bytes] = {}
    met = 0
    for rank in range(2):
        for arrays in batches(prepared, Share(rank, 2)):
            photo = arrays.media["photo"]
            assert photo.id_U is not None
            for number, pixels in zip(photo.id_U.tolist(), photo.values["pixels_UCHW"], strict=True):
                met += 1
                assert numbers.setdefault(number, pixels.tobytes()) == pixels.tobytes()
    assert len(set(numbers.values())) == len(numbers) < met


def test_one_process_numbers_nothing(prepared: Any) -> None:
    assert all(media.id_U is None for arrays in batches(prepared, Share()) for media in arrays.media.values())


def test_parts_differ_by_one_record_at_most_and_leave_none_out() -> None:
    for count in (0, 1, 3, 64, 65, 127):
        for world in (1, 2, 3, 8):
            parts = [range(count)[Share(rank, world).of(count)] for rank in range(world)]
            assert [place for part in parts for place in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_counts_as_many_batches_and_positions_as_without_ranks(prepared: Any) -> None:
    table, preparation = prepared
    config = LoaderConfig(batch_size=6, workers=0)
    whole, share = (Loader(table, preparation, config, share=share) for share in (Share(), Share(2, 4)))
    assert share.batches_per_epoch == whole.batches_per_epoch == 4
    places = [
        [after for _, (after, _) in zip(range(6), one.batches(Position()), strict=False)] for one in (whole, share)
    ]
    assert places[0] == places[1]
