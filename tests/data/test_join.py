"""Holds data/join.py to its promise: every record and row is accounted for, and paths stay in their folders."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import parquet, picture, rows, sound

from dougong.core.config import parse
from dougong.core.errors import ConfigError, DataError
from dougong.data import join as join_module
from dougong.data.columns import infer_roles
from dougong.data.join import JoinConfig, JoinReport, estimate_offset, join_table, nearest, write_joined
from dougong.data.modality.medium import BadValue, media_bytes
from dougong.data.table import Table, cells_of, open_table


def cells(table: Table, name: str) -> list[Any]:
    return [cell for chunk in range(table.num_chunks) for cell in cells_of(table.read(chunk, [name]).column(name))]


def joined(base: Table, other: Path, **settings: Any) -> tuple[Table, JoinReport]:
    table, (report,) = join_table(base, [parse(JoinConfig, {"table": str(other), **settings}, where="join")])
    return table, report


def test_records_find_their_rows_by_key(tmp_path: Path) -> None:
    base = open_table(
        parquet(tmp_path / "base.parquet", rows_per_group=2, id=["b", "x", "a", None, "b"], y=[1, 2, 3, 4, 5])
    )
    other = parquet(tmp_path / "other.parquet", rows_per_group=1, id=["a", "b", "c", None], z=[10, 20, 30, 40])

    table, report = joined(base, other, key="id")

    assert table.schema.names == ["id", "y", "z"]
    assert cells(table, "z") == [20, None, 10, None, 20]
    assert cells(table, "y") == [1, 2, 3, 4, 5]
    assert table.read(1, ["z", "y"]).to_pydict() == {"z": [10, None], "y": [3, 4]}
    assert report._replace(table="") == JoinReport("", 5, 3, 2, 1, 4, 2, 1, 0, 0.0, None, None, True)
    assert report.line() == (
        "other.parquet: 3 of 5 records matched, 2 unmatched, 1 of them without key or time, 2 of its 4 rows unused, "
        "1 of its rows taken by several records"
    )


def test_records_without_a_partner_are_dropped_where_asked_and_keep_their_numbers(tmp_path: Path) -> None:
    base = open_table(parquet(tmp_path / "base.parquet", rows_per_group=2, id=[1, 2, 3, 4, 5, 6]))
    other = parquet(tmp_path / "other.parquet", id=[6, 5, 2], z=["six", "five", "two"])

    table, report = joined(base, other, key="id", unmatched="drop")

    assert (table.num_rows, report.num_unmatched) == (3, 3)
    assert cells(table, "z") == ["two", "five", "six"]
    assert [table.numbers_of(chunk).tolist() for chunk in range(table.num_chunks)] == [[1], [4, 5]]
    assert table.first(1, 1, ["z"]).to_pydict() == {"z": ["five"]}
    assert table.head(10, ["id"]).column("id").to_pylist() == [2, 5, 6]


def test_an_ambiguous_key_is_refused_or_counted(tmp_path: Path) -> None:
    base, other = rows(id=[1, 2]), parquet(tmp_path / "other.parquet", id=[2, 2, 1, 2], z=["a", "b", "c", "d"])

    with pytest.raises(
        DataError, match=r"key 'id' of other\.parquet is ambiguous: 1 values stand more than once \('2'"
    ):
        joined(base, other, key="id")
    table, report = joined(base, other, key="id", duplicates="first")

    assert cells(table, "z") == ["c", "a"]
    assert (report.num_duplicate_keys, report.num_unused) == (2, 2)


def test_the_nearest_in_time_is_taken_and_its_skew_measured(tmp_path: Path) -> None:
    base = rows(t=[0.0, 1.0, 2.0, 3.0, None, 10.0])
    other = parquet(tmp_path / "other.parquet", t=[2.9, 0.1, 1.6, float("nan"), 0.9], z=["d", "a", "c", "x", "b"])

    table, report = joined(base, other, time="t", tolerance=0.45)

    assert table.schema.names == ["t", "z"]
    assert cells(table, "z") == ["a", "b", "c", "d", None, None]
    assert (report.num_matched, report.num_unmatched, report.num_without_key, report.num_unused) == (4, 2, 1, 1)
    assert report.skew_median == pytest.approx(-0.1)  # of .1, -.1, -.4, -.1
    assert report.skew_p95 == pytest.approx(np.quantile([0.1, 0.1, 0.4, 0.1], 0.95))
    assert not report.was_sorted
    assert "skew median -0.1, 95 % within 0.355; its times were not in order" in report.line()


def test_time_within_a_key_never_leaves_the_key(tmp_path: Path) -> None:
    base = rows(who=["a", "b", "c"], t=[1.0, 1.0, 1.0])
    other = parquet(tmp_path / "o.parquet", who=["a", "b", "a"], t=[1.4, 1.1, 1.0], z=[1, 2, 3])

    table, _ = joined(base, other, key="who", time="t", tolerance=0.5)

    assert cells(table, "z") == [3, 2, None]


def test_of_two_equally_near_times_the_earlier_is_taken() -> None:
    one = np.zeros(1, np.int64)
    match, skews = nearest(np.array([1.0]), np.array([1.5, 0.5]), one, np.zeros(2, np.int64), 0.5)

    assert match.tolist() == [1]
    assert skews.tolist() == [-0.5]


def test_nearest_agrees_with_looking_at_every_pair() -> None:
    random = np.random.default_rng(0)
    base, other = random.uniform(0, 10, 200), random.uniform(0, 10, 150)
    base_group, group = random.integers(-1, 4, 200), random.integers(-1, 4, 150)

    match, _ = nearest(base, other, base_group, group, 0.2)

    for row in range(200):
        apart = np.where((group == base_group[row]) & (group >= 0), np.abs(other - base[row]), np.inf)
        assert match[row] == (int(np.argmin(apart)) if apart.min() <= 0.2 else -1)


def test_a_constant_offset_is_estimated_and_taken_away(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    times = np.cumsum(random.uniform(0.4, 1.6, 300))
    late = times + 7.3 + random.normal(0, 0.01, 300)
    other = parquet(tmp_path / "o.parquet", t=late, z=list(range(300)))

    table, report = joined(rows(t=times), other, time="t", tolerance=0.1, offset="estimate")

    assert report.offset == pytest.approx(-7.3, abs=0.01)
    assert cells(table, "z") == list(range(300))
    assert estimate_offset(times, late, 0.1, largest=1.0) != pytest.approx(-7.3, abs=0.1)


def test_timestamps_are_joined_in_seconds_to_the_microsecond(tmp_path: Path) -> None:
    start = datetime.datetime(2024, 5, 1, 12, 0, 0, 250)
    moments = [start + datetime.timedelta(seconds=second) for second in range(5)]
    other = tmp_path / "o.csv"
    later = [moment + datetime.timedelta(microseconds=300) for moment in moments]
    other.write_text("t,z\n" + "".join(f"{moment.isoformat(sep=' ')},{n}\n" for n, moment in enumerate(later)))

    table, report = joined(rows(t=moments), other, time="t", tolerance=0.001)

    assert cells(table, "z") == [0, 1, 2, 3, 4]
    assert report.skew_median == pytest.approx(0.0003, abs=1e-9)


@pytest.mark.parametrize(
    ("base", "other", "settings", "message"),
    [
        (
            {"id": [1]},
            {"id": ["1"], "z": [1]},
            {"key": "id"},
            "key 'id' of b.parquet holds int64 and 'id' of o.parquet string: no",
        ),
        (
            {"id": [1.5]},
            {"id": [1.5], "z": [1]},
            {"key": "id"},
            "key 'id' of b.parquet holds double: a key is a whole number, a",
        ),
        (
            {"id": [1]},
            {"id": [2], "z": [1]},
            {"key": "id"},
            "o.parquet matches none of the 1 records of b.parquet by 'id'",
        ),
        (
            {"id": [1], "z": [1]},
            {"id": [1], "z": [1]},
            {"key": "id"},
            "column 'z' of o.parquet is there already. Set a prefix",
        ),
        ({"id": [1]}, {"z": [1]}, {"key": "id"}, "o.parquet has no column 'id'. It has z."),
        ({"x": [1]}, {"id": [1]}, {"key": "id"}, "b.parquet has no column 'id'. It has x."),
        (
            {"t": ["noon"]},
            {"t": [1.0]},
            {"time": "t", "tolerance": 1},
            "time 't' of b.parquet holds string, neither numbers nor",
        ),
        (
            {"t": [datetime.datetime(2024, 1, 1)]},
            {"t": [1.0]},
            {"time": "t", "tolerance": 1},
            "timestamp[us] and 't' of o.parquet double: their clocks cannot be compared",
        ),
    ],
)
def test_what_cannot_be_joined_is_said_in_one_line(
    base: Any, other: Any, settings: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        joined(
            open_table(parquet(tmp_path / "b.parquet", **base)), parquet(tmp_path / "o.parquet", **other), **settings
        )

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither key nor time is given"),
        ({"time": "t"}, "time 't' needs a tolerance"),
        ({"key": "id", "tolerance": 1}, "no time is given"),
        ({"time": "t", "tolerance": -1}, "-1.0 must be at least 0"),
        ({"time": "t", "tolerance": 1, "base_key": "id"}, "base_key 'id' stands without a key"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(JoinConfig, {"table": "o.parquet", **settings}, where="join")


def two_folders(tmp_path: Path) -> tuple[Table, Path]:
    """Pictures in one folder, sounds in another; one path of each leads into the other's."""
    for name, content in {
        "photos/a.png": picture(seed=1),
        "photos/b.png": picture(seed=2),
        "clips/deep/a.flac": sound(seed=1),
        "clips/b.flac": sound(seed=2),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "photos" / "photos.csv").write_text("id,photo\n1,a.png\n2,b.png\n3,../clips/b.png\n4,gone.png\n")
    parquet(
        tmp_path / "clips" / "clips.parquet",
        id=[1, 2, 3, 4],
        clip=[
            {"bytes": None, "path": "deep/a.flac"},
            {"bytes": sound(seed=3), "path": "inline.flac"},
            {"bytes": None, "path": str(tmp_path / "photos" / "a.png")},
            None,
        ],
    )
    (tmp_path / "clips" / "b.png").write_bytes(picture(seed=9))
    return open_table(tmp_path / "photos" / "photos.csv"), tmp_path / "clips" / "clips.parquet"


def test_media_stay_readable_and_no_path_leaves_its_own_tables_folder(tmp_path: Path) -> None:
    table, _ = joined(*two_folders(tmp_path), key="id")
    photos, clips = cells(table, "photo"), cells(table, "clip")

    assert media_bytes(photos[0], table.folder) == picture(seed=1)
    assert media_bytes(clips[0], table.folder) == sound(seed=1)
    assert media_bytes(clips[1], table.folder) == sound(seed=3)
    assert clips[3] is None
    for cell in (photos[2], photos[3], clips[2]):
        with pytest.raises(BadValue):
            media_bytes(cell, table.folder)
    roles = infer_roles(table, target="id", named={})
    assert (roles["photo"].role, roles["clip"].role) == ("image", "audio")


def test_what_is_written_holds_its_media_and_its_report(tmp_path: Path) -> None:
    base, other = two_folders(tmp_path)

    report = write_joined(base.path, [JoinConfig(table=str(other), key="id")], tmp_path / "out" / "all.parquet")

    written = pq.read_table(tmp_path / "out" / "all.parquet").to_pylist()
    assert [row["photo"]["bytes"] for row in written] == [picture(seed=1), picture(seed=2), b"", b""]
    assert [row["clip"] and row["clip"]["bytes"] for row in written] == [sound(seed=1), sound(seed=3), b"", None]
    assert report["unreadable"]["photo"]["count"] == 2
    assert "'../clips/b.png' leads out of its table's folder" in report["unreadable"]["photo"]["first"]
    assert (tmp_path / "out" / "all.parquet.join.json").exists()
    with pytest.raises(DataError, match=r"all\.parquet exists already"):
        write_joined(base.path, [JoinConfig(table=str(other), key="id")], tmp_path / "out" / "all.parquet")
    with pytest.raises(DataError, match=r"name a file that ends in \.parquet"):
        write_joined(base.path, [JoinConfig(table=str(other), key="id")], tmp_path / "all.csv")


def test_a_table_joined_from_two_keeps_both(tmp_path: Path) -> None:
    base = rows(id=[1, 2, 3], label=["a", "b", "a"])
    joins = [
        JoinConfig(
            table=str(parquet(tmp_path / f"{name}.parquet", id=[3, 2, 1], value=[name * n for n in (3, 2, 1)])),
            key="id",
            prefix=f"{name}_",
        )
        for name in ("x", "y")
    ]

    table, reports = join_table(base, joins)

    assert table.schema.names == ["id", "label", "x_value", "y_value"]
    assert cells(table, "y_value") == ["y", "yy", "yyy"]
    assert [report.num_matched for report in reports] == [3, 3]
    assert table.schema.field("x_value").type == pa.string()


def test_a_column_named_as_media_stays_in_its_folder_though_it_does_not_look_like_paths(tmp_path: Path) -> None:
    base = open_table(parquet(tmp_path / "records" / "base.parquet", id=[1, 2]))
    (tmp_path / "records" / "secret").write_bytes(b"not for others")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "one").write_bytes(b"a scan")
    other = parquet(tmp_path / "scans" / "other.parquet", id=[1, 2], scan=["one", "../records/secret"])
    joins = [parse(JoinConfig, {"table": str(other), "key": "id", "prefix": "s_"}, where="join")]

    table, _ = join_table(base, joins, ["s_scan"])

    inside, outside = cells(table, "s_scan")
    assert media_bytes(inside, table.folder) == b"a scan"
    with pytest.raises(BadValue, match="is an empty file"):
        media_bytes(outside, table.folder)


def test_of_equal_times_the_first_row_is_taken_and_the_others_are_counted(tmp_path: Path) -> None:
    base = open_table(parquet(tmp_path / "base.parquet", t=[0.9, 1.0, 1.2, 5.0]))
    other = parquet(tmp_path / "other.parquet", t=[1.0, 1.0, 1.0, 5.0], z=[10, 20, 30, 40])

    table, report = joined(base, other, time="t", tolerance=0.5)

    assert cells(table, "z") == [10, 10, 10, 40]
    assert report.num_duplicate_keys == 2


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.array([2**63 + 1, 5], pa.uint64()), pa.array([5, 2**63 + 1], pa.uint64())),
        (pa.array([b"\xff\xfe", b"b"]), pa.array([b"b", b"\xff\xfe"])),
        (pa.array([1, 2], pa.int8()), pa.array([2, 1], pa.uint64())),
    ],
)
def test_keys_of_any_kind_find_each_other(tmp_path: Path, left: pa.Array, right: pa.Array) -> None:
    base = open_table(parquet(tmp_path / "base.parquet", id=left))
    table, report = joined(base, parquet(tmp_path / "other.parquet", id=right, z=[10, 20]), key="id")
    assert cells(table, "z") == [20, 10]
    assert report.num_matched == 2


def test_keys_below_and_far_above_nothing_cannot_be_compared(tmp_path: Path) -> None:
    base = open_table(parquet(tmp_path / "base.parquet", id=pa.array([-1, 5])))
    other = parquet(tmp_path / "other.parquet", id=pa.array([5, 2**63 + 1], pa.uint64()), z=[10, 20])
    with pytest.raises(DataError, match=r"below 0 on one side and above 2\*\*63 on the other"):
        joined(base, other, key="id")


def test_moments_of_any_year_are_compared_to_the_nanosecond(tmp_path: Path) -> None:
    far = pa.array([datetime.datetime(9999, 12, 31), datetime.datetime(1, 1, 1), None], pa.timestamp("us"))
    base = open_table(parquet(tmp_path / "base.parquet", t=far))
    other = parquet(
        tmp_path / "other.parquet", t=pa.array([far[1].as_py(), far[0].as_py()], pa.timestamp("us")), z=[1, 2]
    )
    table, report = joined(base, other, time="t", tolerance=1.0)
    assert cells(table, "z") == [2, 1, None]
    assert report.num_without_key == 1

    near = pa.array([1_700_000_000_000_000_000, 1_700_000_000_000_000_400], pa.timestamp("ns"))
    base = open_table(parquet(tmp_path / "near.parquet", t=near.slice(1)))
    table, report = joined(base, parquet(tmp_path / "many.parquet", t=near, z=[1, 2]), time="t", tolerance=1e-7)
    assert cells(table, "z") == [2]
    assert report.skew_p95 == 0


def test_a_path_column_of_repeated_words_is_spelt_from_the_shared_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "one.png").write_bytes(picture(seed=1))
    (tmp_path / "a" / "secret.png").write_bytes(picture(seed=2))
    base = open_table(parquet(tmp_path / "a" / "base.parquet", id=[1, 2]))
    names = pa.array(["one.png", "a/secret.png"]).dictionary_encode()
    other = parquet(tmp_path / "b" / "other.parquet", id=[1, 2], photo=names)

    table, _ = joined(base, other, key="id")
    first, second = cells(table, "photo")

    assert media_bytes(first, table.folder) == picture(seed=1)
    with pytest.raises(BadValue):
        media_bytes(second, table.folder)


def test_a_joined_table_is_written_by_parts_of_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [picture(seed=seed) for seed in range(6)]
    for place, content in enumerate(contents):
        (tmp_path / f"{place}.png").write_bytes(content)
    parquet(tmp_path / "base.parquet", id=list(range(7)))
    names = [*(f"{place}.png" for place in range(6)), "gone.png"]
    parquet(tmp_path / "other.parquet", id=list(range(7)), photo=names)
    monkeypatch.setattr(join_module, "EMBEDDED_BYTES", 2 * max(map(len, contents)))

    join = parse(JoinConfig, {"table": str(tmp_path / "other.parquet"), "key": "id"}, where="join")
    write_joined(tmp_path / "base.parquet", [join], tmp_path / "out.parquet")

    written = pq.ParquetFile(tmp_path / "out.parquet")
    assert written.num_row_groups >= 3
    found = [cell["bytes"] for cell in written.read().column("photo").to_pylist()]
    assert found == [*contents, b""]
